"""What a run with `+loss=nested` does at its end: scores and bytes of each width."""

import math
from collections.abc import Mapping
from pathlib import Path

from petl.core.adapter_folder import Folder
from petl.core.adapter_widths.cuts import at_width_in_file
from petl.core.adapter_widths.switch import at_width
from petl.core.types import Record
from petl.data.tasks.scores import is_percentage
from petl.errors import InputError
from petl.system.values import type_problem
from petl.training.features import Context, RunFeature
from petl.training.features.section import Curve, Lines, Section
from petl.training.runs.lookup import ADAPTER
from petl.training.runs.records import SCORES

VALIDATION, BYTES = "validation", "bytes"


class WidthScores(RunFeature):
    """Scores the adapter at each width, on test and validation rows.

    `widths` of scores.json has, by width, the scores of the test rows, `validation` with those of
    the validation rows, and `bytes` of the narrowed adapter's tensors.
    """

    key = "widths"

    def after_training(self, context: Context, step: int) -> Mapping[str, object]:
        """Return the entry `widths`."""
        model, splits = context.model, context.splits
        nesting = vars(model)["nesting"]
        saved = Folder(context.run.path / ADAPTER)
        found: dict[str, Record] = {}
        for k in nesting.widths:
            entry: Record = {}
            with at_width(model, k):
                if context.settings.test:
                    entry |= context.evaluate(splits.test, f"scoring width {k}")
                if splits.validation is not None:
                    entry[VALIDATION] = context.evaluate(splits.validation, f"scoring width {k}")
            tensors, _ = at_width_in_file(saved.config, saved.tensors, k, nesting.config.scale)
            entry[BYTES] = sum(tensor.nbytes for tensor in tensors.values())
            found[str(k)] = entry
        return {self.key: found}

    @classmethod
    def section(cls, folder: Path, scores: Record) -> Section | None:
        """Return the curves of score and bytes by width."""
        found = scores.get(cls.key)
        if found is None:
            return None
        problem = type_problem(found, dict[str, Record])
        if problem:
            raise InputError(f"{folder / SCORES} cannot be used: {cls.key}: {problem}")
        charts = []
        for name in _names(found):
            factor = 100 if is_percentage(name) else 1
            curves = [
                Curve(rows, points)
                for rows, points in (
                    ("test", _points(found, name, factor)),
                    (VALIDATION, _points(_validation(found), name, factor)),
                )
                if points
            ]
            unit = f"{name} (%)" if factor == 100 else name
            charts.append(Lines(f"{name.replace('_', ' ')} by width", "width", unit, curves))
        size = _points(found, BYTES, 1e-3)
        if size:
            charts.append(Lines("Size by width", "width", "kB of tensors", [Curve("size", size)]))
        return Section("Widths", "Each width is the first components of one adapter.", charts)


def _validation(found: Mapping[str, Record]) -> dict[str, Record]:
    return {k: entry.get(VALIDATION) or {} for k, entry in found.items()}


def _names(found: Mapping[str, Record]) -> list[str]:
    """Return the names of the scores that any width has."""
    entries = [*found.values(), *_validation(found).values()]
    names = dict.fromkeys(name for entry in entries for name in entry)
    return [name for name in names if name not in (VALIDATION, BYTES)]


def _points(found: Mapping[str, Record], name: str, factor: float) -> list[tuple[float, float]]:
    """Return finite values by width, in order."""
    values = ((int(k), entry.get(name)) for k, entry in found.items())
    return sorted(
        (float(k), factor * value)
        for k, value in values
        if isinstance(value, int | float) and math.isfinite(value)
    )
