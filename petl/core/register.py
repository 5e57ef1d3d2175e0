"""Register a method, and generate the tuner class that PEFT needs for its type."""

from collections.abc import Callable
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
    if isinstance(method_cls, str):  # a tuner, which derives from `MethodTuner`
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


def _register_tuner(name: str, variant: Any = None, **facts: Any) -> Callable[[Tuner], Tuner]:
    """Register a tuner that is not yet a `Method`, as a decorator."""

    def add(tuner: Tuner) -> Tuner:
        check_free(name, tuner)
        # PEFT reads the prefix, MethodConfig the name (for its PEFT type)
        tuner.prefix, tuner.config_cls.method = f"petl_{name}_", name
        add_method(f"petl_{name}", tuner.prefix, tuner.config_cls, tuner)
        known = vars(getattr(tuner, "method", None) or Method())
        entry = Method(**{**known, **facts}, name=name, config_cls=tuner.config_cls)
        entry.tuner_cls, entry.lacks = tuner, getattr(tuner, "lacks", {})
        if variant is not None:
            entry.variant = partial(variant, entry)
        if hasattr(tuner, "on_wrap"):
            entry.calibrate = lambda c: tuner.on_wrap(c.model, c.config, c.calibration)
        for fact, hook in {"calibration": "needs_data", "computed": "is_computed"}.items():
            if hasattr(tuner, fact):
                setattr(entry, hook, getattr(tuner, fact))
        _settle(entry)
        if variant is None:
            tuner.method = entry
        METHODS[name] = entry
        return tuner

    return add
