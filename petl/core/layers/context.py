"""What the layers of a model share during a forward pass, and auxiliary losses.

An auxiliary loss (a router's balance, say) that is added to `outputs.loss` is lost in trainers that
compute the loss themselves and under reentrant checkpointing. Here each layer sends its own term
into the backward pass instead: `add_gradient` is the identity on an activation, and its backward
also hands the term its gradient. `outputs.loss` only shows the value.

A term that is no mean over the rows of a batch is not the mean of what several processes make of
their shares either. `weighed` is for such: its weights are those of all processes together, so that
processes that average their gradients get what one process gets from all rows. For that all of them
must run the same number of training forwards. Under torch.compile each keeps to its own rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from petl.core.distributed import num_processes, summed
from petl.errors import InputError

Made = TypeVar("Made")


@dataclass
class Weighed:
    """A term `weights @ values` of one forward pass, with weights of the counts."""

    values: Tensor
    counts: Tensor
    weigh: Callable[[Tensor], Tensor]
    weights: Tensor


class ForwardContext:
    """Shared by the adapters of one tuner; a plain object, never a module, never saved.

    Attributes:
        aux_weight: weight of the coming forward's auxiliary terms in the gradient of the optimizer
            step: 1 / accumulation steps, or the share of the items in this micro-batch.
        item_processes: over how many processes a trainer sums `num_items_in_batch`; None: all.
        mask: 2-D attention mask of the forward, or None.
        decoder_mask: likewise of a decoder behind an encoder: its own mask, or where labels are.
        terms: by module name, the detached value of each auxiliary term of the last forward.
        series: by name, further detached values that `metrics()` averages.
        joint: by module name, the terms of the last training forward that are over all processes.
    """

    def __init__(self) -> None:
        self.aux_weight = 1.0
        self.item_processes: int | None = None
        self.mask: Tensor | None = None
        self.decoder_mask: Tensor | None = None
        self.scale: Tensor | None = None
        self.recording = False
        self.processes = 1  # that train together, as of the last training forward
        self.terms: dict[str, Tensor] = {}
        self.series: dict[str, dict[str, Tensor]] = {}
        self.joint: dict[str, Weighed] = {}
        self._once: dict[Any, Any] = {}
        self._states: tuple[dict[Any, Any], dict[Any, Any]] = ({}, {})

    def __deepcopy__(self, memo: dict[int, Any]) -> "ForwardContext":
        copy = memo[id(self)] = ForwardContext()  # what a forward left behind has a graph: leave it
        copy.aux_weight, copy.item_processes = self.aux_weight, self.item_processes
        return copy

    def __reduce__(self) -> tuple[type["ForwardContext"], tuple[()]]:
        return ForwardContext, ()

    @property
    def state(self) -> dict[Any, Any]:
        """Values that one layer leaves for the next, or a hook in front of the model for all.

        A forward without gradients has its own, so that it cannot disturb one whose backward
        (with checkpoints to recompute) is still to come.
        """
        return self._states[torch.is_grad_enabled()]

    def once(self, key: Any, make: Callable[[], Made]) -> Made:
        """What `make()` gives: called once in a forward pass and the backward pass behind it.

        For what follows from parameters alone and carries no gradient, so that it does not matter
        which layer asks first, or whether it recomputes.
        """
        if key not in self._once:
            self._once[key] = make()
        return self._once[key]

    def begin(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook of the base model."""
        self.state.clear()
        self._once.clear()
        self.recording = model.training and torch.is_grad_enabled()
        if not self.recording:
            return
        self.mask = as_2d(kwargs.get("attention_mask"))
        self.decoder_mask = as_2d(kwargs.get("decoder_attention_mask"))
        if self.decoder_mask is None and is_encoder_decoder(model):
            labels = as_2d(kwargs.get("labels"))
            self.decoder_mask = None if labels is None else labels.ne(-100)
        self.processes = num_processes()
        self.scale = self._scale(model, kwargs)
        self.terms.clear()
        self.series.clear()
        self.joint.clear()

    def end(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
        """Forward hook of the base model: shows the auxiliary value in the output's loss."""
        if not self.recording:
            return output
        if self.joint:
            self._join()
        self.recording = False  # what checkpointing recomputes later is not recorded again
        loss = output.get("loss") if isinstance(output, Mapping) else None
        if loss is not None and self.terms:
            total = self.total()
            if kwargs.get("num_items_in_batch") is not None and self.scale is not None:
                total = total * self.scale  # the loss is a share of the step's, so is this
            output["loss"] = loss + total
        return output

    def total(self) -> Tensor:
        """Sum of the auxiliary terms of the last training forward, detached; 0 if none."""
        return torch.stack(list(self.terms.values())).sum() if self.terms else torch.zeros(())

    def record(self, key: str, term: Tensor, **series: Tensor) -> None:
        """Note the value of a term, and further series, of the module called `key`."""
        if self.recording:
            self.terms[key] = term.detach()
            for name, value in series.items():
                self.series.setdefault(name, {})[key] = value.detach()

    def weighed(
        self,
        key: str,
        values: Tensor,
        counts: Tensor,
        weigh: Callable[[Tensor], Tensor],
        **series: Tensor,
    ) -> Tensor:
        """The term `weigh(counts) @ values` of the module called `key`, 0-d.

        By the time of the backward pass, weights and noted value are of the sums of `counts` and
        `values` over all processes.

        Args:
            values: [N], sums over the tokens of this process; they alone carry a gradient.
            counts: likewise, without a gradient.
            weigh: a pure function, to [N].
            series: further values to note, of this process.
        """
        weights = weigh(counts)
        if self.processes > 1 and not torch.compiler.is_compiling():
            if self.recording:
                self.joint[key] = Weighed(values.detach(), counts, weigh, weights)
            elif key in self.joint:  # recomputed by checkpointing
                weights = self.joint[key].weights
        term = torch.dot(weights, values)
        self.record(key, term, **series)
        return term

    @torch.no_grad()
    def _join(self) -> None:
        """Make the terms of this forward those of all processes.

        Weights and scale stand in the graph already, and the backward pass is to see the new ones:
        so they are written through `data`, which autograd does not watch.
        """
        assert self.scale is not None
        joint, scale, processes = self.joint, self.scale, self.processes
        is_real = (scale != 0).float()  # a process without a row of its own runs a spare one
        both = [tensor for term in joint.values() for tensor in (term.counts, term.values)]
        parts = [is_real * tensor.flatten().to(is_real) for tensor in both]
        every = summed(torch.cat([scale[None], *parts]))
        sums = iter(every[1:].split([len(part) for part in parts]))
        scale.data.copy_(every[0] / processes)
        for key, term in joint.items():
            weights, values = term.weigh(next(sums)), next(sums)
            self.terms[key] = torch.dot(weights, values).to(term.values.device)
            # trainers average the gradients of the processes
            term.weights.data.copy_(weights * is_real * processes)

    def mask_of(self, tokens: int, *, in_decoder: bool = False) -> Tensor | None:
        """The flat mask [tokens] of a layer that sees as many tokens as the mask has, else None.

        A layer in a decoder behind an encoder may see either's tokens; its own come first.
        """
        masks = (self.decoder_mask, self.mask) if in_decoder else (self.mask,)
        fits = (m.reshape(-1) for m in masks if m is not None and m.numel() == tokens)
        return next(fits, None)

    def _scale(self, model: nn.Module, kwargs: Mapping[str, Any]) -> Tensor:
        labels, items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
        device = next(model.parameters()).device
        if labels is None or items is None:
            return torch.full((), self.aux_weight, device=device)
        # The trainer sums micro-batch losses over their share of the items, as transformers counts
        # them, and multiplies by the processes over which it counted; so must this term.
        share = counted_labels(model, labels, kwargs).ne(-100).sum().to(device) / items
        return share.float() * (self.item_processes or self.processes)


def counted_labels(model: nn.Module, labels: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """The labels that a loss averages over: those that `num_items_in_batch` counts in Trainer."""
    if kwargs.get("shift_labels") is not None:
        return kwargs["shift_labels"]
    shifts = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "") is ForCausalLMLoss
    return labels[..., 1:] if shifts and not is_encoder_decoder(model) else labels


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model is an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def as_2d(mask: Any) -> Tensor | None:
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


class _AddGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, term: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.dtype = term.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # ty: ignore[incompatible-method-override]
        (scale,) = ctx.saved_tensors
        return grad, scale.to(ctx.dtype), None


def add_gradient(y: Tensor, term: Tensor, scale: Tensor) -> Tensor:
    """`y` itself; in backward the scalar `term` receives the gradient `scale`, a 0-d tensor."""
    return _AddGradient.apply(y, term, scale)


class InputCapture:
    """Keeps the first input of a source module until the adapted layer takes it.

    It is a forward pre-hook of the source. Source and layer run in one call of their block, the
    source first, so that caching, compilation and checkpointing need no care.
    """

    def __init__(self, context: ForwardContext, key: str, adapter_name: str, source: str) -> None:
        self.context, self.source = context, source
        self.place = (key, adapter_name)
        self.handle: RemovableHandle | None = None

    def attach(self, model: nn.Module) -> None:
        """Listen to the source module of `model`."""
        module = model.get_submodule(self.source)
        self.handle = module.register_forward_pre_hook(self, with_kwargs=True)

    def detach(self) -> None:
        """Stop listening."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def __call__(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        self.context.state[self.place] = args[0] if args else next(iter(kwargs.values()))

    def pop(self) -> Tensor:
        """What the source saw last; it is not kept any longer.

        Raises:
            InputError: the source has not run.
        """
        x = self.context.state.pop(self.place, None)
        if x is None:
            raise InputError(
                f"{self.place[0]} has an adapter that reads the input of {self.source}, which has "
                "not run; call the model, or the block that holds both"
            )
        return x
