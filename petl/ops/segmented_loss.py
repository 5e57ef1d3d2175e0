"""Cross-entropy over a vocabulary, computed in segments of positions, with its gradient.

Shapes: P positions, D width of the hidden states, V entries of the vocabulary, m positions of a
segment, N positions with a label. The logits of one segment exist at a time, m V numbers instead of
P V. The gradient of the summed loss is computed in the forward pass, segment by segment, and scaled
in the backward pass, so that logits are computed once. Positions without a label are left out.

Source of the idea: Wang et al., "LeMo: Enabling LEss Token Involvement for MOre Context
Fine-tuning", arXiv 2501.09767, which computes logits again in backward.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from petl.errors import InputError
from petl.ops import IGNORED, Ctx


class Head(Protocol):
    """Turns hidden states into logits and adds up the gradients of a segment's loss."""

    def step(
        self, rows: Tensor, labels: Tensor, into: Tensor | None, sums: Sequence[Tensor | None]
    ) -> Tensor:
        """Return the summed loss of a segment, 0-d float32, and store its gradients.

        Args:
            rows: hidden states, [m, D].
            labels: [m], all of them in range.
            into: [m, D], receives the gradient of `rows` and may be the same memory; None: none.
            sums: for each parameter the sum to which its gradient is added, or None.
        """
        ...


