"""What a bench found, as a file, and what has become worse since an earlier one."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.clocks import Spread
from petl.errors import InputError

FORMAT = 1  # of the file
MARGIN = 0.10  # by how much a figure may grow


@dataclass(frozen=True)
class Record:
    """A row of a section's table.

    Attributes:
        row: name of what was measured.
        failed: why it has no figures; "" if it has.
        is_own: whether it is petl's to mend.
        ratios: of times, by what they are; smaller is better.
        counts: figures that repeat exactly; smaller is better.
        facts: further figures, which nobody compares.
    """

    section: str
    shape: str
    row: str
    failed: str = ""
    is_own: bool = True
    ratios: Mapping[str, Spread] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        return self.section, self.shape, self.row


@dataclass(frozen=True)
class Result:
    """One run of the bench.

    Attributes:
        environment: versions, processor, threads, load, and the like.
    """

    environment: Mapping[str, Any]
    records: Sequence[Record]

    def write(self, path: Path) -> None:
        """Write the result as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Result":
        """The result that `write` wrote.

        Raises:
            InputError: there is none, or it was written by another version of the bench.
        """
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read as a result of the bench: {error}") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise InputError(f"{path} is no result of this bench, format {FORMAT}; run it anew")
        return cls(found["environment"], [_record(**record) for record in found["records"]])


def _record(ratios: dict[str, dict[str, float]], **rest: Any) -> Record:
    return Record(ratios={name: Spread(**spread) for name, spread in ratios.items()}, **rest)


def regressions(old: Result, new: Result, margin: float = MARGIN) -> list[str]:
    """What is worse in `new`, a sentence each.

    A ratio has grown if its lower quartile is above the old upper one by more than `margin`, so
    that noise, which widens both, is no growth. Counts have no noise.

    Raises:
        InputError: the two have no row in common.
    """
    before = {record.key: record for record in old.records}
    pairs = [(before[record.key], record) for record in new.records if record.key in before]
    if not pairs:
        raise InputError(
            "the earlier result has no row of this one; run the same suite, shapes and sections"
        )
    return [sentence for then, now in pairs for sentence in _grown(then, now, margin)]


def _grown(then: Record, now: Record, margin: float) -> list[str]:
    where = ", ".join(now.key)
    if now.failed:
        return [] if then.failed else [f"{where}: it fails now: {now.failed}"]
    found = [
        f"{where}: {name} {_told(then.ratios[name])} -> {_told(ratio)}"
        for name, ratio in now.ratios.items()
        if name in then.ratios and ratio.low > then.ratios[name].high * (1 + margin)
    ]
    found += [
        f"{where}: {name} {then.counts[name]:g} -> {count:g}"
        for name, count in now.counts.items()
        if name in then.counts and count > then.counts[name] * (1 + margin)
    ]
    return found


def _told(ratio: Spread) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
