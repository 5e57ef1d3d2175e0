"""CorDA: PEFT's LoRA on residual weights, saved as a plain LoRA on the original ones.

Shapes: I in, O out, R rank.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from petl.core.compat import BaseTunerLayer, LoraConfig, LoraLayer, renamed_targets
from petl.core.experts.layout import experts_of
from petl.core.experts.linears import paths_of_experts, stack_of
from petl.core.experts.lora import FusedExperts
from petl.core.experts.stacks import has_sides_swapped, saved_factors
from petl.core.layers.layer import Adapter
from petl.core.layers.wrappers import factors_of_experts
from petl.core.method import (
    AdapterSet,
    Method,
    NewAdapters,
    Settings,
    Tensors,
    TrainContext,
    WrapContext,
)
from petl.core.model.heat_map import HeatMap, means, of_layers, role_of
from petl.core.model.weight_changes import CHANGES, MEANING
from petl.core.register import register
from petl.core.support import BASES, Capability
from petl.efficiency.fused_lora.switching import SwitchingLora
from petl.errors import InputError
from petl.methods.corda.config import CordaConfig
from petl.methods.corda.initialization import (
    QUANTIZED,
    InitialFactors,
    initialize,
    without_experts,
)
from petl.methods.families.conversion import set_refusal
from petl.system.files.tensor_file import check_finite

logger = logging.getLogger(__name__)

IS_LORA = (
    "CorDA has changed the base weights, to which its update is relative; save_pretrained writes a "
    "plain LoRA on the original weights"
)
# Both relative to the largest entry; assumptions, above the rounding of half precision and float32.
LARGE = 1e-2  # error of the split weights that is logged as a warning
SAME = 1e-5  # difference up to which two initializations count as equal


@register
class Corda(Method[CordaConfig, Any]):
    """See the package.

    The base weight of each target is W - s B0 A0, with A0 and B0 the initial factors. So
    `disable_adapter` gives the outputs of that residual, not of the pretrained model; for those,
    load the saved adapter onto a new base model and disable it there. A model can have one CorDA
    adapter only. `unload` and `delete_adapter` restore the pretrained weights.
    """

    name, config_cls, over = "corda", CordaConfig, SwitchingLora
    # below LoRA's: the factors are large parts of the weights; paper: 2e-5 for 7 B models
    lr = 3e-4
    by_position = True
    components = "its start was taken from the base as a whole"
    summary = (
        "LoRA initialized from the weight's components, oriented by samples of the task or of "
        "knowledge to preserve"
    )
    need = "keeping what the model knows"
    recommended = (
        "starts from the components that samples of the task, or of the knowledge to keep, use"
    )
    paper = "Yang et al. 2024, CorDA: Context-Oriented Decomposition Adaptation, arXiv:2406.05223"
    lacks = {
        Capability.EXPERTS: without_experts,
        Capability.NEW_TOKENS: "its export holds the updates of linear layers alone",
        Capability.RANKS: "it distributes ranks itself, by rank_budget",
        Capability.FSDP1: factors_of_experts,
        **dict.fromkeys(BASES, QUANTIZED),
        Capability.MIXED_BATCH: "a CorDA adapter changes the base weights, so the model can have "
        "no other adapter",
    }

    def keeps_base(self, config: CordaConfig) -> bool:
        """Return False: without the adapter the residual weights are left."""
        return False

    def needs_data(self, config: CordaConfig) -> str:
        """Return that it does."""
        return "method 'corda'"

    def calibrate(self, c: WrapContext[CordaConfig]) -> None:
        """Compute the initial factors."""
        initialize(c)

    def settings(self, c: WrapContext[CordaConfig]) -> dict[str, Settings]:
        """Return none.

        Raises:
            InputError: the model has an adapter already; or there are no initial factors.
        """
        if any(isinstance(module, BaseTunerLayer) for module in c.model.modules()):
            raise InputError(
                f"cannot add adapter {c.adapter_name!r} to one of CorDA, which has changed the "
                "base weights: save it and load the saved adapters onto the original model. In "
                "TRL, pass the original model as ref_model=, or set beta=0 (GRPO)"
            )
        if c.config.initial is None:
            raise InputError(
                f"CorDA with corda_method={c.config.corda_method!r} is initialized from "
                "calibration data: use petl.wrap(model, 'corda', calibration=batches, ...)"
            )
        return {}

    def added(self, new: NewAdapters[CordaConfig, Adapter]) -> None:
        """Split each weight into the initial update, which replaces PEFT's, and the residual."""
        initial, new.config.initial = new.config.initial, None  # configs are copied and saved
        # PEFT shortens names, and would take `down_proj` of the saved LoRA for that of experts
        if renamed_targets(LoraConfig(), new.model) & {*(new.config.target_modules or ())}:
            new.config.target_modules = [key for key in initial if stack_of(key) == key]
        layers = {
            path: module
            for path, module in new.model.named_modules()
            if isinstance(module, LoraLayer) and new.name in module.lora_A
        }
        sizes, kept = {}, {}
        for path, layer in layers.items():
            keys = keys_of(path, layer)
            # experts without a computation, which LongCat-Flash has weights for
            none = initial[keys[0]]._replace(A=0 * initial[keys[0]].A, B=0 * initial[keys[0]].B)
            kept[path] = layer, [initial.get(key, none) for key in keys]
            # a dry run has no weights to split
            if not kept[path][1][0].A.is_meta:
                own, of_layer = split(layer, new.name, kept[path][1])
                kept[path] = layer, own
                sizes |= dict(zip(keys, of_layer, strict=True))
        new.kept[new.name] = kept
        set_refusal(layers.values(), new.name, IS_LORA)
        if sizes:
            log_split(sizes)

    @torch.no_grad()
    def removed(self, old: AdapterSet[CordaConfig, Adapter]) -> None:
        """Add the initial update, which `added` subtracted, to the base weights."""
        for layer, initial in old.kept.pop(old.name, {}).values():
            # a merged weight has the trained update, too
            if layer.merged:
                layer.unmerge()
            for weight, own in zip(weights_of(layer), initial, strict=True):
                if not weight.is_meta:
                    weight.copy_(float32_copy(weight) + update_of(weight, own))

    @torch.no_grad()
    def heat_maps(self, t: TrainContext[CordaConfig, Adapter]) -> list[HeatMap]:
        """The spectrum of the decomposition, and the changes of the pretrained weights."""
        changes, spectra = {}, {}
        for name in t.names:
            for path, (layer, initial) in t.kept[name].items():
                weights, parts = weights_of(layer), []
                # a shard of FSDP2 has no norm of the complete weight
                if any(isinstance(weight, DTensor) for weight in weights):
                    continue
                factors = factors_of(layer, name)
                for weight, own, (A, B) in zip(weights, initial, factors, strict=True):
                    start = update_of(weight, own)
                    change = update_of(weight, own._replace(A=A, B=B)) - start
                    whole = float32_copy(weight) + start
                    parts.append(100 * float(change.norm() / whole.norm()))
                changes[path] = sum(parts) / len(parts)
                if initial[0].spectrum is not None:
                    spectra[path] = torch.stack([each.spectrum for each in initial]).mean(0)
        title, unit = "Change of the weights", "norm of the update, % of the weight's"
        changed = of_layers(t.model, changes, CHANGES, title, unit, MEANING)
        return [*spectrum_map(t.model, spectra), *changed]

    # Files

    def pack(self, saved: AdapterSet[CordaConfig, Adapter], tensors: Tensors) -> Tensors:
        """A' = [A; A0] and B' = [B, -B0]: the LoRA of twice the rank on the original weights."""
        for key, experts, initial in halves(saved, f".{saved.name}"):
            both = [by_expert(tensors[key], experts), initial.to(tensors[key])]
            tensors[key] = joined(torch.cat(both, 1), experts)
        return tensors

    def unpack(self, saved: AdapterSet[CordaConfig, Adapter], tensors: Tensors) -> Tensors:
        """The trained half of the tensors that `pack` concatenated.

        Raises:
            InputError: the other half differs from this model's initial factors.
        """
        check_finite(tensors, "the adapter file")
        for key, experts, initial in halves(saved):
            tensor = tensors.get(key)
            if tensor is None:  # PEFT warns
                continue
            rank = initial.shape[1]
            # a file of another rank must not fail here
            fits = experts == 0 or len(tensor) == 2 * rank * experts
            parts = by_expert(tensor, experts) if fits else tensor
            size = min(rank, parts.shape[1])
            second = parts.narrow(1, parts.shape[1] - size, size)
            if parts.shape[1] != 2 * rank or not is_close(second.to(initial), initial):
                raise InputError(
                    f"{key} was saved with other initial factors than this model's; load the file "
                    "onto the original model, or repeat the initialization: same calibration "
                    "data, same number of processes (method.factors_cache stores the factors)"
                )
            tensors[key] = joined(parts.narrow(1, 0, rank), experts)
        return tensors


