"""Extra losses that any method can be trained with: their registry, and those on a model."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

from peft import PeftModel
from torch import nn

from petl.core.layers.context import ForwardContext
from petl.core.model.heat_map import HeatMap
from petl.core.spec.config import config_field, require, require_effect
from petl.core.support import Capability, Lacks, Part
from petl.core.types import Batch, Chart, Fields, Settings
from petl.errors import InputError, UnknownNameError, choose, did_you_mean
from petl.system.imports.tables import LOSSES, check_free
from petl.system.values import check_rules

ATTRIBUTE = "petl_extra_losses"  # of a PeftModel
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
        features: what a run does besides training with it, see `petl.training.features`.
        charts: of metrics of its own.
    """

    name: str
    config_cls: type[LossConfig]
    controller_cls: Any
    summary: str
    paper: str
    features: tuple[str, ...] = ()
    charts: tuple[Chart, ...] = ()


def register_loss(
    name: str,
    *,
    summary: str,
    paper: str,
    features: tuple[str, ...] = (),
    charts: tuple[Chart, ...] = (),
) -> Callable[[Controller], Controller]:
    """Register a controller as extra loss `name`, the word after `+loss=`.

    A decorator for a class whose `config_cls` is set.

    Raises:
        ValueError: a loss or method has this name.
    """

    def add(controller: Any) -> Any:
        check_free(name, controller.config_cls)
        # so that a config alone leads back to its loss
        controller.config_cls.name = name
        about = summary, paper, features, charts
        LOSSES[name] = Loss(name, controller.config_cls, controller, *about)
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


class TrainingPart(Protocol):
    """Interface of what the lifecycle drives: an `AskingTuner`, or an extra loss on the model."""

    context: ForwardContext

    def series(self) -> dict[str, float]:
        """Return metrics of the last training forward for the log."""

    def heat_maps(self) -> list[HeatMap]:
        """Return maps of what it did, for the folder of a run."""


class ExtraLoss(TrainingPart, Protocol):
    """Interface of a loss term that is on a model in addition to its method."""

    @property
    def lacks(self) -> Lacks:
        """Its rows of the table of petl/core/support.py."""

    @property
    def config(self) -> LossConfig:
        """The loss's config."""

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Use training batches once, before the optimizer exists."""

    def report(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Return metrics over validation batches, to compare before and after training."""


def read(settings: Settings | None) -> LossConfig | None:
    """Build the loss config from `cfg.loss` (a name and fields); None if there is no extra loss.

    Raises:
        InputError: an unknown loss or field, an invalid value, or a field that sets the method,
            which a run sets by `+method=`.
    """
    if settings is None:
        return None
    fields = {str(key): value for key, value in settings.items()}
    for key in WRAP_ONLY:
        require(
            key not in fields,
            f"loss.{key}={fields.get(key)!r} is for petl.wrap only; here +method=NAME sets the "
            "method: leave it out",
        )
    config = build_loss(fields.pop("name", ""), **fields)
    config.check_driven()
    return config


def extra_losses(model: nn.Module) -> Sequence[ExtraLoss]:
    """Return the extra losses on a model."""
    return model.__dict__.get(ATTRIBUTE, ())


def loss_list(model: PeftModel) -> list[ExtraLoss]:
    """Return the list of extra losses on a PeftModel, to which one is attached by adding it."""
    # in `__dict__`: PeftModel looks up unknown attributes in the base model
    return model.__dict__.setdefault(ATTRIBUTE, [])
