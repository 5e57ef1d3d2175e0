"""State that the layers of a model share during a forward pass, and auxiliary losses.

An auxiliary loss (a router's balance, say) that is added to `outputs.loss` is lost in trainers that
compute the loss themselves and under reentrant checkpointing. Here each layer adds the gradient of
its own term during backward instead: `add_gradient` is the identity on an activation, and its
backward also gives the term its gradient. `outputs.loss` only shows the value.

A term that is not a mean over the rows of a batch is not the mean of the terms of several processes
either. `weighted_term` is for these: it takes its weights from the counts of all processes
together, so that averaging the gradients of the processes gives the gradient of one process with
all rows. For that all processes must run the same number of training forwards. Under torch.compile
each process uses the counts of its own rows.
"""

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from petl.core.layers.task_rows import TaskRows, take_task_ids
from petl.core.masks import as_2d, tokens_of
from petl.core.types import Arguments
from petl.errors import InputError
from petl.ops import IGNORED, Ctx
from petl.system.collectives import num_processes, summed

T = TypeVar("T")
TASKS = "tasks of rows"  # keys in `ForwardContext.state`
TOKENS = "mask of tokens"


@dataclass
class WeightedTerm:
    """A term `weights @ values` of one forward pass, with `weights = weigh(counts)`."""

    values: Tensor
    counts: Tensor
    weigh: Callable[[Tensor], Tensor]
    weights: Tensor