class LinearHead:
    """Logits `rows @ weight.T + bias`; logits, softmax and gradient take turns in one buffer."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        kind = weight.device.type
        autocast = torch.is_autocast_enabled(kind)
        self.dtype = torch.get_autocast_dtype(kind) if autocast else weight.dtype
        self.weight = weight.detach().to(self.dtype)
        self.bias = None if bias is None else bias.detach().to(self.dtype)
        size = rows, len(weight)
        # allocated once for all segments: logits are the largest tensors of a training step
        self.logits = weight.new_empty(size, dtype=torch.float32)
        # products have the dtype of the weight; the loss is computed in float32
        full = self.dtype == torch.float32
        self.product = self.logits if full else self.logits.new_empty(size, dtype=self.dtype)

    def step(
        self, rows: Tensor, labels: Tensor, into: Tensor | None, sums: Sequence[Tensor | None]
    ) -> Tensor:
        """Return the summed loss of a segment and store its gradients, as `Head` says."""
        # the last segment may be shorter
        product, logits = self.product[: len(rows)], self.logits[: len(rows)]
        rows = rows.to(self.dtype)
        torch.mm(rows, self.weight.t(), out=product)
        if self.bias is not None:
            product += self.bias
        if product is not logits:
            logits.copy_(product)
        # -log softmax of the label, and softmax, from logits of which the largest is 0
        logits -= logits.amax(1, keepdim=True)
        index = labels.unsqueeze(1)
        chosen = logits.gather(1, index)
        logits.exp_()
        total = logits.sum(1, keepdim=True)
        loss = (total.log() - chosen).sum()
        if into is None and not any(s is not None for s in sums):
            return loss
        # gradient of the sum: softmax - one-hot
        logits /= total
        logits.scatter_add_(1, index, -torch.ones_like(chosen))
        if product is not logits:
            product.copy_(logits)
        # without a bias there is one sum
        to_weight, to_bias = (*sums, None)[:2]
        if to_weight is not None:
            to_weight += product.t() @ rows
        if to_bias is not None:
            to_bias += logits.sum(0)
        if into is not None and into.dtype == self.dtype:
            torch.mm(product, self.weight, out=into)  # `rows` is not read after this
        elif into is not None:
            into.copy_(product @ self.weight)
        return loss


class AnyHead:
    """Logits by a function; the gradients of each segment are those of autograd."""

    def __init__(self, logits: Callable[[Tensor], Tensor], parameters: Sequence[Tensor]) -> None:
        self.logits = logits
        self.parameters = parameters

    def step(
        self, rows: Tensor, labels: Tensor, into: Tensor | None, sums: Sequence[Tensor | None]
    ) -> Tensor:
        """Return the summed loss of a segment and store its gradients, as `Head` says."""
        wanted = [(p, s) for p, s in zip(self.parameters, sums, strict=True) if s is not None]
        with torch.enable_grad():
            leaf = rows.detach().clone().requires_grad_(into is not None)
            loss = F.cross_entropy(self.logits(leaf).float(), labels, reduction="sum")
        if into is not None:
            # `into` may be the memory of `rows`, which `leaf` has copied
            into.zero_()
            wanted.append((leaf, into))
        if wanted:
            # allow_unused: with experts, a segment may use some of the parameters only
            found = torch.autograd.grad(loss, [x for x, _ in wanted], allow_unused=True)
            for gradient, (_, place) in zip(found, wanted, strict=True):
                if gradient is not None:
                    place += gradient
        return loss.detach()


class _SummedLoss(torch.autograd.Function):
    """Sum of cross-entropies over the segments, with its gradient from the forward pass."""

    @staticmethod
    def forward(
        ctx: Ctx, head: Head, tokens: int, hidden: Tensor, labels: Tensor, *parameters: Tensor
    ) -> Tensor:
        to_hidden, to_parameters = ctx.needs_input_grad[2], ctx.needs_input_grad[4:]
        kept = labelled(labels)
        ctx.kept, ctx.shape = kept, hidden.shape
        rows = hidden.detach()
        # not zeros: every position is in some segment, which writes its part
        gradient = torch.empty_like(rows) if to_hidden and kept is None else None
        if kept is not None:
            rows, labels = rows.index_select(0, kept), labels.index_select(0, kept)
            gradient = rows if to_hidden else None  # the copy is free once a segment was read
        sums = [
            # float32: many segments are added up, whose small ones bfloat16 would lose
            torch.zeros_like(p, dtype=torch.float32) if wanted else None
            for p, wanted in zip(parameters, to_parameters, strict=True)
        ]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(labels), tokens):
            part = slice(start, start + tokens)
            into = None if gradient is None else gradient[part]
            total += head.step(rows[part], labels[part], into, sums)
        ctx.dtypes = [p.dtype for p in parameters]
        # these are not inputs or outputs, but are freed with the graph when saved this way
        ctx.save_for_backward(gradient, *sums)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx, scale: Tensor) -> tuple[Tensor | None, ...]:
        gradient, *sums = ctx.saved_tensors
        if gradient is not None:
            gradient = gradient * scale
            if ctx.kept is not None:
                full = gradient.new_zeros(ctx.shape)
                gradient = full.index_copy_(0, ctx.kept, gradient)
        scaled = [
            None if s is None else (s * scale).to(dtype)
            for s, dtype in zip(sums, ctx.dtypes, strict=True)
        ]
        # head, tokens and labels have no gradient
        return None, None, gradient, None, *scaled


LEFT_OUT = -1  # labels of positions that are left out, within this module


def shifted(labels: Tensor, ignore: int = IGNORED) -> Tensor:
    """Return the label that each position predicts, [..., T]: that of the next token."""
    return F.pad(labels, (0, 1), value=ignore)[..., 1:]


def labelled(labels: Tensor) -> Tensor | None:
    """Return the indices of positions with a label, or None if all have one.

    A dry run does not know their number: there, all positions count.
    """
    if isinstance(labels, FakeTensor) or labels.is_meta:
        return None
    kept = (labels != LEFT_OUT).nonzero().squeeze(1)
    return None if len(kept) == len(labels) else kept


def mean_loss(
    head: Head,
    hidden: Tensor,
    labels: Tensor,
    *,
    tokens: int,
    parameters: Sequence[Tensor] = (),
    items: Tensor | int | None = None,
    ignore: int = IGNORED,
) -> Tensor:
    """Return the cross-entropy of `labels` by a `head`, as `segmented_loss` does."""
    labels = labels.to(hidden.device)
    valid = labels != ignore
    # `ignore` may be any number, also a valid entry of the vocabulary
    labels = labels.masked_fill(~valid, LEFT_OUT)
    total = _SummedLoss.apply(head, tokens, hidden, labels, *parameters)
    # items: labels of all micro-batches of a step, as the Trainer of transformers counts them
    count = valid.sum() if items is None else items
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


def segmented_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    tokens: int,
    bias: Tensor | None = None,
    items: Tensor | int | None = None,
    ignore: int = IGNORED,
) -> Tensor:
    """Return the mean cross-entropy of `hidden @ weight.T + bias`, computed in segments.

    Equal to `F.cross_entropy((hidden @ weight.T + bias).float(), labels)` and so are its gradients;
    second derivatives are not available.

    Args:
        hidden: hidden states, [P, D].
        weight: [V, D].
        labels: [P], already shifted: `labels[i]` is predicted by `hidden[i]`.
        tokens: positions of a segment, from 1.
        bias: [V].
        items: the sum is divided by it; None: by the number of labels that are not `ignore`.
        ignore: label of positions that do not count.

    Returns:
        0-d, float32. Without any label 0 / 0, as the plain loss.

    Raises:
        InputError: `tokens` is not an integer from 1.
    """
    require_tokens(tokens)
    head = LinearHead(weight, bias, min(tokens, len(hidden)))
    parameters = [weight] if bias is None else [weight, bias]
    return mean_loss(
        head, hidden, labels, tokens=tokens, parameters=parameters, items=items, ignore=ignore
    )


def require_tokens(tokens: object) -> None:
    """Raise InputError if `tokens` is not an integer from 1."""
    fits = isinstance(tokens, int) and not isinstance(tokens, bool) and tokens >= 1
    if not fits:
        raise InputError(f"tokens={tokens!r} is not an integer from 1: positions of a segment")
