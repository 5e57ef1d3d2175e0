"""The table of extra losses: terms that any method can be trained with."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from petl.core.compat import calls_past_hooks
from petl.core.spec.config import config_field
from petl.errors import InputError, UnknownNameError, UnsupportedError, did_you_mean

Controller = TypeVar("Controller", bound=type)


WRAP_ONLY = ("method", "method_config")  # fields that only `petl.wrap(model, LOSS)` reads


@dataclass
class LossConfig:
    """What every extra loss has: the method that `petl.wrap(model, LOSS, ...)` puts below it.

    A loss adds its own fields, each a `config_field`, from which `petl show` reads its meaning.
    """

    name: ClassVar[str]  # set by `register_loss`

    method: str = config_field("for petl.wrap alone: the method that trains; any", "lora")
    method_config: dict[str, Any] = config_field("for petl.wrap alone: fields of that method", {})

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise InputError for a value that the loss cannot use."""

    def check_driven(self) -> None:
        """Raise InputError for a value that is wrong where petl drives the training.

        It does in its own loop and through `petl.Callback`, by the `Lifecycle`.
        """


@dataclass(frozen=True)
class Loss:
    """What petl knows of an extra loss.

    Attributes:
        name: the word after `+loss=`.
        config_cls: its config.
        controller_cls: called with (PeftModel, config) it puts itself on the model; its class
            method `check(model, config)` refuses a base model before anything is changed.
        summary: one sentence.
        paper: authors, year, title or venue, arXiv id.
    """

    name: str
    config_cls: type[LossConfig]
    controller_cls: Any
    summary: str
    paper: str


LOSSES: dict[str, Loss] = {}


def register_loss(name: str, *, summary: str, paper: str) -> Callable[[Controller], Controller]:
    """Know a controller whose `config_cls` is set as `name`: its `+loss=` word.

    Raises:
        ValueError: `name` is taken.
    """

    def add(controller: Any) -> Any:
        if name in LOSSES:
            raise ValueError(f"loss {name!r} is taken by {LOSSES[name].config_cls.__module__}")
        controller.config_cls.name = name
        LOSSES[name] = Loss(name, controller.config_cls, controller, summary, paper)
        return controller

    return add


def list_losses() -> list[str]:
    """The names of all extra losses, sorted."""
    return sorted(LOSSES)


def loss(name: str) -> Loss:
    """What petl knows of the loss called `name`.

    Raises:
        UnknownNameError: there is none; the message names the nearest ones.
    """
    if name not in LOSSES:
        raise UnknownNameError(f"no loss {name!r}" + did_you_mean(str(name), LOSSES))
    return LOSSES[name]


def build_loss(name: str, **fields: Any) -> LossConfig:
    """The config of loss `name` with these fields.

    Raises:
        InputError: a field that the loss does not have (the nearest are named), or a value that it
            cannot use.
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
    except (TypeError, ValueError) as error:
        raise InputError(f"loss {name!r}: {error}") from error


def require_hooks(tuner: type, loss: str) -> None:
    """Raise UnsupportedError if the model under `tuner` is not called as the loss needs it."""
    if calls_past_hooks(tuner):
        raise UnsupportedError(
            f"loss {loss!r} would not be seen: PEFT's {tuner.__name__} calls the model past its "
            "hooks; take another method, such as increlora"
        )
