"""Retained texts: the loss of a model on texts that it was not trained on, before and after.

Text t has n_t predicted tokens, all but the first, N in total. b_t and a_t are the mean losses in
nats of the base and of the adapted model. What was lost is sum n_t (a_t - b_t) / N. Its interval
takes texts as units: the estimate is a ratio, so with e_t = n_t (a_t - b_t - lost) and T texts the
standard error is sqrt(T / (T - 1) sum e_t^2) / N, times Student's quantile with T - 1 degrees of
freedom (Cochran 1977, Sampling Techniques, section 6.4). A loss may fall while a model becomes
another one, so the divergence KL(base || adapted) over the vocabulary and the share of tokens whose
likeliest next token is the base's are measured beside it. A model without a vocabulary has the
drift of its features instead, see drift.py.

Shapes: B rows, T tokens, N positions, V tokens of the vocabulary.
"""

import logging
import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from petl.core.compat import BaseTunerLayer
from petl.core.masks import IGNORED
from petl.core.model.modes import calibration_pass
from petl.core.types import Batch, Record, base_of
from petl.data.models.new_tokens import added_rows, plain_of
from petl.efficiency.frozen.feed import paused
from petl.efficiency.frozen.repeat import RepeatedPasses, repeated_passes
from petl.errors import InputError, UnsupportedError, shown
from petl.ops.divergence import divergence_terms
from petl.training.retain.rows import (
    ALONE,
    Processes,
    Processor,
    RetainedRow,
    by_length,
    has_base,
    tokenizer_of,
)

MAX_LENGTH = 256
FEWEST = 8  # texts with which an interval is stated
LEVEL = 0.95
# logits of a model that are computed with at a time, in float64: on a CPU, what its caches hold
CHUNK = {"cpu": 2**19}
LARGEST_CHUNK = 2**22
LOGITS = 2**27  # of a pass at most, unless one row has more: half a gigabyte in float32
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetainedText:
    """One text: a line of retained.jsonl, without `gained`.

    Attributes:
        tokens: predicted ones.
        before, after: mean loss of the base and of the adapted model, in nats per token.
        divergence: mean KL(base || adapted) per token, in nats; None if the base is not there.
        agreement: share of tokens whose likeliest next token is the base's; None likewise.
        gained: loss that each predicted token has more, in nats; None likewise.
    """

    text: str
    tokens: int
    before: float
    after: float
    divergence: float | None = None
    agreement: float | None = None
    gained: tuple[float, ...] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Retained:
    """What a model that writes has lost on retained texts.

    Attributes:
        rows, tokens: texts, and predicted tokens of all.
        loss_before, loss_after: mean loss per token of the base and of the adapted model, in nats.
        lost: the difference of the two.
        interval: of `lost`, 95 %; None for fewer than eight texts.
        ratio: of perplexities, after to before.
        divergence, agreement: as of each text, over all tokens; None if the base is not there.
        texts: each with the columns of retained.jsonl.
    """

    rows: int
    tokens: int
    loss_before: float
    loss_after: float
    lost: float
    interval: tuple[float, float] | None
    ratio: float
    divergence: float | None
    agreement: float | None
    texts: tuple[RetainedText, ...] = field(repr=False, default=())
    kind: str = "language"

    @property
    def change(self) -> float:
        """What `retain.limit` limits."""
        return self.lost

    @classmethod
    def of(cls, texts: Sequence[RetainedText]) -> "Retained":
        """Sum up texts, of which there is at least one."""
        total = sum(each.tokens for each in texts)

        def mean(values: Iterable[float | None]) -> float | None:
            pairs = list(zip((each.tokens for each in texts), values, strict=True))
            known = [count * value for count, value in pairs if value is not None]
            return math.fsum(known) / total if len(known) == len(texts) else None

        before, after = mean(each.before for each in texts), mean(each.after for each in texts)
        lost = mean(each.after - each.before for each in texts)
        assert before is not None
        assert after is not None
        assert lost is not None
        return cls(
            rows=len(texts),
            tokens=total,
            loss_before=before,
            loss_after=after,
            lost=lost,
            interval=interval_of([(e.tokens, e.after - e.before) for e in texts], lost),
            # of adapters that write nonsense, beyond what a float holds
            ratio=math.exp(lost) if lost < 700 else math.inf,
            divergence=mean(each.divergence for each in texts),
            agreement=mean(each.agreement for each in texts),
            texts=tuple(texts),
        )

    def entry(self) -> Record:
        """Return the entry of scores.json, without the texts."""
        return {name: value for name, value in asdict(self).items() if name != "texts"}

    def __str__(self) -> str:
        # 0.0 is added, or a small negative number would be printed as -0.00
        limits = [round(limit, 2) + 0.0 for limit in self.interval or ()]
        around = " ({:.2f} to {:.2f})".format(*limits) if limits else ""
        text = (
            f"on other text: loss {self.loss_before:.2f} -> {self.loss_after:.2f} nats, "
            f"{round(self.lost, 2) + 0.0:+.2f}{around}: perplexity {100 * (self.ratio - 1):+.0f} %"
        )
        if self.agreement is not None:
            text += f"; same next token {100 * self.agreement:.0f} %"
        return text


