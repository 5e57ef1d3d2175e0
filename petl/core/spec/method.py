"""Entries of the registries: a method, and an extra loss that any method can be trained with."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from peft import PeftConfig, PeftModel
from torch import nn

from petl.core.compat import LoraModel, calls_past_hooks, tuner_class
from petl.core.spec.config import check_bounds, config_field
from petl.core.support import Capability, Lacks, reason_of, without_lora
from petl.errors import InputError, UnknownNameError, UnsupportedError, choose, did_you_mean
from petl.system.files.paths import method_preset

Calibration = Iterable[Any] | Callable[[], Any]
Finish = Callable[[PeftModel], None]
logger = logging.getLogger(__name__)
LR = 1e-3  # default peak learning rate of most methods


@dataclass(frozen=True)
class Method:
    """A method's entry in the registry.

    Attributes:
        name: the word after `+method=`.
        config_cls: its PEFT config.
        summary: one sentence.
        paper: authors, year, title or venue, arXiv id.
        own: True if its tuner is a `MethodTuner`.
        start_tolerance: maximum difference of outputs at the start from the base model's.
        defaults: fields that this entry sets, such as `use_dora` of "dora".
        keeps_base: function of a config: True if the model without the adapter equals the
            pretrained one.
        calibration: function of a config: the reason for which it needs calibration data, for a
            message; "" if it needs none.
        computed: function of a config: True if calibration makes the final adapter, so that nothing
            trains. A run then has train.steps=0, and its scores before are the base model's.
        on_wrap: called with (model, config, calibration) before the model is changed, or None. The
            function that it returns, if any, is called with the wrapped model.
        tuner_cls: the tuner of a method of petl's own; None: PEFT's.
        lr_by: a field with whose values in the mapping the method has another default than `lr`.
        variant: for a method whose fields and capabilities depend on one of its fields (binary's
            inner method): called with (this entry, fields), returns the entry for them; or None.
        lr: the default peak learning rate, with AdamW. Where it is not `LR`: measured, the best of
            the few that were tried on the quickstart task (docs/results.md).
        inner: of a variant, the inner method, whose fields it has in addition to its own.
        inner_defaults: defaults of the variant for fields of the inner method.
        rank_step: `r` must be a multiple of this.
        check: for a method that PEFT implements, called with a config: raises InputError for values
            that PEFT accepts and then fails on or changes.
        fit: likewise, called with the config and the shapes [O, I] of the linear layers that it
            targets, by name.
        rank: for a method that PEFT implements, the field for the rank of a layer's update, which
            has rank (I + O) parameters; "" if it has none.
        need: what a user wants who chooses it, in a few words; `petl methods` groups by it.
        recommended: why it is the first to try for its need; "": it is not.
        lacks: its rows of the table of petl/core/support.py: by capability, why it is lacking.
        decays: False if weight decay leaves the adapter's tensors out; the head's may decay.
        features: what a run does besides training it, each "module:class", see
            `petl.training.features`.
    """

    name: str
    config_cls: type[PeftConfig]
    summary: str
    paper: str
    own: bool = False
    start_tolerance: float = 0.0
    defaults: dict[str, Any] = field(default_factory=dict)
    keeps_base: Callable[[Any], bool] = field(default=lambda config: True)
    calibration: Callable[[Any], str] = field(default=lambda config: "")
    computed: Callable[[Any], bool] = field(default=lambda config: False)
    on_wrap: Callable[[nn.Module, Any, Calibration | None], Finish | None] | None = None
    tuner_cls: type[Any] | None = None
    variant: Callable[["Method", Mapping[str, Any]], "Method"] | None = None
    lr: float = LR
    lr_by: tuple[str, Mapping[str, float]] | None = None
    inner: str = ""
    inner_defaults: Mapping[str, Any] = field(default_factory=dict)
    rank_step: int = 1
    check: Callable[[Any], None] = field(default=lambda config: None)
    fit: Callable[[Any, Mapping[str, tuple[int, int]]], None] | None = None
    rank: str = ""
    need: str = ""
    recommended: str = ""
    lacks: Lacks = field(default_factory=dict)
    decays: bool = True
    features: tuple[str, ...] = ()

    def given(self, fields: Mapping[str, Any]) -> "Method":
        """Return the entry for these fields of the config: itself, unless it has a `variant`."""
        return self if self.variant is None else self.variant(self, fields)

    def default_lr(self, fields: Mapping[str, Any]) -> float:
        """Return the default peak learning rate with these fields of the config."""
        if self.lr_by is None:
            return self.lr
        name, rates = self.lr_by
        return rates.get(str(fields.get(name)), self.lr)

    def log_other_defaults(self, config: PeftConfig, given: Mapping[str, Any]) -> None:
        """Log, in one line, the fields that are not given and have other defaults in train.py.

        There each field has the value of the method's YAML file, here that of the config class:
        PEFT's, for its own methods, so that `petl.wrap(model, "lora")` is what `peft.LoraConfig()`
        gives.
        """
        if not logger.isEnabledFor(logging.INFO):
            return
        inner = {**method_preset(self.inner), **self.inner_defaults} if self.inner else {}
        preset = {**inner, **method_preset(self.name), **given}
        here, there = [], []
        for name, value in preset.items():
            used = getattr(config, name, value)
            used = sorted(used) if isinstance(used, set) else used
            # a mapping is a group of settings of train.py
            is_field = name not in given and name != "name" and not isinstance(value, dict)
            if is_field and used != value:
                here.append(f"{name}={used}")
                there.append(f"{name}={value}")
        if here:
            logger.info(
                "%s: fields that are not given have the defaults of petl.wrap, %s; train.py has %s",
                self.name,
                ", ".join(here),
                ", ".join(there),
            )

    def lacking(self, capability: Capability, config: Any = None) -> str:
        """Return why it lacks a capability with this config; "": it has it.

        Args:
            config: None for a capability of all configs.
        """
        if capability is Capability.LORA_EXPORT:
            return without_lora(self.lacks, config)
        if capability in self.lacks:
            return reason_of(self.lacks, capability, config)
        if capability is Capability.RANKS:
            # AdaLoRA has an `r` that it does not use
            known = {"r", "rank_pattern"} <= self.config_cls.__dataclass_fields__.keys()
            return "" if known and self.rank in ("", "r") else "it has no rank_pattern"
        # what a layer computes for a row must depend on that row and on the adapter alone
        if capability is Capability.TOGETHER and self.tuner is not LoraModel:
            return "the method is not written for rows of several adapters in training"
        # PEFT's AdaLoRA masks ranks in place, so that its entries keep their reference
        moves = self.own and hasattr(self.tuner, "update_and_allocate")
        if capability is Capability.ADAMR and moves:
            return (
                "it adds or exchanges entries while it trains, and the reference does not move "
                "with them"
            )
        return ""

    @property
    def merges(self) -> bool:
        """True if the adapter can be merged into the base weights."""
        return not self.lacking(Capability.MERGE)

    @property
    def exports_lora(self) -> bool:
        """True if it can be saved as a plain LoRA."""
        return not self.lacking(Capability.LORA_EXPORT)

    @property
    def by(self) -> str:
        """The package that implements it: "petl", "PEFT", or the name of another."""
        # of the config: PEFT's LoRA stays PEFT's, though petl lists it
        package = self.config_cls.__module__.partition(".")[0]
        return "PEFT" if package == "peft" else package

    @property
    def tuner(self) -> type[Any]:
        """The tuner class of the method."""
        return self.tuner_cls or tuner_class(self.config_cls)


# values of init_lora_weights, or how they begin ("pissa_niter_16")
MODIFIES_BASE_WEIGHTS = ("pissa", "olora", "corda", "lora_ga", "loftq")


def modifies_base_weights(config: Any) -> bool:
    """Return True if the initialization of an adapter of this config changes the base weights.

    Such an adapter gives correct outputs on the original base only if it is saved relative to its
    initial state: `save_pretrained(..., path_initial_model_for_weight_conversion=START)`.
    """
    initialization = getattr(config, "init_lora_weights", None)
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
    method_config: dict[str, Any] = config_field("only for petl.wrap: fields of that method", {})

    def __post_init__(self) -> None:
        check_bounds(self)
        self.check()

    def check(self) -> None:
        """Raise InputError for values that are wrong together; bounds are checked before."""

    def check_driven(self) -> None:
        """Raise InputError for a value that is wrong where petl's `Lifecycle` drives the training.

        That is in petl's own loop and with `petl.Callback`.
        """

    def reads_blocks_alone(self) -> bool:
        """Return True if nothing behind the last block changes the term."""
        return False


@dataclass(frozen=True)
class Loss:
    """An extra loss's entry in the registry.

    Attributes:
        name: the word after `+loss=`.
        config_cls: its config.
        controller_cls: called with (PeftModel, config), it adds itself to the model; its class
            method `check(model, config)` raises for a base model that it does not support, before
            anything is changed.
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
    """Register a controller as extra loss `name`, the word after `+loss=`.

    A decorator for a class whose `config_cls` is set.

    Raises:
        ValueError: `name` is taken.
    """

    def add(controller: Any) -> Any:
        if name in LOSSES:
            raise ValueError(
                f"loss name {name!r} is taken by {LOSSES[name].config_cls.__module__}; choose "
                "another name"
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


def require_effect(loss: LossConfig, tuner: type, method_cls: type) -> None:
    """Raise UnsupportedError if a loss would have no effect with a method.

    Args:
        loss: its config.
        tuner: of the method; it must not bypass the model's forward hooks, which losses need.
        method_cls: the method's config class.
    """
    if calls_past_hooks(tuner):
        raise UnsupportedError(
            f"loss {loss.name!r} would have no effect: PEFT's {tuner.__name__} calls model.forward "
            "and so bypasses its forward hooks; choose another method, such as increlora"
        )
    if getattr(method_cls, "replaces_head", False) and loss.reads_blocks_alone():
        raise UnsupportedError(
            f"loss {loss.name!r} would have no effect: it reads the blocks, and "
            f"{tuner.__name__} trains a head behind them; choose a method that trains blocks"
        )
