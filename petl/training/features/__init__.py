"""What a run does besides training: a `RunFeature` each, imported when a run has it.

`FEATURES` has the class of each by the setting that asks for it, with any value but null or false,
or with the one value that stands behind it. One under `scores` is asked for by an entry of
scores.json, and has a section alone.
A method and an extra loss bring features of their own (`petl.core.method.Method.features`,
`petl.core.losses.Loss.features`), which come first. A package adds an entry in a module of
`imports`. A feature with `Settings` has a group of settings
with its name, such as `ranks`, or with that of the setting that asks for it, such as `retain.data`.
A run asks its features in this order, for each of their hooks.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, ClassVar

from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel

from petl.core.support import Capability, Lacks, Part
from petl.core.types import Batch, Chart, Fields, Groups, Record
from petl.errors import InputError
from petl.system.imports.tables import LOSSES, METHODS
from petl.system.values import check_rules, read_fields
from petl.training.distributed.launch import on_device
from petl.training.features.section import Section
from petl.training.runs.config import method_fields
from petl.training.runs.settings import TrainConfig

if TYPE_CHECKING:
    from petl.training.dataloader import Splits, TrainingRows
    from petl.training.evaluate import Evaluator, KnownScores
    from petl.training.feature_cache import FeatureCache
    from petl.training.runs.config import RunConfig
    from petl.training.runs.run_folder import Run

SCORES = "scores"  # what the entries of scores.json are, in FEATURES
FEATURES = {
    "task": "petl.training.features.objective:LearnFromPreferences",
    "data.source": "petl.training.features.before:TrainingRowsInTest",
    "data.task=retrieval": "petl.training.features.rankings:RankingSection",
    "data.bad_rows": "petl.training.features.skipped_rows:SkippedRows",
    "model.adapter": "petl.training.features.before:AdapterBelow",
    "data.new_tokens": "petl.training.features.new_tokens:NewTokens",
    "train.init_from": "petl.training.features.init_from:InitFrom",
    "data.order": "petl.training.features.class_stream:ClassOrder",
    "data.sampling": "petl.training.features.sampling:RowSampling",
    "train.class_weights": "petl.training.features.class_weights:ClassWeights",
    "train.budget": "petl.training.budget:ParameterBudget",
    "ranks": "petl.training.ranks.run:RanksByImportance",
    "tokens": "petl.training.features.tokens:DroppedTokens",
    "train.cache_frozen": "petl.training.frozen:FrozenStore",
    "train.linear_probe": "petl.training.linear_probe:LinearProbe",
    "train.score_before": "petl.training.features.before:ScoreBefore",
    "train.find_lr": "petl.training.lr_finder:LrFinder",
    "scores.strengths": "petl.training.features.strengths:StrengthSection",
    "retain": "petl.training.retain.run:Retaining",
}


@dataclass
class Setup:
    """What is known before the model is wrapped: in a run, a plan, or a search of batch sizes.

    Attributes:
        load: loads a base model, as `petl.data.models.loading.load_base`.
        features: of the run, in their order.
        accelerator: None in a plan, which reads neither weights nor calibration data.
        run: None in a plan and in a search of batch sizes.
        calibration: batches that a feature has chosen for the initial values of the adapter.
        notes: sentences for the reader of a plan.
        when_wrapped: functions of the wrapped model, called before anything is on disk.
    """

    load: Callable[..., PreTrainedModel]
    config: "RunConfig"
    splits: "Splits"
    features: "Sequence[RunFeature]"
    accelerator: Accelerator | None = None
    run: "Run | None" = None
    calibration: Iterable[Batch] | None = None
    notes: list[str] = field(default_factory=list)
    when_wrapped: list[Callable[[PeftModel], None]] = field(default_factory=list)

    @cached_property
    def base(self) -> PreTrainedModel:
        """The base model on the device of the run, loaded when it is read first."""
        assert self.accelerator is not None, "a plan has no weights"
        task, processor = self.splits.task, self.splits.processor
        return on_device(self.load(self.config.model, task, processor=processor), self.accelerator)

    def fields(self) -> Fields:
        """Return the method's name and fields in this run, as its features complete them.

        Raises:
            InputError: as `method_fields`, or as a feature.
        """
        config, splits = self.config, self.splits
        steps = splits.sampler(config.train).steps
        # fields are checked here for the first time with task type and number of steps
        fields = method_fields(config.method, splits.task.peft_task_type, steps)
        for feature in self.features:
            fields = feature.before_wrapping(self, fields)
        return fields

    def shapes(self) -> PreTrainedModel:
        """Return the base model on the meta device."""
        task, processor = self.splits.task, self.splits.processor
        return self.load(self.config.model, task, meta=True, processor=processor)


@dataclass
class Context:
    """A run with its rows and its model.

    Attributes:
        model: with the adapter.
        features: of the run, in their order.
        settings: those under `train`, with the learning rates of a range test.
        known: of `Evaluator.test`: returns scores before training that another pass
            has computed, or None.
    """

    run: "Run"
    splits: "Splits"
    model: PeftModel
    features: "Sequence[RunFeature]"
    settings: TrainConfig
    known: "KnownScores | None" = None

    @property
    def accelerator(self) -> Accelerator:
        """That of the run."""
        return self.run.accelerator

    @property
    def evaluator(self) -> "Evaluator":
        """What scores the model as it is."""
        from petl.training.evaluate import Evaluator  # imported when something is scored

        size = self.settings.eval_batch_size
        return Evaluator(self.model, self.splits, self.accelerator, size)

    def evaluate(self, rows: Dataset, what: str) -> dict[str, float]:
        """Return the task's scores over encoded rows.

        Args:
            what: the pass does, for the display of its progress.
        """
        return self.evaluator.rows(rows, what=what)

    def test(
        self,
        when: str,
        kept: Path | None,
        known: "KnownScores | None" = None,
        store: "FeatureCache | None" = None,
    ) -> dict[str, float] | None:
        """Return the scores on the test rows; None with `train.test=false`."""
        self.run.timer.start()
        scores = None
        if self.settings.test:
            scores = self.evaluator.test(when=when, kept=kept, known=known, store=store)
        self.run.timer.mark("evaluation")
        return scores

    def add(self, scores: Mapping[str, object], phase: str) -> None:
        """Add entries to scores.json, and the time since the last phase to that of `phase`."""
        self.run.scores.add(dict(scores))
        self.run.timer.mark(phase)

    def log(self, line: Mapping[str, object]) -> None:
        """Append a line with its `step` to metrics.jsonl and to the tracker."""
        self.run.log.append(dict(line))


class RunFeature:
    """What a run does besides training; one instance a run, each hook optional.

    Attributes:
        key: its entry in scores.json.
        Settings: a dataclass of `setting` fields, for a feature that is a group of settings.
        uses, lacks: its capability and its rows in the table of petl/core/support.py.
        charts: of metrics of its own in the log.
        setting: the name of the setting that asks for it.
        settings: the value of its setting: of `Settings`, or as YAML has it; None if a method
            or loss brings it.
        groups: all settings of the run.
    """

    key: ClassVar[str] = ""
    Settings: ClassVar[type | None] = None
    uses: ClassVar[tuple[Capability, ...]] = ()
    lacks: ClassVar[Lacks] = {}
    charts: ClassVar[tuple[Chart, ...]] = ()
    setting: str = ""

    def __init__(self, settings: Any, groups: Groups) -> None:
        self.settings, self.groups = settings, groups

    @property
    def part(self) -> Part:
        """The feature as a part of what is chosen for a run."""
        value = self.setting if self.Settings else f"{self.setting}={self.settings}"
        return Part(value, self.uses, self.lacks, self)

    def settle(self, settings: Groups) -> Groups:
        """Return the settings of the run with those that this feature fills in."""
        return settings

    def check(self, config: "RunConfig") -> None:
        """Raise InputError for settings that are wrong together; nothing is loaded yet."""

    def order(self, rows: "TrainingRows") -> "TrainingRows":
        """Return the training rows with those, or the order, that this feature chooses."""
        return rows

    def before_wrapping(self, setup: Setup, fields: Fields) -> Fields:
        """Return the method's fields with those that this feature chooses."""
        return fields

    def before_training(self, context: Context) -> None:
        """Measure or change the wrapped model; a resumed run finds earlier scores in the run."""

    def at_evaluation(self, context: Context, step: int) -> float:
        """Measure at an evaluation on validation rows; return by how much a limit is exceeded.

        0.0 within it, and without one. The best checkpoint is the best of those that exceed it
        least. All processes call it.
        """
        return 0.0

    def after_step(self, context: Context, step: int) -> None:
        """Do what is due after an optimizer step, counted from 1; all processes call it."""

    def after_training(self, context: Context, step: int) -> Mapping[str, object]:
        """Return entries of scores.json after the last step; the adapter is saved."""
        return {}

    @classmethod
    def section(cls, folder: Path, scores: Record) -> Section | None:
        """Return its part of the page of a run, finished or not.

        Args:
            folder: of the run.
            scores: of scores.json, empty without the file.

        Raises:
            InputError: a file of the folder is damaged.
        """
        return None


