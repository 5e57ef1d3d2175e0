"""Reranking: a score for a query and a document that are read together, by which they are ranked.

An encoded row has the tokens of the pairs of one query with its documents, one after the other,
with their `sizes`. A row to score is one pair, with the ids of both and a grade.
B rows, n documents of a row, N pairs of a batch, T tokens.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import accumulate, pairwise
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from petl.data.judgements import are_grades, candidate_rows, candidates, grades_of
from petl.data.tasks.base import (
    Batch,
    Collate,
    Columns,
    Fields,
    Outputs,
    Pad,
    Prediction,
    Row,
    TextTask,
    pad_id,
    rounded,
)
from petl.data.tasks.encoding_cache import values_of
from petl.data.tasks.own_loss import compute_loss_of
from petl.data.tasks.regression import correlation, ranks
from petl.data.tasks.retrieval.base_folder import LENGTHS, MODULES, PROMPTS, module
from petl.data.tasks.retrieval.scores import Rankings
from petl.errors import InputError
from petl.system.values import field, integer, one_of

PARTS = ("input_ids", "attention_mask", "token_type_ids")  # of pairs


def binary(logits: Tensor, scores: Tensor, places: Tensor) -> Tensor:
    """The binary cross-entropy of scores in [0, 1], mean over pairs, in nats: 0-d, from [N]."""
    return F.binary_cross_entropy_with_logits(logits, scores)


def mse(logits: Tensor, scores: Tensor, places: Tensor) -> Tensor:
    """The mean squared difference to a teacher's scores: 0-d, from [N]."""
    return F.mse_loss(logits, scores)


def listwise(logits: Tensor, scores: Tensor, places: Tensor) -> Tensor:
    """The cross-entropy of the softmax over the documents of a query, at the first, in nats: 0-d.

    Args:
        places: of the documents of each query in `logits`, -1: none, [B, n].
    """
    # -1 would be the last pair of the batch
    of_query = logits[places.clamp(min=0)].masked_fill(places < 0, -torch.inf)
    return -of_query.log_softmax(1)[:, 0].mean()


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {  # by data.loss
    "binary": binary,
    "listwise": listwise,
    "mse": mse,
}


