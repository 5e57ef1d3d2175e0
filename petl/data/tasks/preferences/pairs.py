"""DPO and ORPO: a decoder learns from pairs of a chosen and a rejected answer.

Rafailov et al. 2023, "Direct Preference Optimization", arXiv:2305.18290. Azar et al. 2023, "A
General Theoretical Paradigm to Understand Learning from Human Preferences" (IPO), arXiv:2310.12036.
Hong et al. 2024, "ORPO: Monolithic Preference Optimization without Reference Model",
arXiv:2403.07691. As in TRL, IPO's log-ratios are means over tokens, and ORPO's loss of the chosen
text is that of all of its tokens, those of the prompt included.

Shapes: P pairs.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from petl.data.objectives import DPOSettings, ORPOSettings
from petl.data.tasks.base import IGNORED, Batch, Collate, Outputs, Pad, Row, pad_id
from petl.data.tasks.preferences.base import (
    AnswerTask,
    PairTask,
    batch_of_pairs,
    log_probabilities,
)
from petl.system.collectives import gathered, num_processes

SCORED = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")


def of_pairs(losses: Tensor, rewards: Tensor) -> Tensor:
    """The columns `SCORED` of each pair, [P, 5].

    Args:
        losses: [P].
        rewards: of the chosen texts, then of the rejected ones, [2 P]; equal ones of a pair count
            as half right.
    """
    chosen, rejected = rewards.detach().chunk(2)
    margin = chosen - rejected
    return torch.stack([losses, (1 + margin.sign()) / 2, margin, chosen, rejected], 1)


@dataclass
class DPO(DPOSettings, PairTask, AnswerTask):
    """Pairs of answers: the log-ratio of the chosen one to the base model exceeds the other's."""

    name: ClassVar[str] = "dpo"
    scored: ClassVar[tuple[str, ...]] = SCORED

    def values(self, outputs: Outputs, labels: Batch) -> Tensor:
        """The columns `SCORED`; a reward is `beta` times the log-ratio of an answer."""
        ratios, tokens = self.ratios(outputs, labels)
        compared = ratios / tokens.clamp(min=1) if self.loss == "ipo" else ratios
        chosen, rejected = compared.chunk(2)
        difference = chosen - rejected
        losses = {
            "sigmoid": lambda: -F.logsigmoid(self.beta * difference),
            "hinge": lambda: torch.relu(1 - self.beta * difference),
            "ipo": lambda: (difference - 1 / (2 * self.beta)) ** 2,
        }
        return of_pairs(losses[self.loss](), self.beta * ratios)


@dataclass
class ORPO(ORPOSettings, PairTask, AnswerTask):
    """Pairs of answers: the loss of the chosen text, and the odds of the chosen answer."""

    name: ClassVar[str] = "orpo"
    scored: ClassVar[tuple[str, ...]] = SCORED
    label_columns: ClassVar[tuple[str, ...]] = ("labels", "texts", "tokens")
    has_reference: ClassVar[bool] = False

    def whole_step(
        self, weighted: Sequence[tuple[Batch, float]], forward: Callable[[Batch], Outputs]
    ) -> Iterable[tuple[Batch, float]]:
        """Micro-batches with `tokens`, 0-d: what divides the summed loss of their chosen texts.

        They are weighted by their pairs, and the loss of a step is a mean over all of its tokens.
        """
        own = sum(chosen_tokens(batch) for batch, weight in weighted if weight)
        every = sum(gathered(own)) / num_processes()
        for batch, weight in weighted:
            more = {"tokens": torch.tensor(weight * every)} if weight else {}
            yield {**batch, **more}, weight

    def own_loss(self, outputs: Outputs, labels: Batch) -> Tensor:
        """The loss of the tokens of all chosen texts of a step, and the mean of the odds ratios."""
        chosen, odds, rewards = self.parts(outputs, labels)
        tokens = labels.get("tokens", chosen[1].sum())
        losses = chosen[0].sum() / tokens - self.beta * F.logsigmoid(odds)
        self.last = of_pairs(losses, rewards)[:, 1:].detach().mean(0)
        return losses.mean()

    def values(self, outputs: Outputs, labels: Batch) -> Tensor:
        """The columns `SCORED`; a reward is `beta` times the mean log-probability of a token."""
        chosen, odds, rewards = self.parts(outputs, labels)
        return of_pairs(chosen[0] / chosen[1] - self.beta * F.logsigmoid(odds), rewards)

    def parts(
        self, outputs: Outputs, labels: Batch
    ) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """Summed loss and tokens of the chosen texts, log-odds, [P] each, and rewards, [2 P]."""
        logits, texts = outputs.logits, labels["texts"].chunk(2)[0]
        of_answers, tokens = log_probabilities(logits, labels["labels"])
        means = of_answers / tokens.clamp(min=1)
        chosen, rejected = (means - log_of_rest(means)).chunk(2)
        of_texts, lengths = log_probabilities(logits[: len(texts)], texts)
        return (-of_texts, lengths), chosen - rejected, self.beta * means

    def collate(self, tokenizer: PreTrainedTokenizerBase, /, multiple: int = 1) -> Collate:
        """As of other pairs, with the tokens of whole texts as `texts`, [2 P, T]."""
        return partial(batch_of_whole_pairs, Pad(pad_id(tokenizer), multiple))


def batch_of_whole_pairs(pad: Pad, rows: Sequence[Row]) -> dict[str, Tensor]:
    """`batch_of_pairs`, with `texts`: the tokens of each text, or IGNORED."""
    batch = batch_of_pairs(pad, rows)
    padding = batch["attention_mask"] == 0
    return {**batch, "texts": batch["input_ids"].masked_fill(padding, IGNORED)}


def chosen_tokens(batch: Batch) -> int:
    """Number of tokens of the chosen texts that a model predicts."""
    return int((batch["texts"].chunk(2)[0][:, 1:] != IGNORED).sum())


def log_of_rest(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x below 0, by the form that is exact there."""
    return torch.where(x > -0.693, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
