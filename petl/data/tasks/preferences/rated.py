"""KTO: a decoder learns from answers that are rated good or bad, each for itself.

Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization",
arXiv:2402.01306. The reference point is the mean log-ratio of answers to other prompts of the
micro-batch, at least 0: each prompt has the answer of the row before it, as in TRL.

Shapes: N rows, T tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import ClassVar

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from petl.core.model.modes import evaluation_mode, without_adapters
from petl.data.objectives import KTOSettings
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
from petl.data.tasks.causal_lm import has_targets
from petl.data.tasks.preferences.base import AnswerTask, encoded, text_of
from petl.system.collectives import num_processes, summed

OTHER = "other_"  # before the columns of the prompts with answers of other rows


@dataclass
class KTO(KTOSettings, AnswerTask):
    """Answers that are `good` or not; pairs give one of each."""

    name: ClassVar[str] = "kto"
    scored: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "reward")
    label_columns: ClassVar[tuple[str, ...]] = (
        *("labels", "good", "reference", "point"),
        *(f"{OTHER}{name}" for name in ("input_ids", "attention_mask", "labels")),
    )
    shown: ClassVar[tuple[str, ...]] = ("prompt", "completion", "good", "chosen", "rejected")

    def encode_rows(self, tokenizer: PreTrainedTokenizerBase, rows: Columns, /) -> Columns:
        """Encode each answer of each row; those without a token left are dropped."""
        texts, good, sources = [], [], []
        for i, prompt in enumerate(rows["prompt"]):
            has_pair = "chosen" in rows
            names = ("chosen", "rejected") if has_pair else ("completion",)
            answers = [rows[name][i] for name in names]
            for number, (ids, labels) in enumerate(
                encoded(tokenizer, prompt, answers, plain=self.plain)
            ):
                cut = labels[: self.max_length]
                if has_targets(cut):
                    texts.append((ids[: self.max_length], cut))
                    good.append(number == 0 if has_pair else rows["good"][i])
                    sources.append(i)
        return {
            "input_ids": [ids for ids, _ in texts],
            "attention_mask": [[1] * len(ids) for ids, _ in texts],
            "labels": [labels for _, labels in texts],
            "good": good,
            **source_numbers(rows, sources),
        }

    def label_text(self, row: Row) -> str:
        return "good" if row["good"] else "bad"

    def label_counts(self, rows: Dataset) -> dict[str, int]:
        """Number of good and of bad answers."""
        good = sum(rows["good"])
        return {"good": good, "bad": len(rows) - good}

    def collate(self, tokenizer: PreTrainedTokenizerBase, /, multiple: int = 1) -> Collate:
        """A collate function that pads the texts, and each prompt with another row's answer."""
        return partial(batch_of_rated, Pad(pad_id(tokenizer), multiple), self.max_length)

    def items(self, batch: Batch) -> int:
        """Number of answers."""
        return len(batch["input_ids"])

    def completed(self, model: nn.Module, batch: Batch) -> Batch:
        """The batch with `reference`, [N], and with the reference `point`, 0-d."""
        # dropout would make a reference of its own in each step
        with torch.no_grad(), evaluation_mode(model):
            point = self.answers(model, batch, OTHER)
            with without_adapters(model):
                point = (point - self.answers(model, batch, OTHER)).mean()
                reference = self.answers(model, batch)
        # one point for all processes, as if one had all rows
        point = summed(point) / num_processes()
        own = {name: value for name, value in batch.items() if not name.startswith(OTHER)}
        return {**own, "reference": reference, "point": point.clamp(min=0)}

    def values(self, outputs: Outputs, labels: Batch) -> Tensor:
        """Loss, 1 for a reward on the right side of the reference point, and reward, [N, 3].

        A reward is `beta` times the log-ratio of an answer; one at the point is half right.
        """
        ratios, _ = self.ratios(outputs, labels)
        sign = 2 * labels["good"].to(ratios) - 1
        gain = sign * (ratios - labels.get("point", 0))
        weights = torch.where(sign > 0, self.desirable_weight, self.undesirable_weight)
        losses = weights * (1 - torch.sigmoid(self.beta * gain))
        right = (1 + gain.detach().sign()) / 2
        return torch.stack([losses, right, self.beta * ratios.detach()], 1)

    def score(self, outputs: Outputs, batch: Batch) -> Tensor:
        """As of other tasks, then number and rewards of the good answers: [6]."""
        sums = super().score(outputs, batch)
        good, rewards = batch["good"].to(sums), self.scores(outputs)[:, 2]
        return torch.cat([sums, torch.stack([good.sum(), good @ rewards.to(sums)])])

    def summarize(self, total: Tensor) -> dict[str, float]:
        """Loss, accuracy, rewards of good and bad answers and their margin, number of answers.

        Without answers of one of both kinds there is no margin.
        """
        scores = super().summarize(total[:4])
        good, of_good = total[4:].tolist()
        bad, of_bad = scores["rows"] - good, scores.pop("reward") * scores["rows"] - of_good
        means = {"chosen_reward": (of_good, good), "rejected_reward": (of_bad, bad)}
        found = {name: value / count for name, (value, count) in means.items() if count}
        if len(found) == len(means):
            found = {"margin": found["chosen_reward"] - found["rejected_reward"], **found}
        return {**scores, **found, "rows": scores["rows"]}

    def described(
        self, values: Iterable[np.ndarray], rows: Iterable[Row]
    ) -> Iterator[tuple[int, Prediction]]:
        """The scores of each row: means of loss and accuracy, if it is a pair."""
        both = zip(values, rows, strict=True)
        for number, group in groupby(both, key=lambda pair: pair[1]["_number"]):
            answers = [value for value, _ in group]
            loss, accuracy, _ = np.mean(answers, 0)
            names = ("reward",) if len(answers) == 1 else ("chosen_reward", "rejected_reward")
            rewards = zip(names, (value[2] for value in answers), strict=True)
            found = {"loss": loss, "accuracy": accuracy, **dict(rewards)}
            yield number, {name: rounded(value) for name, value in found.items()}


def batch_of_rated(pad: Pad, most: int, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Texts with `good`, [N], and the texts of prompts with answers of the row before.

    Args:
        most: tokens of a text.
    """
    others = []
    for row, before in zip(rows, [rows[-1], *rows[:-1]], strict=True):
        start, end = (answer_start(each["labels"]) for each in (row, before))
        ids = [*row["input_ids"][:start], *before["input_ids"][end:]][:most]
        others.append(text_of(ids, [IGNORED] * start + ids[start:]))
    mixed = {f"{OTHER}{name}": value for name, value in batch_of_tokens(pad, others).items()}
    good = torch.tensor([int(row["good"]) for row in rows])
    return {**batch_of_tokens(pad, rows), "good": good, **mixed}


def answer_start(labels: Sequence[int]) -> int:
    """The place of the first token of the answer."""
    return next(i for i, label in enumerate(labels) if label != IGNORED)
