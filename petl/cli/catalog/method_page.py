"""The page of a method, an extra loss or a recipe, which `petl show NAME` prints."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from petl.cli.catalog.recipes import Recipe, list_recipes, paper_of, parts_of, recipe
from petl.cli.catalog.verdicts import verdict_lines
from petl.core.losses import Loss
from petl.core.method import Method
from petl.core.registry import METHODS
from petl.core.support import Capability
from petl.errors import UnknownNameError, did_you_mean
from petl.experiments.reports.fields import Field, describe_inner_fields, fields_of
from petl.experiments.reports.formatting import as_yaml
from petl.system.imports.tables import LOSSES
from petl.system.settings.command_line import config_file, preset_of, shown_path


@dataclass(frozen=True)
class Page:
    """The description of a method, a loss or a recipe.

    Attributes:
        kind: "method", "loss" or "recipe".
        facts: lines to print below the paper; the last ones are the usage.
        file: the YAML file that sets the presets of the fields.
        fields: the fields that a user can set.
        more: further information, or "".
        inner: the inner method, of a method that wraps another one; else "".
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
        """Return the field called `name`.

        Raises:
            UnknownNameError: there is none; the message suggests similar names.
        """
        fields = {field.name: field for field in self.fields}
        if name not in fields:
            # a wrapper also takes the inner method's fields, which that method's own page describes
            inner = f"; `petl show {self.inner} {name}` describes that of its inner method"
            raise UnknownNameError(
                f"{self.kind} {self.name!r} has no field {name!r}{inner if self.inner else ''}"
                + did_you_mean(name, fields)
            )
        return fields[name]


def page_of(name: str) -> Page:
    """Return the page of the method, loss or recipe called `name`.

    Raises:
        UnknownNameError: there is none; the message suggests similar names.
    """
    # a name is unique across methods, losses and recipes: registration checks it
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
    from petl.cli.catalog.support import lines_of  # slow to import, and only this page needs it

    name, wraps_another = entry.name, entry.has_inner
    file = config_file("method", name)
    return Page(
        name,
        "method",
        entry.summary,
        entry.paper,
        [
            f"implemented by: {entry.by}",
            *lines_of(name),
            f"default learning rate (train.lr): {entry.lr:g}",
            *verdict_lines(name),
            *_usage(entry),
        ],
        # a method of another package may have no YAML yet
        f"configs/method/{name}.yaml" if file is None else shown_path(file),
        fields_of(name, preset_of(name)),
        describe_inner_fields(entry) if wraps_another else "",
        # of a wrapper without fields: the default inner method
        entry.variant({}).inner,
    )


def _usage(entry: Method) -> list[str]:
    """Return how to use a method, in lines."""
    call = f'petl.wrap(model, "{entry.name}", ...)'
    reason = entry.lacking(Capability.TRAIN)
    if reason:
        return [f"not in petl train: {reason}", f"usage: {call}"]
    return [f"usage: petl train +method={entry.name}, or {call}"]


def _page_of_loss(entry: Loss) -> Page:
    name = entry.name
    return Page(
        name,
        "loss",
        entry.summary,
        entry.paper,
        [
            "an extra loss, for any method",
            *verdict_lines(name),
            f"usage: petl train +method=NAME +loss={name} loss.FIELD=VALUE,",
            f'  or petl.wrap(model, "{name}", method="lora", method_config={{"r": 8}}, ...),',
            "  or, for an existing PeftModel,",
            f'  petl.losses.attach(model, petl.losses.build_loss("{name}", ...))',
        ],
        f"configs/loss/{name}.yaml",
        fields_of(name, preset_of(name)),
    )


def _page_of_recipe(entry: Recipe) -> Page:
    parts = {"method": entry.method, "loss": entry.loss}
    # a recipe may have no loss
    parts = {group: settings for group, settings in parts.items() if settings is not None}
    names = {group: settings["name"] for group, settings in parts.items()}
    fields = [
        # as on the command line: method.r, loss.weight
        replace(field, name=f"{group}.{field.name}")
        for group, settings in parts.items()
        for field in fields_of(names[group], settings)
        if field.name in settings  # the others are those of the method or loss alone
    ]
    others = " ".join(f"{key}={as_yaml(value)}" for key, value in entry.others.items())
    also = [f"also sets: {others}"]
    return Page(
        entry.name,
        "recipe",
        entry.summary,
        paper_of(entry),
        [
            *([entry.more] if entry.more else []),
            f"a recipe: {parts_of(entry)}",
            *(also if entry.others else []),
            f"usage: petl train +method={entry.name}, or {_call(parts, fields)}",
        ],
        shown_path(entry.file),
        fields,
        "all fields: " + ", ".join(f"`petl show {name}`" for name in names.values()),
    )


def _call(parts: Mapping[str, Mapping[str, object]], fields: Sequence[Field]) -> str:
    """The call of `petl.wrap` that equals a recipe, with the fields that it sets."""
    # arguments by part, since a loss nests those of its method
    chosen = {group: {} for group in parts}
    for field in fields:
        group, _, name = field.name.partition(".")
        if field.preset is not None:  # else it is the default, which the call can omit
            chosen[group][name] = parts[group][name]
    name, fields_to_set = parts["method"]["name"], chosen["method"]
    if "loss" in parts:  # `petl.wrap` of a loss wraps its method as well
        fields_to_set = {"method": name, "method_config": fields_to_set, **chosen["loss"]}
        name = parts["loss"]["name"]
    arguments = ["model", repr(name), *(f"{key}={value!r}" for key, value in fields_to_set.items())]
    return f"petl.wrap({', '.join(arguments)})"