class ForwardContext:
    """State that the adapters of one tuner share in a forward pass; not a module, never saved.

    Attributes:
        aux_weight: weight of the coming forward's auxiliary terms in the gradient of the optimizer
            step: 1 / accumulation steps, or this micro-batch's fraction of the items.
        micro_batches: number of forward and backward passes in the coming optimizer step; None:
            unknown.
        step: completed optimizer steps, as a lifecycle counts them; None: there is none.
        item_processes: number of processes over which a trainer sums `num_items_in_batch`; None:
            all.
        mask: 2-D attention mask of the forward, or None.
        decoder_mask: the same of the decoder of an encoder-decoder: its own mask, or where labels
            are.
        scale: 0-d, the gradient that auxiliary terms get: `aux_weight`, or the fraction of the
            items; None before the first training forward.
        recording: True during a training forward, False while checkpointing recomputes it.
        processes: number of processes that train together, as of the last training forward.
        terms: by module name, the detached value of each auxiliary term of the last forward.
        series: by name, further detached values that `metrics()` averages.
        joint: by module name, the weighted terms of the last training forward, which `end` sums
            over all processes.
        given_tasks: the tasks of the rows during one call of the PeftModel, or None.
        is_mixed: True during a call of the PeftModel with an adapter for each row.
        rows: the rows of the batch that a layer computes, in `only_rows`; None: all.
        tokens: the tokens of the batch that a layer computes, in `only_tokens`, and the number of
            all; None: all.
    """

    def __init__(self) -> None:
        self.aux_weight = 1.0
        self.micro_batches: int | None = None
        self.step: int | None = None
        self.item_processes: int | None = None
        self.mask: Tensor | None = None
        self.decoder_mask: Tensor | None = None
        self.scale: Tensor | None = None
        self.recording = False
        self.processes = 1
        self.terms: dict[str, Tensor] = {}
        self.series: dict[str, dict[str, Tensor]] = {}
        self.joint: dict[str, WeightedTerm] = {}
        self.given_tasks: TaskRows | None = None
        self.is_mixed = False
        self.rows: Sequence[int] | None = None
        self.tokens: tuple[Tensor, int] | None = None
        self._once: dict[object, Any] = {}
        # one without and one with gradients, see `state`
        self._states: tuple[dict[object, Any], dict[object, Any]] = ({}, {})

    def __deepcopy__(self, memo: dict[int, object]) -> "ForwardContext":
        # values of the last forward are part of a graph, which deepcopy refuses: not copied
        copy = memo[id(self)] = ForwardContext()
        copy.aux_weight, copy.item_processes = self.aux_weight, self.item_processes
        copy.micro_batches = self.micro_batches
        return copy

    def __reduce__(self) -> tuple[type["ForwardContext"], tuple[()]]:
        return ForwardContext, ()

    @property
    def state(self) -> dict[object, Any]:
        """Values that a layer passes to later layers, or a hook of the model to all layers.

        A forward without gradients has a state of its own, so that it does not overwrite that of a
        training forward whose backward (which recomputes checkpoints) is still to come.
        """
        return self._states[torch.is_grad_enabled()]

    @property
    def passed_on(self) -> dict[object, Any]:
        """`state` for values without a gradient: one for all of a training forward.

        Under reentrant checkpointing, layers run without gradients in a forward with gradients.
        """
        return self._states[torch.is_grad_enabled() or self.recording]

    @property
    def tasks(self) -> TaskRows | None:
        """The task of each row of this forward pass and of its backward pass; None: none given."""
        if self.given_tasks is not None:
            return self.given_tasks
        # the first pass of reentrant checkpointing runs without gradients, in a training forward
        return self._states[torch.is_grad_enabled() or self.recording].get(TASKS)

    def take_tasks(
        self, model: nn.Module, args: tuple[object, ...], kwargs: Arguments
    ) -> tuple[tuple[object, ...], Arguments]:
        """Forward pre-hook of the base model, after `begin`: remove `task_ids` and keep them."""
        tasks, kwargs = take_task_ids(args, kwargs)
        tasks = self.given_tasks if tasks is None else tasks
        if tasks is not None:
            self.state[TASKS] = tasks
        return args, kwargs

    @contextmanager
    def only_rows(self, rows: Sequence[int], of: int) -> Generator[None]:
        """Limit `tasks`, `token_mask` and `rows` to these of the `of` rows of a layer's input."""
        tasks, before = self.tasks, (self.given_tasks, self.rows)
        if tasks is not None:
            self.given_tasks = tasks.select(rows, of)
        self.rows = rows if self.rows is None else [self.rows[row] for row in rows]
        try:
            yield
        finally:
            self.given_tasks, self.rows = before

    @contextmanager
    def only_tokens(self, tokens: Tensor | None, of: int) -> Generator[None]:
        """Let `mask_of` return the entries of these of `of` tokens, as an expert has them."""
        self.tokens = None if tokens is None else (tokens, of)
        try:
            yield
        finally:
            self.tokens = None

    def keep_mask(
        self, module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]
    ) -> None:
        """Forward pre-hook of a module whose layers read `token_mask`: keep its attention mask.

        That module is an encoder, which `generate` calls directly, or the base model.
        """
        mask = kwargs.get("attention_mask")
        if mask is None and len(args) > 1:
            names = [*inspect.signature(module.forward).parameters][: len(args)]
            mask = dict(zip(names, args, strict=False)).get("attention_mask")
        self.passed_on[TOKENS] = as_2d(mask)

    def token_mask(self, x: Tensor) -> Tensor | None:
        """Return the mask [N, T] for a layer's input `x` [N, T, ...], or None without a mask.

        Unlike `mask`, it is there in evaluation, too; see `keep_mask`.

        Raises:
            InputError: the tokens of the layer are not those of the mask.
        """
        mask = self.passed_on.get(TOKENS)
        if mask is None:
            return None
        mask = mask if self.rows is None else mask[[*self.rows]]
        if mask.shape != x.shape[:2]:
            raise InputError(
                f"a layer has {[*x.shape[:2]]} rows and tokens and the attention mask "
                f"{[*mask.shape]}: this model changes the number of tokens, so that padding cannot "
                "be told apart; use an adapter that needs no mask (another gate than 'small')"
            )
        return mask

    def compute_once(self, key: object, make: Callable[[], T]) -> T:
        """Return `make()`, called once per forward pass and its backward pass, then cached.

        For values that depend on parameters alone and carry no gradient, so that the result is the
        same whichever layer calls first, and in a recomputation.
        """
        if key not in self._once:
            self._once[key] = make()
        return self._once[key]

    def begin(self, model: nn.Module, args: object, kwargs: Mapping[str, object]) -> None:
        """Forward pre-hook of the base model: clear the state, read masks and scale."""
        # the state first: values of an aborted forward pass must not be read by this one
        self.state.clear()
        self._once.clear()
        self.recording = model.training and torch.is_grad_enabled()
        if not self.recording:
            return
        self.read_masks(model, kwargs)
        # here, not in `__init__`: the process group may start after the model is wrapped
        self.processes = num_processes()
        self.scale = self._scale(model, kwargs)
        self.terms.clear()
        self.series.clear()
        self.joint.clear()

    def read_masks(self, model: nn.Module, kwargs: Mapping[str, object]) -> None:
        """Set `mask` and `decoder_mask` from the inputs of the base model."""
        # from keyword arguments only: trainers of transformers pass batches so
        self.mask, self.decoder_mask = tokens_of(kwargs, has_decoder=is_encoder_decoder(model))

    def end(self, model: nn.Module, args: object, kwargs: Mapping[str, Any], output: Any) -> Any:
        """Forward hook of the base model: add the auxiliary loss to `output["loss"]`, detached.

        Its gradient comes from `add_gradient`.
        """
        if not self.recording:
            return output
        if self.joint:
            self._join()
        self.recording = False  # what checkpointing recomputes later is not recorded again
        loss = output.get("loss") if isinstance(output, Mapping) else None
        if loss is not None and self.terms:
            total = self.total()
            # Trainer passes the number of items of the whole step
            if kwargs.get("num_items_in_batch") is not None and self.scale is not None:
                total = total * self.scale  # the loss is this micro-batch's fraction of the step's
            output["loss"] = loss + total.to(loss.device)
        return output

    def total(self) -> Tensor:
        """Sum of the auxiliary terms of the last training forward, detached; 0 if none."""
        terms = list(self.terms.values())
        # a model may be spread over devices
        return (
            torch.stack([t.to(terms[0].device) for t in terms]).sum() if terms else torch.zeros(())
        )

    def record(self, key: str, term: Tensor, **series: Tensor) -> None:
        """Store the value of a term, and further series, of the module called `key`."""
        if self.recording:
            self.terms[key] = term.detach()
            for name, value in series.items():
                self.series.setdefault(name, {})[key] = value.detach()

    def weighted_term(
        self,
        key: str,
        values: Tensor,
        counts: Tensor,
        weigh: Callable[[Tensor], Tensor],
        **series: Tensor,
    ) -> Tensor:
        """Return the term `weigh(counts) @ values` of the module called `key`, 0-d, and record it.

        By the time of the backward pass, the weights and the recorded value are those of the sums
        of `counts` and `values` over all processes (see `_join`).

        Args:
            values: [N], sums over the tokens of this process; only they carry a gradient.
            counts: [N], sums over the tokens of this process, without a gradient.
            weigh: a pure function of the counts, returns [N].
            series: further values of this process to record.
        """
        weights = weigh(counts)
        if self.processes > 1 and not torch.compiler.is_compiling():
            if self.recording:
                self.joint[key] = WeightedTerm(values.detach(), counts, weigh, weights)
            elif key in self.joint:  # recomputed by checkpointing: weights of all processes
                weights = self.joint[key].weights
        term = torch.dot(weights, values)
        self.record(key, term, **series)
        return term

    @torch.no_grad()
    def _join(self) -> None:
        """Sum counts and values of this forward's weighted terms over all processes.

        The weights and the scale are in the autograd graph already and backward has to see the new
        values, so they are written through `data`, which autograd does not track.
        """
        assert self.scale is not None
        joint, scale, processes = self.joint, self.scale, self.processes
        # a process that has no rows left runs a dummy row with scale 0, which must not count
        is_real = (scale != 0).float()
        both = [tensor for term in joint.values() for tensor in (term.counts, term.values)]
        parts = [is_real * tensor.flatten().to(is_real) for tensor in both]
        totals = summed(torch.cat([scale[None], *parts]))  # one all-reduce for all terms
        sums = iter(totals[1:].split([len(part) for part in parts]))
        scale.data.copy_(totals[0] / processes)
        for key, term in joint.items():
            weights, values = term.weigh(next(sums)), next(sums)
            self.terms[key] = torch.dot(weights, values).to(term.values.device)
            # times `processes`: trainers average the gradients of the processes
            term.weights.data.copy_(weights * is_real * processes)

    def mask_of(self, tokens: int, *, in_decoder: bool = False) -> Tensor | None:
        """Return the flat mask [tokens] for a layer with that many tokens, or None if none fits.

        A layer of the decoder of an encoder-decoder may see either's tokens (cross-attention), so
        both masks are tried, the decoder's first.
        """
        own, tokens = (None, tokens) if self.tokens is None else self.tokens
        # compared by number of tokens, since a layer does not know what it attends to
        masks = (self.decoder_mask, self.mask) if in_decoder else (self.mask,)
        fits = (m.reshape(-1) for m in masks if m is not None and m.numel() == tokens)
        found = next(fits, None)
        return found if own is None or found is None else found[own]

    def _scale(self, model: nn.Module, kwargs: Mapping[str, Any]) -> Tensor:
        labels, items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
        device = next(model.parameters()).device
        # a loop of one's own, which sets `aux_weight`
        if labels is None or items is None:
            return torch.full((), self.aux_weight, device=device)
        # The trainer sums micro-batch losses over their fraction of the items, as transformers
        # counts them, and multiplies by the processes over which it counted; so must this term.
        fraction = counted_labels(model, labels, kwargs).ne(IGNORED).sum().to(device) / items
        return fraction.float() * (self.item_processes or self.processes)


