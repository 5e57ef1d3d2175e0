"""Every use of PEFT's private parts, in one place."""

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.boft.layer import get_fbd_cuda
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.conversion import _convert_module_to_lora
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import (
    AuxiliaryTrainingWrapper,
    BaseTuner,
    BaseTunerLayer,
    _get_tuner_state_dict_key_prefixes,
    check_adapters_to_merge,
    check_target_module_exists,
)
from peft.utils import PeftType, register_peft_method
from peft.utils.constants import (
    SEQ_CLS_HEAD_NAMES,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)
from peft.utils.other import ModulesToSaveWrapper, get_pattern_key
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn

__all__ = [
    "SEQ_CLS_HEAD_NAMES",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "AuxiliaryTrainingWrapper",
    "BaseTuner",
    "BaseTunerLayer",
    "LoraLayer",
    "LoraLinear",
    "LoraModel",
    "ModulesToSaveWrapper",
    "adapter_weights",
    "add_method",
    "adjustments_refused",
    "calls_past_hooks",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "config_class",
    "freeze_ranks",
    "get_pattern_key",
    "get_quantization_kwargs",
    "has_boft_kernel",
    "resolve_quantization_backend",
    "svd_factors",
    "tuner_class",
    "without_noise",
]


@contextmanager
def without_noise() -> Generator[None]:
    """Let PEFT wrap a model without the warnings in which its user can mend nothing.

    It asks transformers for `is_gradient_checkpointing`, which is deprecated there; and where there
    is no GPU its BOFT tells that it has no kernel for one.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        if not torch.cuda.is_available():
            warnings.filterwarnings("ignore", "Failed to load the CUDA extension")
            warnings.filterwarnings("ignore", "Setting boft_n_butterfly_factor to 1 to speed up")
        yield


@contextmanager
def adjustments_refused() -> Generator[None]:
    """Raise, rather than show, the warning of a tuner of PEFT's that it takes another value."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", r"Invalid `\w+` .*Adjusted", UserWarning)
        yield


def add_method(
    name: str, prefix: str, config_cls: type, tuner_cls: type, *, is_own_prefix: bool = True
) -> None:
    """Make PEFT know a tuner of ours, of type `name` in capitals, by its state-dict `prefix`.

    Args:
        is_own_prefix: False for a tuner that derives from one of PEFT's and keeps its tensors.

    Raises:
        ValueError: PEFT or petl already has the type or the prefix.
    """
    taken = prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values()  # PEFT's check looks at the wrong side
    if taken and is_own_prefix:
        raise ValueError(f"the state-dict prefix {prefix!r} is taken by another PEFT method")
    extend_peft_types(name.upper())
    register_peft_method(name=name, prefix=prefix, config_cls=config_cls, model_cls=tuner_cls)


def config_class(peft_type: str) -> type | None:
    """The config class of a PEFT type as a saved file names it, or None."""
    return PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)


def tuner_class(config_cls: type) -> type[BaseTuner]:
    """The tuner that PEFT makes for configs of this class."""
    kinds = (kind for kind, found in PEFT_TYPE_TO_CONFIG_MAPPING.items() if found is config_cls)
    return PEFT_TYPE_TO_TUNER_MAPPING[next(kinds)]


def has_boft_kernel() -> bool:
    """Whether PEFT's kernel for BOFT's butterflies is there; on a GPU it is made if it is not."""
    if not torch.cuda.is_available():
        return False
    with warnings.catch_warnings(action="ignore"):
        return get_fbd_cuda() is not None


def calls_past_hooks(tuner: type) -> bool:
    """Whether a tuner calls the model's `forward` by itself, so that hooks on the model sleep."""
    return issubclass(tuner, AdaLoraModel)


def freeze_ranks(tuner: nn.Module) -> None:
    """Let the counts of ranks of PEFT's AdaLoRA train no more; other tuners have none.

    PEFT freezes them and then moves them to the base's device and precision, which makes each of
    them a new parameter where either is not that of a fresh tensor, and a new parameter trains.
    """
    if isinstance(tuner, AdaLoraModel):
        for module in tuner.modules():
            if isinstance(module, AdaLoraLayer):
                module.ranknum.requires_grad_(False)


def adapter_weights(tuner: BaseTuner, adapter_name: str) -> dict[str, tuple[nn.Module, str]]:
    """By name in the tuner, the parameters that an adapter trains: their owner and name in it."""
    prefixes = _get_tuner_state_dict_key_prefixes(tuner, adapter_name=adapter_name)
    for path, layer in tuner.named_modules():
        if isinstance(layer, BaseTunerLayer):
            frozen = layer.frozen_peft_weight_names.get(adapter_name, ())
            prefixes -= {f"{path}.{name}.{adapter_name}" for name in frozen}
    found: dict[str, tuple[nn.Module, str]] = {}
    for path, owner in tuner.named_modules():
        for name, _ in owner.named_parameters(recurse=False):
            parts = f"{path}.{name}".split(".")
            if any(".".join(parts[:i]) in prefixes for i in range(1, len(parts) + 1)):
                found[".".join(parts)] = owner, name
    return found


def extend_peft_types(value: str) -> None:
    """Add a member to PEFT's closed enum, which `register_peft_method` insists on.

    This is the one impolite function of the project: `PeftType` has no plug-in hook.
    """
    if value in PeftType.__members__:
        raise ValueError(f"PEFT already has a method called {value}; ours needs another name")
    member: Any = str.__new__(PeftType, value)
    member._name_ = member._value_ = value
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(value)
    PeftType._member_map_[value] = member
    PeftType._value2member_map_[value] = member
    type.__setattr__(PeftType, value, member)
    if not (PeftType(value) is PeftType[value] is getattr(PeftType, value) is member):
        raise AssertionError(f"this Python's enum does not take the new member {value}")


def svd_factors(layer: Any, adapter_name: str) -> tuple[Tensor, Tensor]:
    """A [R, I] and B [O, R] with B A the update of a layer: PEFT's conversion to LoRA, uncut."""
    full = min(layer.in_features, layer.out_features)
    A, B, _ = _convert_module_to_lora(layer, full, adapter_name)
    return A, B
