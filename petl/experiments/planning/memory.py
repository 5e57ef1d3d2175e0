"""Memory of a training step on one process, from tensor shapes: weights, optimizer, one pass.

Weights may be quantized (`model.quantization`) or sharded across processes (`+launch=fsdp`). A pass
dequantizes or gathers some of them temporarily.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import Tensor, nn

from petl.core.compat import BaseTunerLayer
from petl.core.lifecycle import Lifecycle
from petl.core.parameters import LiveBytes, trainable
from petl.data.models.quantization import quantized_bytes
from petl.errors import UnsupportedError
from petl.experiments.planning.dry_run import PassMemory, pass_memory
from petl.experiments.reports.formatting import size
from petl.training.dataloader import Batch, Splits, longest_first
from petl.training.distributed.launch import parts
from petl.training.runs.settings import TrainConfig

PARTS_AT_ONCE = 2  # gathered blocks of FSDP2: one computes while the next one is prefetched


@dataclass(frozen=True)
class Storage:
    """How the weights of a run are stored.

    Attributes:
        quantized: `model.quantization` of each quantized layer, by its path in the base model.
        processes: number of processes that train together.
        sharded: True if each process holds a shard of every parameter (FSDP2).
        reshards: True if FSDP2 frees the gathered parameters of a block after its forward pass.
    """

    quantized: Mapping[str, str] = field(default_factory=dict)
    processes: int = 1
    sharded: bool = False
    reshards: bool = True


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of one process during a step.

    Attributes:
        weights: base model, adapter and head; of FSDP2, the shards of this process.
        optimizer: its state; of FSDP2, the shards of this process.
        gradients: those of earlier micro-batches, under accumulation; else part of `pass_`.
        unfolded: weights that are dequantized or gathered at the same time in a pass.
        pass_: forward and backward of one micro-batch of the longest rows; None: unknown.
        rows: number of rows of that micro-batch.
        tokens: length of its rows, including padding; None for images and audio.
        unknown: why `pass_` is unknown, or "".
        scoring: the forward pass of an evaluation of the longest test rows; None: unknown, or
            train.test=false. Answers that are generated are not part of it.
        scoring_rows: number of rows of that pass.
        scoring_tokens: length of its rows, as `tokens`.
        optimizer_state: what the state of the optimizer is, for a table.
    """

    weights: int
    optimizer: int
    gradients: int
    unfolded: int
    pass_: PassMemory | None
    rows: int
    tokens: int | None
    unknown: str = ""
    scoring: PassMemory | None = None
    scoring_rows: int = 0
    scoring_tokens: int | None = None
    optimizer_state: str = ""

    @property
    def scoring_total(self) -> int | None:
        """Bytes on the device during an evaluation at the end; None: unknown."""
        if self.scoring is None:
            return None
        # the optimizer still exists
        return self.weights + self.optimizer + self.unfolded + self.scoring.peak

    @property
    def fixed(self) -> int:
        """Bytes in addition to those of the pass."""
        return self.weights + self.optimizer + self.gradients + self.unfolded


def memory_of(
    model: PeftModel,
    splits: Splits,
    settings: TrainConfig,
    device: torch.device,
    storage: Storage,
    *,
    bf16: bool,
) -> Memory:
    """Return the memory of a step on one process.

    Call it inside `without_values` and `for_training`.
    """
    longest, accumulates = heaviest_pass(splits, settings, storage.processes)
    batch = heaviest_batch(splits, settings, storage.processes)
    trained = [parameter for _, parameter in trainable(model)]
    weights, unfolded = weight_bytes(model, storage)
    # evaluation also sorts by length, so its first batch is the largest
    rows = longest_first(splits.task.lengths(splits.test))[: settings.eval_batch_size]
    tested = splits.collate(list(splits.test.select(rows))) if settings.test and rows else None
    measured, scoring = None, None
    unknown = "" if trained else "no step of the run has one, since nothing trains"
    # a method whose forward pass depends on values of tensors cannot run on shapes alone
    try:
        if trained:
            measured = pass_memory(model, batch, device, bf16=bf16)
        if tested is not None:
            model.eval()
            scoring = pass_memory(model, tested, device, bf16=bf16, trains=False)
            model.train()
    except UnsupportedError as error:
        unknown = str(error)
    optimizer, meaning = optimizer_state(model, settings, storage)
    return Memory(
        weights=weights,
        optimizer=optimizer,
        # FSDP2 keeps them unsharded until the last micro-batch of a step
        gradients=sum(p.nbytes for p in trained) if accumulates else 0,
        unfolded=unfolded,
        pass_=measured,
        rows=len(longest),
        tokens=splits.task.width(batch),
        unknown=unknown,
        scoring=scoring,
        scoring_rows=len(rows),
        scoring_tokens=None if tested is None else splits.task.width(tested),
        optimizer_state=meaning,
    )


