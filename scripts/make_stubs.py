"""Write petl/signatures.pyi: a signature of `petl.wrap`, `build_config` and `get` for each method.

With it a type checker refuses `petl.wrap(model, "molla")` and `petl.wrap(model, "mola", rr=8)`, and
an editor completes names and fields. It is made of the registry; scripts/support.py runs it too.
"""

import dataclasses
import textwrap
from collections.abc import Mapping
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import peft

from petl.core.losses import list_losses, loss
from petl.core.method import Method
from petl.core.registry import method
from petl.core.spec.checks import hints_of
from petl.methods import BUILT_IN

TARGET = Path(__file__).parents[1] / "petl" / "signatures.pyi"
MADE_WITH = f"PEFT {version('peft')}"
HEAD = f'''\
"""Signatures of `petl.wrap`, `petl.build_config` and `petl.get`, one for each method.

Written by scripts/make_stubs.py from the registry, with {MADE_WITH}; tests compare the two. The
code is in petl/core/registry.py. Names that only run time knows, and methods of other packages,
have no signature here: give `petl.wrap` a config, such as `petl.method(name).config_cls(r=4)`.
"""
# ruff: noqa
# fmt: off

from typing import Any, Literal, overload

import peft
from peft import PeftConfig, PeftModel
from torch import nn

from petl.core.losses import LossConfig
from petl.core.method import Calibration
'''
SET_BY_PEFT = {"peft_type", "auto_mapping", "peft_version"}
WRAP = ['adapter_name: str = "default"', "calibration: Calibration | None = None"]


def text() -> str:
    """The content of the stub."""
    losses = {name: loss(name) for name in list_losses()}
    losses = {k: entry for k, entry in losses.items() if entry.config_cls.__module__[:5] == "petl."}
    configs = {entry.config_cls for entry in (*map(method, BUILT_IN), *losses.values())}
    imports = sorted(
        f"from {cls.__module__} import {cls.__name__}"
        for cls in configs
        if not hasattr(peft, cls.__name__) or cls.__module__.startswith("petl.")
    )
    parts = [HEAD + "\n".join(imports)]
    for name in BUILT_IN:
        entry = method(name)
        parts.append(overload("wrap", name, [*WRAP, *keywords(entry)], "PeftModel", entry.summary))
    for name, entry in losses.items():
        fields = [*WRAP, *fields_of(entry.config_cls, {})]
        parts.append(overload("wrap", name, fields, "PeftModel", entry.summary))
    given = f"name: PeftConfig | LossConfig, *, {', '.join(WRAP)}"
    about = "Any method or loss, by a config of it."
    parts.append(
        f'@overload\ndef wrap(\n    model: nn.Module, {given}\n) -> PeftModel:\n    """{about}"""'
    )
    for name in BUILT_IN:
        entry = method(name)
        result = "PeftConfig" if entry.has_inner else class_name(entry.config_cls)
        parts.append(overload("build_config", name, keywords(entry), result, entry.summary))
    for name, entry in {**{name: method(name) for name in BUILT_IN}, **losses}.items():
        result = f"type[{class_name(entry.config_cls)}]"
        parts.append(f'@overload\ndef get(name: Literal["{name}"]) -> {result}: ...')
    return "\n\n".join(parts) + "\n"


def overload(function: str, name: str, fields: list[str], result: str, summary: str) -> str:
    """One signature of a function, with a keyword on each line and the summary as docstring."""
    first = ["model: nn.Module"] if function == "wrap" else []
    lines = [*first, f'name: Literal["{name}"]', "*", *fields]
    body = textwrap.fill(
        f'"""{summary[0].upper()}{summary[1:].rstrip(".")}."""',
        100,
        initial_indent=" " * 4,
        subsequent_indent=" " * 4,
    )
    arguments = "".join(f"    {line},\n" for line in lines)
    return f"@overload\ndef {function}(\n{arguments}) -> {result}:\n{body}"


def keywords(entry: Method) -> list[str]:
    """The keywords of a method; one over another takes the fields of any method as well.

    `**fields: Any` would be shorter, but type checkers would then take an unknown field of any
    method for one of that method, and report the name instead.
    """
    own = fields_of(entry.config_cls, entry.defaults)
    if not entry.has_inner:
        return own
    inner = [line for name in BUILT_IN for line in fields_of(method(name).config_cls, {})]
    names = {line.partition(":")[0] for line in inner} - {line.partition(":")[0] for line in own}
    return [*own, *(f"{name}: Any = ..." for name in sorted(names))]


def fields_of(config_cls: type[Any], defaults: Mapping[str, Any]) -> list[str]:
    """`field: type = default` for each field that takes a value; `defaults` are the method's."""
    lines = []
    types = hints_of(config_cls)
    for field in dataclasses.fields(config_cls):
        kind = types[field.name]
        if not field.init or kind is NoneType or field.name in SET_BY_PEFT:
            continue
        if field.name.endswith("alpha") and kind is int:
            kind = float  # PEFT's annotation; a fraction is allowed
        required = field.default is field.default_factory is dataclasses.MISSING
        value = as_source(defaults.get(field.name, field.default))
        lines.append(f"{field.name}: {type_name(kind)}" + ("" if required else f" = {value}"))
    return lines


def as_source(value: Any) -> str:
    """A default as Python writes it, `...` for what it cannot write in a line."""
    simple = isinstance(value, str | int | float | None) and not isinstance(value, Enum)
    return repr(value) if simple else "..."


def type_name(kind: Any) -> str:
    """A type as it is written in the stub."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        # of a choice of words next to other types, PEFT's annotations leave some out
        words = [str if get_origin(part) is Literal else part for part in parts]
        # sorted, None last: typing caches equal unions, so their order depends on the imports
        names = sorted(map(type_name, words), key=lambda name: (name == "None", name))
        return " | ".join(dict.fromkeys(names))
    if origin is Literal:
        return f"Literal[{', '.join(map(repr, parts))}]"
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(type_name, parts))}]"
    return {NoneType: "None", Any: "Any", dict: "dict[str, Any]"}.get(kind) or class_name(kind)


def class_name(cls: type) -> str:
    """The name of a class, as the imports of the stub have it; Any for what they have not."""
    if cls.__module__ == "builtins" or cls.__module__.startswith("petl."):
        return cls.__name__
    return f"peft.{cls.__name__}" if getattr(peft, cls.__name__, None) is cls else "Any"


def write() -> Path:
    """Write the stub; its file."""
    TARGET.write_text(text())
    return TARGET


if __name__ == "__main__":
    print(f"written: {write()}")