def interval_of(
    differences: Sequence[tuple[int, float]], lost: float, fewest: int = FEWEST
) -> tuple[float, float] | None:
    """Return the 95 % interval of a mean over units with these numbers of tokens and differences.

    Args:
        fewest: units, below which there is none.
    """
    if len(differences) < fewest:
        return None
    from scipy import stats  # takes a quarter of a second

    units, total = len(differences), sum(count for count, _ in differences)
    squares = math.fsum((count * (value - lost)) ** 2 for count, value in differences)
    error = math.sqrt(units / (units - 1) * squares) / total
    half = float(stats.t.ppf((1 + LEVEL) / 2, units - 1)) * error
    return lost - half, lost + half


# The rows


def encode_texts(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase | Processor,
    max_length: int = MAX_LENGTH,
    *,
    special: bool = False,
) -> list[RetainedRow]:
    """Tokenize texts without a template and without an end token, cut to `max_length` tokens.

    New tokens of a run are left out: the base reads its own.

    Texts of fewer than two tokens, which have none to predict, are left out with a line in the log.

    Args:
        special: as a model that does not write reads them: with all special tokens, also at the end
            of a text that is cut.

    Raises:
        InputError: no text is left, one is no text, or `max_length` is below 2.
    """
    if max_length < 2:
        raise InputError(f"max_length={max_length} is below 2: one token has nothing to predict")
    if isinstance(texts, str):
        raise InputError(f"{shown(texts)} is one text, or the name of a file: give a list of texts")
    given = list(texts)
    wrong = next((text for text in given if not isinstance(text, str)), None)
    if wrong is not None:
        raise InputError(f"{shown(wrong)} is not a text: retained texts are strings")
    tokenizer = plain_of(tokenizer_of(tokenizer))
    end = tokenizer.eos_token_id
    rows = []
    for text in given:
        if special:
            ids = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
            rows.append(RetainedRow(text, ids))
            continue
        ids = tokenizer(text, verbose=False)["input_ids"]
        # some tokenizers append it: it would measure the format
        ids = ids[:-1] if end is not None and ids[-1:] == [end] else ids
        rows.append(RetainedRow(text, ids[:max_length]))
    # an encoder reads special tokens of an empty text, too
    kept = [row for row in rows if len(row.ids) > 1 and row.text.strip()]
    if len(kept) < len(rows):
        logger.info(
            "%d retained texts of fewer than two tokens are left out", len(rows) - len(kept)
        )
    if not kept:
        raise InputError(
            f"none of the {len(rows)} retained texts has two tokens or more: give plain texts"
        )
    return kept