def spectrum_map(model: nn.Module, spectra: Mapping[str, Tensor]) -> list[HeatMap]:
    """The singular values at powers of two, averaged over layers, as a heat map."""
    if not spectra:
        return []
    most = max(map(len, spectra.values()))
    at = [2**i for i in range(most.bit_length())]
    relative = {
        key: [100 * float(S[i - 1] / S[0]) if i <= len(S) else 0.0 for i in at]
        for key, S in spectra.items()
    }
    rows = means((role_of(model, key), numbers) for key, numbers in relative.items())
    heat_map = HeatMap(
        "spectrum",
        "CorDA: spectrum of the oriented decomposition",
        "% of the largest singular value",
        list(rows),
        [str(i) for i in at],
        list(rows.values()),
        "Singular values of the weight times the covariance of its inputs, relative to the "
        "largest, averaged over layers. Where they fall fast, few components carry the task.",
        column_label="number of the component, from 1",
    )
    return [heat_map]


def keys_of(path: str, layer: nn.Module) -> list[str]:
    """The paths of what a layer of PEFT adapts: its own, or those of the experts of a stack."""
    if not isinstance(layer, FusedExperts):
        return [path]
    # PEFT wraps the layer of one stack around that of the other
    stack = f"{path.replace('.base_layer', '')}.{layer.parameter_name}"
    return paths_of_experts(stack, layer.num_experts)


