"""A LoRA on stacks of experts for vLLM, which reads it as checkpoints store the experts.

Of most models that is one linear layer for each projection of each expert; of those whose
checkpoints have stacks themselves (gpt_oss), PEFT's own layout. Shapes: E experts, I in, O out,
R rank.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from petl.core.adapter_file import PREFIX
from petl.core.compat import LoraLayer
from petl.core.experts.checkpoints import ExpertProjection, parts_of, path_in_checkpoints
from petl.core.experts.layout import experts_of
from petl.core.experts.lora import FusedExperts
from petl.core.experts.stacks import Stack, stacks_of
from petl.core.layers.layer import Factors
from petl.errors import UnsupportedError


def split_experts(model: PeftModel, adapter_name: str = "default") -> dict[str, Factors] | None:
    """Return the factors of a LoRA whose experts are linear layers, by path in checkpoints.

    Returns:
        None if PEFT's layout is to be served: there are no stacks, or checkpoints have them too.

    Raises:
        UnsupportedError: not all stacks of a module are adapted.
    """
    base: Any = model.get_base_model()
    stacks = [*stacks_of(model.peft_config[adapter_name], base)]
    for stack in stacks:
        layout = experts_of(stack.module)
        own = {each.name for each in stacks if each.path == stack.path}
        missing = set(layout.stacks) - own if layout else set()
        if missing:
            raise UnsupportedError(
                f"the adapter adapts {stack.path}.{stack.name} and not {', '.join(missing)}, and "
                "vLLM serves a LoRA on all projections of experts or on none: train it with "
                "target_modules=experts, or merge it"
            )
    parts = {(s.path, s.name): [*parts_of(base, s.path, s.module, s.name)] for s in stacks}
    if not stacks or not all(parts.values()):
        return None
    return dict(_factors(model, stacks, parts, adapter_name))


Places = list[
    tuple[Tensor, str, Tensor | slice]
]  # weights [O, I], their paths in checkpoints, and rows


def places_of(model: PeftModel) -> Places:
    """Return the weights of the base model that a LoRA changes, by layer and expert."""
    base: Any = model.get_base_model()
    linear = [
        (layer.get_base_layer().weight, path_in_checkpoints(base, path), slice(None))
        for path, layer in base.named_modules()
        if isinstance(layer, LoraLayer) and not isinstance(layer, FusedExperts)
    ]
    return linear + [
        (stack.module.get_parameter(stack.name)[part.expert], part.path, part.outputs)
        for stack in stacks_of(model.peft_config["default"], base)
        for part in parts_of(base, stack.path, stack.module, stack.name)
    ]


def _factors(
    model: PeftModel,
    stacks: list[Stack],
    parts: dict[tuple[str, str], list[ExpertProjection]],
    adapter_name: str,
) -> Iterator[tuple[str, Factors]]:
    """Yield path in checkpoints and factors of each layer and expert."""
    base: Any = model.get_base_model()
    for stack in stacks:
        fused = base.get_submodule(stack.saved_path)
        assert isinstance(fused, FusedExperts)
        update = fused.factors(adapter_name)
        for part in parts[stack.path, stack.name]:
            A, B = update.A[part.expert], update.B[part.expert][part.outputs]
            # a copy: gate and up share A
            yield part.path, Factors(A.clone(), B, update.scale)
    for path, layer in base.named_modules():
        if isinstance(layer, FusedExperts) or not isinstance(layer, LoraLayer):
            continue
        A, B = (sides[adapter_name].weight for sides in (layer.lora_A, layer.lora_B))
        yield path_in_checkpoints(base, path), Factors(A, B, layer.scaling[adapter_name])


@torch.no_grad()
def fold(tensors: Mapping[str, Tensor], scale: float, at: Places) -> None:
    """Add the updates of a LoRA, whose experts are linear layers, to the weights of its base model.

    Args:
        tensors: of the LoRA, by key in its file.
        scale: of all updates.
        at: as of `places_of` the adapted model.
    """
    for weight, path, outputs in at:
        A, B = (tensors[f"{PREFIX}{path}.lora_{side}.weight"] for side in "AB")
        weight[outputs] += scale * (B.double() @ A.double()).to(weight)