def features_of(settings: Groups) -> list[RunFeature]:
    """Return the features of a run with these settings.

    Raises:
        InputError: a wrong setting in the group of a feature.
    """
    features = []
    for kind, name, value in _wanted(settings):
        # a class with Settings takes its whole group
        value = value if kind.Settings is None else settings[name.partition(".")[0]]
        feature = kind(_read(kind, name.partition(".")[0], value), settings)
        feature.setting = name
        features.append(feature)
    return features


def orders_of(features: Sequence[RunFeature]) -> list[Callable[["TrainingRows"], "TrainingRows"]]:
    """Return what chooses the training rows of a run, for `encode_splits`."""
    return [feature.order for feature in features]


def sections_of(folder: Path, settings: Groups, scores: Record) -> list[Section]:
    """Return the parts of a run's page that its features have, from the files of its folder."""
    sections = (kind.section(folder, scores) for kind, *_ in _wanted({**settings, SCORES: scores}))
    return [section for section in sections if section is not None]


def charts_of(settings: Groups) -> list[Chart]:
    """Return the charts that method, loss and features of a run have of their metrics."""
    parts = [entry for key in ("name", "inner") for _, entry in _entries(settings, key)]
    parts += (kind for kind, *_ in _wanted(settings))
    return [chart for part in parts for chart in part.charts]


