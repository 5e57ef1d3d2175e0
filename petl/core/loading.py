"""Load a saved adapter strictly: raise on missing or unexpected tensors."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from petl.core.adapter_folder import ON_THE_HUB, read_config, read_weights
from petl.core.compat import BaseTunerLayer, without_noise
from petl.core.parameters import check_module
from petl.core.registry import apply_peft_fixes, refuse_quantized
from petl.core.switching.tuner import SwitchingTuner, enable_switching
from petl.errors import InputError, did_you_mean
from petl.files import hub


def load(
    base: nn.Module,
    path: str | Path,
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    **kwargs: Any,
) -> PeftModel:
    """Load the adapter saved in `path` onto `base`, as `PeftModel.from_pretrained` but strict.

    Given a `PeftModel`, it adds the adapter to those present, as `PeftModel.load_adapter` does; the
    active adapter stays active. For petl's own methods, and for LoRA after `petl.fuse_lora`, the
    time does not grow with the number of adapters.

    Args:
        base: the model that the adapter was trained on; changed in place.
        path: folder of the adapter, or the name of a hub repository.
        adapter_name: its name in the model, independent of its name when saved.
        is_trainable: leave its parameters trainable.
        kwargs: further arguments of `PeftModel.from_pretrained`, or of `load_adapter`.

    Raises:
        InputError: there is no adapter, its method is unknown, the base contains adapters but is
            no PeftModel, the PeftModel has an adapter of that name or of another method, tensors
            are missing, unexpected or of another shape, or a file could contain code. A PeftModel
            is unchanged then.
    """
    check_module(base, "petl.load")
    is_peft_model = isinstance(base, PeftModel)
    if not is_peft_model and any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise InputError(
            f"the base model, a {type(base).__name__}, contains an adapter already (wrapping "
            "changes a model in place); load onto a new base model, or pass the PeftModel to add "
            "another adapter"
        )
    kwargs = _located(path, kwargs)
    where = {key: kwargs[key] for key in ON_THE_HUB if key in kwargs}
    config = read_config(path, **where)
    if is_peft_model:
        _check_addable(base, config, adapter_name)
    refuse_quantized(base, config)
    # read once more than PEFT does, to compare the file's names with the model's
    weights = read_weights(path, config, **where)
    try:
        if is_peft_model:
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


def _located(path: object, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return `kwargs` with which files of the adapter are found, or missed, without a delay."""
    if not isinstance(path, str | Path):
        raise InputError(
            "petl.load needs the folder of an adapter, or the name of a repository on the Hub, and "
            f"got {type(path).__name__}"
        )
    return hub.arguments_of(str(path), "adapter_config.json", kwargs)


def _check_addable(model: PeftModel, config: PeftConfig, adapter_name: str) -> None:
    if adapter_name in model.peft_config:
        raise InputError(
            f"the model has an adapter {adapter_name!r} already; choose another adapter_name"
        )
    if config.peft_type != model.peft_type:
        raise InputError(
            f"an adapter of type {_type_of(config)} cannot be added to a model with adapters of "
            f"type {_type_of(model)}; load it onto another copy of the model"
        )


def _type_of(config: PeftConfig | PeftModel) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _add(
    model: PeftModel,
    path: str | Path,
    weights: Mapping[str, Tensor],
    adapter_name: str,
    is_trainable: bool,
    kwargs: Mapping[str, Any],
) -> PeftModel:
    """Add an adapter to `model`; if that fails, remove it again and raise."""
    tuner, was_training = model.base_model, model.training
    others_hidden = (
        tuner.only_visible({adapter_name}) if isinstance(tuner, SwitchingTuner) else nullcontext()
    )
    try:
        with others_hidden, without_noise():
            model.load_adapter(str(path), adapter_name, is_trainable=is_trainable, **kwargs)
            _check(model, adapter_name, path, weights)
    except Exception:
        if adapter_name in model.peft_config:
            model.delete_adapter(adapter_name)
        model.train(was_training)  # `load_adapter` sets evaluation mode
        raise
    apply_peft_fixes(model, adapter_name)
    return model


def _check(
    model: PeftModel, adapter_name: str, path: str | Path, weights: Mapping[str, Tensor]
) -> None:
    """Raise InputError unless the file has exactly the tensors that the config requires."""
    # the names as they are saved, without the adapter's name
    expected = set(get_peft_model_state_dict(model, adapter_name=adapter_name))
    missing, unexpected = sorted(expected - set(weights)), sorted(set(weights) - expected)
    if missing or unexpected:
        which = f"lacks {missing[0]}" if missing else f"has {unexpected[0]}, which the model lacks"
        count = len(missing) + len(unexpected)
        nearest = ""
        if unexpected and not missing:
            nearest = did_you_mean(unexpected[0], expected, limit=0)
        raise InputError(
            f"the adapter in {str(path)!r} does not match its config: it {which} ({count} tensors "
            f"differ){nearest}"
        )
