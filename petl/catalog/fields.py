"""The fields of methods and losses, as their configs tell of them: nothing is kept twice."""

import dataclasses
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from peft import PeftConfig

from petl.core.registry import METHODS, get
from petl.core.spec.method import Method

# fields that PEFT and train.py fill in
BOOKKEEPING = frozenset(field.name for field in dataclasses.fields(PeftConfig))
ENTRY = re.compile(r"^ {4}(\w+)\s*(?:\(.*\))?:\s*(.*)$")  # of a docstring's "Args:"
LINK = re.compile(r"\[`?([^\]`]+)`?\]\(([^)]*)\)")  # [text](address) of Markdown
LONG = 160  # characters after which a meaning is cut at the end of its sentence
UNDOCUMENTED = "(PEFT does not say)"


@dataclass(frozen=True)
class Field:
    """One field of a config.

    Attributes:
        default: what `petl.wrap` takes if it is not given, as YAML writes it.
        preset: what the YAML sets instead, as YAML writes it; None: the same.
    """

    name: str
    type: str
    default: str
    preset: str | None
    meaning: str

    @property
    def gist(self) -> str:
        """The meaning, cut at the end of the sentence that makes it long."""
        end = re.compile(r"(?<=[^.][.!?])\s").search(self.meaning, LONG - 60)
        if len(self.meaning) <= LONG or end is None:
            return self.meaning
        return f"{self.meaning[: end.start()]} [...]"


def fields_of(name: str, preset: Mapping[str, Any]) -> list[Field]:
    """The fields of a method or loss that take a value from its user, in the order of its config.

    Args:
        name: one of `petl.list_methods()` or `petl.list_losses()`.
        preset: the settings of its YAML.

    Raises:
        UnknownNameError: there is neither; the message names the nearest ones.
    """
    config_cls = get(name)
    defaults = METHODS[name].defaults if name in METHODS else {}
    types = get_type_hints(config_cls)
    return [
        _describe(config_cls, field, types[field.name], defaults, preset)
        for field in dataclasses.fields(config_cls)
        if field.init and field.name not in BOOKKEEPING and types[field.name] is not NoneType
    ]


def about_inner(entry: Method) -> str:
    """Lines on the fields that a method over another has beside its own."""
    usual = entry.given({})
    own = ", ".join(f"{key}={as_yaml(value)}" for key, value in usual.inner_defaults.items())
    return (
        "\nThe inner method's fields come beside these; petl show INNER lists them.\n"
        f"Set one by +method.FIELD=VALUE, or petl.wrap(model, {entry.name!r}, FIELD=VALUE, ...).\n"
        "One that is not set: what configs/method/INNER.yaml says; in petl.wrap, INNER's default.\n"
        f"With inner={usual.inner} it is instead: {own}"
    )


def _describe(
    config_cls: type,
    field: dataclasses.Field,
    kind: Any,
    defaults: Mapping[str, Any],
    preset: Mapping[str, Any],
) -> Field:
    default = defaults.get(field.name, _default(field))
    given = preset.get(field.name, default)
    return Field(
        name=field.name,
        type=_type_name(kind),
        default=as_yaml(default),
        preset=None if as_yaml(given) == as_yaml(default) else as_yaml(given),
        meaning=meaning(config_cls, field),
    )


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _type_name(kind: Any) -> str:
    if get_origin(kind) in (Union, UnionType):
        parts = sorted(get_args(kind), key=lambda part: part is NoneType)
        return " | ".join(dict.fromkeys(map(_type_name, parts)))
    if get_origin(kind) is Literal:
        options = get_args(kind)
        return " | ".join(map(repr, options)) if len(options) < 4 else type(options[0]).__name__
    if kind is NoneType:
        return "null"
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", inspect.formatannotation(kind))


def as_yaml(value: Any) -> str:
    """A value as it is written after `method.FIELD=`."""
    try:
        plain = sorted(value) if isinstance(value, set) else value
        return plain if isinstance(plain, str) else json.dumps(plain)
    except TypeError:
        return str(value)  # a config inside a config


def meaning(config_cls: type, field: dataclasses.Field) -> str:
    """What a field means: our own words, or those of PEFT's docstring, or of PEFT's metadata."""
    text = field.metadata.get("help", "")
    text = text if isinstance(text, str) else " ".join(text)  # PEFT has a stray comma or two
    owner = next(cls for cls in config_cls.__mro__ if field.name in inspect.get_annotations(cls))
    if not owner.__module__.startswith("petl."):
        documented = (_arguments(cls).get(field.name) for cls in config_cls.__mro__)
        text = next(filter(None, documented), text)
    text = re.sub(r"</?a\b[^>]*>", "", LINK.sub(r"\1", text))
    return " ".join(text.split()) or UNDOCUMENTED


def _arguments(config_cls: type) -> dict[str, str]:
    """The "Args:" of a class docstring: text by name."""
    texts: dict[str, str] = {}
    name = None
    for line in inspect.cleandoc(config_cls.__doc__ or "").splitlines():
        head = ENTRY.match(line)
        if head:
            name, texts[head[1]] = head[1], head[2]
        elif name is not None and (line.startswith(" " * 8) or not line.strip()):
            texts[name] += f" {line.strip()}"
        else:
            name = None
    return texts
