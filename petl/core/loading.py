"""Loading a saved adapter strictly: every tensor that the config asks for, and no other."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from petl.core.adapter_folder import ON_THE_HUB, read_config, read_weights
from petl.core.compat import BaseTunerLayer, without_noise
from petl.core.registry import apply_peft_fixes, refuse_quantized
from petl.core.switching.tuner import SwitchingTuner, enable_switching
from petl.errors import InputError, did_you_mean


def load(
    base: nn.Module,
    path: str | Path,
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    **kwargs: Any,
) -> PeftModel:
    """`base` with the adapter saved in `path`, as `PeftModel.from_pretrained`, but strict.

    Given a `PeftModel`, it adds the adapter to those that are there, as its `load_adapter` does.
    The active one stays active. For a method of petl's own, and for LoRA after `petl.fuse_lora`,
    that takes as long among a thousand.

    Args:
        base: the model that the adapter was trained on; changed in place.
        path: folder of the adapter, or the name of a hub repository.
        adapter_name: its name in the model, whatever it was called when saved.
        is_trainable: leave its parameters trainable.
        kwargs: further arguments of `PeftModel.from_pretrained`, or of `load_adapter`.

    Raises:
        InputError: no adapter there, an unknown method, a base that holds adapters already and is
            no PeftModel, or one of that name or of another method, tensors that are missing,
            unexpected or of another shape, or a file that could hold code. A PeftModel is left as
            it was.
    """
    extra_trainable = isinstance(base, PeftModel)
    if not extra_trainable and any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise InputError(
            "the base model holds an adapter already (wrapping changes a model in place); load "
            "onto a fresh one, or hand over the PeftModel to add to the adapters that it has"
        )
    where = {key: kwargs[key] for key in ON_THE_HUB if key in kwargs}
    config = read_config(path, **where)
    if extra_trainable:
        _refuse_beside(base, config, adapter_name)
    refuse_quantized(base, config)
    weights = read_weights(path, config, **where)
    try:
        if extra_trainable:
            return _add(base, path, weights, adapter_name, is_trainable, kwargs)
        with without_noise():
            model = PeftModel.from_pretrained(
                base, str(path), adapter_name, is_trainable, config=config, **kwargs
            )
    except KeyError as error:  # a module to save that the file lacks
        raise InputError(f"the adapter file in {str(path)!r} lacks tensor {error}") from error
    except RuntimeError as error:
        raise InputError(f"the adapter in {str(path)!r} does not fit the model: {error}") from error
    _check(model, adapter_name, path, weights)
    apply_peft_fixes(model, adapter_name)
    enable_switching(model)
    return model


def _refuse_beside(model: PeftModel, config: PeftConfig, adapter_name: str) -> None:
    if adapter_name in model.peft_config:
        raise InputError(
            f"the model has an adapter {adapter_name!r} already; choose another adapter_name"
        )
    if config.peft_type != model.peft_type:
        raise InputError(
            f"an adapter of {_kind(config)} cannot stand beside those of {_kind(model)}; "
            "load it onto another copy of the model"
        )


def _kind(config: PeftConfig | PeftModel) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _add(
    model: PeftModel,
    path: str | Path,
    weights: Mapping[str, Tensor],
    adapter_name: str,
    is_trainable: bool,
    kwargs: Mapping[str, Any],
) -> PeftModel:
    """`model` with a further adapter, or as it was."""
    tuner, was_training = model.base_model, model.training
    alone = (
        tuner.only_visible({adapter_name}) if isinstance(tuner, SwitchingTuner) else nullcontext()
    )
    try:
        with alone, without_noise():
            model.load_adapter(str(path), adapter_name, is_trainable=is_trainable, **kwargs)
            _check(model, adapter_name, path, weights)
    except Exception:
        if adapter_name in model.peft_config:
            model.delete_adapter(adapter_name)
        model.train(was_training)
        raise
    apply_peft_fixes(model, adapter_name)
    return model


def _check(
    model: PeftModel, adapter_name: str, path: str | Path, weights: Mapping[str, Tensor]
) -> None:
    """Whether the file had each tensor that the config asks for, and no other."""
    expected = set(get_peft_model_state_dict(model, adapter_name=adapter_name))
    missing, unexpected = sorted(expected - set(weights)), sorted(set(weights) - expected)
    if missing or unexpected:
        which = f"lacks {missing[0]}" if missing else f"has {unexpected[0]}, which the model lacks"
        count = len(missing) + len(unexpected)
        nearest = ""
        if unexpected and not missing:
            nearest = did_you_mean(unexpected[0], expected, limit=0)
        raise InputError(
            f"the adapter in {str(path)!r} does not fit its config: it {which} ({count} tensors "
            f"differ){nearest}"
        )
