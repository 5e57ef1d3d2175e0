"""Rewrites: the same adapted model in less time or memory, by the setting that asks for it.

A rewrite puts mixins before the classes of modules (petl/core/layers/class_swap.py): the tree of
modules, its tensors and its files stay, and `undo` takes the mixins out again.
"""

import logging
from collections.abc import Iterator, Mapping
from pkgutil import resolve_name
from typing import ClassVar

from peft import PeftModel
from torch import nn

from petl.core.layers.class_swap import SwappedClass, mixins_of, restore_class
from petl.core.losses import extra_losses, loss_part
from petl.core.registry import method_part
from petl.core.support import Capability, Lacks, Part, conflicts
from petl.errors import UnsupportedError
from petl.system.collectives import is_sharded

# by setting under `train`, in the order in which they are applied; imported when asked for
REWRITES = {
    "fuse_lora": "petl.efficiency.fused_lora.switching:FuseLora",
    "recompute_mlp": "petl.efficiency.recompute:RecomputeMlp",
    "loss_segment": "petl.efficiency.segment_loss:SegmentLoss",
    "skip_unread": "petl.efficiency.skip_unread.read_positions:SkipUnread",
    "fast_dropout": "petl.efficiency.fast_dropout:FastDropout",
    "cast_once": "petl.efficiency.cast_once:CastOnce",
    "cache_frozen": "petl.efficiency.frozen.rewrite:StoreFrozen",
}
Value = bool | int | str | None  # of a setting
AUTO = "auto"  # the value of a setting that asks for a rewrite where it changes nothing but speed
logger = logging.getLogger(__name__)


class Rewrite:
    """A way to compute a model in less time or memory.

    Attributes:
        capability: its column of the table of petl/core/support.py.
        lacks: its rows of that table.
        saves: what it does, in a sentence.
        value: of its setting, where none is given.
        tries: True if it is asked for by default, so that a model without it is no error.
        exact: True if losses and gradients are the same to the bit, else they are up to rounding.
        only_trains: True if it changes nothing but passes with gradients.
        needs_rows: True if it has no effect before it has read the rows of a run, so that a run
            applies it by itself.
        mixins: that it puts before the classes of modules.
    """

    capability: ClassVar[Capability]
    lacks: ClassVar[Lacks] = {}
    saves: ClassVar[str]
    value: ClassVar[Value] = True
    tries: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    only_trains: ClassVar[bool] = False
    needs_rows: ClassVar[bool] = False
    mixins: ClassVar[tuple[type[SwappedClass], ...]] = ()

    def refusal(self, model: nn.Module, value: Value = None) -> str:
        """Return why a model cannot be rewritten, which changes nothing; "" if it can.

        A subclass adds what it needs of the model to the rows of the table.
        """
        own = Part(self.capability.value, (self.capability,), self.lacks)
        pairs = (conflicts([own, part]) for part in parts_of(model))
        return next((conflict.reason for pair in pairs for conflict in pair), "")

    def apply(self, model: nn.Module, value: Value = None) -> int:
        """Rewrite a model and return the number of modules changed.

        Raises:
            UnsupportedError: `refusal` has a reason.
        """
        value = self.value if value is None else value
        reason = self.refusal(model, value)
        if reason:
            raise UnsupportedError(reason)
        return self.change(model, value)

    def change(self, model: nn.Module, value: Value) -> int:
        """Rewrite a model for which `refusal` has no reason; return the number of modules."""
        raise NotImplementedError

    def undo(self, model: nn.Module) -> None:
        """Let a model compute as before `apply`."""
        for module in model.modules():
            for mixin in self.mixins:
                restore_class(module, mixin)


def parts_of(model: nn.Module) -> Iterator[Part]:
    """Yield what is done to a model already, as parts of a choice."""
    if is_sharded(model):
        yield Part("sharding", (Capability.FSDP,))
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        yield Part("gradient checkpointing", (Capability.CHECKPOINTING,))
    if isinstance(model, PeftModel):
        yield from (method_part(model.peft_config[name]) for name in model.active_adapters)
    yield from (loss_part(loss.config) for loss in extra_losses(model))
    mixins = {mixin for module in model.modules() for mixin in mixins_of(module)}
    for mixin in mixins:
        lacks: Lacks = {Capability(name): reason for name, reason in mixin.lacks.items()}
        yield Part(mixin.__name__, (), lacks)


def rewrite(setting: str) -> Rewrite:
    """Return the rewrite of a setting in `REWRITES`."""
    return resolve_name(REWRITES[setting])()


def rewrites_of(settings: object, *, trains: bool = True) -> dict[str, Value]:
    """Return the rewrites that settings of a run ask for, by setting, with its value.

    Without those that need rows.

    Args:
        settings: those under `train`.
        trains: False: without those that change nothing but passes with gradients.
    """
    asked = {}
    for name in REWRITES:
        value = getattr(settings, name)
        if value not in (None, False):
            each = rewrite(name)
            if not each.needs_rows and (trains or not each.only_trains):
                asked[name] = value
    return asked


def apply_rewrites(model: nn.Module, rewrites: Mapping[str, Value]) -> list[str]:
    """Rewrite a model, as far as it allows what is asked for by default; return these settings.

    Call it after extra losses are attached, which may read more.

    Args:
        rewrites: as `rewrites_of` returns them.

    Raises:
        UnsupportedError: the model cannot be rewritten as a setting asks.
    """
    applied = []
    for name, value in rewrites.items():
        each = rewrite(name)
        reason = each.refusal(model, value)
        if not reason:
            each.change(model, value)
            applied.append(name)
        elif each.tries or value == AUTO:
            logger.debug("train.%s has no effect: %s", name, reason)
        else:
            raise UnsupportedError(f"train.{name}={str(value).lower()} is not possible: {reason}")
    return applied
