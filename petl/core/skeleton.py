"""Copies of models without values, to find out which tensors an adapter must have.

An adapter's config and file may come from a stranger. Adding an adapter of that config to a copy of
the model on the meta device gives the names, dtypes and shapes of the tensors that the file must
have, before anything is allocated and before the model is changed.
"""

import copy
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import AdaLoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from petl.core.compat import embedding_weights
from petl.core.method import Method
from petl.core.model.copies import skeleton_of
from petl.core.spec.facts import facts_of
from petl.errors import InputError, first_line
from petl.system.files.tensor_file import Shapes


@dataclass(frozen=True)
class SkeletonShapes:
    """The tensors that the file of an adapter must have.

    Attributes:
        model: a skeleton with the adapter.
        required: dtypes and shapes by name.
        optional: those that the method may leave out (`Method.optional_tensors`), and those of
            the base's embeddings, which PEFT may save with an adapter.
        free_dims: by the last part of a tensor's name, the dimension that may have any size:
            IncreLoRA saves as many components as it has grown.
    """

    model: Any
    required: Shapes
    optional: Shapes
    free_dims: Mapping[str, int]


NAME = "default"  # of the adapter in a skeleton; names of tensors in files are without it
CACHE = "_petl_expected_tensors"  # attribute of a PeftModel


def expected_tensors(model: nn.Module, config: PeftConfig) -> SkeletonShapes:
    """Add an adapter to a skeleton of a model, and return the tensors that its file must have.

    A PeftModel keeps the result, if it takes no memory, for the next adapter of an equal config:
    servers load hundreds.

    Args:
        model: the base model, or a PeftModel.
        config: of the adapter, with its targets as they are saved.

    Raises:
        InputError: an adapter of this config cannot be added to the model.
    """
    config = copy.deepcopy(config)
    config.inference_mode = False
    skeleton = skeleton_of(model)
    shapes = tuple((name, tensor.shape) for name, tensor in skeleton.named_parameters())
    key = json.dumps(config.to_dict(), sort_keys=True, default=str), shapes
    if getattr(model, CACHE, (None,))[0] == key:
        return getattr(model, CACHE)[1]
    try:
        expected = _inject(skeleton, config)
    except InputError as error:
        # PEFT's BOFT and SHiRA read values of tensors that they create, so these get memory, which
        # uninitialized weights of the base hardly take; their sizes are bounded by the base's
        on_meta = isinstance(error.__cause__, NotImplementedError) or "meta tensors" in str(error)
        if error.__cause__ is None or not on_meta:
            raise
        with torch.random.fork_rng(devices=[]):
            # not kept: copies of the model would copy its memory as well
            return _inject(skeleton_of(model, "cpu"), config)
    if isinstance(model, PeftModel):
        setattr(model, CACHE, (key, expected))
    return expected


def _inject(skeleton: Any, config: Any) -> SkeletonShapes:
    if isinstance(facts_of(config).init_lora_weights, str):
        config.init_lora_weights = True  # others need values; shapes are the same
    if hasattr(config, "prompt_tuning_init"):
        config.prompt_tuning_init = "RANDOM"  # others need a tokenizer, or another file
    device = next(skeleton.parameters()).device
    try:
        # on meta, what a method creates takes no memory either
        with warnings.catch_warnings(action="ignore"), device:
            wrapped = get_peft_model(
                skeleton, config, NAME, low_cpu_mem_usage=device.type == "meta"
            )
            if isinstance(config, AdaLoraConfig) and config.rank_pattern is not None:
                wrapped.base_model.resize_modules_by_rank_pattern(config.rank_pattern, NAME)
            required = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    except InputError:
        raise
    except Exception as error:  # of PEFT, on values that it does not check
        raise InputError(
            f"no adapter of this config can be added to {type(skeleton).__name__}: "
            f"{first_line(error)}"
        ) from error
    # PEFT may save the embedding and the head of the base, too
    state = wrapped.state_dict()
    everything = required | {name: state[name] for name in embedding_weights(wrapped)}
    tuner = type(wrapped.base_model)
    asked: Method = getattr(tuner, "method", None) or Method()  # of PEFT's tuners: defaults
    may_lack = asked.optional_tensors
    everything |= {
        tuner._remove_adapter_name_from_key(name, NAME): tensor
        for name, tensor in state.items()
        if name.rpartition(".")[2] in may_lack and f".{tuner.prefix}" in name
    }
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in everything.items()}
    return SkeletonShapes(
        wrapped,
        {name: shapes.pop(name) for name in required if name.rpartition(".")[2] not in may_lack},
        shapes,
        asked.free_dims,
    )


def check_tables(
    expected: SkeletonShapes, config: PeftConfig, tensors: Mapping[str, Tensor]
) -> None:
    """Let a method of petl check the values of an adapter's tensors, as it does on loading.

    Raises:
        InputError: indices out of range, codes of other weights, ...
    """
    tuner = type(expected.model.base_model)
    if isinstance(getattr(tuner, "method", None), Method):
        with warnings.catch_warnings(action="ignore"):
            tuner._remap_adapter_state_dict_for_load(
                model=expected.model,
                config=config,
                adapter_name=NAME,
                state_dict=dict(tensors),
            )
