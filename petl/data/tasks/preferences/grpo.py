"""GRPO: a decoder learns from the rewards of answers that it samples.

Shao et al. 2024, "DeepSeekMath", arXiv:2402.03300; the mean over the tokens of all answers is that
of Yu et al. 2025, "DAPO", arXiv:2503.14476. Each answer is learned from once, right after it was
sampled, so that the ratio to the model that sampled it is 1, and nothing is clipped. The advantage
of an answer is its reward less the mean of those to its prompt, divided by their standard
deviation. All probabilities are those of sampling, with its temperature, as in TRL.

Shapes: P prompts, G answers to each, N = P G, T tokens, L new ones at most.
"""

import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from petl.core.model.modes import evaluation_mode, without_adapters
from petl.core.types import CausalModel, base_of
from petl.data.objectives import GRPOSettings
from petl.data.tasks.base import (
    IGNORED,
    Batch,
    Collate,
    Columns,
    Outputs,
    Pad,
    Prediction,
    Row,
    batch_of_tokens,
    pad_id,
    rounded,
    source_numbers,
)
from petl.data.tasks.chat import answer_ends
from petl.data.tasks.preferences.base import (
    AnswerTask,
    LabelledOutputs,
    text_of,
    token_log_probabilities,
)
from petl.data.tasks.preferences.rewards import Given, Reward, reward_of
from petl.system.collectives import is_sharded


