"""A column that holds a class for (nearly) each row, such as an id, is not a column of labels."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain, islice

from petl.data.validation import Row, label, number
from petl.errors import InputError, typed
from petl.system.files.read import parse_list

MIN_LABELS = 20  # assumption: fewer are an example of a file, or a test
FEW = 0.5  # classes per label: above, a class has fewer than two examples on average
SEPARATORS = ("|", ";", ",", "/")  # between classes in a cell
MISSING = ("nan", "NaN", "N/A", "null", "None")  # as programs write a missing value
NOISE = 0.01  # rows with a contradiction that most data sets have; assumption
SAMPLE = 1000  # rows in which other columns are searched; assumption: enough to tell them apart


def has_too_many_classes(counts: Counter[str]) -> bool:
    """Return True if an average class has fewer than two examples."""
    return counts.total() >= MIN_LABELS and len(counts) > FEW * counts.total()


def refuse_unlikely_classes(
    counts: Counter[str],
    column: str,
    origin: str,
    rows: Callable[[], Iterable[Row]] | None,
    used: Collection[str],
    texts: Collection[str] | None = None,
) -> None:
    """Raise InputError if a column holds several classes in a cell, or too many to be learned.

    Also if classes are the same but for case and space.

    Args:
        counts: how often each class occurs in the column.
        column: its name.
        origin: of the rows, for the message.
        rows: starts an iterator over the rows with all columns, among which others are searched.
        used: names of the columns that the task reads.
        texts: of a task with several classes in a row, the cells that are one class each.
    """
    own = "If each of the {} values is a class of its own, list them in data.labels"
    lists = {name: found for name in counts if (found := parse_list(name)) is not None}
    if len(lists) > 1 and 2 * len(lists) >= len(counts):
        classes = {str(each) for found in lists.values() for each in found}
        raise InputError(
            f"{origin} has a list of classes in each cell of column {column!r}, such as "
            f"{next(iter(lists))!r}: for {len(classes)} classes, any number of them in a row, set "
            f"data.task=multi_label.\n{own.format(len(counts))}"
        )
    # such as Spam and spam: two classes that compete for one meaning
    written: dict[str, list[str]] = {}
    for name in counts:
        written.setdefault(" ".join(name.casefold().split()), []).append(name)
    alike = next((names for names in written.values() if len(names) > 1), None)
    if alike is not None:
        listed = " and ".join(f"{name!r} ({counts[name]} times)" for name in alike)
        raise InputError(
            f"{origin} has {listed} in column {column!r}, which differ in case or space alone: "
            f"write them alike.\n{own.format(len(counts))}"
        )
    several = separator_of(counts) if texts is None else separator_of(texts, is_multi=True)
    if several is not None:
        separator, example, classes = several
        task = "data.task=multi_label " if texts is None else ""
        raise InputError(
            f"{origin} has several classes in a cell of column {column!r}, such as {example!r}: "
            f"for {classes} classes, any number of them in a row, set {task}"
            f"{typed('data.separator', separator)}.\n{own.format(len(counts))}"
        )
    if not has_too_many_classes(counts):
        return
    found = candidates(list(islice(rows(), SAMPLE)), used) if rows else {}
    listed = ", ".join(f"{name!r} ({count} values)" for name, count in found.items())
    others = f"columns with fewer: {listed}" if found else "no other column has fewer"
    numbers = "; numbers are for data.task=regression" if are_measurements(counts) else ""
    raise InputError(
        f"{origin} has {len(counts)} classes for {counts.total()} labels in column {column!r}: too "
        f"few examples of each to learn from; {others}{numbers}.\n"
        "If these are the classes, list them in data.labels"
    )


def separator_of(values: Collection[str], *, is_multi: bool = False) -> tuple[str, str, int] | None:
    """The separator in values of a column that are several classes each; None if they are none.

    Most parts of such values recur in others or are values by themselves, all parts of one at
    least, and there are fewer parts than values.

    Args:
        values: distinct ones.
        is_multi: rows may have several classes, so that one part that recurs is enough.

    Returns:
        The separator, a value with it, and the number of parts.
    """
    for separator in SEPARATORS:
        parts = {name: [part.strip() for part in name.split(separator)] for name in values}
        joined = {name: own for name, own in parts.items() if len(own) > 1}
        found = Counter(part for own in parts.values() for part in {*own})
        inner = {part for own in joined.values() for part in own}
        recurring = {part for part in inner if part and found[part] > 1}
        full = next((name for name, own in joined.items() if recurring.issuperset(own)), None)
        # a class may be "yes/no" beside "yes" and "no"
        is_class = len(joined) < 2 and separator == "/"
        most = 2 * len(recurring) > len(inner) and len(found) < len(values)
        if full is not None and most and not is_class:
            return separator, full, len(found)
        if is_multi and recurring and separator != "/":
            return separator, next(iter(joined)), len(found)
    return None


def doubts(
    names: Sequence[str], train: Sequence[Row], test: Sequence[Row], *, are_listed: bool
) -> Iterator[str]:
    """Yield what is odd about the classes of converted rows, one sentence each.

    Args:
        names: of the classes.
        are_listed: a setting or the source lists them, so that each is meant.
    """
    learned, asked = (Counter(chain.from_iterable(map(numbers_in, rows))) for rows in (train, test))
    unseen = [names[i] for i in sorted(asked) if not learned[i]]
    if unseen:
        more = f" and {len(unseen) - 5} more" if len(unseen) > 5 else ""
        yield (
            f"test rows have classes without a training row: {', '.join(map(repr, unseen[:5]))}"
            f"{more}; the model cannot learn them"
        )
    for i, name in enumerate(names):
        if name in MISSING and learned[i] and not are_listed:
            yield (
                f"{learned[i]} training rows have the class {name!r}, as a missing label is "
                "written: remove them if they have none"
            )
    contradicted = contradictions([row for row in train if "label" in row])
    if contradicted > NOISE * len(train):
        yield (
            f"{contradicted} of {len(train)} training rows have the text of another row and "
            "another label: check the labels"
        )


def numbers_in(row: Row) -> Sequence[int]:
    """The numbers of the classes of a converted row."""
    found = row["tags"] if "tags" in row else row["label"]
    return found if isinstance(found, list) else [found]


def contradictions(rows: Sequence[Row]) -> int:
    """The number of rows of which another one differs in the label alone."""
    inputs = [tuple(value for name, value in row.items() if name != "label") for row in rows]
    labels = [row["label"] for row in rows]
    first = dict(zip(inputs, labels, strict=True))
    pairs = zip(inputs, labels, strict=True)
    differing = {asked for asked, label in pairs if first[asked] != label}
    return sum(asked in differing for asked in inputs)


def candidates(rows: list[Row], used: Collection[str]) -> dict[str, int]:
    """Return the columns whose values may be classes, with their number; the fewest first."""
    found = {}
    # rows of a file all have the columns of the first
    for name in rows[0] if rows else ():
        if name in used:
            continue
        classes = Counter(as_label(row.get(name)) for row in rows)
        # None: some value is no text or number, such as a list
        if None not in classes and 1 < len(classes) <= FEW * len(rows):
            found[name] = len(classes)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def as_label(value: object) -> str | None:
    """Return the name of the class that a value may be; None if it cannot be one."""
    try:
        return label(value)
    except ValueError:
        return None


def are_measurements(labels: Iterable[str]) -> bool:
    """Return True if all labels are numbers, and not all of them integers."""
    try:
        values = [number(name) for name in labels]
    except ValueError:
        return False
    # integers alone may number classes
    return any(value % 1 for value in values)
