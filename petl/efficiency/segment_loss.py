"""The loss of a causal language model in segments of positions, so that few logits exist at a time.

The model's own forward runs with the logits of one position per row, and with a loss function that
ignores them and computes the loss from the decoder's hidden states. What else the forward adds to
the loss (a router's balance, say) is added as before. Between hidden states and logits a model may
do more than multiply by its head (scale, soft cap), so logits of other than plain heads come from
its own forward, on a decoder that returns a segment of the hidden states.

Source of the idea: Wang et al., "LeMo: Enabling LEss Token Involvement for MOre Context
Fine-tuning", arXiv 2501.09767.
"""

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from petl.core.layers.class_swap import (
    SwappedClass,
    original_class,
    swap_class,
    with_signature,
)
from petl.core.layers.layer import Adapter
from petl.core.parameters import check_module
from petl.core.support import Capability
from petl.core.types import Arguments, CausalModel, base_of
from petl.efficiency.rewrite import AUTO, Rewrite, Value
from petl.errors import InputError
from petl.ops import IGNORED
from petl.ops.low_rank import LINEAR, WEIGHT_TYPES, has_no_hooks, product_dtype, weight_for
from petl.ops.segmented_loss import AnyHead, Head, LinearHead, mean_loss, require_tokens, shifted

TOKENS = 2048  # positions of a segment: 1 GB of float32 logits for 128,256 entries


def segment_loss(model: nn.Module, tokens: int = TOKENS) -> None:
    """Compute the training loss of a causal LM in segments of `tokens` positions.

    From then on, a training forward with labels returns `logits=None`, and a loss and gradients
    that equal the model's own up to rounding; positions without a label never reach the head.
    Evaluation, generation, forwards without labels or gradients, and torch.compile are as before.
    A head with auxiliary losses of its own (MoLA on `lm_head`) keeps the model's loss. `petl train`
    does this with `train.loss_segment`. Second derivatives are not available.

    Args:
        model: a PeftModel or a transformers model.
        tokens: positions whose logits exist at a time, from 1.

    Raises:
        InputError: `tokens` is not an integer from 1.
        UnsupportedError: the model is no causal LM with the standard loss.
    """
    check_module(model, "petl.segment_loss")
    require_tokens(tokens)
    SegmentLoss().apply(model, tokens)


def refusal_of_loss(base: nn.Module) -> str:
    """Return why a model is no causal LM with the standard loss of next tokens; "" if it is."""
    if not isinstance(base, PreTrainedModel):
        return "it is not a model of transformers"
    if base.config.is_encoder_decoder or base.get_output_embeddings() is None:
        return "it has no logits over a vocabulary for each next token"
    if (
        base.loss_function is not ForCausalLMLoss
        # some models compute a loss in forward, without the attribute
        or "loss_function" not in _forward_of(base).__code__.co_names
    ):
        return f"its loss (loss_type={base.loss_type!r}) is not that of next tokens"
    return ""


def decoder_of(base: CausalModel) -> nn.Module | None:
    """Return the module inside a causal LM that computes hidden states; None: it is not known."""
    # transformers looks for usual names: it returns the model itself (Llama 4), or a head that has
    # such a name (ModernBERT)
    inner = [m for m in base.children() if isinstance(m, PreTrainedModel)]
    found = base.get_decoder()
    if isinstance(found, PreTrainedModel) and found is not base:
        return found
    return inner[0] if len(inner) == 1 else None


def signature_of(base: nn.Module) -> inspect.Signature:
    """Return the arguments of a model's own forward."""
    return inspect.signature(_forward_of(base))


def _forward_of(base: nn.Module) -> FunctionType:
    kind: Any = original_class(base)
    # transformers wraps forward in decorators, which hide its names
    return inspect.unwrap(kind.forward)


def has_frozen_head(base: CausalModel) -> bool:
    """Return True if the head of a causal LM is a frozen linear layer without an adapter."""
    head = base.get_output_embeddings()
    return not any(p.requires_grad for p in head.parameters()) and _is_linear(head)


