"""Section `cache`: tokens behind prompts, with keys and values written in place.

Beside it is plain `generate` of transformers, whose cache copies those of all tokens for each new
one. Both go on behind prompts that are in their caches, which are cropped back to them each time.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache

from bench.clocks import in_turn
from bench.records import Record
from bench.shapes import Bench, Shape
from petl.efficiency.in_place_cache import cache_argument, write_in_place

SIZES = ((1, 16), (1, 1024), (8, 1024))  # rows and tokens of the prompts
NEW = 16  # tokens of an answer
GOALS = {(8, 1024): 0.55}  # else: no slower


def measure(shape: Shape, rounds: int, sizes: Sequence[tuple[int, int]] = SIZES) -> list[Record]:
    """Return a record for prompts of each size; none for an encoder."""
    return [_record(shape, rounds, *size) for size in sizes] if shape.is_decoder else []


def _record(shape: Shape, rounds: int, rows: int, length: int) -> Record:
    bench = Bench(replace(shape, rows=rows, length=length + NEW))
    base: Any = bench.base.eval()
    ids = bench.batch["input_ids"][:, :length]
    copied, own = (Answers(base, ids, each) for each in (False, True))
    # equal to the bit, or the times say nothing
    differs = not all(map(torch.equal, copied.logits(), own.logits()))
    times = in_turn(copied, {"own": own}, rounds=rounds, warm_up=1, device=shape.device)
    return Record(
        "cache",
        f"{shape.name}, {shape.layers} layers",
        f"{NEW} tokens after {rows} x {length:,}",
        failed="logits are not equal" if differs else "",
        ratios={"time / copied": times.over_floor("own")},
        facts={"goal copied": GOALS.get((rows, length), 1.0)},
    )


class Answers:
    """Answers to prompts that are in a cache but for their last token."""

    def __init__(self, model: Any, ids: torch.Tensor, in_place: bool) -> None:
        self.model, self.ids = model, ids
        cache = DynamicCache(config=model.config)
        self.cache = write_in_place(cache) if in_place else cache
        self.named = {cache_argument(model): self.cache, "use_cache": True}
        with torch.no_grad():
            model(input_ids=ids[:, :-1], logits_to_keep=1, **self.named)

    def logits(self) -> tuple[torch.Tensor, ...]:
        """Return the logits of all tokens of the answers."""
        return self(return_dict_in_generate=True, output_logits=True).logits

    def __call__(self, **more: Any) -> Any:
        """Answer once, and take the answers off the cache again."""
        found = self.model.generate(
            input_ids=self.ids,
            attention_mask=torch.ones_like(self.ids),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            **self.named,
            **more,
        )
        self.cache.crop(self.ids.shape[1] - 1 - self.cache.get_seq_length())
        return found
