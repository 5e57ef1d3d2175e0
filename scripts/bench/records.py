"""Results of the benchmark as files, and regressions between two results."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.clocks import Spread
from petl.errors import InputError
from petl.system.files.disk import write_atomic

FORMAT = 1  # of the file
MARGIN = 0.10  # relative growth of a value that is no regression (assumption)


@dataclass(frozen=True)
class Record:
    """A row of a section's table.

    Attributes:
        row: name of the row; names of rows and values are stable, `report.LABELS` translates them.
        failed: why there are no values; "" if there are.
        is_own: True if the method is part of petl, so that a failure is a bug of petl.
        ratios: ratios of times by name; smaller is better.
        counts: exactly reproducible values by name; smaller is better.
        facts: further values by name, which `regressions` ignores.
        note: shown next to the name of the row.
    """

    section: str
    shape: str
    row: str
    failed: str = ""
    is_own: bool = True
    ratios: Mapping[str, Spread] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """Section, shape and row."""
        return self.section, self.shape, self.row


@dataclass(frozen=True)
class Result:
    """The result of one run of the benchmark.

    Attributes:
        environment: versions, processor, threads, load, ...
    """

    environment: Mapping[str, Any]
    records: Sequence[Record]

    def write(self, path: Path) -> None:
        """Write the result as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Result":
        """Read a result that `write` wrote.

        Raises:
            InputError: there is none, or another version of the benchmark wrote it.
        """
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path} cannot be read as a result of the benchmark: {error}"
            ) from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise InputError(
                f"{path} is not a result of this benchmark in format {FORMAT}; measure again"
            )
        return cls(content["environment"], [_record(**record) for record in content["records"]])


def _record(ratios: dict[str, dict[str, float]], **rest: Any) -> Record:
    return Record(ratios={name: Spread(**spread) for name, spread in ratios.items()}, **rest)


def regressions(old: Result, new: Result, margin: float = MARGIN) -> list[str]:
    """Return a sentence on each value that is worse in `new`.

    A ratio is worse if its lower quartile exceeds the old upper quartile by more than `margin`, so
    that noise, which widens both, does not count. Counts have no noise.

    Raises:
        InputError: the results have no row in common.
    """
    before = {record.key: record for record in old.records}
    pairs = [(before[record.key], record) for record in new.records if record.key in before]
    if not pairs:
        raise InputError(
            f"the earlier result has none of the {len(new.records)} rows of this one; run the same "
            "suite, shapes and sections"
        )
    return [sentence for then, now in pairs for sentence in _grown(then, now, margin)]


def _grown(then: Record, now: Record, margin: float) -> list[str]:
    where = ", ".join(now.key)
    if now.failed:
        return [] if then.failed else [f"{where}: fails now: {now.failed}"]
    sentences = [
        f"{where}: {name} {_format(then.ratios[name])} -> {_format(ratio)}"
        for name, ratio in now.ratios.items()
        if name in then.ratios and ratio.low > then.ratios[name].high * (1 + margin)
    ]
    sentences += [
        f"{where}: {name} {then.counts[name]:g} -> {count:g}"
        for name, count in now.counts.items()
        if name in then.counts and count > then.counts[name] * (1 + margin)
    ]
    return sentences


def _format(ratio: Spread) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