@dataclass
class Reranking(TextTask):
    """Pairs of a query and a document. Raw rows: see `petl.data.retrieval_columns`.

    Rows to score have `query`, `document`, `query_id`, `document_id` and `grade`; rows to predict
    `query` and `document` alone.

    Attributes:
        loss: a name in `LOSSES`.
        scored_pairs: rows are two sentences with a score, which rank nothing.
    """

    name: ClassVar[str] = "reranking"
    metric: ClassVar[str] = "ndcg_at_10"
    higher_is_better: ClassVar[bool] = True
    tensors_by_row: ClassVar[bool] = False
    label_columns: ClassVar[tuple[str, ...]] = ("labels", "places")
    group: ClassVar[str | None] = "_group"
    by_row: ClassVar[bool] = True
    shown: ClassVar[tuple[str, ...]] = ("query", "document", "sentence1", "sentence2")

    max_length: int = field(128, integer(1))
    loss: str = field("binary", one_of(*LOSSES))
    scored_pairs: bool = False

    def __post_init__(self) -> None:
        if self.scored_pairs:
            self.metric = "spearman"  # ty: ignore[invalid-attribute-access]

    def model_kwargs(self) -> Fields:
        """One output, with the name that heads for one have by default: a trained one is kept."""
        # other names would make the head of a pretrained reranker a new one
        names = {"id2label": {0: "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        return {"num_labels": 1, "problem_type": "regression", **names}

    def adjust(self, model: PreTrainedModel) -> None:
        """Let the model compute the loss of this task, and its folder say what scores are."""
        compute_loss_of(self, model)
        # read by CrossEncoder of sentence-transformers to version 5
        model.config.sentence_transformers = {"activation_fn": self.activation}

    @property
    def activation(self) -> str:
        """The function of torch from logits to the scores that are shown."""
        kind = "activation.Sigmoid" if self.loss == "binary" else "linear.Identity"
        return f"torch.nn.modules.{kind}"

    def model_files(self, model: PreTrainedModel) -> dict[str, object]:
        """The files with which CrossEncoder from version 6 on reads pairs without a template."""
        return {
            MODULES: [module(0, "Transformer", "")],
            LENGTHS: {
                "transformer_task": "sequence-classification",
                "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
                "module_output_name": "scores",
            },
            PROMPTS: {
                "model_type": "CrossEncoder",
                "activation_fn": self.activation,
                "prompts": {},
            },
        }

    def saved_tokenizer(self, tokenizer: PreTrainedTokenizerBase, /) -> PreTrainedTokenizerBase:
        """The tokenizer with the length of this task, to which CrossEncoder truncates."""
        # a copy: that of the run truncates where `encode_rows` says
        copied = copy.deepcopy(tokenizer)
        copied.model_max_length = self.max_length
        return copied

    # Rows

    def encode_rows(self, tokenizer: PreTrainedTokenizerBase, rows: Columns, /) -> Columns:
        """Tokenize each document with its query, the longer of both truncated to `max_length`.

        Raises:
            InputError: a pair has no tokens.
        """
        queries, documents = paired(rows)
        # all pairs in one call: the tokenizer works in parallel
        flat = [(q, d) for q, own in zip(queries, documents, strict=True) for d in own]
        texts, others = ([*each] for each in zip(*flat, strict=True))
        found = tokenizer(texts, others, truncation=True, max_length=self.max_length)
        sizes = [len(ids) for ids in found["input_ids"]]
        if 0 in sizes:
            raise InputError(
                f"the query {texts[sizes.index(0)]!r} and its document have no tokens with this "
                "model's tokenizer: remove the row"
            )
        ends = [*pairwise([0, *accumulate(map(len, documents))])]
        columns: Columns = {
            name: [[token for part in found[name][a:b] for token in part] for a, b in ends]
            for name in PARTS
            if name in found
        }
        columns["sizes"] = [sizes[a:b] for a, b in ends]
        columns["_group"] = [number_of(query) for query in queries]
        # rows to score: what the ranking needs, under names that batches leave out
        if "grade" in rows:
            kept = {"_query_id": "query_id", "_id": "document_id", "_grade": "grade"}
            return columns | {name: rows[column] for name, column in kept.items()}
        scores = scores_of(rows)
        if scores is not None:
            columns["scores"] = scores
        if "score" in rows:
            columns["_score"] = [float(value) for value in rows["score"]]
        return columns

    def is_truncated(self, row: Row) -> bool:
        """True if a pair of the row is longer than `max_length`."""
        return max(row["sizes"]) > self.max_length

    def nothing_to_learn(self, rows: Dataset, batch_size: int) -> str:
        """Why these rows tell no documents apart; "" if they do."""
        if not self.scored_pairs and len(np.unique(rows["_group"])) == 1:
            return f"all {len(rows)} training rows have one query: nothing tells documents apart"
        if len({score for scores in rows["scores"] for score in scores}) == 1:
            return f"all {len(rows)} training rows have one score: nothing tells documents apart"
        return ""

    def rows_to_score(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Pairs of queries and their documents, see `candidate_rows`; scored pairs as they are."""
        return rows if self.scored_pairs else candidate_rows(rows)

    def scored_rows(self, train: Dataset, validation: Dataset) -> Dataset:
        """The held-out rows as pairs, of which the documents of each query are ranked."""
        if self.scored_pairs:
            return validation
        # over all rows, as of test rows
        given = are_grades(validation["scores"])
        pairs, by_query = {}, []
        for row in validation:
            grades = grades_of(row["scores"], are_grades=given)
            query, parts = row["_group"], parts_of(row)
            keys = [tuple(part["input_ids"]) for part in parts]
            pairs |= {(query, key): part for key, part in zip(keys, parts, strict=True)}
            by_query.append((query, [*zip(keys, grades, strict=True)]))
        entries = [
            # by their tokens, as ties are in the order of the ids: not by relevance
            {**pairs[query, key], "_query_id": f"q{i}", "_id": f"d{j}", "_grade": float(own[key])}
            for i, (query, own) in enumerate(candidates(by_query).items())
            for j, key in enumerate(sorted(own))
        ]
        return Dataset.from_list(entries)

    # Batches

    def lengths(self, rows: Dataset) -> list[int]:
        """The tokens of the pairs of each row, with padding."""
        # each pair is padded to the longest
        return [len(sizes) * max(sizes) for sizes in values_of(rows, "sizes")]

    def collate(self, tokenizer: PreTrainedTokenizerBase, /, multiple: int = 1) -> Collate:
        """A collate function that pads all pairs of the rows into one batch, see `batch_of`."""
        return partial(batch_of, Pad(pad_id(tokenizer), multiple))

    def items(self, batch: Batch) -> int:
        """Number of pairs, or with `listwise` of rows."""
        return len(batch["places"] if self.loss == "listwise" else batch["labels"])

    def own_loss(self, outputs: Outputs, labels: Batch) -> Tensor:
        """The loss of a batch."""
        # in float32: a softmax over half precision is too coarse
        logits = outputs.logits.squeeze(-1).float()
        return LOSSES[self.loss](logits, labels["labels"], labels["places"])

    # Scores

    def score(self, outputs: Outputs, batch: Batch) -> Tensor:
        """The logit of each pair, [B, 1]: probabilities of sure ones would be equal."""
        return outputs.logits.float().view(-1, 1)

    def summarize_rows(self, values: Tensor, rows: Dataset) -> dict[str, float]:
        """Scores of rankings, means over queries; or the correlations of scored pairs."""
        if not self.scored_pairs:
            return Rankings.of_candidates(values[:, 0].tolist(), rows).scores()
        # Pearson's correlation is that of what users see
        found = self.activated(values[:, 0]).double().cpu()
        given = torch.tensor(rows["_score"], dtype=torch.float64)
        return {
            "spearman": correlation(ranks(found), ranks(given)),
            "pearson": correlation(found, given),
            "rows": float(len(given)),
        }

    def activated(self, logits: Tensor) -> Tensor:
        """Scores as they are shown: with `binary`, probabilities."""
        return logits.sigmoid() if self.loss == "binary" else logits

    def shown_score(self, logit: float) -> float:
        """The score of a pair as it is shown."""
        return rounded(self.activated(torch.tensor(logit)))

    def predict(self, outputs: Outputs, batch: Batch) -> Tensor:
        """The logit of each pair, [B]: its order is that of the pairs."""
        return outputs.logits.squeeze(-1).float()

    def described(
        self, values: Iterable[np.ndarray], rows: Iterable[Row]
    ) -> Iterator[tuple[int, Prediction]]:
        """The score of each pair from its logit; of a document to rank also its rank, from 1."""
        # twice: the rank of a pair needs all of its query
        both = [(row, float(value)) for value, row in zip(values, rows, strict=True)]
        by_query: dict[str, list[tuple[float, str]]] = {}
        for row, value in both:
            if "_id" in row:
                by_query.setdefault(row["_query_id"], []).append((-value, row["_id"]))
        places = {
            (query, name): place
            for query, own in by_query.items()
            for place, (_, name) in enumerate(sorted(own), start=1)
        }
        for row, value in both:
            known: Prediction = {}
            if "_id" in row:
                known = {"label": row["_grade"], "rank": places[row["_query_id"], row["_id"]]}
            elif "_score" in row:
                known = {"label": row["_score"]}
            yield row["_number"], {**known, "prediction": self.shown_score(value)}


def paired(rows: Columns) -> tuple[list[str], list[list[str]]]:
    """The query of each row, and its documents."""
    if "sentence1" in rows:
        return rows["sentence1"], [[text] for text in rows["sentence2"]]
    if "documents" in rows:
        return rows["query"], rows["documents"]
    if "document" in rows:
        return rows["query"], [[text] for text in rows["document"]]
    both = zip(rows["positive"], rows["negatives"], strict=True)
    return rows["query"], [[positive, *negatives] for positive, negatives in both]


def scores_of(rows: Columns) -> list[list[float]] | None:
    """The scores of the documents of each row, of a positive 1; None: rows have none."""
    if "score" in rows:
        return [[float(value)] for value in rows["score"]]
    if "negatives" in rows:
        return [[1.0] + [0.0] * len(own) for own in rows["negatives"]]
    return rows.get("scores")


def number_of(text: str) -> int:
    """A number that equal texts have, the same in each process."""
    # not `hash`, which differs between processes; 7 bytes fit a signed integer of 64 bits
    return int.from_bytes(blake2b(text.encode(), digest_size=7).digest())


def parts_of(row: Row) -> list[Row]:
    """The inputs of each pair of an encoded row, with their size."""
    ends = pairwise([0, *accumulate(row["sizes"])])
    names = [name for name in PARTS if name in row]
    return [{"sizes": [b - a], **{name: row[name][a:b] for name in names}} for a, b in ends]


def batch_of(pad: Pad, rows: Sequence[Row]) -> dict[str, Tensor]:
    """All pairs of the rows as one padded batch.

    Returns:
        the padded inputs [N, T]; of rows with scores also `labels`, these, [N], and `places`
        [B, n]: which pairs are those of each row, -1: none.
    """
    inputs = pad.inputs([part for row in rows for part in parts_of(row)])
    # rows to score and to predict have no loss
    if "scores" not in rows[0]:
        return inputs
    count = max(len(row["sizes"]) for row in rows)
    places = torch.full((len(rows), count), -1)
    start = 0
    for number, row in enumerate(rows):
        size = len(row["sizes"])
        places[number, :size] = torch.arange(start, start + size)
        start += size
    labels = torch.tensor([score for row in rows for score in row["scores"]])
    return {**inputs, "labels": labels, "places": places}
