"""The fields of methods and losses, read from their config classes: types, defaults, meanings."""

import dataclasses
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin

from peft import PeftConfig

from petl.core.method import Method
from petl.core.registry import METHODS, get
from petl.core.spec.blocks import MEANING
from petl.core.spec.checks import BLOCKS, config_hints
from petl.experiments.reports.formatting import as_yaml

# fields that PEFT and `petl train` fill in, not the user
BOOKKEEPING = frozenset(field.name for field in dataclasses.fields(PeftConfig))
ENTRY = re.compile(r"^ {4}(\w+)\s*(?:\(.*\))?:\s*(.*)$")  # of a docstring's "Args:"
LINK = re.compile(r"\[`?([^\]`]+)`?\]\(([^)]*)\)")  # [text](address) of Markdown
MAX_GIST = 160  # characters: longer meanings are cut after a sentence, to fit a table
UNDOCUMENTED = "(not documented by PEFT)"


@dataclass(frozen=True)
class Field:
    """One field of a config.

    Attributes:
        default: the default of `petl.wrap`, in YAML syntax.
        preset: the value that configs/ sets for `petl train`, in YAML syntax; None: the default.
    """

    name: str
    type: str
    default: str
    preset: str | None
    meaning: str

    @property
    def gist(self) -> str:
        """The meaning, cut after the sentence that makes it too long for a table."""
        # a period after two other periods belongs to an ellipsis, not to the end of a sentence
        end = re.compile(r"(?<=[^.][.!?])\s").search(self.meaning, MAX_GIST - 60)
        if len(self.meaning) <= MAX_GIST or end is None:
            return self.meaning
        return f"{self.meaning[: end.start()]} [...]"


def fields_of(name: str, preset: Mapping[str, object]) -> list[Field]:
    """Return the fields of a method or loss that a user can set, in the order of its config.

    Args:
        name: one of `petl.list_methods()` or `petl.list_losses()`.
        preset: the settings of its YAML file.

    Raises:
        UnknownNameError: there is no such method or loss; the message suggests similar names.
    """
    config_cls = get(name)
    defaults = METHODS[name].defaults if name in METHODS else {}
    types = config_hints(config_cls)
    return [
        _describe(config_cls, field, types[field.name], defaults, preset)
        for field in dataclasses.fields(config_cls)
        # a field of type None is one of a parent class that the method has switched off
        if field.init and field.name not in BOOKKEEPING and types[field.name] is not NoneType
    ]


def describe_inner_fields(entry: Method) -> str:
    """Return how to set the fields of the inner method, for a method that wraps another one."""
    default = entry.variant({})
    if not default.inner:  # none, unless one is chosen
        return (
            "\nWith inner=NAME, the fields of that method can be set, too; `petl show NAME` lists "
            "them,\nand `petl train` has the defaults of configs/method/NAME.yaml."
        )
    own = ", ".join(f"{key}={as_yaml(value)}" for key, value in default.inner_defaults.items())
    return (
        "\nIn addition, the fields of the inner method can be set; `petl show INNER` lists them.\n"
        "Set one with +method.FIELD=VALUE, or "
        f"petl.wrap(model, {entry.name!r}, FIELD=VALUE, ...).\n"
        "Their defaults: configs/method/INNER.yaml (`petl train`); those of INNER for petl.wrap.\n"
        f"With inner={default.inner} the defaults are: {own}"
    )


def _describe(
    config_cls: type,
    field: dataclasses.Field,
    annotation: object,
    defaults: Mapping[str, object],
    preset: Mapping[str, object],
) -> Field:
    default = defaults.get(field.name, _default(field))
    value = preset.get(field.name, default)
    return Field(
        name=field.name,
        type=_type_name(annotation),
        default=as_yaml(default),
        preset=None if as_yaml(value) == as_yaml(default) else as_yaml(value),
        meaning=meaning(config_cls, field),
    )


def _default(field: dataclasses.Field) -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _type_name(annotation: object) -> str:
    """Format an annotation: "list[str] | null"; short literals by their values."""
    if get_origin(annotation) in (Union, UnionType):
        # sorted, null last: typing caches equal unions, so their order depends on the imports
        names = sorted(map(_type_name, get_args(annotation)), key=lambda n: (n == "null", n))
        return " | ".join(dict.fromkeys(names))
    if get_origin(annotation) is Literal:
        options = get_args(annotation)
        return " | ".join(map(repr, options)) if len(options) < 4 else type(options[0]).__name__
    if annotation is NoneType:
        return "null"
    # without the modules of classes
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", inspect.formatannotation(annotation))


def meaning(config_cls: type, field: dataclasses.Field) -> str:
    """Return the meaning of a field: petl's metadata, or PEFT's docstring, or PEFT's metadata."""
    if field.name == BLOCKS:  # of PEFT's methods, too, `petl.wrap` takes a share
        return MEANING
    text = field.metadata.get("help", "")
    text = (
        text if isinstance(text, str) else " ".join(text)
    )  # a stray comma makes some of PEFT's tuples
    # the class that declares the field decides whose words describe it
    owner = next(cls for cls in config_cls.__mro__ if field.name in inspect.get_annotations(cls))
    if not owner.__module__.startswith("petl."):
        # a subclass may document a field of its parent again, more precisely
        documented = (_arguments(cls).get(field.name) for cls in config_cls.__mro__)
        text = next(filter(None, documented), text)
    text = re.sub(r"</?a\b[^>]*>", "", LINK.sub(r"\1", text))
    return " ".join(text.split()) or UNDOCUMENTED


def _arguments(config_cls: type) -> dict[str, str]:
    """Parse the "Args:" of a class docstring: text by name."""
    texts: dict[str, str] = {}
    name = None
    for line in inspect.cleandoc(config_cls.__doc__ or "").splitlines():
        entry = ENTRY.match(line)
        if entry:
            name, texts[entry[1]] = entry[1], entry[2]
        # continuation lines are indented deeper; a blank line may separate paragraphs
        elif name is not None and (line.startswith(" " * 8) or not line.strip()):
            texts[name] += f" {line.strip()}"
        else:
            name = None
    return texts
