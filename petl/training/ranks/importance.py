"""The importance of blocks: by how much each turns its input, from one forward pass.

Shapes: T tokens, D width of the residual stream.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from petl.core.layers.context import ForwardContext, is_encoder_decoder
from petl.core.masks import without_padding
from petl.core.model.linear import LINEAR_KINDS
from petl.core.model.modes import calibration_pass, checked_batches, forward
from petl.core.model.places import is_stack
from petl.core.parameters import check_module
from petl.errors import InputError, choose
from petl.system import collectives as distributed


def angular(x: Tensor, y: Tensor) -> Tensor:
    """Return the angle between x and y [T, D] over pi, [T]: 0 for equal directions, 1 for opposite.

    Kahan's formula: unlike the arc cosine it is exact near 0, and never leaves its domain.
    """
    u, v = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    return 2 / math.pi * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1))


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Return 1 minus the cosine of x and y [T, D], [T]."""
    return (F.normalize(x, dim=-1) - F.normalize(y, dim=-1)).square().sum(-1) / 2


def mse(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean square of x - y [T, D], [T]."""
    return (x - y).square().mean(-1)


def mae(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean absolute value of x - y [T, D], [T]."""
    return (x - y).abs().mean(-1)


METRICS = {"angular": angular, "cosine": cosine, "mse": mse, "mae": mae}


def block_importance(
    model: nn.Module, batches: Iterable[Mapping[str, object]], metric: str = "angular"
) -> dict[str, float]:
    """Return the mean over tokens of a metric of each block's input and output, by block path.

    A block is an entry of an outermost list of layers that has linear layers; paths are those in
    the base model, in its order. Input and output are compared in float32, with the residual
    stream and before any final norm. The model runs as it is (quantized, in bfloat16, with its
    active adapter), in evaluation mode and without gradients; its modes are restored. Padding does
    not count: where `attention_mask` (of a decoder: `decoder_attention_mask`, or ignored `labels`)
    has as many entries as the block has tokens. With several processes, each passes its own
    batches and all get the result over all of them.

    Args:
        model: any model, or a PeftModel.
        batches: model inputs; tensors are moved to the device of the model.
        metric: a name in `METRICS`.

    Raises:
        InputError: the metric is unknown, the model has no blocks, there are no batches, or a block
            is not called, changes the shape of its input, or gives values that are not finite.
    """
    check_module(model, "petl.ranks.block_importance")
    compare = choose(METRICS, metric, "metric")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    blocks = blocks_of(base)
    if not blocks:
        raise InputError(
            f"{type(base).__name__} has no blocks, that is no list of layers with linear layers, "
            "so there is no importance by block; give ranks by rank_pattern"
        )
    decoder = base.get_decoder() if is_encoder_decoder(base) else nn.Module()  # ty: ignore
    recorder = BlockSums(blocks, compare, set(decoder.modules()))
    with calibration_pass(model, recorder.attach()):
        for batch in checked_batches(batches):
            recorder.masks.read_masks(base, batch)
            forward(model, batch)
            recorder.end_batch()
    return recorder.means(metric)


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks of a model by path: entries with linear layers of outermost lists."""
    found: dict[str, nn.Module] = {}
    inside = tuple[str, ...]()  # prefixes of the entries of outermost lists
    for name, module in model.named_modules():
        if not is_stack(module) or (inside and f"{name}.".startswith(inside)):
            continue
        entries = {f"{name}.{part}".removeprefix("."): e for part, e in module.named_children()}
        found |= {path: entry for path, entry in entries.items() if has_linear_layers(entry)}
        inside += tuple(f"{path}." for path in entries)
    return found


def has_linear_layers(entry: nn.Module) -> bool:
    """Return True if a module has linear layers inside, of any class, and is none itself."""
    inner = (module for module in entry.modules() if module is not entry)
    return any(isinstance(m, LINEAR_KINDS) or hasattr(m, "in_features") for m in inner)


class BlockSums:
    """Sums of a metric over the tokens of each block.

    Attributes:
        masks: those of the batch that runs.
        sums, counts: by path, of all complete batches of this process.
    """

    def __init__(
        self,
        blocks: Mapping[str, nn.Module],
        compare: Callable[[Tensor, Tensor], Tensor],
        decoder: set[nn.Module],
    ) -> None:
        self.blocks, self.compare, self.decoder = blocks, compare, decoder
        self.masks = ForwardContext()
        self.sums, self.counts = dict.fromkeys(blocks, 0.0), dict.fromkeys(blocks, 0)
        self.batches = 0
        # on the device, of the running batch: reading them would wait for it
        self.running: list[tuple[str, Tensor, int]] = []

    def attach(self) -> list[RemovableHandle]:
        """Register the hooks on the blocks."""
        return [
            block.register_forward_hook(partial(self.add, path), with_kwargs=True)
            for path, block in self.blocks.items()
        ]

    def add(self, path: str, block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forward hook of a block: add the tokens of one call."""
        x = first_tensor(args, kwargs)
        y = output if isinstance(output, Tensor) else output[0]
        if x is None or x.shape != y.shape:
            shape = None if x is None else list(x.shape)
            raise InputError(
                f"{path} turns an input of shape {shape} into {list(y.shape)}: importance compares "
                "the two, so a block must not change the shape; give ranks by rank_pattern"
            )
        mask = self.masks.decoder_mask if block in self.decoder else self.masks.mask
        # before the metric: padding may have values that are not finite
        x_TD, y_TD = without_padding(x, mask), without_padding(y, mask)
        self.running.append((path, self.compare(x_TD.float(), y_TD.float()).sum(), len(x_TD)))

    def end_batch(self) -> None:
        """Add the sums of the running batch to those before it, in float64."""
        self.batches += 1
        for path, total, count in self.running:
            self.sums[path] += float(total)
            self.counts[path] += count
        self.running.clear()

    def means(self, metric: str) -> dict[str, float]:
        """Return the means over all processes."""
        parts = distributed.gathered((self.batches, self.sums, self.counts))
        if not sum(batches for batches, _, _ in parts):
            raise InputError("there are no batches to measure importance with; pass at least one")
        found = {}
        for path in self.blocks:
            tokens = sum(counts[path] for _, _, counts in parts)
            if not tokens:
                raise InputError(
                    f"the batches never reach {path}, so its importance is not known; pass inputs "
                    "for the complete model (of an encoder-decoder: for its decoder too)"
                )
            found[path] = sum(sums[path] for _, sums, _ in parts) / tokens
            if not math.isfinite(found[path]):
                raise InputError(
                    f"{path} has {metric}={found[path]}: its inputs or outputs are not finite; "
                    "check the data, or load the model in float32"
                )
        return found


def first_tensor(args: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the input of a block: the first tensor that it is called with."""
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return kwargs["hidden_states"]
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