def counted_labels(model: nn.Module, labels: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Return the labels over which the loss averages: those in Trainer's `num_items_in_batch`."""
    if kwargs.get("shift_labels") is not None:
        return kwargs["shift_labels"]
    shifts = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "") is ForCausalLMLoss
    # causal models predict each label from the token before it, so the first is not counted
    return labels[..., 1:] if shifts and not is_encoder_decoder(model) else labels


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return True if the model's config says that it is an encoder-decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


class _AddGradient(torch.autograd.Function):
    """Identity on `y` that gives `term` the gradient `scale`, whatever the gradient of `y`."""

    @staticmethod
    def forward(ctx: Ctx, y: Tensor, term: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.dtype = term.dtype
        return y.detach()  # no view: models may change it in place

    @staticmethod
    def backward(ctx: Ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # ty: ignore[incompatible-method-override]
        (scale,) = ctx.saved_tensors
        return grad, scale.to(ctx.dtype), None


def add_gradient(y: Tensor, term: Tensor, scale: Tensor) -> Tensor:
    """Return `y`; in backward the scalar `term` receives the gradient `scale`, a 0-d tensor."""
    return _AddGradient.apply(y, term, scale)


class InputCapture:
    """Forward pre-hook that stores the first input of a source module for an adapted layer.

    Source and layer run in one call of their block, the source first, so that caching, compilation
    and checkpointing need no special handling.
    """

    def __init__(self, context: ForwardContext, key: str, adapter_name: str, source: str) -> None:
        self.context, self.source = context, source
        self.place = (key, adapter_name)
        self.handle: RemovableHandle | None = None

    def attach(self, model: nn.Module) -> None:
        """Register the hook on the source module of `model`."""
        module = model.get_submodule(self.source)
        self.handle = module.register_forward_pre_hook(self, with_kwargs=True)

    def detach(self) -> None:
        """Remove the hook."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def __call__(
        self, module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]
    ) -> None:
        self.context.state[self.place] = args[0] if args else next(iter(kwargs.values()))

    def pop(self) -> Tensor:
        """Return the last input of the source and forget it.

        Raises:
            InputError: the source has not run.
        """
        # popped, so that it is freed with the layer's own input
        x = self.context.state.pop(self.place, None)
        if x is None:
            raise InputError(
                f"{self.place[0]} has an adapter that reads the input of {self.source}, which has "
                "not run; call the model, or the block that holds both"
            )
        return x


@cache
def arguments_of_forward(kind: type[nn.Module]) -> tuple[str, ...]:
    """Return the names of the arguments that the `forward` of a class takes."""
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD)
