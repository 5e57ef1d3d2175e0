"""What a run loses on other texts (`retain.data`): measured after training, or as a curve.

Nothing here changes training: it draws no random number, and adds no row to a batch.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from peft import TaskType

from petl.core.registry import build_config, keeps_base
from petl.core.types import Fields, Record
from petl.data.files import file_names
from petl.data.streaming import StreamedRows
from petl.errors import InputError, UnsupportedError
from petl.system.collectives import on_main
from petl.system.files.disk import write_atomic
from petl.system.files.read import read_json_lines
from petl.system.values import type_problem
from petl.training.dataloader import Splits
from petl.training.features import Context, RunFeature, Setup
from petl.training.features.section import Curve, Lines, Section
from petl.training.retain.measure import Retained, RetainedRow, compare, encode_texts, losses_of
from petl.training.retain.settings import RetainConfig
from petl.training.retain.texts import read_texts
from petl.training.runs.config import RunConfig
from petl.training.runs.records import METRICS, SCORES
from petl.training.runs.settings import TrainConfig

TEXTS = "retained.jsonl"
WRITES = (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM)
SHARE = 0.03  # of a run's cost, unless the number of texts is set
BACKWARD = 3  # forward passes that a training step costs
MOST, FEWEST, SHORTEST = 256, 32, 64  # texts, and tokens of a text
SAMPLE = 1000  # rows whose lengths are looked at
logger = logging.getLogger(__name__)


class RetainedLoss(RunFeature):
    """Measures the loss on retained texts with and without what was trained."""

    key = "retained"
    Settings = RetainConfig
    settings: RetainConfig
    rows: Sequence[RetainedRow] = ()  # none: not measured
    before: list[float] | None = None  # of a base whose weights the method changes

    def check(self, config: RunConfig) -> None:
        """Raise InputError for files that are not there, or a curve without evaluations."""
        if self.settings.curve and not config.train.eval_steps:
            raise InputError(
                "retain.curve=true measures at each evaluation, and train.eval_steps is null: set "
                "train.eval_steps, or retain.curve=false"
            )
        read_texts(self._names(), "retain.data")

    def _names(self) -> list[str]:
        return file_names("retain.data", self.settings.data)

    def before_wrapping(self, setup: Setup, fields: Fields) -> Fields:
        """Choose the texts; measure a base that the method will change."""
        splits = setup.splits
        if splits.task.peft_task_type not in WRITES:
            raise UnsupportedError(
                f"retain.data={self.settings.data} is for models that write, and data.task="
                f"{splits.task.name} has no loss on texts; set retain.data=null"
            )
        texts = read_texts(self._names(), "retain.data")
        rows = encode_texts(texts, splits.processor, self.settings.max_length)
        self.rows, note = self._chosen(rows, splits, setup.config.train)
        if note:
            (logger.info if setup.run else setup.notes.append)(note)
        if setup.run is not None and self.rows and not keeps_base(build_config(**fields)):
            assert setup.accelerator is not None
            with setup.accelerator.autocast():
                self.before = losses_of(setup.base, self.rows, splits.processor)
        return fields

    def _chosen(
        self, rows: list[RetainedRow], splits: Splits, train: TrainConfig
    ) -> tuple[list[RetainedRow], str]:
        """Return the rows that are measured, and what to say of their number."""
        if self.settings.rows is not None:
            return rows[: self.settings.rows], ""
        # each row twice, with and without the adapter
        affordable = SHARE * BACKWARD * trained_tokens(splits, train) / 2
        length = self.settings.max_length
        while True:
            shorter = [RetainedRow(row.text, row.ids[:length]) for row in rows[:MOST]]
            chosen = within(shorter, affordable)
            if len(chosen) >= min(FEWEST, len(rows)):
                return chosen, ""
            if length <= SHORTEST:
                return [], (
                    f"retained texts are not measured: {SHARE:.0%} of this run pays for "
                    f"{len(chosen)} of {length} tokens, and {FEWEST} say little; set "
                    "retain.rows to measure them nevertheless"
                )
            length = max(SHORTEST, length // 2)

    def measure(self, context: Context) -> Retained:
        """Return the measure of the model as it is; on every process the same."""
        splits = context.splits
        with context.accelerator.autocast():
            return compare(context.model, self.rows, splits.processor, before=self.before)

    def after_step(self, context: Context, step: int) -> None:
        """Add a point to the curve after the steps with an evaluation."""
        every = context.settings.eval_steps
        if self.settings.curve and self.rows and every and step % every == 0:
            context.run.timer.start()
            context.log({"step": step, "retained_lost": self.measure(context).lost})
            context.run.timer.mark(self.key)

    def after_training(self, context: Context, step: int) -> Mapping[str, object]:
        """Measure the trained model, and write the losses of each text."""
        if not self.rows:
            return {}
        context.run.timer.start()
        found = self.measure(context)
        lines = "".join(f"{json.dumps(asdict(each))}\n" for each in found.texts)
        file = context.run.path / TEXTS
        on_main(context.accelerator, lambda: write_atomic(file, lines))
        context.run.timer.mark(self.key)
        return {self.key: found.entry()}

    @classmethod
    def section(cls, folder: Path, scores: Record) -> Section | None:
        """Return the measure in words, and its curve."""
        found: Record | None = scores.get(cls.key)
        if not found:
            return None
        problem = type_problem({**found, "interval": None, "texts": ()}, Retained)
        if problem:
            raise InputError(f"{folder / SCORES} cannot be used: {cls.key} has {problem}")
        limits = found["interval"]
        given: Record = {**found, "interval": None if limits is None else tuple(limits)}
        line = str(Retained(**given))
        points = [
            (entry["step"], entry["retained_lost"])
            for entry in (read_json_lines(folder / METRICS) if (folder / METRICS).exists() else ())
            if "retained_lost" in entry
        ]
        charts = [Lines("Lost on other texts", "step", "nats", [Curve("lost", points)])]
        return Section(
            "What was lost",
            f"{line}. Measured on {found['rows']} texts of {found['tokens']:,} tokens that the "
            f"model was not trained on; {TEXTS} has each of them.",
            charts=charts if points else (),
            line=line,
        )


def trained_tokens(splits: Splits, train: TrainConfig) -> float:
    """Return about how many tokens a run trains on."""
    steps = splits.sampler(train).steps
    if isinstance(splits.train, StreamedRows):
        return steps * train.batch_size * splits.task.longest
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
