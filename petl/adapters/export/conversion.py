"""Convert a saved adapter: to a plain LoRA on its base model, or merged into the base model.

The factors of the LoRA are exact where the method has some, else an SVD. Shapes: I in, O out,
R rank.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mode
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from petl.adapters.export.checked_folder import Reference, refuse_changed_base, unwrap_trained
from petl.adapters.export.saved_adapter import SavedAdapter
from petl.core import fingerprint
from petl.core.adapter_file import PREFIX, WEIGHTS, trained_modules, trained_rows
from petl.core.adapter_folder import CONFIG, Folder
from petl.core.compat import BaseTunerLayer, TrainableTokensLayer, svd_factors
from petl.core.experts.layout import experts_of
from petl.core.experts.linears import stack_of
from petl.core.experts.stacks import Stack, has_sides_swapped, saved_factors, stacks_of
from petl.core.layers.grouped import stacked_factors
from petl.core.layers.layer import Adapter, AdapterLayer, Factors
from petl.core.model.targets import matched_names
from petl.core.refusals import is_lora, is_plain
from petl.core.registry import require_capability
from petl.core.spec.facts import facts_of
from petl.core.support import Capability
from petl.system.files.disk import copy_file
from petl.system.progress import Pass, ProgressItems

LARGER = 2  # times, that one rank for all layers may make a file
logger = logging.getLogger(__name__)


def merged_model(saved: SavedAdapter, *, lossy: bool = False) -> tuple[PreTrainedModel, Reference]:
    """Return the base model with the adapter merged into it, and what its outputs should be.

    Args:
        lossy: merge even if rounding removes more than 5 % of the update.

    Raises:
        InputError: the method cannot merge, rounding removes much of the update, or the base is
            another one.
    """
    require_capability(saved.config, Capability.MERGE, "merging")
    if saved.is_quantized:
        logger.warning(
            "merging into the dequantized base model: re-quantizing would lose most of the update"
        )
        saved = saved.dense()
    model = saved.model()
    if saved.run is None and fingerprint.quantized_then(model, saved.folder.base):
        logger.warning(
            "the weights that the adapter changes were quantized, sharded or offloaded when it "
            "trained, so they are not compared: the update of a QLoRA belongs to the dequantized "
            "weights, into which `petl merge RUN` merges; these differ from them by rounding"
        )
    adapted = Reference.of(model, saved.batches())
    unwrap_trained(model, keep=True)  # trained heads become part of the merged model
    with Pass("merging the adapter", None, quiet=True):
        # safe: raises on nan
        return model.merge_and_unload(safe_merge=True, lossy=lossy), adapted


def write_lora(saved: SavedAdapter, folder: Path) -> tuple[PeftModel, Reference]:
    """Write a saved adapter as a plain LoRA into an existing folder, without comparing outputs.

    Returns:
        The LoRA on the base model, as PEFT loads it, and what its outputs should be.

    Raises:
        InputError: as of `export_lora`.
    """
    require_capability(saved.config, Capability.LORA_EXPORT, "a plain LoRA")
    refuse_changed_base(saved.adapter, saved.config)
    model = saved.model()
    adapted = Reference.of(model, saved.batches())
    # a LoRA is copied, and any other adapter converted
    converted = None if is_lora(saved.config) else as_lora(model)
    unwrap_trained(model, keep=False)  # the LoRA brings the trained copies
    # and what it replicates: blocks of the base as it was
    base = saved.base() if facts_of(saved.config).layer_replication else model.unload()
    if converted is None:
        copy_file(saved.adapter / CONFIG, folder / CONFIG)
        saved.folder.copy_weights(folder)
        if (saved.adapter / fingerprint.FILE).is_file():
            copy_file(saved.adapter / fingerprint.FILE, folder / fingerprint.FILE)
            # of a compressed adapter the tensors are written anew
            fingerprint.seal(folder)
        if is_plain(saved.config):
            config: Any = saved.config
            converted = in_one_scale(config, Folder(folder).tensors)
    else:
        converted = in_one_scale(*converted) or converted
    if converted is not None:
        save_lora(*converted, folder)
        # the base is the same, and its tensors are others
        fingerprint.write(folder, saved.folder.base)
    return PeftModel.from_pretrained(base, str(folder)).eval(), adapted


@torch.no_grad()
def as_lora(
    model: PeftModel, adapter_name: str = "default"
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return config and tensors, by saved key, of the LoRA that equals an adapter.

    The tensors include the trained copies of `modules_to_save`, and rows of tokens.
    """
    layers = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, TrainableTokensLayer)
    ]
    factors = {
        name.removeprefix(PREFIX): factors_of(layer, adapter_name)
        for name, layer in ProgressItems(layers, "factoring the updates", unit="layers", quiet=True)
    }
    by_expert = [name for name in factors if stack_of(name) != name]
    stacks: dict[str, list[Factors]] = {}
    for name in by_expert:
        stacks.setdefault(stack_of(name), []).append(factors.pop(name))
    tensors = {}
    for name, (A, B, _) in factors.items():  # the scale goes into the config as alpha / r
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B
    tensors |= trained_modules(model, adapter_name) | trained_rows(model, adapter_name)
    config = lora_config(model, factors, adapter_name, stacks)
    for stack in stacks_of(config, model.get_base_model()):
        tensors |= stack_tensors(stack, stacks[f"{stack.path}.{stack.name}"])
    return config, {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}