def batch_of(rows: Sequence[RetainedRow], model: nn.Module, pad: int) -> tuple[Batch, Tensor]:
    """Return a batch of rows on the model's device, and its labels [B, T].

    The label of a position is the token that its logits predict. An encoder reads the first half of
    a text, its decoder's labels are the rest.
    """
    has_encoder = bool(getattr(base_of(model).config, "is_encoder_decoder", False))
    halves = [max(1, len(row.ids) // 2) if has_encoder else len(row.ids) for row in rows]
    inputs = [row.ids[:half] for row, half in zip(rows, halves, strict=True)]
    labels = [
        row.ids[half:] if has_encoder else row.ids[1:]
        for row, half in zip(rows, halves, strict=True)
    ]
    device = next(model.parameters()).device
    batch = {
        "input_ids": padded(inputs, pad).to(device),
        "attention_mask": padded([[1] * len(ids) for ids in inputs], 0).to(device),
    }
    wanted = padded(labels, IGNORED).to(device)
    if has_encoder:
        batch["labels"] = wanted  # a decoder reads them, shifted
    return batch, wanted


def predicted(row: RetainedRow, model: nn.Module) -> int:
    """Return how many tokens of a row a model predicts."""
    has_encoder = bool(getattr(base_of(model).config, "is_encoder_decoder", False))
    return len(row.ids) - max(1, len(row.ids) // 2) if has_encoder else len(row.ids) - 1


def padded(rows: Sequence[list[int]], value: int) -> Tensor:
    """Return lists of unequal lengths as one tensor, [B, T] int64."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


# The measure


def compare(
    model: nn.Module,
    rows: Sequence[RetainedRow],
    tokenizer: PreTrainedTokenizerBase | Processor,
    *,
    base: nn.Module | None = None,
    before: Sequence[float] | None = None,
    batch_size: int = 8,
    processes: Processes = ALONE,
) -> Retained:
    """Measure as `retained` does, on encoded texts.

    Args:
        before: mean losses of the base on these rows, from before its weights were changed: there
            is no base to run.
        processes: among which the rows are divided.

    Raises:
        InputError, UnsupportedError: as of `retained`.
    """
    other, as_base = base_with(model, base) if before is None else (model, nullcontext)
    found: dict[int, RetainedText] = {}
    with both_measured(model, other) as passes:
        for numbers, batch, labels in _batches(model, rows, tokenizer, batch_size, processes):
            after = _logits(model, batch, labels)
            if before is None:
                with as_base(), passes.second():
                    logits = _logits(other, batch, labels)
                logits = as_it_was(logits, other, after.shape[-1])
                measured = _compared(logits, after, labels)
            else:
                losses = zip(numbers, _losses(after, labels), strict=True)
                measured = [Numbers(before[number], loss) for number, loss in losses]
            counts = (labels != IGNORED).sum(1).tolist()
            for number, count, each in zip(numbers, counts, measured, strict=True):
                found[number] = RetainedText(rows[number].text, count, *each)
    every = processes.all(found)
    return Retained.of([every[number] for number in range(len(rows))])


def losses_of(
    model: nn.Module,
    rows: Sequence[RetainedRow],
    tokenizer: PreTrainedTokenizerBase | Processor,
    *,
    is_base: bool = False,
    batch_size: int = 8,
    processes: Processes = ALONE,
) -> list[float]:
    """Return the mean loss of each row in nats per predicted token.

    Args:
        is_base: the model computes as its base: tokens that it got for a run count nothing.
    """
    found: dict[int, float] = {}
    with measuring(model):
        for numbers, batch, labels in _batches(model, rows, tokenizer, batch_size, processes):
            logits = _logits(model, batch, labels)
            logits = as_it_was(logits, model, logits.shape[-1]) if is_base else logits
            found |= zip(numbers, _losses(logits, labels), strict=True)
    every = processes.all(found)
    return [every[number] for number in range(len(rows))]


def lost_by(
    rows: Sequence[RetainedRow], before: Sequence[float], after: Sequence[float], model: nn.Module
) -> float:
    """Return the mean loss per token that was added, in nats, from the losses of each row."""
    counts = [predicted(row, model) for row in rows]
    added = (n * (a - b) for n, a, b in zip(counts, after, before, strict=True))
    return math.fsum(added) / sum(counts)


def base_with(
    model: nn.Module, base: nn.Module | None
) -> tuple[nn.Module, Callable[[], AbstractContextManager[None]]]:
    """Return what computes as the base in a block, and the block.

    Raises:
        InputError, UnsupportedError: as of `retained`.
    """
    if base is not None:
        return base, nullcontext
    if not isinstance(model, PeftModel):
        raise UnsupportedError(
            f"{type(model).__name__} has no adapters, so there is nothing to compare it with: give "
            "base=MODEL, the model before it was trained"
        )
    if not has_base(model.active_peft_config):
        raise UnsupportedError(
            f"an adapter of {model.active_peft_config.peft_type} changes the weights of its base: "
            "without it the model is another one; give base=MODEL, the base loaded anew"
        )
    if any(isinstance(m, BaseTunerLayer) and m.merged for m in model.modules()):
        raise InputError("adapters are merged: model.unmerge_adapter() first, or give base=MODEL")
    # not `without_adapters`, which leaves virtual tokens
    return model, model.disable_adapter


def _batches(
    model: nn.Module,
    rows: Sequence[RetainedRow],
    tokenizer: PreTrainedTokenizerBase | Processor,
    batch_size: int,
    processes: Processes,
) -> Generator[tuple[list[int], Batch, Tensor]]:
    pad = tokenizer_of(tokenizer).pad_token_id or 0
    lengths = [len(row.ids) for row in rows]
    # those of a large vocabulary would take more memory than a step of training
    of_row = max(lengths) * getattr(base_of(model).config.get_text_config(), "vocab_size", 1)
    size = min(batch_size, max(1, LOGITS // of_row))
    for numbers in by_length(lengths, size, processes):
        yield numbers, *batch_of([rows[number] for number in numbers], model, pad)


@contextmanager
def both_measured(model: nn.Module, other: nn.Module) -> Generator[RepeatedPasses]:
    """Measure a model and its base, which may be the model without its adapters, in passes."""
    # two models have no blocks in common
    if other is not model:
        with measuring(model), measuring(other):
            yield RepeatedPasses()
        return
    with measuring(model), repeated_passes(model) as passes:
        yield passes


@contextmanager
def measuring(model: nn.Module) -> Generator[None]:
    """Run calibration passes; restore random states and `requires_grad`, which PEFT sets."""
    needed = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    device = next(model.parameters()).device
    devices = [] if device.type == "cpu" else [device]
    try:
        with (
            torch.random.fork_rng(devices, device_type=device.type),
            calibration_pass(model),
            paused(model),
        ):
            yield
    finally:
        for parameter, value in needed:
            parameter.requires_grad_(value)


def _logits(model: nn.Module, batch: Batch, labels: Tensor) -> Tensor:
    """Return the logits that predict `labels`, [B, T, V]."""
    logits = model(**batch).get("logits")
    if logits is None or logits.dim() != 3:
        raise UnsupportedError(
            f"{type(base_of(model)).__name__} has no logits over a vocabulary for each token, so "
            "it has no loss on texts"
        )
    if "labels" in batch:
        return logits[:, -labels.shape[1] :]
    # the last position predicts nothing; methods that prepend virtual tokens have more
    return logits[:, -labels.shape[1] - 1 : -1]


def as_it_was(logits: Tensor, base: nn.Module, width: int) -> Tensor:
    """Return the logits of a base, [..., width], in which tokens that it got later have none."""
    least, rows = torch.finfo(logits.dtype).min, added_rows(base_of(base))
    if rows:
        logits = logits.index_fill(-1, torch.tensor(rows, device=logits.device), least)
    # a base that was loaded anew has no columns for them
    more = width - logits.shape[-1]
    return F.pad(logits, (0, more), value=least) if more > 0 else logits


def _chunks(labels: Tensor, vocabulary: int) -> Generator[slice]:
    chunk = CHUNK.get(labels.device.type, LARGEST_CHUNK)
    step = max(1, chunk // (labels.shape[0] * vocabulary))
    yield from (slice(start, start + step) for start in range(0, labels.shape[1], step))


def _losses(logits: Tensor, labels: Tensor) -> list[float]:
    """Return the mean loss of each row over its labels, in nats."""
    total = labels.new_zeros(labels.shape[0], dtype=torch.float64, device="cpu")
    for part in _chunks(labels, logits.shape[-1]):
        losses = _nll(logits[:, part].float().log_softmax(-1), labels[:, part])
        total += losses.cpu().double().sum(1)
    return (total / (labels != IGNORED).sum(1).cpu()).tolist()


def _nll(log_p: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of each position, [B, T]; 0 without a label."""
    return F.nll_loss(log_p.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")


class Numbers(NamedTuple):
    """What is measured of a text, as `RetainedText` has it."""

    before: float
    after: float
    divergence: float | None = None
    agreement: float | None = None
    gained: tuple[float, ...] | None = None


def _compared(before: Tensor, after: Tensor, labels: Tensor) -> list[Numbers]:
    """Return losses, divergence and agreement of each row, means over its tokens.

    Args:
        before, after: logits [B, T, V], converted to float32 in chunks.
        labels: [B, T].
    """
    counted = labels != IGNORED
    losses, divergence, same = [], [], []
    for part in _chunks(labels, before.shape[-1]):
        own = counted[:, part]
        log_p, log_q = (x[:, part].float().log_softmax(-1) for x in (before, after))
        divergence.append(divergence_terms(log_p, log_q).sum(-1).masked_fill(~own, 0))
        same.append((before[:, part].argmax(-1) == after[:, part].argmax(-1)) & own)
        losses.append(torch.stack([_nll(log, labels[:, part]) for log in (log_p, log_q)]))
    # sums in float64: thousands of tokens are added up
    b, a = torch.cat(losses, 2).cpu().double()
    values = [b, a, *(torch.cat(parts, 1).cpu().double() for parts in (divergence, same))]
    means = [(each.sum(1) / counted.sum(1).cpu()).tolist() for each in values]
    gained = [row[kept].tolist() for row, kept in zip(a - b, counted.cpu(), strict=True)]
    return [
        Numbers(*row, tuple(more))
        for row, more in zip(zip(*means, strict=True), gained, strict=True)
    ]
