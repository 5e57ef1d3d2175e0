"""petl: parameter-efficient fine-tuning of any Hugging Face model.

    import petl

    model = petl.wrap(base, "mola", r=8)   # a PeftModel, for any trainer
    model.save_pretrained("adapter")
    model = petl.load(fresh_base, "adapter")  # strict; PeftModel.from_pretrained works too

Importing petl makes PEFT know petl's methods.
"""

import petl.losses
import petl.methods  # noqa: F401  each registers itself, and so do losses
from petl.core.fused_lora import fuse_lora
from petl.core.layer import Adapter, AdapterLayer, Factors, LayerShape, Site
from petl.core.lifecycle import Lifecycle, lifecycle
from petl.core.loading import load
from petl.core.losses import list_losses
from petl.core.registry import (
    Method,
    adopt,
    build_config,
    get,
    list_methods,
    method,
    register,
    wrap,
)
from petl.core.tuner import MethodTuner
from petl.errors import InputError
from petl.methods.lora import lorafa_optimizer, loraplus_optimizer
from petl.methods.sparse import SparseSM3

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterLayer",
    "Callback",
    "Factors",
    "InputError",
    "LayerShape",
    "Lifecycle",
    "Method",
    "MethodTuner",
    "Site",
    "SparseSM3",
    "adopt",
    "build_config",
    "fuse_lora",
    "get",
    "lifecycle",
    "list_losses",
    "list_methods",
    "load",
    "lorafa_optimizer",
    "loraplus_optimizer",
    "method",
    "register",
    "wrap",
]


def __getattr__(name: str) -> object:
    """`petl.Callback`, imported on first use: the trainer of transformers is slow to import."""
    if name == "Callback":
        from petl.callback import Callback

        return Callback
    raise AttributeError(f"module 'petl' has no attribute {name!r}")