def heaviest_pass(
    splits: Splits, settings: TrainConfig, processes: int = 1
) -> tuple[list[int], bool]:
    """Return the rows of the largest pass on a process, and True if a step may need several."""
    buckets, micro = splits.buckets, settings.micro_batch_size
    if buckets is None:
        batch_size = min(settings.batch_size, len(splits.known))
    else:
        batch_size = max(buckets.sizes)
    local = math.ceil(batch_size / processes)  # one process may get one row more than others
    rows = min(micro or local, local)
    if buckets is not None:
        longest = [int(row) for row in buckets.largest_batch(micro, processes)]
    else:
        longest = longest_first(splits.task.lengths(splits.known))[:rows]
    return longest, rows < local


def heaviest_batch(splits: Splits, settings: TrainConfig, processes: int = 1) -> Batch:
    """Return the batch of the largest pass on a process."""
    rows, _ = heaviest_pass(splits, settings, processes)
    return splits.collate(list(splits.known.select(rows)))


def weight_bytes(model: PeftModel, storage: Storage) -> tuple[int, int]:
    """Return the bytes of parameters and buffers on one process, and of the unfolded weights."""
    base = model.get_base_model()
    quantized, dense = {}, 0
    for path, kind in storage.quantized.items():
        layer = base_layer(base.get_submodule(path))
        weight = layer.get_parameter("weight")  # dense here: on the meta device
        quantized[weight] = quantized_bytes(layer, kind)
        dense = max(dense, weight.nbytes)  # layers are dequantized one after the other
    tensors = unique((*model.parameters(), *model.buffers()))
    stored = sum(quantized[t] if t in quantized else local_bytes(t, storage) for t in tensors)
    return stored, gathered_bytes(model, storage) if storage.sharded else dense


def optimizer_state(model: PeftModel, settings: TrainConfig, storage: Storage) -> tuple[int, str]:
    """Return the bytes of the optimizer's state on one process, and what the state is.

    Call it inside `without_values`.
    """
    trained = [parameter for _, parameter in trainable(model)]
    own = Lifecycle(model).make_optimizer([{"params": trained, "lr": settings.lr}])
    if own is None:
        # float32 like the trainable parameters, see `make_optimizer`
        tensors, meaning = settings.optimizer_state
        return tensors * sum(local_bytes(parameter, storage) for parameter in trained), meaning
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes():  # where `.item()` has a result
        own.step()  # the first step allocates the state
    own.zero_grad()
    is_whole = getattr(own, "has_whole_state", False)
    held = sum(
        value.nbytes
        if is_whole or value.shape != parameter.shape
        else local_bytes(parameter, storage)  # a shard of the state for a shard of the parameter
        for parameter, state in own.state.items()
        for value in state.values()
        if isinstance(value, Tensor)
    )
    return held, f"state of {type(own).__name__}"


def gathered_bytes(model: PeftModel, storage: Storage) -> int:
    """Return the bytes of the parameters that FSDP2 gathers at the same time."""
    total = sum(p.nbytes for p in unique(model.parameters()))
    if not storage.reshards:
        return total
    sizes = sorted(sum(p.nbytes for p in unique(part.parameters())) for part in parts(model))
    # parameters outside of the blocks, such as embeddings, stay gathered
    return total - sum(sizes) + sum(sizes[-PARTS_AT_ONCE:])


def local_bytes(tensor: Tensor, storage: Storage) -> int:
    """Return the bytes of a tensor's largest shard: FSDP2 shards parameters along dimension 0."""
    if not storage.sharded or not isinstance(tensor, nn.Parameter):
        return tensor.nbytes
    first, *others = tensor.shape
    return math.ceil(first / storage.processes) * math.prod(others) * tensor.itemsize


def base_layer(module: nn.Module) -> nn.Module:
    """Return the layer that an adapter wraps, or the module itself without an adapter."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors without repetitions: tied weights are stored once."""
    return list({id(tensor): tensor for tensor in tensors}.values())


def megabytes(count: int) -> str:
    """Format a number of bytes of an estimate."""
    return f"{count / 1e6:,.0f} MB" if count >= 1e6 else size(count)
