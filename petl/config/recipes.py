"""Recipes: files of configs/method that configure more than a method, such as a loss."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from petl.config.compose import compose, config_dir
from petl.config.schema import flat, plain
from petl.core.registry import method
from petl.core.spec.losses import loss
from petl.errors import UnknownNameError, did_you_mean

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
    """

    name: str
    summary: str
    more: str
    paper: str
    method: Mapping[str, Any]
    loss: Mapping[str, Any] | None
    others: Mapping[str, Any]


def list_recipes() -> list[str]:
    """Return the names of all recipes, sorted."""
    files = (config_dir() / "method").glob("*.yaml")
    return sorted(file.stem for file in files if file.read_text().startswith(MARK))


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
    comment = _comment(config_dir() / "method" / f"{name}.yaml")
    return Recipe(name, *comment, method, loss, others)


def _comment(file: Path) -> tuple[str, str, str]:
    """Return first sentence (without full stop), remaining text and paper of a file's comment."""
    lines = list(takewhile(lambda line: line.startswith("#"), file.read_text().splitlines()[1:]))
    paper = lines.pop().removeprefix(PAPER) if lines and lines[-1].startswith(PAPER) else ""
    text = " ".join(line.removeprefix("#").strip() for line in lines)
    first, _, rest = re.sub(r"\.(\s|$)", "\n", text, count=1).partition("\n")
    return first, rest, paper


def paper_of(entry: Recipe) -> str:
    """Return the paper of a recipe: its own, or that of its loss, or that of its method."""
    if entry.paper:
        return entry.paper
    if entry.loss is None:
        return method(entry.method["name"]).paper
    return loss(entry.loss["name"]).paper


def parts_of(entry: Recipe) -> str:
    """Return the parts of a recipe, such as "method lora with loss density"."""
    with_loss = "" if entry.loss is None else f" with loss {entry.loss['name']}"
    return f"method {entry.method['name']}{with_loss}"
