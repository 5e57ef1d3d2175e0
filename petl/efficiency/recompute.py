"""Activation recomputation in MLP blocks: backward recomputes what it would have saved.

Shapes: F width of an MLP between its layers. A gated MLP computes `down(act(gate(x)) * up(x))`; for
backward torch saves gate, act(gate) and up, and an adapter on `down` saves the product, its input:
4 F values per token. A plain one computes `out(act(in(x)))` and saves 2 F. Here only the inputs of
the activation are saved, 2 F and F, and what follows from them elementwise is computed again.

The layers are called as before, so adapters of any method, hooks, quantized and sharded layers
work unchanged. Other saved-tensor hooks (checkpointing, offloading) stay in effect.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.autograd.function import once_differentiable

from petl.core.layers.class_swap import SwappedClass, forward_code, mixins_of, swap_class
from petl.core.parameters import check_module
from petl.core.support import Capability
from petl.efficiency.rewrite import Rewrite, Value
from petl.ops import Ctx
from petl.ops.low_rank import has_no_hooks

T = TypeVar("T")


class Recomputable(torch.autograd.Function):
    """A function of which the output can be computed again from what it saves."""

    @staticmethod
    def output(node: Ctx) -> Tensor:
        """Return the output of a node of the graph."""
        raise NotImplementedError

    @staticmethod
    def saved(node: Ctx) -> tuple[Any, ...]:
        """Return the saved tensors of a node, read once and kept until its backward.

        Under checkpointing, saved tensors can be unpacked only once.
        """
        if getattr(node, "unpacked", None) is None:
            node.unpacked = node.saved_tensors
        return node.unpacked


class _ActivationProduct(Recomputable):
    """`act(z)`, or `act(z) * up`, that saves only `z` and `up` for backward."""

    @staticmethod
    def forward(ctx: Ctx, act: Callable[[Tensor], Tensor], z: Tensor, up: Tensor | None) -> Tensor:
        ctx.save_for_backward(z, up)
        # the activation is a function, not a tensor: it cannot go through save_for_backward
        ctx.act = act
        return _product(act(z), up)

    @staticmethod
    def output(node: Ctx) -> Tensor:
        z, up = Recomputable.saved(node)
        return _product(node.act(z), up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (z, up), ctx.unpacked = Recomputable.saved(ctx), None
        with torch.enable_grad():  # act again, now with a graph of its own for its gradient
            leaf = z.detach().requires_grad_()
            a = ctx.act(leaf)
        to_z = to_up = None
        # the product rule: d(a u) = a du + u da
        if ctx.needs_input_grad[2]:
            to_up = grad * a.detach()
        if ctx.needs_input_grad[1]:
            (to_z,) = torch.autograd.grad(a, leaf, _product(grad, up))
        return None, to_z, to_up


def _product(a: Tensor, up: Tensor | None) -> Tensor:
    return a if up is None else a * up


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return `function(x)`, of which only `x` is saved for backward: nothing else of it trains."""
    return _ActivationProduct.apply(function, x, None)


class _SavedView(NamedTuple):
    """Saved in place of a tensor: node and view (size, stride, offset) of its output."""

    node: Ctx
    view: tuple[torch.Size, tuple[int, ...], int]

    def tensor(self) -> Tensor:
        """Compute the output again and return the view of it."""
        with torch.no_grad():
            return self.node._forward_cls.output(self.node).as_strided(*self.view)


