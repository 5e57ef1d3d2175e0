"""Extra losses that any method can be trained with, and their registry."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from peft import PeftConfig

from petl.core.spec.config import config_field, require_effect
from petl.core.spec.facts import facts_of
from petl.core.support import Capability, Part
from petl.core.types import Fields
from petl.errors import InputError, UnknownNameError, choose, did_you_mean
from petl.system.imports.tables import LOSSES
from petl.system.values import check_rules

# values of init_lora_weights, or how they begin ("pissa_niter_16")
MODIFIES_BASE_WEIGHTS = ("pissa", "olora", "corda", "lora_ga", "loftq")


def modifies_base_weights(config: PeftConfig) -> bool:
    """Return True if the initialization of an adapter of this config changes the base weights.

    Such an adapter gives correct outputs on the original base only if it is saved relative to its
    initial state: `save_pretrained(..., path_initial_model_for_weight_conversion=START)`.
    """
    initialization = facts_of(config).init_lora_weights
    return isinstance(initialization, str) and initialization.startswith(MODIFIES_BASE_WEIGHTS)


Controller = TypeVar("Controller", bound=type)


WRAP_ONLY = ("method", "method_config")  # fields that only `petl.wrap(model, LOSS)` reads


@dataclass
class LossConfig:
    """Base of the configs of extra losses; its fields choose the method in `petl.wrap`.

    A loss adds its own fields, each a `config_field`, from which `petl show` reads its meaning.
    """

    name: ClassVar[str]  # set by `register_loss`

    method: str = config_field("only for petl.wrap: the method that trains; any", "lora")
    method_config: Fields = config_field("only for petl.wrap: fields of that method", {})

    def __post_init__(self) -> None:
        check_rules(self)
        self.check()
        require_effect(self, self.name)

    def check(self) -> None:
        """Raise InputError for values that are wrong together; bounds are checked before."""

    def check_driven(self) -> None:
        """Raise InputError for a value that is wrong where petl's `Lifecycle` drives the training.

        That is in petl's own loop and with `petl.Callback`.
        """


@dataclass(frozen=True)
class Loss:
    """An extra loss's entry in the registry.

    Attributes:
        name: the word after `+loss=`.
        config_cls: its config.
        controller_cls: called with (PeftModel, config), it adds itself to the model; its class
            method `check(model, config)` raises for a base model that it does not support, before
            anything is changed. `lacks` are its rows of the table of petl/core/support.py.
        summary: one sentence.
        paper: authors, year, title or venue, arXiv id.
    """

    name: str
    config_cls: type[LossConfig]
    controller_cls: Any
    summary: str
    paper: str


def register_loss(name: str, *, summary: str, paper: str) -> Callable[[Controller], Controller]:
    """Register a controller as extra loss `name`, the word after `+loss=`.

    A decorator for a class whose `config_cls` is set.

    Raises:
        ValueError: `name` is taken.
    """

    def add(controller: Any) -> Any:
        taken = LOSSES.get(name)
        if taken is not None:
            raise ValueError(
                f"loss name {name!r} is taken by {taken.config_cls.__module__}; choose another name"
            )
        # so that a config alone leads back to its loss
        controller.config_cls.name = name
        LOSSES[name] = Loss(name, controller.config_cls, controller, summary, paper)
        return controller

    return add


def list_losses() -> list[str]:
    """Return the names of all extra losses, sorted."""
    return sorted(LOSSES)


def loss(name: str) -> Loss:
    """Return the registry's entry for the loss called `name`.

    Raises:
        UnknownNameError: there is none; the message suggests the closest matches.
    """
    return choose(LOSSES, name, "loss")


def build_loss(name: str, **fields: Any) -> LossConfig:
    """Build the config of loss `name` with these fields.

    Raises:
        InputError: the loss has no such field (the message suggests the closest matches), or cannot
            use the value.
    """
    config_cls = loss(name).config_cls
    known = {field.name for field in dataclasses.fields(config_cls)}
    for given in fields:
        if given not in known:
            raise UnknownNameError(
                f"loss {name!r} has no field {given!r}" + did_you_mean(given, known)
            )
    try:
        return config_cls(**fields)
    except InputError:
        raise
    # such as a comparison of a string with a number in `check`
    except (TypeError, ValueError) as error:
        raise InputError(f"loss {name!r}: {error}") from error


def loss_part(config: LossConfig) -> Part:
    """Return an extra loss as a part of a choice."""
    lacks = loss(config.name).controller_cls.lacks
    return Part(f"loss={config.name}", (Capability.EXTRA_LOSS,), lacks, config)