@dataclass
class GRPO(GRPOSettings, AnswerTask):
    """Prompts, with the columns that the reward reads as JSON text (`given`)."""

    name: ClassVar[str] = "grpo"
    metric: ClassVar[str] = "reward"
    scored: ClassVar[tuple[str, ...]] = ("reward", "length")
    label_columns: ClassVar[tuple[str, ...]] = ("labels", "advantages", "reference", "given")
    shown: ClassVar[tuple[str, ...]] = ("prompt", "given")

    def __post_init__(self) -> None:
        GRPOSettings.__post_init__(self)
        AnswerTask.__post_init__(self)
        self.rate: Reward | None = None  # of a file; None: that of the settings
        self.tokenizer: Any = None  # that of the rows, once they are collated
        self.sampled: dict[str, float] = {}  # metrics of the last micro-batch

    @property
    def longest(self) -> int:
        """Tokens of a prompt and its answer."""
        return self.max_length + self.max_new_tokens

    def why_dropped(self) -> str:
        return f": the prompt has more than data.max_length={self.max_length} tokens"

    def untruncated(self) -> None:
        """None: no row is truncated."""

    def labeled_tokens(self, row: Row) -> tuple[list[int], list[bool]]:
        """The tokens of a prompt, none of which is learned."""
        return row["input_ids"], [False] * len(row["input_ids"])

    def encode_rows(self, tokenizer: PreTrainedTokenizerBase, rows: Columns, /) -> Columns:
        """Encode prompts; longer ones than `max_length` are dropped. JSON text is kept as bytes."""
        prompts = self.prompts(tokenizer, rows)
        kept = {i: ids for i, ids in enumerate(prompts) if 0 < len(ids) <= self.max_length}
        given = [
            json.dumps({"prompt": rows["prompt"][i], **json.loads(rows["given"][i])}) for i in kept
        ]
        return {
            "input_ids": [*kept.values()],
            "given": [[*text.encode()] for text in given],
            **source_numbers(rows, kept),
        }

    def collate(self, tokenizer: PreTrainedTokenizerBase, /, multiple: int = 1) -> Collate:
        """A collate function that repeats each prompt, with room for its answers."""
        # rewards are of texts, and whoever computes them has collated rows before
        self.tokenizer = tokenizer
        room = self.generations, self.max_new_tokens
        return partial(batch_of_prompts, Pad(pad_id(tokenizer), multiple), *room)

    def items(self, batch: Batch) -> int:
        """Number of prompts."""
        return len(batch["input_ids"]) // self.generations

    # Answers

    def completed(self, model: nn.Module, batch: Batch) -> Batch:
        """The batch with sampled answers, their advantages, and the base model's tokens."""
        texts, rewards = self.answered(model, batch, self.generations)
        grouped = rewards.view(-1, self.generations)
        spread = grouped.std(1, keepdim=True)
        advantages = ((grouped - grouped.mean(1, keepdim=True)) / (spread + 1e-4)).flatten()
        labels = texts["labels"]
        # sampling waits for the device anyway
        self.sampled = {
            "reward": rewards.mean().item(),
            "reward_spread": spread.mean().item(),
            "length": (labels != IGNORED).sum(1).float().mean().item(),
        }
        found = {**texts, "advantages": advantages}
        if not self.beta:
            return found
        with torch.no_grad(), evaluation_mode(model), without_adapters(model):
            logits = model(**{name: found[name] for name in INPUTS}).logits
            known = token_log_probabilities(logits, labels, self.temperature)
            return {**found, "reference": known}

    @torch.no_grad()
    def answered(
        self, model: nn.Module, batch: Batch, count: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Texts of prompts with answers, as a batch of N rows, and their rewards, [N].

        Args:
            count: of answers to each prompt; one is the most probable, several are sampled.
        """
        # imported only where texts are written
        from petl.efficiency.in_place_cache import cache_arguments

        # each prompt once, without the room for its answers
        asked = {n: batch[n][:: self.generations, : -self.max_new_tokens] for n in INPUTS}
        chat = self.tokenizer if self.chat else None
        base = base_of(model)
        end = answer_ends(self.tokenizer.eos_token_id, base, chat)
        pad = pad_id(self.tokenizer)
        sampling = {"temperature": self.temperature, "top_k": 0, "top_p": 1.0} if count > 1 else {}
        with evaluation_mode(model), nullcontext() if count == 1 else sampled_plainly(base):
            written = cast(Any, model).generate(
                **asked,
                **cache_arguments(model, use_cache=True),
                max_new_tokens=self.max_new_tokens,
                do_sample=count > 1,
                num_return_sequences=count,
                num_beams=1,
                use_cache=True,  # which training switches off
                eos_token_id=end,
                pad_token_id=pad,
                # of a sharded model each pass needs all processes, also those that are done
                synced_gpus=is_sharded(model),
                **sampling,
            )
        answers = [until(ids, end) for ids in written[:, asked["input_ids"].shape[1] :].tolist()]
        # padded on the right from here on: positions then begin at 0 in any model
        prompts = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(asked["input_ids"], asked["attention_mask"], strict=True)
        ]
        repeated = [ids for ids in prompts for _ in range(count)]
        # a batch has tensors alone, so JSON text travels as bytes, padded by 0
        given = [json.loads(bytes(row[row > 0].tolist())) for row in batch["given"].cpu()]
        rows = [row for row in given[:: self.generations] for _ in range(count)]
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        own: list[Given] = [{k: v for k, v in row.items() if k != "prompt"} for row in rows]
        rate = self.rate or reward_of(self)
        rewards = rate([row["prompt"] for row in rows], texts, own)
        device = batch["input_ids"].device
        found = texts_of(Pad(pad), repeated, answers)
        return (
            {name: tensor.to(device) for name, tensor in found.items()},
            torch.tensor(rewards, device=device),
        )

    # Loss and scores

    def own_loss(self, outputs: Outputs, labels: Batch) -> Tensor:
        """The mean over tokens, 0-d; without advantages, that of answers with an advantage of 1."""
        own = token_log_probabilities(outputs.logits, labels["labels"], self.temperature)
        mask = (labels["labels"][:, 1:] != IGNORED).to(own)
        advantages = labels.get("advantages")
        # 1, with the gradient of the log-probability
        ratio = torch.exp(own - own.detach())
        losses = -ratio if advantages is None else -ratio * advantages.to(own)[:, None]
        reference = labels.get("reference")
        if reference is not None:
            rest = reference - own
            losses = losses + self.beta * (torch.exp(rest) - rest - 1)
        if self.loss == "dapo":
            return (losses * mask).sum() / mask.sum().clamp(min=1)
        return ((losses * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()

    def metrics(self) -> dict[str, float]:
        """Mean reward, spread within a prompt, and tokens of the last micro-batch's answers."""
        return self.sampled

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """Reward, tokens, and the tokens of the most probable answer to each prompt, [P, 2 + L]."""
        texts, rewards = self.answered(model, batch, 1)
        labels = texts["labels"]
        is_own = labels != IGNORED
        answers = [row[own] for row, own in zip(labels, is_own, strict=True)]
        # float32 has all numbers of tokens exactly
        wide = [F.pad(ids, (0, self.max_new_tokens - len(ids)), value=-1) for ids in answers]
        columns = torch.stack([rewards, is_own.sum(1).to(rewards)], 1)
        return cast("Outputs", LabelledOutputs(torch.cat([columns, torch.stack(wide)], 1), {}))

    def values(self, outputs: Outputs, labels: Batch) -> Tensor:
        """Reward and tokens of each answer, [P, 2]."""
        return outputs.logits[:, :2]

    def predict(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Reward, tokens, and the tokens of each answer, [P, 2 + L], -1 behind the last."""
        return outputs.logits.float()

    def described(
        self, values: Iterable[np.ndarray], rows: Iterable[Row]
    ) -> Iterator[tuple[int, Prediction]]:
        """The answer to each prompt, its reward and tokens."""
        for value, row in zip(values, rows, strict=True):
            ids = [int(token) for token in value[2:] if token >= 0]
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            reward, length = value[:2]
            found = {"prediction": text, "reward": rounded(reward), "length": int(length)}
            yield row["_number"], found


INPUTS = ("input_ids", "attention_mask")


@contextmanager
def sampled_plainly(base: CausalModel) -> Generator[None]:
    """Inside the block `generate` samples from the model's own probabilities.

    The generation config of a published model may penalize repetition or leave out unlikely tokens,
    and fills in what a call does not set: the loss knows nothing of it.
    """
    kept, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = kept


def until(ids: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens up to the first that ends an answer, which is part of it."""
    place = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[: place + 1]


def batch_of_prompts(
    pad: Pad, generations: int, room: int, rows: Sequence[Row]
) -> dict[str, Tensor]:
    """Each prompt `generations` times, padded on the left, with room for its answer: [N, T + L].

    What measures a pass without sampling, such as a plan, sees the largest that training has.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), longest + room), pad.pad_id)
    mask = torch.ones_like(ids)
    for i, row in enumerate(rows):
        start = longest - len(row["input_ids"])
        ids[i, start:longest], mask[i, :start] = torch.tensor(row["input_ids"]), 0
    labels = ids.clone()
    labels[:, :longest] = IGNORED
    given = Pad(0).stack(rows, "given", 0)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "given": given}
    return {name: tensor.repeat_interleave(generations, 0) for name, tensor in batch.items()}


def texts_of(
    pad: Pad, prompts: Sequence[list[int]], answers: Sequence[list[int]]
) -> dict[str, Tensor]:
    """Prompts with answers, padded on the right, with labels on the answers: [N, T] each."""
    rows = [
        text_of([*prompt, *answer], [IGNORED] * len(prompt) + answer)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return batch_of_tokens(pad, rows)
