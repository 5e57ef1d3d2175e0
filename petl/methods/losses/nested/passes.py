"""The pass of the smaller width: its rows, and how far its outputs are from the full width's.

Shapes: R rows, n of them that the smaller width sees, T tokens, V classes.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F

from petl.core.adapter_widths.switch import Narrowed
from petl.core.layers.class_swap import original_class
from petl.core.layers.context import (
    ForwardContext,
    arguments_of_forward,
    counted_labels,
    is_encoder_decoder,
)
from petl.core.tuners.asking import AskingTuner
from petl.core.types import Arguments
from petl.errors import UnsupportedError
from petl.methods.losses.nested.config import NestedConfig
from petl.ops import IGNORED

Run = Callable[..., object]
# arguments without rows, whatever their sizes, and those that a pass of its own does not take
OF_TOKENS = {"cache_position"}
LEFT_OUT = ("num_items_in_batch", "output_hidden_states", "output_attentions", "past_key_values")


def no_classes(model: nn.Module) -> str:
    """Return why the outputs of a model are no probabilities of classes; "": they may be."""
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem in ("regression", "multi_label_classification"):
        return f"problem_type={problem} has none that exclude each other"
    return ""


def inputs_of(
    model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object], share: float
) -> Arguments:
    """Return the arguments of the smaller width's pass by name: the first ceil(share R) rows.

    Raises:
        UnsupportedError: a cache is given, or an argument has another number of rows.
    """
    names = arguments_of_forward(original_class(model))
    inputs = {**dict(zip(names, args, strict=False)), **kwargs}
    if inputs.get("past_key_values") is not None:
        raise UnsupportedError(
            "nested runs two passes on each batch, which would extend past_key_values twice; leave "
            "them out of training"
        )
    tensors = {n: t for n, t in inputs.items() if isinstance(t, Tensor) and t.dim()}
    R = len(next(iter(tensors.values())))
    n = math.ceil(share * R)
    for name, tensor in tensors.items():
        if n == R or name in OF_TOKENS:
            continue
        # Qwen's positions are [3, R, T]; those of all rows [1, T]
        dim = 1 if name == "position_ids" and tensor.dim() == 3 else 0
        if tensor.shape[dim] == R:
            inputs[name] = tensor.narrow(dim, 0, n)
        elif not (name == "position_ids" and len(tensor) == 1):
            raise UnsupportedError(
                f"{name} has shape {list(tensor.shape)} in a batch of {R} rows, so that share="
                f"{share:g} of them cannot be taken; set share=1"
            )
    kept = {name: value for name, value in inputs.items() if name not in LEFT_OUT}
    fixed = {"use_cache": False, "return_dict": True}
    return kept | {name: value for name, value in fixed.items() if name in names}


class SmallPass:
    """A training forward at a smaller width, and what of it is compared with the full width.

    Attributes:
        rows: n.
        loss: the model's own, 0-d; None without labels or weight.
        parts: logits, or the blocks' outputs, with a graph; none if nothing is compared.
    """

    def __init__(
        self,
        model: PeftModel,
        narrowed: Narrowed,
        inputs: Arguments,
        config: NestedConfig,
        blocks: Sequence[str],
    ) -> None:
        base: Any = model.get_base_model()
        self.base, self.inputs, self.config = base, inputs, config
        self.features: dict[str, Tensor] = {}
        given = dict(inputs)
        # an encoder-decoder makes inputs of its labels
        if not config.weight and not is_encoder_decoder(base):
            given["labels"] = None
        hooks = [
            base.get_submodule(path).register_forward_hook(partial(self._keep, path))
            for path in blocks
        ]
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        try:
            with torch.random.fork_rng([*devices]), at_width_in_backward(model, narrowed):
                # not by a call: hooks of the model are for the full width
                output = base.forward(**given)
        finally:
            for hook in hooks:
                hook.remove()
        loss = output.get("loss") if config.weight else None
        self.loss: Tensor | None = loss if given.get("labels") is not None else None
        self.parts = [*self.features.values()] if blocks else []
        if config.distill and not blocks:
            self.parts = [outputs_in(output, base)]
        self.rows = len(next(t for t in inputs.values() if isinstance(t, Tensor) and t.dim()))

    def _keep(self, path: str, module: nn.Module, args: object, output: Any) -> None:
        self.features[path] = output[0] if isinstance(output, tuple) else output

    @property
    def joined(self) -> list[Tensor]:
        """What has a gradient: the loss, then the parts."""
        found = [*self.parts] if self.loss is None else [self.loss, *self.parts]
        return [tensor for tensor in found if tensor.requires_grad]

    def compare(self, full: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return D_k, 0-d, and its gradient by each part.

        Args:
            full: the parts of the full width on the same rows.
        """
        parts = [part.detach().requires_grad_() for part in self.parts]
        by_features = self.config.distance == "features"
        one = _relative if by_features else _kl if self.config.distance == "kl" else _mse
        with torch.enable_grad(), torch.autocast(parts[0].device.type, enabled=False):
            found = [
                self._mean(one(_wide(y), _wide(target.detach())), y)
                for y, target in zip(parts, full, strict=True)
            ]
            value = torch.stack([each.to(found[0].device) for each in found]).mean()
        return value.detach(), [*torch.autograd.grad(value, parts)]

    def _mean(self, values: Tensor, y: Tensor) -> Tensor:
        """Return the mean of values [n] or [n, T] over the positions that count."""
        mask = self._counted(values.shape)
        if mask is None:
            return values.mean()
        mask = mask.to(values.device)
        # where none counts: 0
        return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)

    def _counted(self, shape: torch.Size) -> Tensor | None:
        """Return the positions that count: with a label, else those of the mask; None: all."""
        labels = self.inputs.get("labels")
        if labels is not None and not labels.is_floating_point():
            counted = counted_labels(self.base, labels, self.inputs).ne(IGNORED)
            # of a causal model: the last token predicts none
            if counted.dim() == 2 and len(shape) == 2 and counted.shape[1] == shape[1] - 1:
                counted = F.pad(counted, (0, 1))
            if counted.shape == shape:
                return counted
        for name in ("attention_mask", "decoder_attention_mask"):
            mask = self.inputs.get(name)
            if isinstance(mask, Tensor) and mask.shape == shape:
                return mask.ne(0)
        return None