def factors_of(layer: nn.Module, adapter_name: str) -> Factors:
    """Return A [R, I], B [O, R] and the scale of one layer's update."""
    if isinstance(layer, AdapterLayer):
        (adapter,) = (adapter for _, adapter in layer.pick([adapter_name]))
        assert isinstance(adapter, Adapter)
        exact = adapter.factors()
        if exact is not None:  # no SVD: exact and fast
            return exact
    A, B = svd_factors(layer, adapter_name)
    # the columns of B have the singular values as their norms; below this bound, the tolerance of
    # torch.linalg.matrix_rank, they are rounding errors
    norm_R = B.float().norm(dim=0)
    bound = norm_R.max() * torch.finfo(torch.float32).eps * max(*A.shape, *B.shape)
    significant = norm_R > bound
    if not significant.any():
        significant[0] = True  # an update of zero becomes a LoRA of rank 1
    return Factors(A[significant], B[:, significant], 1.0)


def stack_tensors(stack: Stack, factors: Sequence[Factors]) -> dict[str, Tensor]:
    """Return the tensors of a LoRA on a stack of experts by their names in a file.

    Args:
        stack: of the base model.
        factors: of each expert; smaller ranks than the largest are filled up with zeros.
    """
    A, B, scales, _ = stacked_factors(factors)
    B = B * torch.tensor(scales, dtype=B.dtype, device=B.device)[:, None, None]
    layout = experts_of(stack.module)
    assert layout is not None
    names = (f"{PREFIX}{stack.saved_path}.lora_{side}.weight" for side in "AB")
    swapped = has_sides_swapped(stack.module, layout)
    return dict(zip(names, saved_factors(A, B, swapped=swapped), strict=True))


def lora_config(
    model: PeftModel,
    factors: dict[str, Factors],
    adapter_name: str,
    stacks: Mapping[str, Sequence[Factors]],
) -> LoraConfig:
    """Return the config of a LoRA with these factors; patterns hold the ranks that differ.

    Args:
        model: with the adapter.
        factors: by path of a linear layer.
        adapter_name: the adapter.
        stacks: by path of a stack, those of its experts, whose scale is in B.
    """
    config = model.peft_config[adapter_name]
    ranks = {name: len(A) for name, (A, _, _) in factors.items()}
    alphas = {name: scale * ranks[name] for name, (_, _, scale) in factors.items()}
    for stack, own in stacks.items():
        ranks[stack] = max(len(A) for A, _, _ in own)
        alphas[stack] = ranks[stack]
    layers: list[Any] = [model.get_base_model().get_submodule(name) for name in factors]
    return ranked_config(
        config,
        ranks,
        alphas,
        target_modules=shortest_targets(model, list(factors)) if factors else [],
        target_parameters=list(stacks) or None,
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers),
    )


