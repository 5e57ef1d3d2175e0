"""Several data sets of one task, mixed: `data=mixture data.sets=[hamlet,notes]`.

Each set is read by its own source, as the sets of data=tasks are; all have the same task. An epoch
visits each row once, or rows of the sets by temperature or by share (`data.sampling`), and scores
are also given for each set.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from datasets import Dataset, concatenate_datasets

from petl.data.base import RawData, Stream
from petl.data.task_sets import SeveralSets
from petl.data.tasks import SET, TASKS
from petl.errors import InputError
from petl.system.values import Rule, field, one_of

SHARES = Rule(
    "a share above 0 for each set, such as {notes: 0.3, hamlet: 0.7}",
    lambda shares: len(shares) > 1 and all(share > 0 for share in shares.values()),
)


@dataclass(kw_only=True)
class SetMixture(SeveralSets):
    """Rows of several sets of one task."""

    serves: ClassVar[tuple[str, ...]] = tuple(TASKS)

    sampling: str | None = field("size", one_of("size", "temperature", "shares"))
    # of an epoch's rows, by set; divided by their sum
    shares: dict[str, float] | None = field(None, SHARES)

    # settings of a task that is an objective, as of files
    objective: dict[str, str | float | bool | None] | None = None

    def __post_init__(self) -> None:
        # queries are answered from the documents of all rows, whatever set they are of
        if self.task in ("retrieval", "reranking"):
            raise InputError(
                f"data.task={self.task} is not possible with data={self.source}: data=files "
                "'data.train=[a.jsonl,b.jsonl]' reads several files"
            )
        super().__post_init__()
        if (self.sampling == "shares") != (self.shares is not None):
            raise InputError(
                f"data.sampling={self.sampling} and data.shares={self.shares}: give a share for "
                "each set with data.sampling=shares, and only there"
            )
        if self.shares is not None and {*self.shares} != {*self.sets}:
            raise InputError(
                f"data.shares={self.shares} has other names than the sets: {', '.join(self.sets)}"
            )

    def read(self) -> RawData:
        """Read each set, and number its rows by the set."""
        parts = self.parts()
        (first, data), *others = parts.items()
        for name, other in others:
            if other.task != data.task:
                raise InputError(
                    f"the sets {first} and {name} differ: {difference(data.task, other.task)}; "
                    "give both the same settings, such as data.labels"
                )
        if data.task.packs:
            raise InputError(
                "data.pack=true joins texts of several sets in one row: set it to false"
            )
        train = together({name: part.train for name, part in parts.items()})
        test = together({name: part.test for name, part in parts.items()})
        formats = dict.fromkeys(part.format for part in parts.values() if part.format)
        return RawData(
            data.task,
            train,
            test,
            self.name,
            format="; ".join(formats),
            skipped=self.skipped(parts),
            sets=tuple(parts),
            origins=self.origins(parts),
        )


def difference(one: object, other: object) -> str:
    """The first value in which two tasks differ."""
    values = vars(other)
    name = next((n for n, v in vars(one).items() if values.get(n) != v), "kind")
    return f"{name} is {vars(one).get(name)} and {values.get(name)}"


def together(parts: Mapping[str, Dataset | Stream]) -> Dataset:
    """The rows of all sets, with the number of their set (`SET`) and new numbers.

    Raises:
        InputError: a set has other columns than another.
    """
    numbered = []
    for number, rows in enumerate(parts.values()):
        assert isinstance(rows, Dataset), "streams are refused"
        kept = rows.remove_columns([n for n in ("number",) if n in rows.column_names])
        numbered.append(kept.add_column(SET, [number] * len(rows)))
    columns = [{*rows.column_names} for rows in numbered]
    if any(each != columns[0] for each in columns):
        listed = "; ".join(", ".join(sorted(each - {SET})) for each in columns)
        raise InputError(f"the sets of data.sets have other columns than another: {listed}")
    rows = concatenate_datasets(numbered)
    return rows.add_column("number", list(range(len(rows))))
