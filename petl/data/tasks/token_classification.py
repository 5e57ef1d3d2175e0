"""Token classification: a class for each word of a text, such as a tag of named entities.

Words are joined with spaces and tokenized as one text, as in pretraining; the first token of each
word has the word's label, and the other tokens have none.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForTokenClassification, PreTrainedTokenizerBase

from petl.data.tasks.base import (
    IGNORED,
    AutoModelClass,
    Batch,
    Collate,
    Columns,
    Outputs,
    Pad,
    Prediction,
    Row,
    batch_of_tokens,
    need_offsets,
    pad_id,
    rounded,
    source_numbers,
    sums_dtype,
)
from petl.data.tasks.classification import ClassTask, macro_f1
from petl.data.tasks.encoding_cache import values_of
from petl.system.values import field, integer


@dataclass
class TokenClassification(ClassTask[PreTrainedTokenizerBase]):
    """Lists of words (`tokens`) with the number of each word's class (`tags`)."""

    name: ClassVar[str] = "token_classification"
    peft_task_type: ClassVar[str | None] = "TOKEN_CLS"
    metric: ClassVar[str] = "f1"
    auto_class: ClassVar[type[AutoModelClass]] = AutoModelForTokenClassification
    shown: ClassVar[tuple[str, ...]] = ("tokens",)

    max_length: int = field(128, integer(1))

    def encode_rows(self, tokenizer: PreTrainedTokenizerBase, rows: Columns, /) -> Columns:
        """Tokenize the joined words; rows without a labeled token are dropped.

        Raises:
            InputError: the tokenizer has no offsets.
        """
        need_offsets(tokenizer, self.name)
        encoded = tokenizer(
            [" ".join(words) for words in rows["tokens"]],
            truncation=True,
            max_length=self.max_length,
            return_offsets_mapping=True,
        )
        words = [
            words_of_tokens(words, offsets)
            for words, offsets in zip(rows["tokens"], encoded["offset_mapping"], strict=True)
        ]
        # a row whose tokens were all truncated or special
        kept = [i for i, row in enumerate(words) if any(word != IGNORED for word in row)]
        columns = {
            "input_ids": [encoded["input_ids"][i] for i in kept],
            "attention_mask": [encoded["attention_mask"][i] for i in kept],
            "_words": [words[i] for i in kept],
            "_size": [len(rows["tokens"][i]) for i in kept],
            **source_numbers(rows, kept),
        }
        if "tags" in rows:
            columns["labels"] = [
                [word if word == IGNORED else rows["tags"][i][word] for word in words[i]]
                for i in kept
            ]
        return columns

    def why_dropped(self) -> str:
        return f": no word begins within the first max_length={self.max_length} tokens"

    def collate(self, tokenizer: PreTrainedTokenizerBase, /, multiple: int = 1) -> Collate:
        """A collate function that pads tokens and labels."""
        return partial(batch_of_tokens, Pad(pad_id(tokenizer), multiple))

    def labeled_tokens(self, row: Row) -> tuple[list[int], list[bool]]:
        """The tokens of a row, and for each whether it has a label."""
        return row["input_ids"], [label != IGNORED for label in row["labels"]]

    def label_text(self, row: Row) -> str:
        """The names of the words' classes."""
        return " ".join(self.classes[label] for label in row["labels"] if label != IGNORED)

    def label_counts(self, rows: Dataset) -> dict[str, int]:
        """Number of words of each class."""
        occurrences = Counter(label for labels in values_of(rows, "labels") for label in labels)
        return {name: occurrences[i] for i, name in enumerate(self.classes)}

    def items(self, batch: Batch) -> int:
        """Number of labeled tokens."""
        return int((batch["labels"] != IGNORED).sum())

    @property
    def entity_types(self) -> list[str]:
        """The types of entities; empty if the classes are not tags of entities."""
        if not are_entities(self.classes):
            return []
        return sorted({parts(tag)[1] for tag in self.classes if tag != OUTSIDE})

    def score(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Sums over the words inside `max_length`: [1 + C*C + 3*E].

        The loss in nats; the flattened confusion matrix (label, prediction); for each type of
        entity the numbers of correct, predicted and expected entities.
        """
        logits, labels = outputs.logits, batch["labels"]
        C, dtype, device = len(self.classes), sums_dtype(logits.device), logits.device
        # one token per word has a label
        is_word = labels != IGNORED
        word_labels, word_logits = labels[is_word], logits[is_word]
        loss = F.cross_entropy(word_logits.float(), word_labels, reduction="sum").to(dtype)
        predictions = word_logits.argmax(-1)
        confusion = torch.bincount(word_labels * C + predictions, minlength=C * C).to(dtype)
        # words per row: entities do not extend across rows
        sizes = is_word.sum(1).tolist()
        pairs = zip(predictions.cpu().split(sizes), word_labels.cpu().split(sizes), strict=True)
        counts = self.count_entities((p.tolist(), l.tolist()) for p, l in pairs)
        return torch.cat([loss[None], confusion, torch.tensor(counts, dtype=dtype, device=device)])

    def count_entities(self, pairs: Iterable[tuple[list[int], list[int]]]) -> list[float]:
        """For each type of entity the numbers of correct, predicted and expected entities.

        Args:
            pairs: for each row the predicted and the labeled classes of its words.
        """
        counts = {entity_type: [0.0, 0.0, 0.0] for entity_type in self.entity_types}
        if counts:
            for predictions, labels in pairs:
                # an entity counts as correct only if type, first and last word agree
                predicted, expected = (
                    set(entities([self.classes[i] for i in row])) for row in (predictions, labels)
                )
                for column, group in enumerate((predicted & expected, predicted, expected)):
                    for entity_type, *_ in group:
                        counts[entity_type][column] += 1
        return [count for row in counts.values() for count in row]

    def summarize(self, total: Tensor) -> dict[str, float]:
        """F1, precision and recall over all entities, and macro F1, the mean over their types.

        If the classes are not tags of entities, F1 is that of the words. Accuracy and loss are per
        word.
        """
        C = len(self.classes)
        total = total.double().cpu()
        confusion = total[1 : 1 + C * C].view(C, C)
        words = confusion.sum()
        accuracy = (confusion.diagonal().sum() / words).item()
        word_scores = {
            "accuracy": accuracy,
            "loss": (total[0] / words).item(),
            "words": words.item(),
        }
        if (
            not self.entity_types
        ):  # one prediction per word: precision, recall and F1 equal accuracy
            return {"f1": accuracy, "macro_f1": macro_f1(confusion), **word_scores}
        counts = total[1 + C * C :].view(-1, 3)
        correct, predicted, expected = counts.sum(0).tolist()
        # types that occur neither in labels nor in predictions are left out, as in seqeval
        f1_by_type = [f1(*row) for row in counts.tolist() if row[1] or row[2]]
        return {
            "f1": f1(correct, predicted, expected),
            "precision": correct / predicted if predicted else 0.0,
            "recall": correct / expected if expected else 0.0,
            "macro_f1": sum(f1_by_type) / len(f1_by_type) if f1_by_type else 0.0,
            **word_scores,
        }

    def predict(self, outputs: Outputs, batch: Batch) -> Tensor:
        """The most probable class of each token and its probability, [B, T, 2]."""
        probability, best = outputs.logits.float().softmax(-1).max(-1)
        return torch.stack([best.float(), probability], -1)

    def described(
        self, values: Iterable[np.ndarray], rows: Iterable[Row]
    ) -> Iterator[tuple[int, Prediction]]:
        """The most probable class of each word and its probability; None beyond `max_length`."""
        for value, row in zip(values, rows, strict=True):
            # the first token of each word that the model has read
            first = {word: i for i, word in enumerate(row["_words"]) if word != IGNORED}
            tokens = [first.get(word) for word in range(row["_size"])]
            best = [None if i is None else self.classes[int(value[i, 0])] for i in tokens]
            sure = [None if i is None else rounded(value[i, 1]) for i in tokens]
            found: Prediction = {"prediction": best, "probability": sure}
            if "labels" in row:
                labels = row["labels"]
                given = [None if i is None else self.classes[labels[i]] for i in tokens]
                found = {"label": given, **found}
            yield row["_number"], found

    def head_loss(self, logits: Tensor, labels: Batch) -> Tensor:
        """Mean cross-entropy over labeled tokens, from logits [B, T, C]."""
        return F.cross_entropy(logits.flatten(0, 1), labels["labels"].flatten())


def f1(correct: float, predicted: float, expected: float) -> float:
    """The harmonic mean of precision and recall; 0 if nothing is correct."""
    return 2 * correct / (predicted + expected) if correct else 0.0


def words_of_tokens(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """The position of the word of which each token is the first, IGNORED for other tokens."""
    ends: list[int] = []  # end positions of the words in the joined text
    for word in words:
        ends.append((ends[-1] + 1 if ends else 0) + len(word))
    found, word = [], 0  # `word`: position of the first word without a token
    for start, end in offsets:
        while word < len(words) and start >= ends[word]:
            word += 1  # a word without tokens
        # start < end excludes special tokens, whose offsets are empty
        begins = word < len(words) and start < end and end > ends[word] - len(words[word])
        found.append(word if begins else IGNORED)
        word += begins
    return found


# Entities in tagged sequences, by the rules of the CoNLL-2000 scorer (and of seqeval).
#
# A tag is `O`, or a position in an entity and the entity's type: `B-PER` is the first word, `I-` a
# word inside, `E-` (or `L-`) the last word, `S-` (or `U-`) the only word. Where a sequence violates
# its scheme, a new entity begins at each word that does not continue the entity before it.


SINGLE, LAST, OUTSIDE = ("S", "U"), ("E", "L"), "O"
PREFIXES = ("B", "I", *LAST, *SINGLE)

Entity = tuple[str, int, int]  # type, first word, last word


def parts(tag: str) -> tuple[str, str]:
    """Split a tag into the position in an entity ("O" for none) and the entity's type."""
    position, _, entity_type = tag.partition("-")
    return position, entity_type


def are_entities(tags: Iterable[str]) -> bool:
    """True if these classes are tags of entities rather than, say, parts of speech."""
    # parts of speech, for example, have no prefix and no type
    inside = [parts(tag) for tag in tags if tag != OUTSIDE]
    return bool(inside) and all(position in PREFIXES and type_ for position, type_ in inside)


def entities(tags: Sequence[str]) -> Iterator[Entity]:
    """Yield the entities of one sequence in order."""
    start, previous, entity_type = 0, OUTSIDE, ""
    # the additional tag closes an entity at the end of the sequence
    for i, tag in enumerate((*tags, OUTSIDE)):
        position, own_type = parts(tag)
        continues = position in ("I", *LAST) and previous in ("B", "I") and own_type == entity_type
        if previous != OUTSIDE and not continues:
            yield entity_type, start, i - 1
        if not continues:
            start = i
        previous, entity_type = position, own_type
