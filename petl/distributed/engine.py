"""Backward pass and optimizer step on one process, under DDP or FSDP2.

Whatever reads or writes the adapter's values (files, pictures, restored checkpoints) does so within
`whole`; there it finds what one process would have. Everything else works on the shares.
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
from petl.core.model.structure import blocks, quantization_of
from petl.core.parameters import trainable


class Engine:
    """Drives a model and its optimizer for the training loop.

    Attributes:
        wrapped: what makes the forward pass in place of the model.
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
        return self.model if is_sharded(self.model) else self.accelerator.prepare(self.model)

    def passes(self, *, last: bool) -> AbstractContextManager[None]:
        """Around the passes of a micro-batch; with the last, processes average their gradients."""
        return nullcontext() if last else self.accelerator.no_sync(self.wrapped)

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients those of a loss."""
        loss.backward()

    def step(self) -> Tensor:
        """Cut the gradient to `max_norm` and make the optimizer's step; its norm before, 0-d."""
        if self.max_norm is None:
            norm = nn.utils.get_total_norm([p.grad for p in self.tensors if p.grad is not None])
        else:
            norm = nn.utils.clip_grad_norm_(self.tensors, self.max_norm)
        self.optimizer.step()
        return to_full(norm)

    def whole(self) -> AbstractContextManager[None]:
        """As `petl.distributed.engine.whole`, of the model and its optimizer."""
        return whole(self.model, self.optimizer)

    def release(self) -> None:
        """Take away from the model what only training needs."""
        if not is_sharded(self.model):
            self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)


def on_device(model: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
    """The base model on the device of this process; where it is if only shares of it will be.

    A quantised one was read onto the device.
    """
    stays = accelerator.is_fsdp2 or quantization_of(model)
    return model if stays else model.to(accelerator.device)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def shard(model: PeftModel, accelerator: Accelerator) -> None:
    """Spread the model over the processes, block by block, if the run is launched so.

    Not by Accelerate, which breaks an embedding that an encoder and a decoder share. The model must
    not be called in part from here on: the shares come together in the forward pass of the whole,
    or in `generate`, in which every process takes part.
    """
    if not accelerator.is_fsdp2:
        return
    for _, parameter in trainable(model):  # what trains in one group has one type
        parameter.data = parameter.data.float()
    plugin: Any = accelerator.state.fsdp_plugin
    base: Any = model.get_base_model()
    for part in parts(model):
        fully_shard(part, reshard_after_forward=plugin.reshard_after_forward)
    fully_shard(model)
    if base.can_generate():  # it does not go through the model's own forward
        register_fsdp_forward_method(model, "generate")


def parts(model: PeftModel) -> list[nn.Module]:
    """What is put together by itself: blocks, and the embedding of tokens, which can be large.

    It stays with the rest if another module has its weight too.
    """
    base: Any = model.get_base_model()
    found = [block for _, block in blocks(model)]
    try:
        embedding = base.get_input_embeddings()
    except NotImplementedError:  # of a model that reads waves
        return found
    every = [parameter for _, parameter in model.named_parameters(remove_duplicate=False)]
    if isinstance(embedding, nn.Embedding) and sum(p is embedding.weight for p in every) == 1:
        found.append(embedding)
    return found


def reshard(model: nn.Module) -> None:
    """Let go of what a forward pass without a backward pass has left whole.

    Until then the outermost modules hold other parameters than those that an optimizer is about.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def whole(model: nn.Module, optimizer: Optimizer | None = None) -> Generator[None]:
    """Within it, what trains and the optimizer's state are plain tensors, equal on all processes.

    All processes must enter it. What is changed in it, in all of them alike, goes back into the
    shares. No forward pass may be made in it. Without sharding it does nothing.
    """
    reshard(model)
    places: list[tuple[nn.Module, str, Any]] = [
        (owner, name, parameter)
        for owner in model.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if isinstance(parameter, DTensor) and parameter.requires_grad
    ]
    plain = {share: nn.Parameter(share.detach().full_tensor()) for *_, share in places}
    # FSDP's hooks after loading expect shares
    hooks = {owner: owner._load_state_dict_post_hooks for owner, *_ in places}
    for owner, name, share in places:
        owner._parameters[name] = plain[share]
        owner._load_state_dict_post_hooks = OrderedDict()
    _exchange(optimizer, plain, lambda value, _: to_full(value))
    try:
        yield
    finally:
        for owner, name, share in places:
            share.data.copy_(to_shards(plain[share].detach(), share))
            owner._parameters[name] = share
            owner._load_state_dict_post_hooks = hooks[owner]
        back = {parameter: share for share, parameter in plain.items()}
        _exchange(optimizer, back, to_shards)


def _exchange(optimizer: Optimizer | None, values: dict[Any, Any], convert: Any) -> None:
    """Let an optimizer be about other parameters, and its state go with them."""
    if optimizer is None or not values:
        return
    for group in optimizer.param_groups:
        group["params"] = [values[parameter] for parameter in group["params"]]
    in_shares = not getattr(optimizer, "has_whole_state", False)
    state: dict[Any, Any] = defaultdict(dict)
    for parameter, entries in optimizer.state.items():
        state[values[parameter]] = {
            key: convert(value, values[parameter])
            if in_shares and isinstance(value, Tensor)
            else value
            for key, value in entries.items()
        }
    optimizer.state = state
