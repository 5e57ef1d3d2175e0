"""What was measured of a claim, as a file: scores, differences and their variance, heat maps.

A file has measurements only. Intervals and verdicts are computed from them where they are shown, so
that they follow one rule.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from claims.claim import Claim, Statement
from claims.intervals import Estimate
from petl.errors import InputError
from petl.system.files.disk import as_json, write_atomic
from petl.system.files.read import read_json

PUBLISHED = Path(__file__).parent / "results"  # those that the pages show


@dataclass(frozen=True)
class Scored:
    """The finished runs of a contender.

    Attributes:
        scores: of the first measure of the claim by seed, such as the test accuracy.
        rate: the learning rate of the runs; of an edited adapter, that of its training, as the
            next two; None: it is made of several, each with its own.
        validation: the validation score of each learning rate.
        parameters: of the adapter, without the head.
        bytes: of the adapter's file, with the head.
        cpu_seconds: processor seconds of training, or of the edit alone, the mean over seeds.
        measured: the other measures by name and seed.
    """

    scores: dict[str, float]
    rate: float | None
    validation: dict[str, float]
    parameters: int
    bytes: int
    cpu_seconds: float
    measured: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Map:
    """A heat map, averaged over seeds."""

    title: str
    unit: str
    meaning: str
    rows: list[str]
    columns: list[str]
    cells: list[list[float | None]]


@dataclass(frozen=True)
class Result:
    """The measurements of a claim.

    Attributes:
        claim: its name.
        settings: of all runs, as overrides of `petl train`.
        seeds: planned for each contender.
        contenders: by words; without those that have no finished run.
        estimates: by `Statement.key`; a statement of which fewer than two seeds are finished has
            none.
        maps: the heat maps.
        environment: command, machine, packages, commits and times of the runs.
        curves: the validation losses of each contender by step, one for each seed; of settings that
            evaluate more than once.
    """

    claim: str
    settings: list[str]
    seeds: list[int]
    contenders: dict[str, Scored] = field(default_factory=dict)
    estimates: dict[str, Estimate] = field(default_factory=dict)
    maps: list[Map] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def is_complete(self, statement: Statement) -> bool:
        """Return True if a statement has all of its seeds."""
        found = self.estimates.get(statement.key)
        return found is not None and found.seeds == len(self.seeds)

    def refuse_unknown(self, claim: Claim) -> None:
        """Raise InputError for an estimate of a comparison that the claim does not make."""
        unknown = sorted(self.estimates.keys() - {each.key for each in claim.statements})
        if unknown:
            raise InputError(
                f"the results of {claim.name} have an estimate of {unknown[0]!r}, which the claim "
                f"does not compare: write them again with python scripts/claims.py {claim.name}"
            )

    def write(self, folder: Path) -> None:
        """Write the file of the claim in a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / f"{self.claim}.json", as_json(asdict(self), in_order=True))


def read(file: Path) -> Result:
    """Read a file that `Result.write` has written.

    Raises:
        InputError: it cannot be read, or has another form.
    """
    found = read_json(file, Result)
    return Result(
        **{
            **found,
            "contenders": {words: Scored(**each) for words, each in found["contenders"].items()},
            "estimates": {key: Estimate(**each) for key, each in found["estimates"].items()},
            "maps": [Map(**each) for each in found["maps"]],
        }
    )


def read_published(folder: Path = PUBLISHED) -> dict[str, Result]:
    """Return the published results by name of the claim."""
    return {file.stem: read(file) for file in sorted(folder.glob("*.json"))}