@contextmanager
def saved_as_recipe(x: Tensor) -> Generator[None]:
    """In the block, save `_SavedView`s for `x` and its views, if a `Recomputable` made `x`."""
    node: Any = getattr(x, "grad_fn", None)
    if not issubclass(getattr(node, "_forward_cls", object), Recomputable):
        yield
        return
    # only the innermost hooks of torch are called, so these pass all other tensors on to the outer
    outer_pack, outer_unpack = _top_saved_tensors_default_hooks(False) or (_same, _same)
    # by storage, so that reshaped views of x are recognized as well
    storage = x.untyped_storage()._cdata

    def pack(tensor: Tensor) -> object:
        if tensor.layout != torch.strided or tensor.untyped_storage()._cdata != storage:
            return outer_pack(tensor)
        return _SavedView(node, (tensor.size(), tensor.stride(), int(tensor.storage_offset())))

    def unpack(packed: object) -> Tensor:
        return packed.tensor() if isinstance(packed, _SavedView) else outer_unpack(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _same(packed: T) -> T:
    return packed


def _can_recompute(act: object) -> bool:
    """Return True in a pass with gradients, if `act` has no parameters and no hooks.

    torch.compile decides by itself what to recompute.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    is_module = isinstance(act, nn.Module)
    return not is_module or (has_no_hooks(act) and next(act.parameters(), None) is None)


class _GatedMlp(SwappedClass):
    """Mixin for a gated MLP."""

    computes_as_before = True

    def forward(self: Any, x: Tensor) -> Tensor:
        act = self.act_fn
        if not _can_recompute(act):
            return super().forward(x)
        product = _ActivationProduct.apply(act, self.gate_proj(x), self.up_proj(x))
        with saved_as_recipe(product):
            return self.down_proj(product)


class _Intermediate(SwappedClass):
    """Mixin for the first half of a plain MLP, as in BERT."""

    computes_as_before = True

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        act = self.intermediate_act_fn
        if not _can_recompute(act):
            return super().forward(hidden_states)
        return recomputed(act, self.dense(hidden_states))


class _MlpOutput(SwappedClass):
    """Mixin for the second half, whose first argument is the input of its linear layer."""

    computes_as_before = True

    def forward(self: Any, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        with saved_as_recipe(hidden_states):
            return super().forward(hidden_states, *args, **kwargs)


# The attributes that `forward` reads, in order of use (its code's co_names): a class with just
# these computes the formula above.
GATED = ("down_proj", "act_fn", "gate_proj", "up_proj")
INTERMEDIATE = ("dense", "intermediate_act_fn")


def recompute_mlp(model: nn.Module) -> int:
    """Recompute activations of the MLPs in `model` during backward, which halves what they save.

    The activation is computed two more times; results are bit-exact. `petl train` does this with
    `train.recompute_mlp`. MLPs run as before under torch.compile and where the activation has
    hooks. Second derivatives are not available.

    Returns:
        The number of MLPs changed.

    Raises:
        UnsupportedError: no MLP has a known form.
    """
    check_module(model, "petl.recompute_mlp")
    return RecomputeMlp().apply(model)


class RecomputeMlp(Rewrite):
    """`recompute_mlp` as a rewrite."""

    capability = Capability.RECOMPUTE
    saves = "activation functions of MLPs are computed two more times"
    exact = True
    only_trains = True
    mixins = (_GatedMlp, _Intermediate, _MlpOutput)

    def refusal(self, model: nn.Module, value: Value = True) -> str:
        """Return that no MLP has a known form."""
        if any(True for _ in _mlps(model)):
            return super().refusal(model, value)
        return (
            f"no MLP of {type(model).__name__} can be recomputed: none is gated as Llama's "
            "(down_proj, act_fn, gate_proj, up_proj) or plain as BERT's (intermediate, output)"
        )

    def change(self, model: nn.Module, value: Value = True) -> int:
        """Swap the classes of all MLPs of a known form."""
        mlps = list(_mlps(model))
        for parts in mlps:
            for module, mixin in parts.items():
                swap_class(module, mixin)
        return len(mlps)


def _mlps(model: nn.Module) -> Iterator[dict[nn.Module, type[SwappedClass]]]:
    """Yield the parts of each MLP of a known form, with their mixins."""
    for module in model.modules():
        halves: Any = module
        # one that keeps a part of its channels for backward has less to store already
        if not all(mixin.computes_as_before for mixin in mixins_of(module)):
            continue
        if _uses(module, GATED):
            yield {module: _GatedMlp}
        elif _uses(getattr(module, "intermediate", None), INTERMEDIATE) and hasattr(
            getattr(module, "output", None), "dense"
        ):
            yield {halves.intermediate: _Intermediate, halves.output: _MlpOutput}


def gated_mlp(block: nn.Module) -> nn.Module | None:
    """Return the MLP of a block that is gated as Llama's; None if it has not exactly one."""
    found = [module for module in block.modules() if _uses(module, GATED)]
    return found[0] if len(found) == 1 else None


def _uses(module: object, names: tuple[str, ...]) -> bool:
    """Return True if a module's class has `forward(self, x)` with just these names, in order."""
    code = forward_code(module)
    return code is not None and code.co_names == names and code.co_argcount == 2
