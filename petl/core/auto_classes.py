"""PEFT's `AutoPeftModelFor...` classes load a run's adapter with the labels of its head.

They build the base model from its own config, which does not have the labels that an adapter was
trained on: the head would have another size. So a run saves them next to its adapter, and importing
this module makes these classes pass them to the base model.
"""

from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypedDict

from petl.core.adapter_folder import ON_THE_HUB, Folder
from petl.core.compat import AutoPeftClass
from petl.errors import InputError
from petl.system.files.paths import LABELS
from petl.system.files.read import read_json

PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")


class Labels(TypedDict):
    """The content of `LABELS`."""

    id2label: dict[str, str]
    problem_type: str | None


def read_labels(path: str | Path, **where: object) -> dict[str, Any]:
    """Return the fields of the base model's config for the head of an adapter; {} if none is saved.

    Args:
        path: the adapter's folder or hub repository.
        where: arguments of `ON_THE_HUB`.

    Raises:
        InputError: the file has other contents. It may be a stranger's: nothing else of it is used.
    """
    file = Folder(path, **where).file(LABELS)
    if file is None:
        return {}
    saved = read_json(file, Labels)
    labels, problem = saved["id2label"], saved["problem_type"]
    names = [labels.get(str(i)) for i in range(len(labels))]
    if not names or None in names:
        raise InputError(f"{file} cannot be used: its id2label does not number the labels from 0")
    if problem is not None and problem not in PROBLEMS:
        raise InputError(f"{file}: problem_type={problem!r} is none of {', '.join(PROBLEMS)}")
    by_name = {name: i for i, name in enumerate(names)}
    return {"id2label": dict(enumerate(names)), "label2id": by_name, "problem_type": problem}


_auto: Any = AutoPeftClass
_of_peft: Any = _auto.from_pretrained.__func__


@wraps(_of_peft)
def from_pretrained(cls: Any, path: str | Path, *args: object, **kwargs: object) -> Any:
    """`AutoPeftModel.from_pretrained`, in which the base model gets the saved labels, if any."""
    labels = read_labels(path, **{k: v for k, v in kwargs.items() if k in ON_THE_HUB})
    if not labels or kwargs.keys() & {"num_labels", "id2label"}:
        return _of_peft(cls, path, *args, **kwargs)
    # the adapter has the head; that of the base model may have another size
    given = {**labels, "ignore_mismatched_sizes": True, **kwargs}
    added = given.keys() - kwargs.keys()

    def load_adapter(*args: object, **kwargs: object) -> object:
        kept = {key: value for key, value in kwargs.items() if key not in added}
        return cls._target_peft_class.from_pretrained(*args, **kept)

    # PEFT passes the same arguments to the adapter's class, where mismatches stay errors
    name = cls._target_peft_class.__name__
    adapter_cls = SimpleNamespace(__name__=name, from_pretrained=load_adapter)
    inner = type(cls.__name__, (cls,), {"_target_peft_class": adapter_cls})
    return _of_peft(inner, path, *args, **given)


_auto.from_pretrained = classmethod(from_pretrained)
