"""Which task reads rows that the given task cannot read, by their columns."""

from collections.abc import Iterable

from petl.data.formats import recognized

SETTINGS = (
    *((tuple(each.required(labeled=True)), "data.task=causal_lm") for each in recognized()),
    (("tokens", "tags"), "data.task=token_classification"),
    (("tokens", "ner_tags"), "data.task=token_classification data.tags=ner_tags"),
    (("question", "context", "answers"), "data.task=question_answering"),
    (("text", "target"), "data.task=seq2seq"),
    (("text", "label"), "data.task=classification"),
)


def fitting_task(columns: Iterable[str], task: str) -> str | None:
    """Return the end of a message: which task reads rows with these columns; None if none does.

    Args:
        task: the one that does not.
    """
    names = set(columns)
    for required, setting in SETTINGS:
        if names.issuperset(required) and setting != f"data.task={task}":
            return f".\nIt has {' and '.join(required)}: add {setting}"
    return None
