"""Rows of a source that cannot be used: all of them in one message, by kind; or they are left out.

`data.bad_rows` says which of the two. A row that is left out stands in `skipped.jsonl` of the run.
"""

import logging
import re
from collections.abc import Sequence
from typing import NamedTuple

from petl.data.validation import FaultyRow, Row, SourceRows, placed
from petl.errors import InputError

ERROR, SKIP = "error", "skip"  # values of data.bad_rows
KINDS, PLACES = 10, 8  # that a message names
logger = logging.getLogger(__name__)
VALUES = re.compile(r"'[^']*'|\"[^\"]*\"|\d+")  # in which the reasons of one kind differ


class Origin(NamedTuple):
    """Where the rows of a split are from, for faults that show when they are encoded.

    Attributes:
        rows: without their values.
        skips: `data.bad_rows` is skip.
    """

    rows: SourceRows
    skips: bool

    def fault(self, index: int, reason: str, values: Row) -> FaultyRow:
        """The fault of the row at an index."""
        number = self.rows.numbers[index]
        return FaultyRow(number, self.rows.locate(number), reason, values)


def leave_out(faulty: Sequence[FaultyRow], rows: SourceRows, *, skips: bool, left: int) -> None:
    """Log that rows are left out.

    Args:
        rows: as in `described`.
        left: number of rows that can be used.

    Raises:
        InputError: `data.bad_rows` is not skip, or no row is left.
    """
    if not skips or not left:
        raise refusal(faulty, rows, skips=skips)
    logger.warning("%s\ndata.bad_rows=skip leaves them out", described(faulty, rows))


def refusal(faulty: Sequence[FaultyRow], rows: SourceRows, *, skips: bool) -> InputError:
    """The error for rows that cannot be used."""
    message = described(faulty, rows)
    if skips:
        return InputError(f"{message}; data.bad_rows=skip leaves no row")
    if len(faulty) == len(rows) + len(rows.unread):
        return InputError(message)
    end = "\n" if "\n" in message else "; "
    return InputError(f"{message}{end}data.bad_rows=skip leaves such rows out")


def described(faulty: Sequence[FaultyRow], rows: SourceRows) -> str:
    """All faults of a source: of each kind the first in full, and the places of the others.

    Args:
        faulty: at least one, in the order of the source.
        rows: of the source, before faulty ones were left out.
    """
    if len(faulty) == 1:
        return placed(faulty[0].place, faulty[0].reason)
    kinds: dict[str, list[FaultyRow]] = {}
    for each in faulty:
        kinds.setdefault(VALUES.sub("", each.reason), []).append(each)
    most = sorted(kinds.values(), key=len, reverse=True)
    lines = [f"  {placed(same[0].place, same[0].reason)}{others(same)}" for same in most[:KINDS]]
    if len(most) > KINDS:
        lines.append(f"  and {sum(map(len, most[KINDS:]))} rows with other faults")
    listed = "\n".join(lines)
    count = len(rows) + len(rows.unread)
    return f"{rows.origin}: {len(faulty)} of {count} rows cannot be used\n{listed}"


def others(same: Sequence[FaultyRow]) -> str:
    """The places of all faults of a kind but the first, for the end of its line."""
    first = same[0].place.rpartition(" ")[0]
    places = [each.place.removeprefix(f"{first} ") for each in same[1:]]
    if not places:
        return ""
    more = f" and {len(places) - PLACES} more" if len(places) > PLACES else ""
    return f" ({len(same)} such rows, also {', '.join(places[:PLACES])}{more})"
