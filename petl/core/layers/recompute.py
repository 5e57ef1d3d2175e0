"""MLPs whose activations are made again in backward instead of being kept for it.

Shapes: F width of an MLP between its layers. A gated MLP computes `down(act(gate(x)) * up(x))`; for
backward torch keeps gate, act(gate) and up, and an adapter on `down` keeps the product, its input:
4 F values a token. A plain one computes `out(act(in(x)))` and keeps 2 F. Here the inputs of the
activation are kept, 2 F and F, and what follows from them elementwise is made again.

The layers themselves are called as ever, so adapters of any kind, hooks, quantised and sharded
layers are no matter. Whoever else decides on what is kept (checkpointing, offloading) is asked.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.autograd.function import once_differentiable

from petl.core.layers.class_swap import SwappedClass, swap_class
from petl.errors import UnsupportedError
from petl.ops.low_rank import has_no_hooks


class _Remade(torch.autograd.Function):
    """`act(z)`, or `act(z) * up`, of which backward finds `z` and `up` only."""

    @staticmethod
    def forward(ctx: Any, act: Callable[[Tensor], Tensor], z: Tensor, up: Tensor | None) -> Tensor:
        ctx.save_for_backward(z, up)
        ctx.act, ctx.unpacked = act, None
        return _product(act(z), up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (z, up), ctx.unpacked = _inputs(ctx), None
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            a = ctx.act(leaf)
        to_z = to_up = None
        if ctx.needs_input_grad[2]:
            to_up = grad * a.detach()
        if ctx.needs_input_grad[1]:
            (to_z,) = torch.autograd.grad(a, leaf, _product(grad, up))
        return None, to_z, to_up


def _product(a: Tensor, up: Tensor | None) -> Tensor:
    return a if up is None else a * up


def _inputs(node: Any) -> tuple[Tensor, Tensor | None]:
    """What a `_Remade` step has kept, until its backward; checkpointing hands it out once."""
    if node.unpacked is None:
        node.unpacked = node.saved_tensors
    return node.unpacked


class _Recipe(NamedTuple):
    """What stands for a kept tensor: how it lay in the output of a `_Remade` step."""

    node: Any
    place: tuple[Any, ...]

    def tensor(self) -> Tensor:
        z, up = _inputs(self.node)
        with torch.no_grad():
            return _product(self.node.act(z), up).as_strided(*self.place)


@contextmanager
def _remade(x: Any) -> Generator[None]:
    """Within it, whoever keeps `x` keeps how it is made, if it is the output of a `_Remade`."""
    node = getattr(x, "grad_fn", None)
    if not isinstance(node, _Remade._backward_cls):
        yield
        return
    keep, take = _top_saved_tensors_default_hooks(False) or (_same, _same)
    storage = x.untyped_storage()._cdata

    def pack(tensor: Tensor) -> Any:
        if tensor.layout != torch.strided or tensor.untyped_storage()._cdata != storage:
            return keep(tensor)
        return _Recipe(node, (tensor.size(), tensor.stride(), tensor.storage_offset()))

    def unpack(kept: Any) -> Tensor:
        return kept.tensor() if isinstance(kept, _Recipe) else take(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _same(kept: Any) -> Any:
    return kept


def _remakes(act: Any) -> bool:
    """Whether now is a time to keep less, and `act` a function of its input and nothing else."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    is_module = isinstance(act, nn.Module)
    return not is_module or (has_no_hooks(act) and next(act.parameters(), None) is None)


class _Gated(SwappedClass):
    """Of a gated MLP."""

    def forward(self: Any, x: Tensor) -> Tensor:
        act = self.act_fn
        if not _remakes(act):
            return super().forward(x)
        product = _Remade.apply(act, self.gate_proj(x), self.up_proj(x))
        with _remade(product):
            return self.down_proj(product)


class _Intermediate(SwappedClass):
    """Of a plain MLP's first half, as in BERT."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        act = self.intermediate_act_fn
        if not _remakes(act):
            return super().forward(hidden_states)
        return _Remade.apply(act, self.dense(hidden_states), None)


class _Output(SwappedClass):
    """Of its second half, whose first argument is that of its layer."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with _remade(hidden_states):
            return super().forward(hidden_states, *args, **kwargs)


# The names that forward refers to, in their order, which shows that a class computes so.
GATED = ("down_proj", "act_fn", "gate_proj", "up_proj")
INTERMEDIATE = ("dense", "intermediate_act_fn")


def recompute_mlp(model: nn.Module) -> int:
    """Let the MLPs in `model` keep what goes into their activations, and make the rest again.

    MLPs keep half of what they did; the activation is computed two times more. Results are the
    same to the bit. train.py does so with `train.recompute_mlp`. Under torch.compile, and where a
    hook watches the activation, an MLP computes as it did. There is no gradient of the gradient.

    Returns:
        How many MLPs that are.

    Raises:
        UnsupportedError: there is none of a known form.
    """
    changed = 0
    for module in model.modules():
        if _uses(module, GATED):
            swap_class(module, _Gated)
        elif _uses(getattr(module, "intermediate", None), INTERMEDIATE) and hasattr(
            getattr(module, "output", None), "dense"
        ):
            halves: Any = module
            swap_class(halves.intermediate, _Intermediate)
            swap_class(halves.output, _Output)
        else:
            continue
        changed += 1
    if not changed:
        raise UnsupportedError(
            f"no MLP of {type(model).__name__} can be recomputed: none is gated as Llama's "
            "(down_proj, act_fn, gate_proj, up_proj) or plain as BERT's (intermediate, output)"
        )
    return changed


def _uses(module: Any, names: tuple[str, ...]) -> bool:
    """Whether a module's own forward refers to these names and no others, in this order."""
    if not isinstance(module, nn.Module) or "forward" in module.__dict__:
        return False
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and code.co_names == names and code.co_argcount == 2
