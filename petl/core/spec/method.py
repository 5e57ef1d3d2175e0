"""The registry's record of a method."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn

from petl.core.compat import tuner_class

Calibration = Iterable[Any] | Callable[[], Any]
Finish = Callable[[PeftModel], None]
Unsupported = str | Callable[[Any], str]
LR = 1e-3  # the peak learning rate of a run that names none, for most methods


@dataclass(frozen=True)
class Method:
    """What petl knows of a method.

    Attributes:
        name: the word after `+method=`.
        config_cls: its PEFT config.
        summary: one sentence.
        paper: authors, year, title or venue, arXiv id.
        merges: whether the adapter can be merged into the base weights.
        exports_lora: whether it can be saved as a plain LoRA.
        own: whether its tuner is a `MethodTuner`.
        start_tolerance: how far outputs at the start may be off the base model's.
        defaults: fields that this entry sets, such as `use_dora` of "dora".
        keeps_base: called with a config: whether the model without it is the pretrained one.
        calibration: called with a config: why it looks at calibration data, in words for a
            message; "" if it does not.
        on_wrap: called with (model, config, calibration) before the model is changed, or None. What
            it returns, if anything, is called with the wrapped model.
        tuner_cls: the tuner, of a method of petl's own; None: PEFT's.
        variant: of a method whose fields and promises depend on one of its fields, the entry for
            given fields: called with (this entry, fields), or None.
        lr: the peak learning rate of runs that name none, under AdamW; where it is not `LR`, the
            best of the few that were tried on the quickstart task (docs/results.md).
        inner: of a variant, the method that it is over, whose fields it has beside its own.
        inner_defaults: what the variant sets of those fields in place of that method.
        rank_step: what its `r` must be a multiple of.
        check: of a method that PEFT serves, called with a config: raises InputError for values that
            PEFT takes and fails on later, or changes.
        fit: likewise, called with the config and the shapes [O, I] of the linear layers that it
            targets, by name.
        limits: by ability (see petl/core/abilities.py), why it cannot be had, as a sentence or a
            function of a config that gives one or "".
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
    unsupported: Mapping[str, Unsupported] = field(default_factory=dict)

    def given(self, fields: Mapping[str, Any]) -> "Method":
        """The entry for these fields of the config: this one, for all but a few methods."""
        return self if self.variant is None else self.variant(self, fields)

    @property
    def by(self) -> str:
        """The package that implements it: "petl", "PEFT", or the name of another."""
        package = self.config_cls.__module__.partition(".")[0]
        return "PEFT" if package == "peft" else package

    @property
    def tuner(self) -> type[Any]:
        """The PEFT tuner that puts it in a model."""
        return self.tuner_cls or tuner_class(self.config_cls)


MODIFIES_BASE_WEIGHTS = (
    "pissa",
    "olora",
    "corda",
    "lora_ga",
    "loftq",
)  # values of init_lora_weights


def modifies_base_weights(config: Any) -> bool:
    """Whether an adapter of this config changes the base weights when it begins.

    It is right on the original base only if it is saved relative to its start:
    `save_pretrained(..., path_initial_model_for_weight_conversion=START)`.
    """
    start = getattr(config, "init_lora_weights", None)
    return isinstance(start, str) and start.startswith(MODIFIES_BASE_WEIGHTS)
