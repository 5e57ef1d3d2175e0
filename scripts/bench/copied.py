"""Section `copied`: answers of an encoder-decoder with drafts, by how much of the input they copy.

A T5 of the size of t5-small with random weights is made to write given texts of 64 random tokens:
its input, the input with a fifth of the tokens replaced, and other tokens. Plain decoding and each
drafter in turn, text by text; a text before them is not timed.

Goals: 3 times plain decoding for a copy, 1.8 at a fifth of edits, and 0.97 on unrelated text.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, T5Config, T5ForConditionalGeneration

from bench.clocks import Spread, seconds
from bench.records import Record
from petl.efficiency.drafting import Drafter, Stats, decode, drafter

TOKENS, TEXTS, NAMES = 64, 4, ("aggressive", "free")
KINDS = {"copy": (0.0, 1 / 3.0), "20 % edits": (0.2, 1 / 1.8), "unrelated": (1.0, 1 / 0.97)}
SIZES = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}
START, END, SPECIAL = 0, 1, 5  # the first tokens of the vocabulary are in no text


class Writes(LogitsProcessor):
    """Lets a model write one text, behind the token with which its decoder begins."""

    def __init__(self, text: list[int]) -> None:
        self.text = text

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores of which one is not -inf."""
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.text[input_ids.shape[1] - 1]] = 0
        return forced


def measure(texts: int = TEXTS, tokens: int = TOKENS, **sizes: int) -> list[Record]:
    """Return a record for each drafter and kind of text.

    Args:
        texts: of each kind.
        tokens: of a text.
        sizes: of the model, for tests.
    """
    torch.manual_seed(0)
    special = {"decoder_start_token_id": START, "pad_token_id": START, "eos_token_id": END}
    model = T5ForConditionalGeneration(T5Config(**{**SIZES, **sizes}, **special)).eval()
    guesses = {name: drafter(name, model=model) for name in NAMES}
    shape = f"T5 of {model.config.num_layers} layers, {tokens} tokens"
    records: list[Record] = []
    for kind, (share, goal) in KINDS.items():
        pairs = [_pair(model, tokens, share) for _ in range(texts + 1)]
        records += _records((f"{shape}, {kind}", goal), model, guesses, pairs)
    return records


def _pair(model: T5ForConditionalGeneration, tokens: int, share: float) -> tuple[Tensor, list[int]]:
    """Return an input [1, tokens + 1], and a text in which a share of its tokens is replaced."""
    source, other = torch.randint(SPECIAL, model.config.vocab_size, (2, tokens))
    text = torch.where(torch.rand(tokens) < share, other, source)
    return torch.tensor([[*source, END]]), [*text.tolist(), END]


def _records(
    place: tuple[str, float],
    model: T5ForConditionalGeneration,
    guesses: dict[str, Drafter],
    pairs: list[tuple[Tensor, list[int]]],
) -> list[Record]:
    """Return the record of each drafter on texts of one kind, of which the first is not timed."""
    (shape, goal), stats = place, {name: Stats() for name in guesses}
    ratios: dict[str, list[float]] = {name: [] for name in guesses}
    wrong = set()
    for number, (ids, text) in enumerate(pairs):
        plain, time = _timed(partial(_answer, model, ids, text))
        for name, guess in guesses.items():
            own = {"custom_generate": decode, "drafter": guess, "stats": stats[name]}
            answer, taken = _timed(partial(_answer, model, ids, text, **own))
            if number:
                ratios[name].append(taken / time)
            if not torch.equal(answer, plain):
                wrong.add(name)
    return [
        Record(
            "copied",
            shape,
            name,
            failed="its answers are not those of plain decoding" if name in wrong else "",
            ratios={"time / plain": Spread.of(ratios[name])},
            facts={"goal time / plain": goal, "tokens / pass": stats[name].tokens_per_pass},
        )
        for name in guesses
    ]


def _answer(model: T5ForConditionalGeneration, ids: Tensor, text: list[int], **more: Any) -> Tensor:
    common = {"max_new_tokens": len(text), "do_sample": False, "use_cache": True}
    return model.generate(ids, logits_processor=[Writes(text)], **common, **more)


def _timed(answer: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Return an answer and its processor seconds."""
    found: list[Tensor] = []
    time = seconds(lambda: found.append(answer()), "cpu")
    return found[0], time
