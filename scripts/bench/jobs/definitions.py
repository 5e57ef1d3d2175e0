"""The jobs, the variants that each of them is done by, and the settings of the section.

Imports nothing heavy: other sections of the benchmark load this module too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from petl.errors import InputError

RANK = 8  # of LoRA in all blocks; in fewer blocks it is larger, at equal parameters
PLAIN, GROUPED = "Trainer", "Trainer, by length"  # what the others are relative to
SFT = "SFTTrainer, by length"
AFTER = ("train.score_before=false", "train.linear_probe=false")  # as in Trainer's script


@dataclass(frozen=True)
class Variant:
    """A way to do a job.

    Attributes:
        words: of `petl train`; empty for Trainer.
        grouped, bf16, sft: of Trainer: batches by length, mixed precision, TRL's SFTTrainer.
        arm: variants with one arm have the same learning rates.
        store: "fills": begins without stored states; "reads": these, and the features of the linear
            probe, are stored; "": the features are not.
        tunes: True for the variant whose runs choose the rates of its arm.
    """

    name: str
    arm: str
    words: tuple[str, ...] = ()
    grouped: bool = False
    bf16: bool = False
    sft: bool = False
    store: str = ""
    tunes: bool = False

    @property
    def is_petl(self) -> bool:
        """True if `petl train` does it."""
        return self.arm != "Trainer"


@dataclass(frozen=True)
class Job:
    """A model, data and a length of training.

    Attributes:
        words: of `petl train`: data, epochs, batch size.
        quick: words after these, for a run in seconds.
        blocks: of the model.
        upper: blocks that the fast variant adapts, about a third.
        bf16: True where its products are large enough to gain from bfloat16; `petl, fast` uses it.
        by_length: True if rows have different lengths.
        has_head: True if a new head trains, at a rate of its own.
        trainer: the module of the runs that are not petl's.
        points: evaluations of a run that holds rows out.
    """

    name: str
    title: str
    words: tuple[str, ...]
    quick: tuple[str, ...]
    blocks: int
    upper: int
    bf16: bool = False
    by_length: bool = True
    has_head: bool = True
    trainer: str = "trainer_job"
    points: int = 8

    @property
    def variants(self) -> list[Variant]:
        """The variants, in the order of their turns."""
        return [*self._of_trainer(), *self._of_petl()]

    def _of_trainer(self) -> list[Variant]:
        arm, grouped = "Trainer", self.by_length
        found = [Variant(PLAIN, arm, tunes=not grouped)]
        if grouped:
            found.append(Variant(GROUPED, arm, grouped=True, tunes=True))
        found.append(Variant(f"{found[-1].name}, bf16", arm, grouped=grouped, bf16=True))
        if self.name == "decoder" and find_spec("trl") is not None:
            found.append(Variant(SFT, arm, grouped=True, sft=True))
        return found

    def _of_petl(self) -> list[Variant]:
        precision, full = ("train.precision=auto",), ("train.precision=no",)
        rank = RANK * self.blocks // self.upper
        fast = (
            *(precision if self.bf16 else full),
            f"method.layers_to_transform=top:{self.upper}",
            f"method.r={rank}",
            f"method.lora_alpha={2 * rank}",  # the scale of all blocks
            "train.cache_frozen=true",
        )
        arm, upper = "petl", "petl, upper blocks"
        found = []
        if self.by_length:
            found.append(Variant("petl, no buckets", arm, ("train.buckets=null", *full)))
        return [
            *found,
            Variant("petl", arm, full, tunes=True),
            *([Variant("petl, again", arm, full, store="reads")] if self.has_head else []),
            Variant("petl, bf16", arm, precision),
            Variant("petl, scored after alone", arm, (*AFTER, *full)),
            Variant("petl, fast, fills the store", upper, fast, store="fills"),
            Variant("petl, fast, reads the store", upper, fast, store="reads", tunes=True),
        ]


JOBS = {
    job.name: job
    for job in (
        Job(
            "quickstart",
            "MiniLM on WordNet verbs",
            ("data=wordnet", "model=minilm"),
            ("data.train_rows=80", "data.test_rows=16", "train.epochs=1"),
            blocks=6,
            upper=2,
            bf16=True,
        ),
        Job(
            "decoder",
            "SmolLM2-135M on reasoning chats",
            # reduced: an epoch of all 2,000 rows takes twenty minutes of a core
            (
                "data=reasoning",
                "data.train_rows=200",
                "data.test_rows=50",
                "train.batch_size=8",
                "train.epochs=2",
            ),
            ("data.train_rows=16", "data.test_rows=4", "train.epochs=1"),
            blocks=30,
            upper=10,
            bf16=True,
            has_head=False,
        ),
        Job(
            "vit",
            "a small ViT on digits",
            ("data=digits", "train.epochs=10", "method.modules_to_save=[classifier]"),
            ("data.train_rows=64", "data.test_rows=16", "train.epochs=1"),
            blocks=4,
            upper=1,
            by_length=False,
        ),
        Job(
            "embedder",
            "MiniLM on examples of WordNet verbs",
            (
                "data=wordnet_retrieval",
                "model=minilm",
                "train.epochs=1",
                "train.batch_size=64",
            ),
            ("data.train_rows=128", "data.test_rows=32"),
            blocks=6,
            upper=2,
            bf16=True,
            has_head=False,
            trainer="sentence_job",
            points=2,  # the corpus takes a quarter of the time of an epoch
        ),
    )
}

# of ratios of medians, by job and variant
GOALS: dict[tuple[str, str], dict[str, float]] = {
    ("quickstart", "petl"): {
        f"training / {PLAIN}": 0.40,
        f"training / {GROUPED}": 0.80,
        f"job / {PLAIN}": 0.47,
        f"job / {GROUPED}": 0.93,
    },
    # by default, which is bf16 where that is faster
    ("quickstart", "petl, bf16"): {f"job / {GROUPED}": 0.80},
    ("embedder", "petl, bf16"): {f"job / {GROUPED}": 0.75},
    ("quickstart", "petl, fast, fills the store"): {
        f"job / {PLAIN}": 0.22,
        f"job / {GROUPED}": 0.43,
    },
    ("quickstart", "petl, fast, reads the store"): {
        f"job / {PLAIN}": 0.13,
        f"job / {GROUPED}": 0.27,
    },
}


@dataclass(frozen=True)
class Settings:
    """What the section measures.

    Attributes:
        folder: of all results.
        names: of jobs.
        variants: names of variants; empty: all.
        seeds: of the timed runs.
        rates, head_rates: the grid, from which `tunes` chooses for each arm.
        tunes: choose rates before the timed runs, and draw curves.
        quick: few rows, for tests.
        report: measure nothing; use the runs that are finished.
    """

    folder: Path = Path("runs/jobs")
    names: Sequence[str] = tuple(JOBS)
    variants: Sequence[str] = ()
    seeds: Sequence[int] = (0,)
    rates: Sequence[float] = (1e-3, 3e-3)
    head_rates: Sequence[float] = (3e-3, 1e-2)
    tunes: bool = False
    quick: bool = False
    report: bool = False


def jobs(names: Sequence[str]) -> list[Job]:
    """Return the jobs of these names.

    Raises:
        InputError: there is no such job.
    """
    unknown = [name for name in names if name not in JOBS]
    if unknown:
        raise InputError(f"no job {unknown[0]!r}; jobs: {', '.join(JOBS)}")
    return [JOBS[name] for name in names]


def model_words(job: Job, folder: Path) -> list[str]:
    """Return the words of `petl train` that select the model, which is prepared once.

    Raises:
        InputError: a package is missing.
    """
    if job.name == "decoder":
        from petl.data.models import smollm2

        return ["model=path", f"model.path='{smollm2.folder()}'"]
    if job.name == "vit":
        # imports nothing that is not loaded already, but is a script
        from pretrain_digits import pretrain

        path = folder.absolute() / "models" / "vit"
        pretrain(path, epochs=30)
        return ["model=path", f"model.path='{path}'"]
    return []
