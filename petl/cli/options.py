"""Options of a command as a dataclass, from which its parser is made.

Each field is one option: its default, its meaning, and how its text is read. argparse reads the
command line underneath; further keywords of a field go to its `add_argument`.
"""

import argparse
import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from importlib import import_module
from typing import Any, ClassVar

from petl.system.values import FREE, field, is_required, one_of

MANY = ("*", "+")  # numbers of values, as argparse writes them


@dataclass(kw_only=True)
class Options:
    """Options that every command has.

    Attributes:
        ONE_OF: names of options of which exactly one has to be given.
        words: the command line, for commands that start processes with it.
    """

    ONE_OF: ClassVar[tuple[str, ...]] = ()
    words: list[str] = dataclasses.field(default_factory=list)


@dataclass(frozen=True)
class Command:
    """A command of `petl`.

    Attributes:
        options: the dataclass of its options, whose docstring is the help text.
        function: "module:function" in petl.cli, imported when the command runs.
        usage: instead of the usage line made from the options.
    """

    options: type[Options]
    function: str
    usage: str | None = None

    @property
    def text(self) -> str:
        """The help text, of which the first line says what the command does."""
        return inspect.cleandoc(self.options.__doc__ or "")

    def run(self, options: Options) -> None:
        """Run the command."""
        module, _, name = self.function.partition(":")
        getattr(import_module(f"petl.cli.{module}"), name)(options)


def argument(
    text: str, parse: Callable[[str], object] = str, default: object = MISSING, **keywords: object
) -> Any:
    """Declare an argument without a flag; with `default`, it may be left out.

    Args:
        parse: returns the value of a text, as in `add_argument(type=...)`.
    """
    return field(default, FREE, text, flag=False, keywords={"type": parse, **keywords})


def option(
    text: str, parse: Callable[[str], object] = str, default: object = None, **keywords: object
) -> Any:
    """Declare an option with a value; with MISSING as the default it is required."""
    return field(default, FREE, text, flag=True, keywords={"type": parse, **keywords})


def choice(text: str, options: tuple[str, ...], default: str | None = None) -> Any:
    """Declare an option whose value is one of a few words."""
    return field(default, one_of(*options), text, flag=True, keywords={"choices": options})


def switch(text: str) -> Any:
    """Declare an option without a value, which turns something on."""
    return field(False, FREE, text, flag=True, keywords={"action": "store_true"})


def either(text: str) -> Any:
    """Declare the options --NAME and --no-NAME; the value is None without them."""
    keywords = {"action": argparse.BooleanOptionalAction}
    return field(None, FREE, text, flag=True, keywords=keywords)


def add_options(parser: argparse.ArgumentParser, kind: type[Options]) -> None:
    """Add the options of a command to its parser."""
    declared = [each for each in dataclasses.fields(kind) if "keywords" in each.metadata]
    exclusive = parser.add_mutually_exclusive_group(required=True) if kind.ONE_OF else parser
    # a base class may have an argument of any number, which has to come last
    for each in sorted(declared, key=lambda each: each.metadata["keywords"].get("nargs") in MANY):
        keywords: dict[str, Any] = {"help": each.metadata["help"], **each.metadata["keywords"]}
        if not is_required(each):
            default = each.default if each.default_factory is MISSING else each.default_factory()
            keywords["default"] = default
            if default:
                words = default if isinstance(default, list) else [default]
                keywords["help"] += f" (default: {','.join(map(str, words))})"
        if not each.metadata["flag"]:
            keywords.setdefault("metavar", each.name.upper())
            parser.add_argument(each.name, **keywords)
            continue
        if is_required(each):
            keywords["required"] = True
        group = exclusive if each.name in kind.ONE_OF else parser
        # `as` is a word of Python: a name may end with an underscore
        word = each.name.rstrip("_").replace("_", "-")
        group.add_argument(f"--{word}", dest=each.name, **keywords)