class _SegmentedLoss(SwappedClass):
    """Mixin for a causal LM.

    Attributes:
        loss_segment: positions of a segment.
        adds_to_logits: True if logits are more than the head's product; set by the first pass.
    """

    loss_segment: int
    adds_to_logits: bool | None = None

    @classmethod
    def extra_methods(cls, original: type[Any]) -> Arguments:
        """Forward, with the arguments of the model's own."""
        return {"forward": with_signature(cls.forward, original.forward)}

    def forward(self: Any, *args: object, **kwargs: object) -> object:
        own = super().forward
        if not is_segmented(self, kwargs):
            return own(*args, **kwargs)
        decoder, outputs = cast(nn.Module, decoder_of(self)), []
        # the model passes only logits to its loss function: hidden states come from the hooks
        hooks = [
            module.register_forward_hook(lambda module, _, output: outputs.append((module, output)))
            for module in [*_around(self, decoder)[1:], decoder]
        ]
        # `loss_function` is a property of transformers that stores what is set in this name
        before = self.__dict__.get("_loss_function")
        self.loss_function = partial(_loss, self, own, outputs)
        try:
            # 1, the fewest: 0 means all logits there
            output = own(*args, **{**kwargs, "logits_to_keep": 1})
        finally:
            for hook in hooks:
                hook.remove()
            del self._loss_function
            if before is not None:
                self.loss_function = before
        # logits of the last position alone could be taken for those of all
        output["logits"] = None
        return output


class SegmentLoss(Rewrite):
    """`segment_loss` as a rewrite, with the positions of a segment; auto: if the head is frozen."""

    capability = Capability.SEGMENTS
    saves = f"the logits of {TOKENS} positions at a time"
    value = AUTO
    only_trains = True
    mixins = (_SegmentedLoss,)

    def refusal(self, model: nn.Module, value: Value = TOKENS) -> str:
        """Return why the model is no causal LM with the standard loss, or what reads its logits."""
        base = base_of(model)
        reason = super().refusal(model, value) or refusal_of_loss(base)
        if not reason and "logits_to_keep" not in signature_of(base).parameters:
            reason = "its forward has no argument logits_to_keep"
        if not reason and decoder_of(base) is None:
            reason = "it is not known which of its modules computes the hidden states"
        if not reason and value == AUTO and not has_frozen_head(base):
            reason = "its head is trained, or no linear layer"
        return reason and f"the loss of {type(base).__name__} is not segmented: {reason}"

    def change(self, model: nn.Module, value: Value = TOKENS) -> int:
        """Swap the class of the model; a second call changes the size of a segment."""
        base = base_of(model)
        swap_class(base, _SegmentedLoss)
        cast(_SegmentedLoss, base).loss_segment = value if isinstance(value, int) else TOKENS
        return 1


def is_segmented(model: CausalModel, kwargs: Arguments) -> bool:
    """Return True if a forward with these arguments computes its loss in segments."""
    return isinstance(model, _SegmentedLoss) and is_training(model, kwargs)


def is_training(model: CausalModel, kwargs: Arguments) -> bool:
    """Return True for a training forward with labels that returns a dictionary."""
    chosen = kwargs.get("return_dict")  # PEFT passes None
    as_tuple = chosen is False or (chosen is None and not model.config.return_dict)
    return (
        model.training
        and torch.is_grad_enabled()
        and kwargs.get("labels") is not None
        # the caller asks for logits of certain positions
        and not kwargs.get("logits_to_keep")
        and not as_tuple
        and not torch.compiler.is_compiling()
        and model.loss_function is ForCausalLMLoss
    )


def _loss(
    model: Any,
    own: Callable[..., Any],
    outputs: list[tuple[nn.Module, Any]],
    *args: object,
    **kwargs: object,
) -> Tensor:
    """Return the loss of `ForCausalLMLoss` from the decoder's last output; logits are not read.

    Args:
        outputs: what the decoder and the modules around it returned, the outermost last.
    """
    given: Arguments = inspect.signature(ForCausalLMLoss).bind(*args, **kwargs).arguments
    ignore, items = given.get("ignore_index", IGNORED), given.get("num_items_in_batch")
    shift_labels = given.get("shift_labels")
    decoder = decoder_of(model)
    # last_hidden_state comes first in every decoder's output
    hidden = next(output for module, output in reversed(outputs) if module is decoder)[0]
    # the outermost with these states: what is inside it (an encoder of sounds) is not called again
    module, output = next(
        (module, output)
        for module, output in reversed(outputs)
        if module is decoder or getattr(output, "last_hidden_state", None) is hidden
    )
    if shift_labels is None:
        shift_labels = shifted(given["labels"], ignore)
    if hidden.shape[:-1] != shift_labels.shape:
        raise InputError(
            f"labels of shape {tuple(shift_labels.shape)} do not fit hidden states of shape "
            f"{tuple(hidden.shape)}"
        )
    tail = partial(_logits, model, own, module, output)
    # the terms need the head's own pass over all positions, gradients included
    if _records_terms(model):
        given["logits"] = tail(hidden)
        return ForCausalLMLoss(**given)
    rows = hidden.reshape(-1, hidden.shape[-1])
    head, parameters = _head(model, tail, rows)
    return mean_loss(
        head,
        rows,
        shift_labels.reshape(-1),
        tokens=model.loss_segment,
        parameters=parameters,
        items=items,
        ignore=ignore,
    )


