"""Classes in the predictions of a run: which lines have them, and which are never predicted."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from petl.data.base import BALANCED
from petl.system.files.read import iterate_json_lines
from petl.training.runs.records import of_task

NAMED = 5  # classes that a line names
Line = Mapping[str, Any]


def never_predicted(file: Path, settings: Mapping[str, Any] | None = None) -> str:
    """Name the classes of rows or words that no prediction has, and their counts; "" if all occur.

    A model that learned little predicts the frequent classes alone, and its accuracy hides it.

    Args:
        settings: of the run: what it balanced already is no remedy.

    Raises:
        InputError: the file is damaged.
    """
    labels, predicted, total = Counter[str](), set[str](), 0
    for line in lines_of(file) if file.exists() else ():
        if has_several(line):
            labels.update(line["label"])
            predicted.update(line["prediction"])
            total += 1
        for label, prediction in classes_of(line):
            labels[label] += 1
            predicted.add(prediction)
            total += 1
    missed = [(name, count) for name, count in labels.most_common() if name not in predicted]
    if not missed:
        return ""
    named = ", ".join(f"{name} ({count})" for name, count in missed[:NAMED])
    more = f" and {len(missed) - NAMED} more" if len(missed) > NAMED else ""
    run, data = ((settings or {}).get(group) or {} for group in ("train", "data"))
    is_balanced = run.get("class_weights") is not None or data.get("sampling") == BALANCED
    remedy = " or on more rows of these classes"
    if not is_balanced:
        remedy = ", on more rows of these classes, or with train.class_weights=balanced"
    return f"never predicted, of {total} examples: {named}{more}; train longer{remedy}"


def lines_of(file: Path) -> Iterator[Line]:
    """Yield the lines of a file of predictions."""
    return iterate_json_lines(file, dict[str, Any])


def classes_of(line: Line) -> Iterator[tuple[str, str]]:
    """Yield label and prediction of a row with a class, or of each of its words."""
    label, prediction = line.get("label"), line.get("prediction")
    if isinstance(label, str) and isinstance(prediction, str) and "probability" in line:
        yield of_task(line, label), of_task(line, prediction)
    elif isinstance(label, list) and isinstance(prediction, list) and not has_several(line):
        pairs = zip(label, prediction, strict=False)
        yield from ((a, b) for a, b in pairs if isinstance(a, str) and isinstance(b, str))


def has_several(line: Line) -> bool:
    """Return True if a row may have any number of classes, of which a list has the names."""
    lists = all(isinstance(line.get(key), list) for key in ("label", "prediction"))
    return lists and isinstance(line.get("probabilities"), dict)