def in_one_scale(
    config: LoraConfig, tensors: dict[str, Tensor]
) -> tuple[LoraConfig, dict[str, Tensor]] | None:
    """Return an equal LoRA with one rank and the scale lora_alpha / r; None: it is one, or cannot.

    Engines read r and lora_alpha and no more: not use_rslora, nor patterns. Smaller ranks are
    filled with zeros, unless that makes the file more than twice as large.
    """
    ends = (".lora_A.weight", ".lora_B.weight")
    pairs = {
        key.removeprefix(PREFIX).removesuffix(ends[0]): (key, key.replace(*ends))
        for key in tensors
        if key.endswith(ends[0])
    }
    layers = {name: fingerprint.layer_in(config, name) for name in pairs}
    rank = max(layer["rank"] for layer in layers.values())
    scale = mode(layer["scale"] for layer in layers.values())
    plain = not (config.use_rslora or config.rank_pattern or config.alpha_pattern)
    # the rows of several experts are one tensor, at whose end no zeros can stand
    plain |= bool(config.target_parameters)
    sizes = [tensors[key].numel() for pair in pairs.values() for key in pair]
    padded = sum(rank * (tensors[A].shape[-1] + len(tensors[B])) for A, B in pairs.values())
    if plain or any(tensors[key].dim() != 2 for pair in pairs.values() for key in pair):
        return None
    if padded > LARGER * sum(sizes):
        return None
    found = dict(tensors)
    for name, (a, b) in pairs.items():
        A, B, missing = tensors[a], tensors[b], rank - layers[name]["rank"]
        found[a] = nn.functional.pad(A, (0, 0, 0, missing))
        found[b] = nn.functional.pad(B * (layers[name]["scale"] / scale), (0, missing))
    alpha = as_integer(round(scale * rank, 9))
    one = {"r": rank, "lora_alpha": alpha, "use_rslora": False}
    return replace(copy.deepcopy(config), **one, rank_pattern={}, alpha_pattern={}), found


def ranked_config(
    template: PeftConfig,
    ranks: dict[str, int],
    alphas: Mapping[str, float] | None = None,
    **fields: object,
) -> LoraConfig:
    """Return the config of a LoRA with these ranks and alphas, by layer.

    Args:
        template: has the base model and the heads; of a LoRA also `fan_in_fan_out`.
        alphas: None: the ranks, which is a scale of 1.
        fields: others than by default: all layers by their names.
    """
    alphas = dict(alphas or ranks)
    rank, alpha = mode(ranks.values()), mode(alphas.values())  # the shortest patterns
    own: dict[str, Any] = {
        "target_modules": sorted(ranks),
        "fan_in_fan_out": getattr(template, "fan_in_fan_out", False),
        **fields,
    }
    return LoraConfig(
        task_type=template.task_type,
        base_model_name_or_path=template.base_model_name_or_path,
        revision=template.revision,
        inference_mode=True,  # PEFT saves it so; loading with is_trainable overrides it
        # PEFT may list heads twice
        modules_to_save=list(dict.fromkeys(facts_of(template).modules_to_save or [])) or None,
        # the trained copies of an embedding and of the head that is tied to it are one
        ensure_weight_tying=facts_of(template).ensure_weight_tying,
        layer_replication=facts_of(template).layer_replication,
        trainable_token_indices=facts_of(template).trainable_token_indices,
        r=rank,
        lora_alpha=as_integer(alpha),
        rank_pattern=exceptions(ranks, rank),
        alpha_pattern={name: as_integer(a) for name, a in exceptions(alphas, alpha).items()},
        **own,
    )


def exceptions(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """Return the entries that differ from `usual`, longest names first: the first match counts."""
    names = sorted(values, key=lambda name: (-len(name), name))
    return {name: values[name] for name in names if values[name] != usual}


def as_integer(number: float) -> Any:
    """Return an int where the value is integral: PEFT declares `lora_alpha` as int."""
    return int(number) if float(number).is_integer() else number


def shortest_targets(model: PeftModel, names: list[str]) -> list[str]:
    """Return the last parts of `names` if they match exactly these modules, else `names`."""
    suffixes = sorted({name.rpartition(".")[2] for name in names})
    short = LoraConfig(target_modules=suffixes)
    matched = matched_names(short, model.get_base_model())
    return suffixes if sorted(matched) == sorted(names) else sorted(names)


def save_lora(config: LoraConfig, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write an adapter folder in PEFT's format."""
    # tied ones are one tensor with several names, which safetensors refuses
    names = {tensor.data_ptr(): name for name, tensor in tensors.items()}
    apart = {n: t if names[t.data_ptr()] == n else t.clone() for n, t in tensors.items()}
    save_file(apart, folder / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