def _head(model: Any, tail: Callable[[Tensor], Tensor], rows: Tensor) -> tuple[Head, list[Tensor]]:
    """Return what turns hidden states [P, D] into logits, and its trainable parameters."""
    layer = model.get_output_embeddings()
    if _is_linear(layer):
        # once a model: what its forward does after the head does not change with the data
        if model.adds_to_logits is None:
            model.adds_to_logits = _adds_to_logits(tail, rows)
        if not model.adds_to_logits:
            parameters = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
            # buffers of a segment are allocated: no larger than the batch needs
            size = min(model.loss_segment, len(rows))
            weight = weight_for(layer, product_dtype(rows))
            return LinearHead(weight, layer.bias, size), parameters
    # detached: the graph then ends at parameters of the tail, not in the decoder
    leaves = _leaves(tail(rows[:1].detach()[None]))
    return AnyHead(lambda segment: tail(segment[None])[0], leaves), leaves


def _is_linear(layer: nn.Module) -> bool:
    return type(layer) in LINEAR and has_no_hooks(layer) and type(layer.weight) in WEIGHT_TYPES


def _logits(
    model: Any, own: Callable[..., Any], module: nn.Module, output: Any, hidden: Tensor
) -> Tensor:
    """Return the logits [B, T, V] that the model's forward makes of hidden states [B, T, D].

    Args:
        module: the decoder, or a module around it, which returned `output`.
    """
    # the same class of output, since a model may read fields beside hidden states
    returned = type(output)(last_hidden_state=hidden)
    # never read: the module is replaced; forward requires ids of the shape
    ids = torch.zeros(hidden.shape[:-1], dtype=torch.long, device=hidden.device)
    with _returning(module, returned), _evaluating(_around(model, module)):
        return own(input_ids=ids, use_cache=False).logits


def _around(model: nn.Module, module: nn.Module) -> list[nn.Module]:
    """Return the modules that `module` is inside of, the model first."""
    path = next(name for name, each in model.named_modules() if each is module).split(".")
    return [model.get_submodule(".".join(path[:depth])) for depth in range(len(path))]


@contextmanager
def _evaluating(modules: Sequence[nn.Module]) -> Generator[None]:
    """In the block, these modules, and not their children, are in evaluation mode.

    Some require more inputs in training, such as the types of tokens.
    """
    before = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training


@contextmanager
def _returning(module: nn.Module, output: object) -> Generator[None]:
    """In the block, a call of `module` runs its hooks and returns `output`."""
    # accelerate and others set `forward` on the instance as well
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


class _AroundProduct(TorchDispatchMode):
    """Notes whether `hidden` is changed before a matrix product in its block, or the product after.

    Args:
        hidden: what the first product should get.
    """

    # names of ATen operators, as autograd dispatches them
    PRODUCTS = ("mm", "addmm", "bmm", "linear", "addmv", "mv")
    SAME_VALUES = (
        "view",
        "_unsafe_view",
        "reshape",
        "t",
        "transpose",
        "_to_copy",
        "slice",
        "alias",
    )
    SAME_VALUES += ("detach", "expand", "unsqueeze", "squeeze", "clone", "select", "empty", "zeros")

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.same = [hidden]  # tensors of the same values
        self.products = 0
        self.changes = False

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        is_same = any(given is known for given in args for known in self.same)
        if name in self.PRODUCTS:
            self.products += 1
            self.changes |= not is_same
        elif name not in self.SAME_VALUES:
            self.changes |= bool(self.products)
        elif is_same:
            self.same.append(result)
        return result


@torch.no_grad()
def _adds_to_logits(tail: Callable[[Tensor], Tensor], rows: Tensor) -> bool:
    """Return True if logits are more than one matrix product, found on one position."""
    hidden = rows[:1].detach()[None]
    with _AroundProduct(hidden) as around:
        tail(hidden)
    # more than one product: a low-rank head, or an adapter's
    return around.changes or around.products != 1


def _leaves(logits: Tensor) -> list[Tensor]:
    """Return the trainable tensors on which `logits` depend."""
    found: dict[int, Tensor] = {}
    # None if the tail has no trainable tensor
    nodes: list[Any] = [logits.grad_fn]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # AccumulateGrad
            found[id(node.variable)] = node.variable
        nodes += [following for following, _ in node.next_functions]
    return list(found.values())


def _records_terms(model: CausalModel) -> bool:
    """Return True if an adapter of the head recorded an auxiliary term in this forward."""
    head = model.get_output_embeddings()
    adapters = [module for module in head.modules() if isinstance(module, Adapter)]
    terms = {key for adapter in adapters for key in adapter.info.context.terms}
    names = [f"{name}." for name, module in model.named_modules() if module is head]
    return any(key.startswith(tuple(names)) for key in terms)
