"""Token classification: a class for each word of a text, such as its part in a named entity.

The words are put together with spaces and tokenized as the text that the model was trained to
read; the first token of each word bears the word's label, and no other token has one.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForTokenClassification, PreTrainedTokenizerBase

from petl.errors import InputError
from petl.tasks.base import Task, batch_of_tokens, pad_id, sums_dtype
from petl.tasks.classification import class_names, macro_f1
from petl.tasks.entities import OUTSIDE, are_entities, entities, parts
from petl.tasks.rows import IGNORED, Columns, Pad, Row


@dataclass
class TokenClassification(Task):
    """Lists of words (`tokens`) with the number of each word's class (`tags`)."""

    name: ClassVar[str] = "token_classification"
    peft_task_type: ClassVar[str | None] = "TOKEN_CLS"
    metric: ClassVar[str] = "f1"
    higher_is_better: ClassVar[bool] = True

    classes: list[str]
    max_length: int = 128

    @property
    def labels(self) -> list[str]:
        return self.classes

    @property
    def auto_class(self) -> type[Any]:
        return AutoModelForTokenClassification

    def model_kwargs(self) -> dict[str, Any]:
        return class_names(self.classes)

    def settings(self) -> dict[str, Any]:
        return {"task": self.name, "max_length": self.max_length}

    def encode_rows(self, tokenizer: PreTrainedTokenizerBase, rows: Columns) -> Columns:
        need_offsets(tokenizer, self.name)
        encoded = tokenizer(
            [" ".join(words) for words in rows["tokens"]],
            truncation=True,
            max_length=self.max_length,
            return_offsets_mapping=True,
        )
        labels = [
            labels_of_tokens(words, tags, offsets)
            for words, tags, offsets in zip(
                rows["tokens"], rows["tags"], encoded["offset_mapping"], strict=True
            )
        ]
        kept = [i for i, row in enumerate(labels) if any(label != IGNORED for label in row)]
        return {
            "input_ids": [encoded["input_ids"][i] for i in kept],
            "attention_mask": [encoded["attention_mask"][i] for i in kept],
            "labels": [labels[i] for i in kept],
        }

    def why_dropped(self) -> str:
        return f": no word begins within the first max_length={self.max_length} tokens"

    def collate(
        self, tokenizer: PreTrainedTokenizerBase, multiple: int = 1
    ) -> Callable[[Sequence[Row]], dict[str, Tensor]]:
        return partial(batch_of_tokens, Pad(pad_id(tokenizer), multiple))

    def marks(self, row: Row) -> tuple[list[int], list[bool]]:
        return row["input_ids"], [label != IGNORED for label in row["labels"]]

    def truth(self, row: Row) -> str:
        return " ".join(self.classes[label] for label in row["labels"] if label != IGNORED)

    def counts(self, rows: Dataset) -> dict[str, int]:
        found = Counter(label for labels in rows["labels"] for label in labels)
        return {name: found[i] for i, name in enumerate(self.classes)}

    def items(self, batch: dict[str, Tensor]) -> int:
        return int((batch["labels"] != IGNORED).sum())

    @property
    def kinds(self) -> list[str]:
        """The types of entities; none where classes are not tags of entities."""
        if not are_entities(self.classes):
            return []
        return sorted({parts(tag)[1] for tag in self.classes if tag != OUTSIDE})

    def score(self, outputs: Any, batch: dict[str, Tensor]) -> Tensor:
        """Sums over the words that the model has seen: [1 + C*C + 3*E].

        Their loss in nats; how often each class was taken for each; of each type of entity those
        found rightly, those found, and those there are.
        """
        logits, labels = outputs.logits, batch["labels"]
        C, dtype, device = len(self.classes), sums_dtype(logits.device), logits.device
        is_word = labels != IGNORED
        truth, scores = labels[is_word], logits[is_word]
        loss = F.cross_entropy(scores.float(), truth, reduction="sum").to(dtype)
        guess = scores.argmax(-1)
        confusion = torch.bincount(truth * C + guess, minlength=C * C).to(dtype)
        sizes = is_word.sum(1).tolist()
        pairs = zip(guess.cpu().split(sizes), truth.cpu().split(sizes), strict=True)
        counted = self.count_entities((g.tolist(), t.tolist()) for g, t in pairs)
        return torch.cat([loss[None], confusion, torch.tensor(counted, dtype=dtype, device=device)])

    def count_entities(self, pairs: Iterable[tuple[list[int], list[int]]]) -> list[float]:
        """Of each type: found rightly, found, there; from the classes guessed and true."""
        counts = {kind: [0.0, 0.0, 0.0] for kind in self.kinds}
        if counts:
            for guess, truth in pairs:
                found, there = (
                    set(entities([self.classes[i] for i in row])) for row in (guess, truth)
                )
                for column, some in enumerate((found & there, found, there)):
                    for kind, *_ in some:
                        counts[kind][column] += 1
        return [count for row in counts.values() for count in row]

    def summarize(self, total: Tensor) -> dict[str, float]:
        """F1 with precision and recall, over all entities, and the mean F1 of their types; where
        classes are no tags of entities, F1 is that of the words. Accuracy and loss are of words.
        """
        C = len(self.classes)
        total = total.double().cpu()
        confusion = total[1 : 1 + C * C].view(C, C)
        words = confusion.sum()
        accuracy = (confusion.diagonal().sum() / words).item()
        of_words = {"accuracy": accuracy, "loss": (total[0] / words).item(), "words": words.item()}
        if not self.kinds:  # every word is found and is there: precision, recall and F1 are one
            return {"f1": accuracy, "macro_f1": macro_f1(confusion), **of_words}
        counts = total[1 + C * C :].view(-1, 3)
        right, found, there = counts.sum(0).tolist()
        of_kinds = [f1(*row) for row in counts.tolist() if row[1] or row[2]]
        return {
            "f1": f1(right, found, there),
            "precision": right / found if found else 0.0,
            "recall": right / there if there else 0.0,
            "macro_f1": sum(of_kinds) / len(of_kinds) if of_kinds else 0.0,
            **of_words,
        }

    def head_loss(self, logits: Tensor, truths: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), truths["labels"].flatten())


def f1(right: float, found: float, there: float) -> float:
    """The harmonic mean of precision and recall; 0 if nothing was found rightly."""
    return 2 * right / (found + there) if right else 0.0


def need_offsets(tokenizer: PreTrainedTokenizerBase, task: str) -> None:
    """Raise InputError unless the tokenizer tells which characters a token stands for."""
    if not tokenizer.is_fast:
        raise InputError(
            f"data.task={task} needs a tokenizer that tells the place of each token in the text; "
            f"{type(tokenizer).__name__} does not: use the model's fast tokenizer"
        )


def labels_of_tokens(
    words: Sequence[str], tags: Sequence[int], offsets: Sequence[tuple[int, int]]
) -> list[int]:
    """The label of each token: that of the word whose first token it is, else IGNORED."""
    ends: list[int] = []  # of the words in the text that they make together
    for word in words:
        ends.append((ends[-1] + 1 if ends else 0) + len(word))
    labels, word = [], 0  # `word`: the next that has no token yet
    for start, end in offsets:
        while word < len(words) and start >= ends[word]:
            word += 1  # one that the tokenizer passed over
        begins = word < len(words) and start < end and end > ends[word] - len(words[word])
        labels.append(tags[word] if begins else IGNORED)
        word += begins
    return labels
