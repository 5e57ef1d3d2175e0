"""Backward pass and optimizer step on one process, under DDP or FSDP2.

Code that reads or writes the adapter's values (files, plots, restored checkpoints) does so within
`gathered`, where they are the same as on one process. Everything else works on the shards.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from petl.core.distributed import to_full, to_shards
from petl.core.model.structure import blocks
from petl.core.parameters import quantization_of, trainable


class Engine:
    """Drives a model and its optimizer for the training loop.

    Attributes:
        wrapped: the module to call for a forward pass, in place of the model.
    """

    def __init__(
        self,
        model: PeftModel,
        optimizer: Optimizer,
        max_norm: float | None,
        accelerator: Accelerator,
    ) -> None:
        self.model, self.optimizer, self.max_norm = model, optimizer, max_norm
        self.accelerator = accelerator
        self.tensors = [parameter for _, parameter in trainable(model)]
        self.wrapped: nn.Module = self.wrap()

    def wrap(self) -> nn.Module:
        """Return the module that computes the forward pass: the model itself, or DDP around it."""
        return self.model if is_sharded(self.model) else self.accelerator.prepare(self.model)

    def passes(self, *, last: bool) -> AbstractContextManager[None]:
        """Context of a micro-batch's passes; with the last, processes average their gradients."""
        return nullcontext() if last else self.accelerator.no_sync(self.wrapped)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""
        loss.backward()

    def step(self) -> Tensor:
        """Clip the gradient to `max_norm` and step the optimizer; return the norm before, 0-d."""
        # with DTensors both norms are over all shards
        if self.max_norm is None:
            norm = nn.utils.get_total_norm([p.grad for p in self.tensors if p.grad is not None])
        else:
            norm = nn.utils.clip_grad_norm_(self.tensors, self.max_norm)
        self.optimizer.step()
        return to_full(norm)

    def gathered(self) -> AbstractContextManager[None]:
        """`petl.distributed.engine.gathered` for the model and its optimizer."""
        return gathered(self.model, self.optimizer)

    def release(self) -> None:
        """Remove from the model what only training needs."""
        if not is_sharded(self.model):
            self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)


def on_device(model: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
    """Move the base model to the device of this process, unless FSDP2 will shard it.

    A quantized model was loaded onto the device already, and must not be moved.
    """
    stays = accelerator.is_fsdp2 or quantization_of(model)
    return model if stays else model.to(accelerator.device)


def is_sharded(model: nn.Module) -> bool:
    """Return True if FSDP2 shards the model."""
    return isinstance(model, FSDPModule)


def shard(model: PeftModel, accelerator: Accelerator) -> None:
    """Shard the model across processes, block by block, if the run uses FSDP2.

    Not by Accelerate, which breaks an embedding that an encoder and a decoder share. From here on
    parts of the model must not be called alone: shards are gathered in the forward pass of the
    complete model, or in `generate`, in which every process must take part.
    """
    if not accelerator.is_fsdp2:
        return
    for _, parameter in trainable(model):  # FSDP2 needs one dtype for all that trains in a group
        parameter.data = parameter.data.float()
    plugin: Any = accelerator.state.fsdp_plugin
    base: Any = model.get_base_model()
    # inner modules first, as fully_shard requires
    for part in parts(model):
        fully_shard(part, reshard_after_forward=plugin.reshard_after_forward)
    fully_shard(model)
    if base.can_generate():  # generate does not call the model's own forward
        register_fsdp_forward_method(model, "generate")


def parts(model: PeftModel) -> list[nn.Module]:
    """Return the modules that FSDP2 gathers one by one: blocks and the token embedding.

    An embedding that shares its weight with another module stays in the group of the model.
    """
    base: Any = model.get_base_model()
    found = [block for _, block in blocks(model)]
    try:
        embedding = base.get_input_embeddings()
    except NotImplementedError:  # a model of raw audio has none
        return found
    every = [parameter for _, parameter in model.named_parameters(remove_duplicate=False)]
    if isinstance(embedding, nn.Embedding) and sum(p is embedding.weight for p in every) == 1:
        found.append(embedding)
    return found


def reshard(model: nn.Module) -> None:
    """Free the parameters that a forward pass without a backward pass has left gathered.

    Until then the outermost modules hold other parameters than the sharded ones of an optimizer.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def gathered(model: nn.Module, optimizer: Optimizer | None = None) -> Generator[None]:
    """Inside the block, gather trainable parameters and optimizer state to plain tensors.

    All processes must enter the block and make the same changes, which are sharded again at its
    end. No forward pass is allowed in it. Without sharding it does nothing.
    """
    reshard(model)
    # every place of a parameter: tied parameters have several
    places: list[tuple[nn.Module, str, Any]] = [
        (owner, name, parameter)
        for owner in model.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if isinstance(parameter, DTensor) and parameter.requires_grad
    ]
    full = {shard: nn.Parameter(shard.detach().full_tensor()) for *_, shard in places}
    # FSDP2's hooks after loading a state dict expect shards
    hooks = {owner: owner._load_state_dict_post_hooks for owner, *_ in places}
    for owner, name, shard in places:
        owner._parameters[name] = full[shard]
        owner._load_state_dict_post_hooks = OrderedDict()
    _exchange(optimizer, full, lambda value, _: to_full(value))
    try:
        yield
    finally:
        for owner, name, shard in places:
            shard.data.copy_(to_shards(full[shard].detach(), shard))
            owner._parameters[name] = shard
            owner._load_state_dict_post_hooks = hooks[owner]
        back = {parameter: shard for shard, parameter in full.items()}
        _exchange(optimizer, back, to_shards)


def _exchange(optimizer: Optimizer | None, values: dict[Any, Any], convert: Any) -> None:
    """Replace the parameters of an optimizer, and convert its state accordingly."""
    if optimizer is None or not values:
        return
    for group in optimizer.param_groups:
        group["params"] = [values[parameter] for parameter in group["params"]]
    # SM3 of SparseAdapter keeps its complete state on every process
    is_sharded_state = not getattr(optimizer, "has_whole_state", False)
    # torch optimizers create the state of a new parameter on access
    state: dict[Any, Any] = defaultdict(dict)
    for parameter, entries in optimizer.state.items():
        state[values[parameter]] = {
            key: convert(value, values[parameter])
            if is_sharded_state and isinstance(value, Tensor)
            else value
            for key, value in entries.items()
        }
    optimizer.state = state