@contextmanager
def at_width_in_backward(model: PeftModel, narrowed: Narrowed) -> Generator[None]:
    """Inside the block the model has a width, and so have the blocks that checkpointing repeats."""
    tuner = model.base_model
    context = tuner.context if isinstance(tuner, AskingTuner) else None

    def again(original: Run, function: Run, *args: object, **kwargs: object) -> object:
        def inside(*own: object, **others: object) -> object:
            with narrowed.applied(), quiet(context):
                return function(*own, **others)

        return original(inside, *args, **kwargs)

    name = "_gradient_checkpointing_func"
    running = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    before = [(m, getattr(m, name)) for m in running if hasattr(m, name)]
    with ExitStack() as stack:
        for module, original in before:
            setattr(module, name, partial(again, original))
            stack.callback(setattr, module, name, original)
        stack.enter_context(narrowed.applied())
        stack.enter_context(quiet(context))
        yield


@contextmanager
def quiet(context: ForwardContext | None) -> Generator[None]:
    """Inside the block petl's layers add no auxiliary loss, and pass on states of their own."""
    if context is None:
        yield
        return
    given = context.recording, context.scale, dict(context.state)
    context.recording, context.scale = False, None
    try:
        yield
    finally:
        context.recording, context.scale, state = given
        context.state.clear()
        context.state.update(state)


def outputs_in(output: object, model: nn.Module) -> Tensor:
    """Return logits, or the last hidden states of a model without a head.

    Raises:
        UnsupportedError: the output has neither.
    """
    found = output if isinstance(output, Mapping) else {}
    for name in ("logits", "last_hidden_state"):
        if isinstance(found.get(name), Tensor):
            return found[name]
    raise UnsupportedError(
        f"{type(model).__name__} returned no logits in a dictionary, of which nested takes the "
        "distance of a width; set distance=features, or distill=0, or return_dict=True"
    )


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _kl(y: Tensor, target: Tensor) -> Tensor:
    """KL(p_W || p_k) of each position, in nats."""
    log_p = target.log_softmax(-1)
    return (log_p.exp() * (log_p - y.log_softmax(-1))).sum(-1)


def _mse(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().mean(-1)


def _relative(y: Tensor, target: Tensor) -> Tensor:
    square = target.square().sum(-1)
    return (y - target).square().sum(-1) / square.clamp(min=torch.finfo(square.dtype).tiny)
