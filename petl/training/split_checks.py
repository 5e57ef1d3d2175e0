"""Warnings about encoded rows: scores that say less than they seem to, and labels without rows."""

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset

from petl.tasks.base import Task
from petl.tasks.classification import SingleLabelTask
from petl.tasks.encoding_cache import encode_once
from petl.tasks.regression import Regression

NAMED = 5  # classes that a message names
# fraction of the test rows; assumption: fewer shift a score by less than its interval (the
# definitions of WordNet repeat in 0.6 %)
MIN_KNOWN = 0.01
MAX_COMPARED = 100_000  # training rows; assumption: few seconds next to the training of as many
logger = logging.getLogger(__name__)


def warn_about_truncation(task: Task, processor: Any, raw: Dataset, encoded: Dataset) -> None:
    """Log how many test rows are truncated, and so scored by their beginning.

    Args:
        raw: the test rows before encoding.
        encoded: the same after encoding.
    """
    whole = task.untruncated()
    # tokens of the parts of a row, at which it may have been truncated: a text, or also its target
    limit = min(task.max_length, getattr(task, "max_target_length", np.inf)) if whole else np.inf
    if whole is None or max(task.lengths(encoded), default=0) < limit:
        return  # no row is as long as the limit: nothing to encode again
    count = sum(task.is_truncated(row) for row in encode_once(whole, processor, raw))
    if count:
        logger.warning(
            "%d of %d test examples are truncated to data.max_length=%d tokens: their scores are "
            "those of what is left",
            count,
            len(raw),
            task.max_length,
        )


def warn_about_overlap(task: Task, train: Dataset, test: Dataset) -> None:
    """Log how many test rows have the same input as a training row, of which a model may know it.

    Not checked for rows without tokens, packed rows, and more than `MAX_COMPARED` training rows.
    """
    if not task.reads_text or task.packs or len(train) > MAX_COMPARED:
        return
    tested = Counter(map(tuple, test["input_ids"]))
    count = sum(tested[ids] for ids in tested.keys() & set(map(tuple, train["input_ids"])))
    if count > MIN_KNOWN * len(test):
        logger.warning(
            "%d of %d test examples have the same input as a training example, which the model may "
            "memorize",
            count,
            len(test),
        )


def warn_about_labels(task: Task, splits: Mapping[str, Dataset | None]) -> None:
    """Log splits whose labels are all the same, and classes that are scored but never trained.

    Args:
        splits: encoded rows by name: training, if they are no stream, validation, test.
    """
    if not isinstance(task, SingleLabelTask | Regression):
        return
    labels = {name: np.asarray(rows["labels"]) for name, rows in splits.items() if rows}
    present = {name: np.unique(values) for name, values in labels.items()}
    for name, values in present.items():
        if len(values) == 1:
            count = len(labels[name])
            logger.warning(
                "all %d %s examples have the label %s: %s",
                count,
                name,
                task.label_text({"labels": values[0]}),
                "there is nothing to learn" if name == "training" else of_one_label(task, count),
            )
    if "training" in present and isinstance(task, SingleLabelTask):
        for name in present.keys() - {"training"}:
            unseen = np.setdiff1d(present[name], present["training"])
            if len(unseen):
                classes = ", ".join(repr(task.classes[i]) for i in unseen[:NAMED])
                count = int(np.isin(labels[name], unseen).sum())
                logger.warning(
                    "%d %s examples have a class without training examples (%s%s)",
                    count,
                    name,
                    classes,
                    ", ..." if len(unseen) > NAMED else "",
                )


def of_one_label(task: Task, count: int) -> str:
    """What scores on examples with one and the same label do not say."""
    if isinstance(task, Regression):
        return "a correlation is undefined, and counts as 0"
    few = "a single example" if count == 1 else "examples of one class"
    return f"scores on {few} do not show whether classes are told apart"
