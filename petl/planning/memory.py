"""Bytes that a training step needs on one process, from shapes alone: weights, optimizer, a pass.

Weights may lie in few bits (`model.quantization`) or in shares on several processes
(`+launch=fsdp`). A pass makes parts of them dense or whole again, for a while.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import Tensor, nn

from petl.core.compat import BaseTunerLayer
from petl.core.dry_run import PassMemory, pass_memory
from petl.core.parameters import trainable
from petl.distributed.engine import parts
from petl.errors import UnsupportedError
from petl.models.quantization import quantized_bytes
from petl.runs.settings import TrainConfig
from petl.training.dataloader import Splits, longest_first

PARTS_AT_ONCE = 2  # of FSDP2, beside the rest: one computes while the next one is fetched


@dataclass(frozen=True)
class Storage:
    """How the weights of a run lie.

    Attributes:
        quantised: by path in the base model, the kind of `model.quantization` of a layer's weight.
        processes: how many train together.
        sharded: whether each has a share of every tensor (FSDP2).
        reshards: whether FSDP2 lets go of a block after its forward pass.
    """

    quantized: Mapping[str, str] = field(default_factory=dict)
    processes: int = 1
    sharded: bool = False
    reshards: bool = True


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of one process during a step.

    Attributes:
        weights: base model, adapter and head, or this process's share.
        optimizer: AdamW's two moments, float32, or this process's share.
        gradients: what earlier micro-batches left, under accumulation; else part of the pass.
        unfolded: weights that a pass makes dense, or puts together from shares, at a time.
        pass_: forward and backward of one micro-batch of the longest rows; None: not to be told.
        rows: of that micro-batch.
        tokens: of each of its rows, padding included; None where rows have none.
        unknown: why the pass is not to be told, or "".
    """

    weights: int
    optimizer: int
    gradients: int
    unfolded: int
    pass_: PassMemory | None
    rows: int
    tokens: int | None
    unknown: str = ""

    @property
    def fixed(self) -> int:
        """Bytes that the pass comes on top of."""
        return self.weights + self.optimizer + self.gradients + self.unfolded


def memory_of(
    model: PeftModel,
    splits: Splits,
    settings: TrainConfig,
    dtype: str,
    device: torch.device,
    storage: Storage,
) -> Memory:
    """What a step needs on one process; to be called inside `without_values` and `for_training`."""
    longest, accumulates = heaviest_pass(splits, settings, storage.processes)
    batch = splits.collate(list(splits.known.select(longest)))
    trained = [parameter for _, parameter in trainable(model)]
    weights, unfolded = weight_bytes(model, storage)
    bf16 = settings.computes_in(dtype) == "bf16"
    measured, unknown = None, ""
    try:
        measured = pass_memory(model, batch, device, bf16=bf16)
    except UnsupportedError as error:
        unknown = str(error)
    return Memory(
        weights=weights,
        optimizer=optimizer_bytes(model, storage),
        # FSDP2 keeps them whole until those of the last micro-batch are there
        gradients=sum(p.nbytes for p in trained) if accumulates else 0,
        unfolded=unfolded,
        pass_=measured,
        rows=len(longest),
        tokens=splits.task.width(batch),
        unknown=unknown,
    )


def heaviest_pass(
    splits: Splits, settings: TrainConfig, processes: int = 1
) -> tuple[list[int], bool]:
    """The rows of the largest forward pass on one process, and whether a step may take several."""
    buckets, micro = splits.buckets, settings.micro_batch_size
    most = min(settings.batch_size, len(splits.known)) if buckets is None else max(buckets.sizes)
    most = math.ceil(most / processes)
    rows = min(micro or most, most)
    if buckets is not None:
        longest = [int(row) for row in buckets.largest_batch(micro, processes)]
    else:
        longest = longest_first(splits.task.lengths(splits.known))[:rows]
    return longest, rows < most


def weight_bytes(model: PeftModel, storage: Storage) -> tuple[int, int]:
    """Bytes of all parameters and buffers as they lie on one process, and of what is unfolded."""
    base = model.get_base_model()
    few, dense = {}, 0
    for path, kind in storage.quantized.items():
        layer = base_layer(base.get_submodule(path))
        weight = layer.get_parameter("weight")
        few[weight] = quantized_bytes(layer, kind)
        dense = max(dense, weight.nbytes)
    tensors = unique((*model.parameters(), *model.buffers()))
    kept = sum(few[t] if t in few else share(t, storage) for t in tensors)
    return kept, put_together(model, storage) if storage.sharded else dense


def optimizer_bytes(model: PeftModel, storage: Storage) -> int:
    """Bytes of AdamW's two moments on one process."""
    return 2 * sum(share(parameter, storage) for _, parameter in trainable(model))


def put_together(model: PeftModel, storage: Storage) -> int:
    """Bytes of the parameters that FSDP2 holds whole at a time."""
    every = sum(p.nbytes for p in unique(model.parameters()))
    if not storage.reshards:
        return every
    sizes = sorted(sum(p.nbytes for p in unique(part.parameters())) for part in parts(model))
    return every - sum(sizes) + sum(sizes[-PARTS_AT_ONCE:])


def share(tensor: Tensor, storage: Storage) -> int:
    """Bytes of the largest share of a tensor: FSDP2 cuts parameters up along their first side."""
    if not storage.sharded or not isinstance(tensor, nn.Parameter):
        return tensor.nbytes
    first, *others = tensor.shape
    return math.ceil(first / storage.processes) * math.prod(others) * tensor.itemsize


def base_layer(module: nn.Module) -> nn.Module:
    """The layer that an adapter is on, or a module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())
