"""What turns the losses of a step into gradients and makes the step: alone, under DDP or FSDP2.

DeepSpeed's ZeRO does both in its own way: see petl/zero.py.
"""

from contextlib import AbstractContextManager, nullcontext

from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer

from petl.core.distributed.sharding import full
from petl.core.parameters import trainable
from petl.distributed.fsdp import is_sharded, whole


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
        return full(norm)

    def whole(self) -> AbstractContextManager[None]:
        """As `petl.distributed.fsdp.whole`, of the model and its optimizer."""
        return whole(self.model, self.optimizer)

    def release(self) -> None:
        """Take away from the model what only training needs."""
        if not is_sharded(self.model):
            self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
