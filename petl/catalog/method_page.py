"""What `petl show NAME` says: a page of a method, of an extra loss or of a recipe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from petl.catalog.fields import Field, about_inner, as_yaml, fields_of
from petl.config.compose import config_file, preset_of, shown_path
from petl.config.recipes import Recipe, list_recipes, recipe
from petl.core.registry import METHODS, method
from petl.core.spec.losses import LOSSES, Loss, loss
from petl.core.spec.method import Method
from petl.errors import UnknownNameError, did_you_mean


@dataclass(frozen=True)
class Page:
    """What `petl show NAME` says of a method, a loss or a recipe.

    Attributes:
        kind: "method", "loss" or "recipe".
        facts: lines to print below the paper; how it is used is the last of them.
        file: the YAML that sets the presets of the fields.
        fields: what takes a value from the user.
        more: where to read on, or "".
        inner: of a method over another, that method.
    """

    name: str
    kind: str
    summary: str
    paper: str
    facts: Sequence[str]
    file: str
    fields: Sequence[Field]
    more: str = ""
    inner: str = ""

    def field(self, name: str) -> Field:
        """The field called `name`.

        Raises:
            UnknownNameError: there is none; the message names the nearest ones.
        """
        found = {field.name: field for field in self.fields}
        if name not in found:
            of_inner = f"; petl show {self.inner} {name} asks for its inner method's"
            raise UnknownNameError(
                f"{self.kind} {self.name!r} has no field {name!r}{of_inner if self.inner else ''}"
                + did_you_mean(name, found)
            )
        return found[name]


def page_of(name: str) -> Page:
    """The page of whatever is called `name`.

    Raises:
        UnknownNameError: there is no such method, loss or recipe; the message names the nearest.
    """
    if name in METHODS:
        return _page_of_method(METHODS[name])
    if name in LOSSES:
        return _page_of_loss(LOSSES[name])
    recipes = list_recipes()
    if name in recipes:
        return _page_of_recipe(recipe(name))
    known = [*METHODS, *LOSSES, *recipes]
    raise UnknownNameError(f"no method, loss or recipe {name!r}{did_you_mean(name, known)}")


def _page_of_method(entry: Method) -> Page:
    name, can = entry.name, (entry.merges, entry.exports_lora)
    file = config_file("method", name)
    merges, exports = ("yes" if flag else "no" for flag in can)
    over = entry.variant is not None
    from petl.catalog.support import lines_of  # takes a moment, and only this page needs it

    capabilities = (
        "merges, and exports as LoRA, where its inner method does"
        if over
        else f"merges: {merges}; exports as LoRA: {exports}"
    )
    return Page(
        name,
        "method",
        entry.summary,
        entry.paper,
        [
            f"by {entry.by}; {capabilities}",
            *lines_of(name),
            f"train.lr if a run names none: {entry.lr:g}",
            f'use: python train.py +method={name}, or petl.wrap(model, "{name}", ...)',
        ],
        f"configs/method/{name}.yaml" if file is None else shown_path(file),
        fields_of(name, preset_of(name)),
        about_inner(entry) if over else "",
        entry.given({}).inner,
    )


def _page_of_loss(entry: Loss) -> Page:
    name = entry.name
    return Page(
        name,
        "loss",
        entry.summary,
        entry.paper,
        [
            "an extra loss: it goes with any method",
            f"use: python train.py +method=NAME +loss={name} loss.FIELD=VALUE,",
            f'  or petl.wrap(model, "{name}", method="lora", method_config={{"r": 8}}, ...),',
            "  or, on a PeftModel that is there already,",
            f'  petl.losses.attach(model, petl.losses.build_loss("{name}", ...))',
        ],
        f"configs/loss/{name}.yaml",
        fields_of(name, preset_of(name)),
    )


def _page_of_recipe(entry: Recipe) -> Page:
    parts = {"method": entry.method, "loss": entry.loss}
    parts = {group: settings for group, settings in parts.items() if settings is not None}
    names = {group: settings["name"] for group, settings in parts.items()}
    fields = [
        replace(field, name=f"{group}.{field.name}")
        for group, settings in parts.items()
        for field in fields_of(names[group], settings)
        if field.name in settings
    ]
    also = [f"sets as well: {' '.join(f'{k}={as_yaml(v)}' for k, v in entry.others.items())}"]
    return Page(
        entry.name,
        "recipe",
        entry.summary,
        paper_of(entry),
        [
            *([entry.more] if entry.more else []),
            f"a recipe: {made_of(entry)}",
            *(also if entry.others else []),
            f"use: python train.py +method={entry.name}, or {_call(parts, fields)}",
        ],
        f"configs/method/{entry.name}.yaml",
        fields,
        " and ".join(f"petl show {name}" for name in names.values()) + " tell of all their fields",
    )


def paper_of(entry: Recipe) -> str:
    """The paper of a recipe: its own, or that of its loss, or else of its method."""
    if entry.paper:
        return entry.paper
    if entry.loss is None:
        return method(entry.method["name"]).paper
    return loss(entry.loss["name"]).paper


def made_of(entry: Recipe) -> str:
    """What a recipe puts together, such as "method lora with loss density"."""
    with_loss = "" if entry.loss is None else f" with loss {entry.loss['name']}"
    return f"method {entry.method['name']}{with_loss}"


def _call(parts: Mapping[str, Mapping[str, Any]], fields: Sequence[Field]) -> str:
    """The `petl.wrap` that a recipe stands for, of the fields that it sets."""
    chosen = {group: {} for group in parts}
    for field in fields:
        group, _, name = field.name.partition(".")
        if field.preset is not None:
            chosen[group][name] = parts[group][name]
    name, given = parts["method"]["name"], chosen["method"]
    if "loss" in parts:
        given = {"method": name, "method_config": given, **chosen["loss"]}
        name = parts["loss"]["name"]
    arguments = ["model", repr(name), *(f"{key}={value!r}" for key, value in given.items())]
    return f"petl.wrap({', '.join(arguments)})"
