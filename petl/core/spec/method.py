"""A method's entry in the registry."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn

from petl.core.compat import tuner_class

Calibration = Iterable[Any] | Callable[[], Any]
Finish = Callable[[PeftModel], None]
Unsupported = str | Callable[[Any], str]
LR = 1e-3  # default peak learning rate of most methods


@dataclass(frozen=True)
class Method:
    """A method's entry in the registry.

    Attributes:
        name: the word after `+method=`.
        config_cls: its PEFT config.
        summary: one sentence.
        paper: authors, year, title or venue, arXiv id.
        merges: True if the adapter can be merged into the base weights.
        exports_lora: True if it can be saved as a plain LoRA.
        own: True if its tuner is a `MethodTuner`.
        start_tolerance: maximum difference of outputs at the start from the base model's.
        defaults: fields that this entry sets, such as `use_dora` of "dora".
        keeps_base: function of a config: True if the model without the adapter equals the
            pretrained one.
        calibration: function of a config: the reason for which it needs calibration data, for a
            message; "" if it needs none.
        on_wrap: called with (model, config, calibration) before the model is changed, or None. The
            function that it returns, if any, is called with the wrapped model.
        tuner_cls: the tuner of a method of petl's own; None: PEFT's.
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
        unsupported: by capability (see petl/core/spec/capabilities.py), why the method lacks it, as
            a sentence or a function of a config that returns one or "".
    """

    name: str
    config_cls: type[PeftConfig]
    summary: str
    paper: str
    merges: bool = True
    exports_lora: bool = False
    own: bool = False
    start_tolerance: float = 0.0
    defaults: dict[str, Any] = field(default_factory=dict)
    keeps_base: Callable[[Any], bool] = field(default=lambda config: True)
    calibration: Callable[[Any], str] = field(default=lambda config: "")
    on_wrap: Callable[[nn.Module, Any, Calibration | None], Finish | None] | None = None
    tuner_cls: type[Any] | None = None
    variant: Callable[["Method", Mapping[str, Any]], "Method"] | None = None
    lr: float = LR
    inner: str = ""
    inner_defaults: Mapping[str, Any] = field(default_factory=dict)
    rank_step: int = 1
    check: Callable[[Any], None] = field(default=lambda config: None)
    fit: Callable[[Any, Mapping[str, tuple[int, int]]], None] | None = None
    rank: str = ""
    need: str = ""
    recommended: str = ""
    unsupported: Mapping[str, Unsupported] = field(default_factory=dict)

    def given(self, fields: Mapping[str, Any]) -> "Method":
        """Return the entry for these fields of the config: itself, unless it has a `variant`."""
        return self if self.variant is None else self.variant(self, fields)

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
