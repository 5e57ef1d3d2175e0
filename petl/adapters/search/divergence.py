"""The fitness of a candidate: how far a model's predictions are from those of a reference.

KL(p || q) in nats, averaged over positions with a label, where p is the model as it was when the
object was made and q the model as it is. Of p only the `top` largest probabilities are kept, with
one for all others together, which bounds the memory with large vocabularies; the divergence of
these classes is a lower bound of that of all. Shapes: B rows, T tokens, V classes, N positions,
K = min(top, V).
"""

from bisect import bisect_left
from collections.abc import Generator, Iterable
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from petl.core.model.modes import calibration_pass
from petl.core.types import Batch, base_of
from petl.data.tasks.base import IGNORED
from petl.errors import InputError
from petl.ops.divergence import divergence_terms

TOP = 512
LABELS = ("labels", "start_positions", "end_positions")  # columns that a model without loss lacks


class CachedReference(NamedTuple):
    """The reference at the positions of a batch.

    Attributes:
        log_p: the largest log-probabilities, [N, K], float32.
        classes: which they are, [N, K].
        log_rest: log-probability of all others together, [N]; None: there are no others.
    """

    log_p: Tensor
    classes: Tensor
    log_rest: Tensor | None


class DivergenceData:
    """Batches in a fixed order, of which a prefix of positions is used.

    Attributes:
        counts: positions of each row of each batch.
        total: positions, `most` at most.
    """

    def __init__(
        self, model: nn.Module, batches: Iterable[Batch], *, most: int | None = None
    ) -> None:
        self.model, given = model, list(batches)
        self.causal, self.reads_labels = is_causal(model), is_encoder_decoder(model)
        counts = [self.labeled(batch).flatten(1).sum(1).tolist() for batch in given]
        # of the batches only those that hold the first `most` positions
        ends = [*accumulate(map(sum, counts))]
        needed = len(ends) if most is None else bisect_left(ends, most) + 1
        self.batches, self.counts = given[:needed], counts[:needed]
        found = sum(map(sum, self.counts))
        self.total = found if most is None else min(found, most)
        if self.total == 0:
            raise InputError(
                f"none of the {len(given)} calibration batches has a position with a label"
            )

    def labeled(self, batch: Batch) -> Tensor:
        """Return the mask of the positions that count, [B, ...]: of rows, or of tokens."""
        if "start_positions" in batch:  # question answering: a start and an end
            return torch.ones_like(batch["start_positions"])[:, None].expand(-1, 2) > 0
        labels = batch.get("labels")
        if labels is None:
            labels = batch["attention_mask"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        if labels.dim() < 2:
            return torch.ones_like(labels)[:, None] > 0
        # a token's prediction is made at the token before it
        return (labels[:, 1:] if self.causal else labels) != IGNORED

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits at the positions of a batch, [N, V], float32, row after row.

        Raises:
            InputError: the model's outputs are no logits of classes.
        """
        outputs = self.model(**self.inputs(batch))
        if "start_logits" in outputs:
            logits = torch.stack([outputs["start_logits"], outputs["end_logits"]], 1).float()
            padding = batch["attention_mask"][:, None] == 0
            # finite, so that 0 times the difference of two such values is 0
            return logits.masked_fill(padding, -1e4).flatten(0, 1)
        logits = outputs.get("logits")
        if logits is None or logits.shape[-1] < 2:
            raise InputError(
                "the outputs of the model are no logits of classes, so that they have no "
                "divergence; use the loss of the task (--metric loss)"
            )
        mask = self.labeled(batch)
        if logits.dim() == 2:
            return logits.float()
        # methods that prepend virtual tokens have more logits than labels
        logits = logits[:, -mask.shape[1] - 1 : -1] if self.causal else logits[:, -mask.shape[1] :]
        return logits[mask].float()

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Return a batch without labels, unless they are the decoder's inputs."""
        left_out = () if self.reads_labels else LABELS
        return {name: tensor for name, tensor in batch.items() if name not in left_out}

    def prefix(self, tokens: int) -> Generator[tuple[int, Batch, int]]:
        """Yield number, rows and count of positions of the batches that hold the first `tokens`."""
        if tokens < 1:
            raise InputError(f"tokens={tokens} is below 1, the minimum")
        tokens = min(tokens, self.total)
        for number, (batch, counts) in enumerate(zip(self.batches, self.counts, strict=True)):
            if tokens <= 0:
                return
            own = rows = 0
            while rows < len(counts) and own < tokens:
                own, rows = own + counts[rows], rows + 1
            if own:
                size = len(counts)
                part = {k: t[:rows] if len(t) == size else t for k, t in batch.items()}
                yield number, part, min(own, tokens)
            tokens -= own


class Divergence(DivergenceData):
    """The divergence of a model from itself as it was when this object was made."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        top: int = TOP,
        *,
        most: int | None = None,
    ) -> None:
        """Compute the reference.

        Args:
            model: a model with logits; its parameters may change later.
            batches: inputs with labels, on the model's device, in the order of calibration.
            top: number of classes of the reference that are kept apart.
            most: positions that are used at most; later batches are not computed.

        Raises:
            InputError: no position has a label, or the outputs are no logits of classes.
        """
        super().__init__(model, batches, most=most)
        if top < 1:
            raise InputError(f"top={top} is below 1, the minimum")
        with calibration_pass(model):
            self.reference = [cached(self.logits(batch), top) for batch in self.batches]

    def __call__(self, tokens: int) -> float:
        """Return the mean divergence over the first `tokens` positions, in nats."""
        total, count = 0.0, 0
        with calibration_pass(self.model):
            for number, part, positions in self.prefix(tokens):
                values = divergence(self.reference[number], self.logits(part)[:positions])
                total, count = total + float(values.double().sum()), count + positions
        return total / count


class TaskLoss(DivergenceData):
    """The loss of a model on labeled rows, as a fitness in place of `Divergence`."""

    def __call__(self, tokens: int) -> float:
        """Return the mean loss over the rows that hold the first `tokens` positions, in nats."""
        total, count = 0.0, 0
        with calibration_pass(self.model):
            for _, part, positions in self.prefix(tokens):
                loss = self.model(**part)["loss"]
                total, count = total + positions * float(loss), count + positions
        return total / count


def cached(logits: Tensor, top: int) -> CachedReference:
    """Return the reference of logits [N, V]."""
    log_p, classes = logits.log_softmax(-1).topk(min(top, logits.shape[-1]), dim=-1)
    return CachedReference(log_p, classes, log_others(logits, classes))


def log_others(logits: Tensor, classes: Tensor) -> Tensor | None:
    """Return the log-probability of all classes but those in `classes`, [N]; None without any."""
    if classes.shape[-1] == logits.shape[-1]:
        return None
    others = logits.scatter(-1, classes, float("-inf"))
    return others.logsumexp(-1) - logits.logsumexp(-1)


def divergence(reference: CachedReference, logits: Tensor) -> Tensor:
    """Return KL(p || q) at each position, [N], of the first N of a reference."""
    classes = reference.classes[: len(logits)]
    log_q, other = logits.log_softmax(-1).gather(-1, classes), log_others(logits, classes)
    found = divergence_terms(reference.log_p[: len(logits)], log_q).sum(-1)
    if reference.log_rest is not None and other is not None:
        found += divergence_terms(reference.log_rest[: len(logits)], other)
    return found


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return True if a model reads its labels, as the inputs of its decoder."""
    return bool(getattr(base_of(model).config, "is_encoder_decoder", False))


def is_causal(model: nn.Module) -> bool:
    """Return True if a model's logits at a token predict the next one."""
    base = base_of(model)
    return not is_encoder_decoder(model) and bool(base.can_generate())
