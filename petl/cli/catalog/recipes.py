"""Recipes: files of configs/method, petl's or the user's own, that are not those of a method.

They configure more than a method, such as a loss, or a method with other settings.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from petl.core.losses import loss
from petl.core.registry import METHODS, method
from petl.errors import UnknownNameError, did_you_mean
from petl.system.settings.command_line import config_file, options_of
from petl.system.settings.schema import flat, plain
from petl.training.compose import compose, raw

MARK = "# @package _global_"  # the first line of a recipe
PAPER = "# paper: "  # prefix of the last comment line, if the recipe has a paper of its own


@dataclass(frozen=True)
class Recipe:
    """The settings of `+method=NAME` where NAME is a recipe.

    Attributes:
        summary: the first sentence of the comment that its file begins with.
        more: the rest of that comment.
        paper: of the recipe itself; "" if it is that of its loss or method.
        method: the settings of the method, its name included.
        loss: the same of the loss; None without one.
        others: further settings that the recipe changes, such as "train.lr".
        file: its YAML.
    """

    name: str
    summary: str
    more: str
    paper: str
    method: Mapping[str, Any]
    loss: Mapping[str, Any] | None
    others: Mapping[str, Any]
    file: Path


def list_recipes() -> list[str]:
    """Return the names of all recipes, sorted."""
    return [name for name in options_of("method") if _is_recipe(name)]


def _is_recipe(name: str) -> bool:
    """True if configs/method/NAME.yaml configures more than the method NAME, or another one."""
    if name in METHODS:
        return False
    file = config_file("method", name)
    if file is not None and file.read_text().startswith(MARK):
        return True
    # else the YAML of a method, which may be that of a package that is not imported
    settings = raw("method", name)
    return "defaults" in settings or settings.get("name") in METHODS


def recipe(name: str) -> Recipe:
    """Return the recipe `name`, as `+method=NAME` composes it.

    Raises:
        UnknownNameError: there is none; the message suggests the closest matches.
    """
    names = list_recipes()
    if name not in names:
        raise UnknownNameError(f"no recipe {name!r}{did_you_mean(name, names)}")
    composed, without = compose([f"+method={name}"]), flat(plain(compose([])))
    settings = plain(composed)
    method, loss = settings.pop("method"), settings.pop("loss", None)
    settings.pop("recipe", None)  # the name again
    others = {key: value for key, value in flat(settings).items() if without.get(key) != value}
    file = config_file("method", name)
    assert file is not None  # it has just been composed
    return Recipe(name, *_comment(file), method, loss, others, file)


def _comment(file: Path) -> tuple[str, str, str]:
    """Return first sentence (without full stop), remaining text and paper of a file's comment."""
    text = file.read_text().removeprefix(MARK).lstrip("\n")
    lines = list(takewhile(lambda line: line.startswith("#"), text.splitlines()))
    paper = lines.pop().removeprefix(PAPER) if lines and lines[-1].startswith(PAPER) else ""
    text = " ".join(line.removeprefix("#").strip() for line in lines)
    first, _, rest = re.sub(r"\.(\s|$)", "\n", text, count=1).partition("\n")
    return first, rest, paper


def paper_of(entry: Recipe) -> str:
    """Return the paper of a recipe: its own, or that of its loss, or that of its method."""
    if entry.paper:
        return entry.paper
    if entry.loss is None:
        name = entry.method["name"]
        return method(name).paper if name in METHODS else ""  # of a package that is not imported
    return loss(entry.loss["name"]).paper


def parts_of(entry: Recipe) -> str:
    """Return the parts of a recipe, such as "method lora with loss density"."""
    with_loss = "" if entry.loss is None else f" with loss {entry.loss['name']}"
    return f"method {entry.method['name']}{with_loss}"
