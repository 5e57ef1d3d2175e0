"""Register a method, and generate the tuner class that PEFT needs for its type."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from petl.core.compat import add_method
from petl.core.method import Method
from petl.core.registry import METHODS, check_free
from petl.core.tuners.adapter import AdapterTuner

Tuner = TypeVar("Tuner", bound=type[Any])


def register(method_cls: Any, **old: Any) -> Any:
    """Register a method: its name is the word after `+method=`.

    A decorator for a `Method`. The PEFT type becomes `PETL_<NAME>` and the prefix of its tensors in
    state dicts `petl_<name>_`, since a later PEFT may have that name.

    Raises:
        ValueError: its name is taken.
    """
    if isinstance(method_cls, str):  # a tuner of its own, over an inner method's
        return _register_tuner(method_cls, **old)
    entry = method_cls()
    check_free(entry.name, entry.config_cls)
    _settle(entry)
    body = {
        "method": entry,
        "prefix": f"petl_{entry.name}_",
        "__module__": method_cls.__module__,
        "__qualname__": f"{method_cls.__qualname__}.tuner_cls",  # by which pickle finds it
    }
    word = "".join(part.capitalize() for part in entry.name.split("_"))
    method_cls.tuner_cls = type(f"{word}Model", (AdapterTuner,), body)
    # MethodConfig reads the name, for its PEFT type
    entry.config_cls.method = entry.name
    add_method(f"petl_{entry.name}", body["prefix"], entry.config_cls, method_cls.tuner_cls)
    METHODS[entry.name] = entry
    return method_cls


def _settle(entry: Method[Any, Any]) -> None:
    """Set the facts that follow from the adapter."""
    entry.own, adapter_cls = True, entry.adapter_cls
    if adapter_cls is not None:
        entry.start_tolerance, entry.decays = adapter_cls.start_tolerance, adapter_cls.decays


def _register_tuner(
    name: str, variant: Callable[[Method, Mapping[str, Any]], Method], **facts: Any
) -> Callable[[Tuner], Tuner]:
    """Register a tuner that is generated for each inner method, as a decorator."""

    def add(tuner: Tuner) -> Tuner:
        check_free(name, tuner)
        # PEFT reads the prefix, the config the name (for its PEFT type)
        tuner.prefix, tuner.config_cls.method = f"petl_{name}_", name
        add_method(f"petl_{name}", tuner.prefix, tuner.config_cls, tuner)
        entry: Method = Method(name=name, tuner_cls=tuner, own=True, lacks=tuner.lacks, **facts)
        vars(entry).update(config_cls=tuner.config_cls, variant=partial(variant, entry))
        METHODS[name] = entry
        return tuner

    return add