def weights_of(layer: Any) -> list[Tensor]:
    """The weights [O, I] below a layer, as views; one for each expert of a stack."""
    base = layer.get_base_layer()
    if not isinstance(layer, FusedExperts):
        return [base.weight.t() if isinstance(base, Conv1D) else base.weight]
    layout = experts_of(base)
    assert layout is not None
    weights = layer.get_param().detach()
    return list(weights.mT if layout.transposed else weights)


def factors_of(layer: Any, adapter_name: str) -> list[tuple[Tensor, Tensor]]:
    """A [R, I] and B [O, R] of an adapter on each of `weights_of`."""
    if isinstance(layer, FusedExperts):
        update = layer.factors(adapter_name)
        return list(zip(update.A.detach(), update.B.detach(), strict=True))
    return [(layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight)]


def saved_form(layer: nn.Module, initial: list[InitialFactors]) -> tuple[Tensor, Tensor]:
    """The factors of a layer as PEFT keeps them, lora_A and lora_B."""
    if not isinstance(layer, FusedExperts):
        return initial[0].A, initial[0].B
    base = layer.get_base_layer()
    layout = experts_of(base)
    assert layout is not None
    A, B = (torch.stack([each[side] for each in initial]) for side in (0, 1))
    return saved_factors(A, B, swapped=has_sides_swapped(base, layout))


