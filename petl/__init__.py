"""petl: parameter-efficient fine-tuning of any Hugging Face model.

    import petl

    model = petl.wrap(base, "mola", r=8)   # a PeftModel, for any trainer
    model.save_pretrained("adapter")
    model = petl.load(fresh_base, "adapter")  # strict; PeftModel.from_pretrained works too

Importing petl makes PEFT know petl's methods, whichever is imported first. It imports neither PEFT
nor torch by itself: a name of petl is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from petl.system.imports.peft_hook import refuse_mixed_install, register_with_peft
from petl.version import __version__ as __version__

if TYPE_CHECKING:
    from petl import core as core
    from petl import data as data
    from petl import errors as errors
    from petl import methods as methods
    from petl import ops as ops
    from petl.adapters import deltas as deltas
    from petl.adapters import search as search
    from petl.adapters.check.rules import Checked, check
    from petl.adapters.deltas.narrow import narrow
    from petl.adapters.shrink.folder import load_shrunk
    from petl.adapters.shrink.model import Shrunk, shrink
    from petl.core.adapter_widths.switch import at_width
    from petl.core.layers.layer import Adapter, AdapterLayer, Factors, LayerInfo, LayerShape
    from petl.core.lifecycle import Lifecycle, lifecycle
    from petl.core.loading import load
    from petl.core.losses import list_losses
    from petl.core.method import (
        AdapterSet,
        Method,
        NewAdapters,
        Target,
        TrainContext,
        WrapContext,
    )
    from petl.core.register import register
    from petl.core.registry import adopt, list_methods, method
    from petl.core.spec.config import MethodConfig
    from petl.data.models.new_tokens import add_tokens
    from petl.efficiency import drafting as drafting
    from petl.efficiency.drafting.folder import load_drafter
    from petl.efficiency.frozen.rewrite import cache_frozen
    from petl.efficiency.fused_lora.switching import fuse_lora
    from petl.efficiency.recompute import recompute_mlp
    from petl.efficiency.segment_loss import segment_loss
    from petl.efficiency.tokens import drop_tokens, train_predictors
    from petl.errors import InputError
    from petl.generation.prediction.library import evaluate, predict
    from petl.generation.prediction.predictor import Predictor
    from petl.generation.prediction.vectors import embed
    from petl.methods import losses as losses
    from petl.methods.lora import lorafa_optimizer, loraplus_optimizer
    from petl.methods.sparse import SparseSM3
    from petl.ops import retrieval as retrieval
    from petl.signatures import build_config, get, wrap  # of petl.core.registry, method by method
    from petl.training import ranks as ranks
    from petl.training.adamr import AdamR
    from petl.training.integrations.trainer_callback import Callback
    from petl.training.retain.compare import retained
    from petl.training.retain.drift import Drift
    from petl.training.retain.measure import Retained
    from petl.training.together.jobs import Job, TrainResult, train_together
    from petl.training.watch.watcher import Watch, watch

__all__ = [
    "AdamR",
    "Adapter",
    "AdapterLayer",
    "AdapterSet",
    "Callback",
    "Checked",
    "Drift",
    "Factors",
    "InputError",
    "Job",
    "LayerInfo",
    "LayerShape",
    "Lifecycle",
    "Method",
    "MethodConfig",
    "NewAdapters",
    "Predictor",
    "Retained",
    "Shrunk",
    "SparseSM3",
    "Target",
    "TrainContext",
    "TrainResult",
    "Watch",
    "WrapContext",
    "add_tokens",
    "adopt",
    "at_width",
    "build_config",
    "cache_frozen",
    "check",
    "drop_tokens",
    "embed",
    "evaluate",
    "fuse_lora",
    "get",
    "lifecycle",
    "list_losses",
    "list_methods",
    "load",
    "load_drafter",
    "load_shrunk",
    "lorafa_optimizer",
    "loraplus_optimizer",
    "method",
    "narrow",
    "predict",
    "recompute_mlp",
    "register",
    "retained",
    "segment_loss",
    "shrink",
    "train_predictors",
    "train_together",
    "watch",
    "wrap",
]

_PACKAGES = {  # public packages by name
    "core": "petl.core",
    "data": "petl.data",
    "deltas": "petl.adapters.deltas",
    "drafting": "petl.efficiency.drafting",
    "errors": "petl.errors",
    "losses": "petl.methods.losses",
    "methods": "petl.methods",
    "ops": "petl.ops",
    "ranks": "petl.training.ranks",
    "retrieval": "petl.ops.retrieval",
    "search": "petl.adapters.search",
}
_NAMES = {
    "petl.adapters.check.rules": ("Checked", "check"),
    "petl.adapters.deltas.narrow": ("narrow",),
    "petl.adapters.shrink.folder": ("load_shrunk",),
    "petl.adapters.shrink.model": ("Shrunk", "shrink"),
    "petl.data.models.new_tokens": ("add_tokens",),
    "petl.efficiency.frozen.rewrite": ("cache_frozen",),
    "petl.training.integrations.trainer_callback": ("Callback",),
    "petl.core.layers.layer": ("Adapter", "AdapterLayer", "Factors", "LayerShape", "LayerInfo"),
    "petl.core.lifecycle": ("Lifecycle", "lifecycle"),
    "petl.core.loading": ("load",),
    "petl.efficiency.recompute": ("recompute_mlp",),
    "petl.efficiency.segment_loss": ("segment_loss",),
    "petl.efficiency.tokens": ("drop_tokens", "train_predictors"),
    "petl.core.spec.config": ("MethodConfig",),
    "petl.core.method": (
        "AdapterSet",
        "Method",
        "NewAdapters",
        "Target",
        "TrainContext",
        "WrapContext",
    ),
    "petl.core.losses": ("list_losses",),
    "petl.core.adapter_widths.switch": ("at_width",),
    "petl.core.registry": (
        "adopt",
        "build_config",
        "get",
        "list_methods",
        "method",
        "wrap",
    ),
    "petl.core.register": ("register",),
    "petl.efficiency.fused_lora.switching": ("fuse_lora",),
    "petl.efficiency.drafting.folder": ("load_drafter",),
    "petl.errors": ("InputError",),
    "petl.methods.lora": ("lorafa_optimizer", "loraplus_optimizer"),
    "petl.methods.sparse": ("SparseSM3",),
    "petl.training.adamr": ("AdamR",),
    "petl.training.retain.compare": ("retained",),
    "petl.training.retain.drift": ("Drift",),
    "petl.training.retain.measure": ("Retained",),
    "petl.training.together.jobs": ("Job", "TrainResult", "train_together"),
    "petl.training.watch.watcher": ("Watch", "watch"),
    "petl.generation.prediction.library": ("evaluate", "predict"),
    "petl.generation.prediction.predictor": ("Predictor",),
    "petl.generation.prediction.vectors": ("embed",),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> object:
    """A public name or a package of petl, imported on first use."""
    if name in _PACKAGES:
        return import_module(_PACKAGES[name])
    if name not in _HOMES:
        raise AttributeError(f"module 'petl' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PACKAGES, *_HOMES})


refuse_mixed_install(__path__[0])
register_with_peft()
