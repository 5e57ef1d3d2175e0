"""Methods and extra losses by name, each imported when it is looked up first.

Their names are in petl/methods/index.json, which `python scripts/support.py` writes and a test
compares with the code. So a name is known, and a misspelt one answered, without torch.
"""

import json
from collections.abc import Iterator, Mapping, MutableMapping
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar, get_type_hints

from petl.system.values import FREE, Rule, bounded, one_of

T = TypeVar("T")
INDEX = Path(__file__).parents[2] / "methods" / "index.json"


class Indexed(NamedTuple):
    """What is known of a method or loss that is not imported.

    Attributes:
        module: whose import registers it.
        config: the name of its config's class.
        fields: of its config, each with its type, if Python's own types make it, and its rule:
            `options`, or the arguments of `bounded`.
        prefix: of its tensors, for a type that petl adds to PEFT's; else "".
    """

    module: str
    config: str
    fields: Mapping[str, Mapping[str, Any]]
    prefix: str = ""

    def check(self, group: str, settings: Mapping[str, object]) -> None:
        """Raise InputError for a value that a field may not have, as far as the index knows.

        Args:
            group: the word before the dot in the message: "method" for `method.r`.
        """
        known = {name: self.fields[name] for name in settings if name in self.fields}
        words = {name: field["type"] for name, field in known.items() if "type" in field}
        hints = get_type_hints(SimpleNamespace(__annotations__=words))
        for name, field in known.items():
            rule_in(field).check(f"{group}.{name}", settings[name], hints.get(name, Any))


def rule_in(field: Mapping[str, Any]) -> Rule:
    """Return the rule of a field of the index."""
    bounds = {name: value for name, value in field.items() if name not in ("type", "options")}
    if "options" in field:
        return one_of(*field["options"])
    return bounded(**bounds) if bounds else FREE


class LazyTable(MutableMapping[str, T]):
    """Values by name: those of the index, and those that other packages have registered.

    Attributes:
        kind: "methods" or "losses", as in the index.
        loaded: those that are imported.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.loaded: dict[str, T] = {}

    @cached_property
    def index(self) -> dict[str, Indexed]:
        """What is known of petl's own."""
        content = json.loads(INDEX.read_text())[self.kind]
        return {name: Indexed(**entry) for name, entry in content.items()}

    def __getitem__(self, name: str) -> T:
        if name not in self.loaded and name in self.index:
            import_module(self.index[name].module)  # which adds it
        return self.loaded[name]

    def __setitem__(self, name: str, value: T) -> None:
        self.loaded[name] = value

    def __delitem__(self, name: str) -> None:
        del self.loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self.loaded or name in self.index

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.index.keys() | self.loaded.keys()))

    def __len__(self) -> int:
        return len(self.index.keys() | self.loaded.keys())


METHODS: LazyTable[Any] = LazyTable("methods")  # of `petl.core.method.Method`
LOSSES: LazyTable[Any] = LazyTable("losses")  # of `petl.core.losses.Loss`


def check_free(name: str, newcomer: type) -> None:
    """Raise ValueError if a method or loss has this name."""
    taken = METHODS.get(name) or LOSSES.get(name)  # `wrap` and `petl show` accept either
    if taken is not None:
        raise ValueError(
            f"name {name!r} is taken by {_full_name(taken.config_cls)}; choose another name "
            f"for {_full_name(newcomer)}"
        )


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