def _entries(settings: Groups, key: str = "name") -> Iterator[tuple[str, Any]]:
    """Yield the groups of method and loss, each with the registry's entry that `key` names."""
    for group, table in (("method", METHODS), ("loss", LOSSES)):
        chosen = settings.get(group)
        # a saved run may be of a package that is not installed
        entry = table.get(str(chosen.get(key))) if isinstance(chosen, Mapping) else None
        if entry:
            yield group, entry


def _wanted(settings: Groups) -> Iterator[tuple[type[RunFeature], str, Any]]:
    """Yield class, setting and its value of each feature of a run."""
    for group, entry in _entries(settings):
        for place in entry.features:
            yield resolve_name(place), group, None
    for asked, place in FEATURES.items():
        name, _, only = asked.partition("=")
        group, _, key = name.partition(".")
        value = settings.get(group)
        value = value.get(key) if key and isinstance(value, Mapping) else value
        if value is not None and value is not False and (not only or value == only):
            yield resolve_name(place), name, value


def _read(kind: type[RunFeature], name: str, value: object) -> Any:
    if kind.Settings is None:
        return value
    if not isinstance(value, Mapping):
        raise InputError(f"{name}={value!r} is not a group of settings: set {name}.SETTING=VALUE")
    settings = read_fields(kind.Settings, value, name)
    check_rules(settings, name)
    return settings
