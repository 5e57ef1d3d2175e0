"""What a run loses on other texts (`retain`): measured after training, as a curve, and limited.

Nothing here changes training, but for `retain.mix` and `retain.limit`: it draws no random number,
and adds no row to a batch.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from datasets import Dataset
from peft import TaskType

from petl.core.parameters import positions_in
from petl.core.registry import build_config
from petl.core.support import Capability
from petl.core.types import Batch, Fields, Record
from petl.core.types import Processor as AnyProcessor
from petl.data.base import as_dataset, read_data
from petl.data.models.sources import read_source
from petl.data.overlap import TrainingInputs
from petl.errors import InputError
from petl.system.collectives import on_main
from petl.training.dataloader import Splits, TrainingRows, batched
from petl.training.features import Context, RunFeature, Setup
from petl.training.features.section import Section
from petl.training.frozen import FrozenStore
from petl.training.retain.rows import (
    ALONE,
    AT_START,
    CURVE,
    KEY,
    Processes,
    RetainedRow,
    by_length,
    has_base,
    longest_for,
)
from petl.training.retain.settings import RetainConfig
from petl.training.retain.texts import BUNDLED, halves, require_texts, texts_of
from petl.training.runs.config import RunConfig
from petl.training.runs.settings import TrainConfig
from petl.training.wrapping import train_new_modules

if TYPE_CHECKING:
    from petl.training.retain import drift
    from petl.training.retain.measure import Retained

WRITES = (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM)
SHARE = 0.03  # of a run's cost, unless the number of texts is set
# of a trained token, that a measured one costs: two forward passes, and for a language model the
# comparison of all logits (measured: 1.5 with a vocabulary that is large for the model)
COST = {"language": 2.0, "features": 1.0}
MOST, FEWEST, SHORTEST = 256, 32, 64  # texts, and tokens of a text
TEXTS = "texts of {} tokens"  # what is measured, in words
SAMPLE = 1000  # rows whose lengths are looked at
# change of the first row up to which a start is the base but for rounding, by whether that is of
# float32: a base that the method has changed is rounded in other places than its own
ROUNDING = {True: 1e-5, False: 2e-2}
DATA, MIX_DATA = "retain.data", "retain.mix_data"
BATCH_SIZE = 8
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OtherRows:
    """Encoded rows of images or sounds, as settings of `data` name them.

    Attributes:
        names: of the rows.
        collate: makes a batch of the rows at some numbers.
        lengths: of the rows.
    """

    names: Sequence[str]
    collate: Callable[[Sequence[int]], Batch]
    lengths: Sequence[int]

    @classmethod
    def of(cls, value: object, splits: Splits, most: int) -> "OtherRows":
        """Read at most so many rows of other data.

        Raises:
            InputError: the value is no group of settings, or they are data of another kind.
        """
        if not isinstance(value, Mapping):
            raise InputError(
                f"retain.data={value} are texts, and data.task={splits.task.name} reads none: "
                "choose other data by +data@retain.data=NAME, or set retain.data=null"
            )
        data = read_data(cast("Mapping[str, Any]", value))
        task, processor = data.task, splits.processor
        if task.reads_text or type(task) is not type(splits.task):
            raise InputError(
                f"retain.data: data.task={task.name} is not that of the run, {splits.task.name}"
            )
        raw = as_dataset(data, most)
        # a stream gives no more than that anyway
        raw = raw.select(range(min(most, len(raw))))
        rows = task.encode(processor, raw)
        inputs, together = rows.select_columns(batched(rows)), task.collate(processor, 1)
        labels = task.label_columns

        def collate(numbers: Sequence[int]) -> Batch:
            # the labels of other data mean nothing here
            batch = together(list(inputs.select(numbers)))
            return {name: tensor for name, tensor in batch.items() if name not in labels}

        paths = raw["path"] if "path" in raw.column_names else range(len(raw))
        names = [str(each) for each in paths]
        return cls(names, collate, task.lengths(rows))

    def batches(self, processes: Processes) -> list[tuple[list[int], Callable[[], Batch]]]:
        """Return the numbers of the rows of each batch, and what makes it."""
        parts = by_length(self.lengths, BATCH_SIZE, processes)
        return [(numbers, partial(self.collate, numbers)) for numbers in parts]


class Retaining(RunFeature):
    """Measures what a model loses on retained texts, limits it, and replays some of them."""

    key, at_start = KEY, AT_START
    charts = tuple((name, "", "") for name in CURVE.values())  # its section has them
    Settings = RetainConfig
    settings: RetainConfig
    kind = "language"
    lacks = {
        Capability.BUCKETS: lambda own: own.reason("the texts of retain.mix are of any length"),
        Capability.TASKS: lambda own: own.reason("the texts of retain.mix are of no task"),
    }
    rows: Sequence[RetainedRow] = ()  # none: not measured
    other: OtherRows | None = None  # of models that read no text
    before: Any = None  # losses or features of the base, once they are known
    note = ""  # why there are none

    def reason(self, reason: str) -> str:
        """Return why something is lacking; "" without retain.mix."""
        return reason if self.settings.mix else ""

    def check(self, config: RunConfig) -> None:
        """Raise InputError for texts that are not there, or settings that are wrong together."""
        own, steps = self.settings, config.train.eval_steps
        for name in ("curve", "limit"):
            value = getattr(own, name)
            if value not in (False, None) and not steps:
                raise InputError(
                    f"retain.{name}={value} measures at each evaluation, and train.eval_steps is "
                    f"null: set train.eval_steps, or leave retain.{name} out"
                )
            if value not in (False, None) and own.data is None:
                raise InputError(
                    f"retain.{name}={value} measures texts, and retain.data is null: set it, or "
                    f"leave retain.{name} out"
                )
        # raises for a limit that is none
        own.most("language")
        if own.mix_data is not None and not own.mix:
            raise InputError(
                f"retain.mix_data={own.mix_data} are texts for retain.mix, which is {own.mix:g}: "
                "set the share of each batch"
            )
        if own.mix and own.mix_data is None and own.data is None:
            raise InputError(
                f"retain.mix={own.mix:g} replays texts, and retain.data is null: set it, or "
                "retain.mix_data"
            )
        if own.mix:
            from petl.training.retain.replay import replayed_rows  # of runs that replay texts

            replayed_rows(config.train.batch_size, own.mix)
        require_texts(own.data, DATA)
        require_texts(own.mix_data, MIX_DATA)

    # Replay

    def order(self, rows: TrainingRows) -> TrainingRows:
        """Put texts among the training rows."""
        own = self.settings
        if not own.mix:
            return rows
        from petl.training.retain.measure import encode_texts
        from petl.training.retain.replay import require_text_task, with_texts  # as in `check`

        require_text_task(rows.task, own.mix)
        if rows.order is not None:
            raise InputError(
                f"retain.mix={own.mix:g} chooses the rows of each batch, as data.order does: leave "
                "one of them out"
            )
        longest = self._longest(rows.processor)
        if own.mix_data is None:
            _, texts = halves(texts_of(own.data, DATA, own.max_length))
        else:
            measured = TrainingInputs(self._measured()) if own.data is not None else ()
            texts = texts_of(own.mix_data, MIX_DATA, own.max_length)
            texts = [text for text in texts if text not in measured]
        # such as a file of one text, which is measured
        if not texts:
            raise InputError(
                f"retain.mix={own.mix:g} has no text that is not measured: give more, or other "
                "ones, in retain.mix_data"
            )
        return with_texts(rows, encode_texts(texts, rows.processor, longest), own.mix)

    def _longest(self, processor: AnyProcessor) -> int:
        """Return how many tokens of a text are read: no more than the model has positions."""
        positions = positions_in(read_source(self.groups["model"]).config())
        return longest_for(processor, self.settings.max_length, positions)

    def _measured(self) -> list[str]:
        """Return the texts that may be measured."""
        own = self.settings
        texts = texts_of(own.data, DATA, own.max_length)
        return halves(texts)[0] if own.mix and own.mix_data is None else texts

    # The rows

    def before_wrapping(self, setup: Setup, fields: Fields) -> Fields:
        """Choose what is measured; measure a base that the method will change."""
        own, splits = self.settings, setup.splits
        # there are no bundled images or sounds
        if own.data is None or (own.data == BUNDLED and not splits.task.reads_text):
            if own.data is not None and own.measures_curve:
                raise InputError(
                    f"retain.limit={own.limit} retain.curve={str(own.curve).lower()} measure other "
                    f"rows, and petl has none for {splits.task.name}: give retain.data"
                )
            return fields
        self.kind = "language" if splits.task.peft_task_type in WRITES else "features"
        if splits.task.reads_text:
            self.note = self._choose(splits, setup.config.train)
        else:
            self.note = self._choose_other(splits, setup.config.train)
        if self.note and setup.run is None:
            setup.notes.append(self.note)
        config = build_config(**fields)
        if setup.run is not None and self.is_measured and not has_base(config):
            assert setup.accelerator is not None
            with setup.accelerator.autocast():
                trained = train_new_modules(fields, setup.base).get("modules_to_save")
                self.before = self._of_model(
                    setup.base, splits, trained=trained or (), is_base=True
                )
        return fields

    def before_training(self, context: Context) -> None:
        """Say why nothing is measured; measure a start that is not the base's."""
        if self.note:
            logger.info(self.note)
        if not self.is_measured:
            return
        # a run that is resumed is no longer at its start, and has the number if there was one
        if context.run.resume is not None:
            if self.at_start in context.run.scores:
                self._share()
            return
        context.run.timer.start()
        first = copy(self)
        first._keep(1)
        config = context.model.active_peft_config
        rounding = ROUNDING[has_base(config) or context.accelerator.mixed_precision == "no"]
        # most methods start as the base: one row shows it
        if abs(first.measure(context).change) > rounding and self._share():
            context.run.scores.add({self.at_start: self.measure(context).change})
        context.run.timer.mark(self.key)

    def _share(self) -> bool:
        """Measure half of the rows, where 3 % of the run pay for the start too; False: too few."""
        own, count = self.settings, len(self.other.names if self.other else self.rows)
        if own.rows is not None or own.measures_curve:
            return True
        if count < 2 * FEWEST:
            logger.info(
                "the model does not start as its base; what it has lost before the first step is "
                "not measured: %.0f%% of the run's cost pay for %d rows; retain.rows=N measures "
                "N whatever they cost",
                100 * SHARE,
                count,
            )
            return False
        self._keep(count // 2)
        return True

    def _keep(self, count: int) -> None:
        """Measure the first rows only."""
        self.rows = self.rows[:count]
        self.before = None if self.before is None else self.before[:count]
        if self.other is not None:
            names, lengths = self.other.names[:count], self.other.lengths[:count]
            self.other = replace(self.other, names=names, lengths=lengths)

    @property
    def is_measured(self) -> bool:
        """True if there are rows to measure."""
        return bool(self.rows) or self.other is not None

    def _choose(self, splits: Splits, train: TrainConfig) -> str:
        """Choose the texts that are measured; return what to say of their number."""
        own, most = self.settings, self.settings.rows
        # what a run depends on is measured whatever it costs
        if most is None and own.measures_curve:
            most = MOST
        affordable = SHARE / COST[self.kind] * trained_tokens(splits, train)
        # the shortest that the bundled texts are cut to: no text need be read to know
        if most is None and own.data == BUNDLED and affordable < FEWEST * SHORTEST:
            return too_few(int(affordable // SHORTEST), TEXTS.format(SHORTEST))
        from petl.training.retain.measure import encode_texts  # as in `_of_model`

        texts = self._measured()
        if splits.inputs is not None:
            kept = [text for text in texts if text not in splits.inputs]
            if len(kept) < len(texts):
                logger.info(
                    "%d retained texts are training rows, and are left out", len(texts) - len(kept)
                )
            texts = kept
        if not texts:
            raise InputError(
                f"retain.data={own.data}: no text is left to measure, since all are training rows "
                "or replayed: give others, or set retain.data=null"
            )
        length = self._longest(splits.processor)
        # no more than may be measured: a file may have millions
        rows = encode_texts(
            texts[: most or MOST], splits.processor, length, special=self.kind == "features"
        )
        # a number that is set by hand is measured whatever it costs
        if most is not None:
            self.rows = rows
            return ""
        while True:
            shorter = [RetainedRow(row.text, row.ids[:length]) for row in rows]
            self.rows = within(shorter, affordable)
            # of fewer texts than say much, all
            if len(self.rows) >= min(FEWEST, len(rows)):
                return ""
            if length <= SHORTEST:
                note = too_few(len(self.rows), TEXTS.format(length))
                self.rows = ()
                return note
            length = max(SHORTEST, length // 2)

    def _choose_other(self, splits: Splits, train: TrainConfig) -> str:
        """Choose the rows that are no texts, as `_choose`."""
        most = self.settings.rows
        if most is None and self.settings.measures_curve:
            most = MOST
        if most is None:
            # rows of images, and about those of sounds, are of one size
            trained = splits.sampler(train).steps * train.batch_size
            most = min(MOST, int(SHARE / COST["features"] * trained))
            if most < FEWEST:
                return too_few(most, "rows")
        self.other = OtherRows.of(self.settings.data, splits, most)
        return ""

    # What is measured

    def _of_model(
        self,
        model: Any,
        splits: Splits,
        processes: Processes = ALONE,
        trained: Any = None,
        is_base: bool = False,
    ) -> Any:
        """Return the losses of each row, or the features, of a model as it is.

        Args:
            trained: names of modules that an adapter will train as a whole.
            is_base: as of `measure.losses_of`.
        """
        from petl.training.retain import drift, measure  # where something is measured

        if self.kind == "language":
            return measure.losses_of(
                model, self.rows, splits.processor, is_base=is_base, processes=processes
            )
        return drift.features_of(model, self._batches(splits, processes), trained)

    def _batches(self, splits: Splits, processes: Processes) -> "drift.BatchedRows":
        from petl.training.retain import drift  # as in `_of_model`

        if self.other is not None:
            return drift.BatchedRows(self.other.names, self.other.batches(processes), processes)
        return drift.of_texts(self.rows, splits.processor, BATCH_SIZE, processes)

    def measure(self, context: Context) -> "Retained | drift.Drift":
        """Return the measure of the model as it is; on every process the same."""
        from petl.training.retain import drift, measure  # as in `_of_model`

        splits, parts = context.splits, processes_of(context)
        before = None if has_base(context.model.active_peft_config) else self.before
        with context.accelerator.autocast():
            if self.kind == "features":
                rows = self._batches(splits, parts)
                return drift.compare(context.model, rows, before=before)
            return measure.compare(
                context.model, self.rows, splits.processor, before=before, processes=parts
            )

    def _change(self, context: Context) -> float:
        """Return what the model has lost so far, from one pass: the base's is computed once."""
        from petl.training.retain import drift, measure  # as in `_of_model`

        splits, parts, model = context.splits, processes_of(context), context.model
        with context.accelerator.autocast():
            # of a base that stays, once for all points
            if self.before is None:
                with model.disable_adapter():
                    self.before = self._of_model(model, splits, parts, is_base=True)
            if self.kind == "features":
                return drift.compare(model, self._batches(splits, parts), before=self.before).change
            after = self._of_model(model, splits, parts)
        return measure.lost_by(self.rows, self.before, after, model)

    def at_evaluation(self, context: Context, step: int) -> float:
        """Add a point to the curve; return by how much it is above the limit."""
        if not self.settings.measures_curve or not self.is_measured:
            return 0.0
        # its time is no part of that of training
        context.run.timer.start()
        change = self._change(context)
        context.log({"step": step, CURVE[self.kind]: change})
        context.run.timer.mark(self.key)
        most = self.settings.most(self.kind)
        if most is None:
            return 0.0
        return math.inf if math.isnan(change) else max(0.0, change - most)

    def after_training(self, context: Context, step: int) -> Mapping[str, object]:
        """Measure the trained model, and write what was measured of each text."""
        if not self.is_measured:
            return {}
        from petl.training.retain.page import write_texts  # where something was measured

        context.run.timer.start()
        self._spare(context)
        found = self.measure(context)
        folder, processor = context.run.path, context.splits.processor
        on_main(context.accelerator, lambda: write_texts(folder, found, self.rows, processor))
        context.run.timer.mark(self.key)
        # the limit is that of the restored checkpoint
        most = self.settings.most(self.kind)
        if most is not None and found.change > most:
            logger.warning(
                "no checkpoint is within retain.limit=%s: the one that lost least is kept, with "
                "%.4f",
                self.settings.limit,
                found.change,
            )
        return {self.key: found.entry()}

    def _spare(self, context: Context) -> None:
        """Leave out rows of a run that stored its frozen blocks, and so was cheaper."""
        caches = (f.cache for f in context.features if isinstance(f, FrozenStore))
        cache = next((each for each in caches if each is not None), None)
        if cache is None or self.settings.rows is not None or self.settings.measures_curve:
            return
        share, passes = cache.k / len(cache.prefix.blocks), context.splits.passes(context.settings)
        # of a step's three passes, and of the two of a measured row
        trained = 1 - share + share / (3 * max(1, passes))
        left = trained / (1 - share / 2) * sum(len(row.ids) for row in self.rows)
        # fewer tell little
        if self.rows:  # images and sounds stay as they were chosen
            self._keep(max(FEWEST, len(within(self.rows, left))))

    @classmethod
    def section(cls, folder: Path, scores: Record) -> Section | None:
        """Return the measure in words and pictures."""
        found: Record | None = scores.get(cls.key)
        if not found:
            return None
        from petl.training.retain.page import section_of  # as in `after_training`

        return section_of(folder, scores)


def processes_of(context: Context) -> Processes:
    """Return the processes of a run, among which rows are divided."""
    accelerator = context.accelerator
    return Processes(accelerator.process_index, accelerator.num_processes)


def too_few(count: int, rows: str) -> str:
    """Return the line for a run that is too short to pay for what is measured."""
    return (
        f"what is lost on other {rows.partition(' ')[0]} is not measured: {SHARE:.0%} of this "
        f"run's cost pays for {count} {rows}, and fewer than {FEWEST} tell little; retain.rows=N "
        "measures N whatever they cost"
    )


def trained_tokens(splits: Splits, train: TrainConfig) -> float:
    """Return about how many tokens a run trains on."""
    steps = splits.sampler(train).steps
    if not isinstance(splits.train, Dataset):  # a stream
        return steps * train.batch_size * splits.task.longest
    # the lengths of all rows would take long
    sample = splits.train.select(range(min(SAMPLE, len(splits.train))))
    lengths = splits.task.lengths(sample)
    return steps * train.batch_size * sum(lengths) / max(1, len(lengths))


def within(rows: Sequence[RetainedRow], tokens: float) -> list[RetainedRow]:
    """Return the first rows that have at most so many tokens together."""
    chosen: list[RetainedRow] = []
    for row in rows:
        tokens -= len(row.ids)
        if tokens < 0:
            break
        chosen.append(row)
    return chosen