@torch.no_grad()
def split(
    layer: Any, adapter_name: str, initial: list[InitialFactors]
) -> tuple[list[InitialFactors], list[Tensor]]:
    """Copy the initial factors to a layer's adapter and subtract their updates from the weights.

    Returns:
        The factors as rounded to the adapter's dtype, on the CPU; and for each a tensor [2]: the
        largest error of residual plus update, and the largest entry of the update, both relative
        to the largest entry of the weight.
    """
    A, B = saved_form(layer, initial)
    layer.lora_A[adapter_name].weight.copy_(A)
    layer.lora_B[adapter_name].weight.copy_(B)
    rounded, sizes = [], []
    parts = zip(weights_of(layer), initial, factors_of(layer, adapter_name), strict=True)
    for weight, given, (A, B) in parts:
        own = given._replace(A=A.cpu().clone(), B=B.cpu().clone())
        before, update = float32_copy(weight), update_of(weight, own)
        # the residual, rounded to the dtype of the base
        weight.copy_(before - update)
        error = float32_copy(weight) + update - before
        rounded.append(own)
        sizes.append(
            (torch.stack([error.abs().max(), update.abs().max()]) / before.abs().max()).cpu()
        )
    return rounded, sizes


def float32_copy(tensor: Tensor) -> Tensor:
    """A copy in float32, or in float64 if the tensor is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


def update_of(weight: Tensor, initial: InitialFactors) -> Tensor:
    """The initial update of a weight, [O, I]."""
    A, B = (float32_copy(tensor.to(weight.device)) for tensor in (initial.A, initial.B))
    return initial.scale * (B @ A)


def log_split(sizes: dict[str, Tensor]) -> None:
    """Log the largest error of the split weights, and the largest initial update."""
    error, error_at = max((float(pair[0]), key) for key, pair in sizes.items())
    size, size_at = max((float(pair[1]), key) for key, pair in sizes.items())
    logger.log(
        logging.WARNING if error > LARGE else logging.INFO,
        "CorDA: W_res + s B A equals W up to %.1e of its largest entry (%s); the largest entry of "
        "s B A is %.2g times that of W (%s). With its adapter disabled the model computes with the "
        "residual weights, not with the pretrained ones: as a reference, use another copy of the "
        "original model (ref_model= in TRL)",
        error,
        error_at,
        size,
        size_at,
    )


def halves(
    saved: AdapterSet[CordaConfig, Adapter], name: str = ""
) -> Iterator[tuple[str, int, Tensor]]:
    """Yield for each tensor its key, a number of experts, and its second half in a file.

    The half is as of `by_expert`: its ranks are the second dimension.

    Args:
        saved: the adapter.
        name: its name in the key, with a dot before it.
    """
    for path, (layer, initial) in saved.kept[saved.name].items():
        A, B = saved_form(layer, initial)
        where = f"base_model.model.{path}.lora_"
        yield f"{where}A{name}.weight", len(initial), by_expert(A, len(initial))
        # its columns are those of all experts for the first rank, then for the second, ...
        yield f"{where}B{name}.weight", 0, -B


def by_expert(tensor: Tensor, experts: int) -> Tensor:
    """A tensor [E R, I] as [E, R, I]; itself for no experts."""
    return tensor.unflatten(0, (experts, -1)) if experts else tensor


def joined(tensor: Tensor, experts: int) -> Tensor:
    """Undo `by_expert`."""
    return tensor.flatten(0, 1) if experts else tensor


def is_close(found: Tensor, expected: Tensor) -> bool:
    """True if the tensors are equal in shape, and in values up to `SAME`."""
    limit = SAME * float(expected.abs().max())
    return found.shape == expected.shape and bool((found - expected).abs().max() <= limit)
