"""Rows that show a fault when they are encoded, such as those that a chat template refuses.

They are treated as rows with other faults: named by file and line, or left out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from petl.data.base import RawData, Stream, encode
from petl.data.validation import FaultyRow, RefusedRow, from_table
from petl.system.progress import Pass

if TYPE_CHECKING:
    from datasets import Dataset

    from petl.data.tasks.base import P, Task


def encode_usable(
    data: RawData, processor: "P", parts: Callable[[RawData], Sequence["Dataset"]]
) -> tuple[RawData, list["Dataset"]]:
    """Encode rows of data; where one is refused, again without all that are.

    Args:
        parts: returns the rows to encode.

    Returns:
        The data without the rows that were left out, and its encoded parts.

    Raises:
        RefusedRow: a row was refused whose place is unknown.
        InputError: rows were refused, and `data.bad_rows` is not skip.
    """
    encode = data.task.encode
    try:
        return data, [encode(processor, rows) for rows in parts(data)]
    except RefusedRow:
        if not data.origins:
            raise
        data = without_refused(data, processor)
    return data, [encode(processor, rows) for rows in parts(data)]


def without_refused(data: RawData, processor: "P") -> RawData:
    """Data without the rows that their task refuses, which are then among the skipped ones.

    Raises:
        InputError: there are such rows, and `data.bad_rows` is not skip.
    """
    skipped = dict(data.skipped)
    test, skipped["test"] = data.test, [*skipped.get("test", ())]
    if not isinstance(data.train, Stream):
        train, faulty = _usable(data, data.train, "training", processor)
        skipped["training"] = [*skipped.get("training", ()), *faulty]
        data = replace(data, train=train)
    test, faulty = _usable(data, data.test, "test", processor)
    skipped["test"] += faulty
    return replace(data, test=test, skipped=skipped)


def _usable(
    data: RawData, rows: "Dataset", split: str, processor: "P"
) -> tuple["Dataset", list[FaultyRow]]:
    reasons = refusals(data.task, processor, rows)
    skipped, start = list[FaultyRow](), 0
    for origin in data.origins[split]:
        own = range(start, start + len(origin.rows))
        start = own.stop
        faulty = [
            origin.fault(number - own.start, reasons[number], from_table(rows[number]))
            for number in own
            if number in reasons
        ]
        # rows may be shuffled; messages name lines in order
        faulty.sort(key=lambda row: row.number)
        if faulty:
            from petl.data.faulty_rows import leave_out  # most runs have none

            leave_out(faulty, origin.rows, skips=origin.skips, left=len(own) - len(faulty))
        skipped += faulty
    kept = rows.select([n for n in range(len(rows)) if n not in reasons])
    if "number" in kept.column_names:  # positions, which those after a row that is gone have lost
        kept = kept.remove_columns("number").add_column("number", list(range(len(kept))))
    return kept, skipped


def refusals(task: "Task[P]", processor: "P", rows: "Dataset") -> Mapping[int, str]:
    """Why rows are refused, by their number in `rows`; those that can be used are absent."""
    reasons: dict[int, str] = {}
    with Pass(f"checking {len(rows):,} rows", len(rows), unit="rows", quiet=True) as shown:
        for number, row in enumerate(rows):
            try:
                encode(task, processor, [row])
            except RefusedRow as error:
                reasons[number] = str(error)
            shown.advance(1)
    return reasons
