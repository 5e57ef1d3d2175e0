"""Retrieval: texts to vectors, so that queries are near to the documents that answer them.

An encoded row has the tokens of all its texts, one after the other, with their `sizes`: those of a
query, then of its documents. A row to score is one text with its `role` and id, or a scored pair.
B rows, n texts of a row, N texts of a batch, T tokens, D numbers of a vector.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from tokenizers.processors import Sequence as Sequenced
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from petl.core.layers.class_swap import swap_class
from petl.core.tuners.asking import computes_by_position
from petl.core.types import base_of
from petl.data.judgements import DOCUMENT, test_rows
from petl.data.tasks import ABOVE_0, DIMS, DISTANCE, MARGIN, POOLING
from petl.data.tasks.base import (
    AutoModelClass,
    BaseFiles,
    Batch,
    Collate,
    Columns,
    Outputs,
    Pad,
    Prediction,
    Row,
    TextTask,
    pad_id,
    rounded,
)
from petl.data.tasks.encoding_cache import values_of
from petl.data.tasks.regression import correlation, ranks
from petl.data.tasks.retrieval.base_folder import LENGTHS, BaseFolder, folder_files
from petl.data.tasks.retrieval.dense import NAME, DenseLayers
from petl.data.tasks.retrieval.embedder import (
    COUPLED,
    LOSSES,
    OPTIONS,
    Embedder,
    alike_parts,
    first_sees_itself_alone,
    whole_step,
)
from petl.data.tasks.retrieval.packed import Packing, layout_of, packing_of
from petl.data.tasks.retrieval.scores import Rankings, held_out
from petl.errors import InputError
from petl.system.values import field, integer, one_of

logger = logging.getLogger(__name__)
INPUTS = ("places", "identity", "scores", "labels", "gradient", "value")  # of the loss alone


@dataclass
class Retrieval(TextTask):
    """Texts to vectors. Raw rows have the columns of a shape, see `petl.data.retrieval_columns`.

    Rows to score have `text`, `role` (`query` or `document`), `id` and `relevant`, the grades of
    documents by id as JSON text; rows to embed have `text` alone.

    Attributes:
        loss: a name in `LOSSES`.
        pooling: mean, cls or last; None until the base is known, as the other fields with None.
        normalize: True for vectors of unit length.
        dims: widths for which the loss is computed as well; None: the full one alone.
        query_prefix, document_prefix: put before each text.
        mask_duplicates: copies of the own positive are no negatives.
        scale, margin, symmetric, distance, temperature: of the loss; None: its default.
    """

    name: ClassVar[str] = "retrieval"
    peft_task_type: ClassVar[str | None] = "FEATURE_EXTRACTION"
    metric: ClassVar[str] = "ndcg_at_10"
    higher_is_better: ClassVar[bool] = True
    auto_class: ClassVar[type[AutoModelClass]] = AutoModel
    encoded_by: ClassVar[tuple[str, ...]] = (
        *("max_length", "pooling", "query_prefix", "document_prefix"),
    )
    tensors_by_row: ClassVar[bool] = False
    keeps_before: ClassVar[bool] = True
    new_head: ClassVar[bool] = False
    unread: ClassVar[tuple[str, ...]] = ("pooler",)
    label_columns: ClassVar[tuple[str, ...]] = INPUTS
    group: ClassVar[str | None] = "_group"
    by_row: ClassVar[bool] = True
    shown: ClassVar[tuple[str, ...]] = ("text", "role", "query", "sentence1", "sentence2")

    max_length: int = field(128, integer(1))
    loss: str = field("in_batch", one_of(*LOSSES))
    pooling: str | None = field(None, POOLING)
    normalize: bool | None = None
    dims: list[int] | None = field(None, DIMS)
    query_prefix: str | None = None
    document_prefix: str | None = None
    mask_duplicates: bool = True
    scale: float | None = field(None, ABOVE_0)
    margin: float | None = field(None, MARGIN)
    symmetric: bool | None = None
    distance: str | None = field(None, DISTANCE)
    temperature: float | None = field(None, ABOVE_0)

    def __post_init__(self) -> None:
        self._dense: DenseLayers | None = None  # until the base is known
        self._plain: BaseFolder | None = None  # of a model that no run has made
        self.packing: Packing | None = None  # until the model is known
        for name in OPTIONS:
            users = [loss for loss, kind in LOSSES.items() if name in kind.options]
            value = getattr(self, name)
            if value is not None and self.loss not in users:
                raise InputError(
                    f"data.{name}={value} is for data.loss={' or '.join(users)}, and the loss is "
                    f"{self.loss}"
                )
        if LOSSES[self.loss].scored_pairs:
            self.metric = "spearman"  # ty: ignore[invalid-attribute-access]

    def take_base(self, base: BaseFiles) -> None:
        """Fill in what is None from the base model's folder, see `BaseFolder`.

        Raises:
            InputError: the folder has modules that are not supported.
        """
        folder = BaseFolder(base)
        folder.check()
        self._dense = folder.dense()
        if self.pooling is None:
            self.pooling = folder.pooling()
        if self.normalize is None:
            self.normalize = folder.normalizes()
        query, document = folder.prompts()
        if self.query_prefix is None:
            self.query_prefix = query
        if self.document_prefix is None:
            self.document_prefix = document

    def take_folder(self, folder: BaseFolder) -> None:
        """Compute as the folder of a model does that no run has made.

        Raises:
            InputError: it compares vectors in a way that is not supported.
        """
        folder.similarity()
        self._plain = folder

    def adjust(self, model: PreTrainedModel) -> None:
        """Let the model return vectors, and the loss of a batch with the columns of `INPUTS`."""
        width = self.vector_width(model.config)
        if self.dims is not None and self.dims[0] > width:
            raise InputError(
                f"data.dims={self.dims} is wider than the {width} numbers of the base's vectors"
            )
        if isinstance(getattr(model, "pooler", None), nn.Module):
            model.register_module(
                "pooler", None
            )  # its output is not read: no adapter and no time for it
        if self._dense is not None:
            inner = model.config.get_text_config().hidden_size
            layers = self._dense.module(inner).to(model.device, model.dtype)
            model.register_module(NAME, layers)
            # they have files of their own
            names = {f"{NAME}.{name}" for name in layers.state_dict()}
            model._keys_to_ignore_on_save = names | set(model._keys_to_ignore_on_save or ())
        swap_class(model, Embedder)
        cast("Embedder", model).petl_task = self

    def check_model(self, model: PeftModel) -> None:
        """Let training batches be rows of several texts, if that changes no vector.

        Raises:
            InputError: the vector of a text would be that of its first token alone.
        """
        base = base_of(model)
        if self.pooling == "cls" and first_sees_itself_alone(cast("Embedder", base)):
            raise InputError(
                "data.pooling=cls takes the first token, which sees no other one in this base "
                "model: all texts would have one vector; set data.pooling=last or mean"
            )
        if computes_by_position(model):
            states_of = cast("Embedder", base).states_of
            self.packing = packing_of(base, states_of, self.max_length)

    def vector_width(self, config: PretrainedConfig) -> int:
        """Numbers of a vector."""
        dense = self._dense
        return config.get_text_config().hidden_size if dense is None else dense.width

    @property
    def similarity(self) -> str:
        """How two vectors are compared: `dot` or `cosine`."""
        given = None if self._plain is None else self._plain.similarity()
        if given is not None:
            return given
        # with `dims`, the loss has vectors of unit length as well
        is_product = LOSSES[self.loss].products and not self.normalize and self.dims is None
        return "dot" if is_product else "cosine"

    def model_files(self, model: PreTrainedModel) -> dict[str, object]:
        """The files with which sentence-transformers opens a model of this task."""
        prompts = {"query": self.query_prefix or "", "document": self.document_prefix or ""}
        files = folder_files(
            self.pooling or "mean",
            model.config.get_text_config().hidden_size,
            dense=[] if self._dense is None else [*self._dense.configs],
            normalize=bool(self.normalize),
            prompts=prompts,
            similarity=self.similarity,
        )
        lengths = {"max_seq_length": self.max_length, "do_lower_case": False}
        dense = {} if self._dense is None else self._dense.files(model.get_submodule(NAME))
        return {**files, **dense, LENGTHS: lengths}

    def saved_tokenizer(self, tokenizer: PreTrainedTokenizerBase, /) -> PreTrainedTokenizerBase:
        """The tokenizer with the length of this task; it appends the end token if that is read."""
        # a copy: that of the run truncates where `tokens` says
        copied = copy.deepcopy(tokenizer)
        copied.model_max_length = self.max_length
        # a probe: tokenizers say in many ways whether they do
        end, ids = tokenizer.eos_token, tokenizer("a")["input_ids"]
        if self.pooling != "last" or end is None or ids[-1] == tokenizer.eos_token_id:
            return copied
        backend = copied.backend_tokenizer
        parts = [] if backend.post_processor is None else [backend.post_processor]
        appended = TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
        )
        backend.post_processor = Sequenced([*parts, appended])
        return copied

    # Rows

    def encode_rows(self, tokenizer: PreTrainedTokenizerBase, rows: Columns, /) -> Columns:
        """Tokenize all texts of each row, each truncated to `max_length`.

        Raises:
            InputError: a text has no tokens.
        """
        texts = self.prefixed(rows)
        ids = self.tokens(tokenizer, [text for row in texts for text in row])
        starts = [0, *accumulate(map(len, texts))]
        by_row = [ids[start:end] for start, end in pairwise(starts)]
        columns: Columns = {
            "input_ids": [[token for part in parts for token in part] for parts in by_row],
            "sizes": [[len(part) for part in parts] for parts in by_row],
            # rows of one first text are held out together
            "_group": [hash(tuple(parts[0])) for parts in by_row],
        }
        columns["attention_mask"] = [[1] * len(row) for row in columns["input_ids"]]
        if "role" in rows:
            kept = {"_text": "text", "_role": "role", "_id": "id", "_relevant": "relevant"}
            columns |= {name: rows[column] for name, column in kept.items()}
        one = next((name for name in ("score", "label") if name in rows), None)
        if "scores" in rows:
            columns["scores"] = rows["scores"]
        elif one is not None:
            columns["scores"] = [[float(value)] for value in rows[one]]
        return columns

    def prefixed(self, rows: Columns) -> list[list[str]]:
        """The texts of each row, with their prefixes."""
        query, document = self.query_prefix or "", self.document_prefix or ""
        if "role" in rows:
            both = {"query": query, "document": document}
            each = zip(rows["role"], rows["text"], strict=True)
            return [[both[role] + text] for role, text in each]
        if "text" in rows:
            return [[document + text] for text in rows["text"]]
        if "sentence1" in rows:
            pairs = zip(rows["sentence1"], rows["sentence2"], strict=True)
            return [[document + one, document + other] for one, other in pairs]
        found = []
        for i, text in enumerate(rows["query"]):
            own = rows["documents"][i] if "documents" in rows else [rows["positive"][i]]
            own = [*own, *(rows["negatives"][i] if "negatives" in rows else ())]
            found.append([query + text, *(document + each for each in own)])
        return found

    def tokens(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of texts; where the last one is the vector, it is the end token.

        Raises:
            InputError: a text has no tokens.
        """
        ids = tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
        empty = next((text for text, own in zip(texts, ids, strict=True) if not own), None)
        if empty is not None:
            raise InputError(
                f"the text {empty!r} has no tokens with this model's tokenizer: remove the row"
            )
        end = tokenizer.eos_token_id
        is_whole = self._plain is not None and self._plain.is_embedders
        if self.pooling != "last" or end is None or is_whole:
            return ids  # such a folder's tokenizer adds what is read
        return [own if own[-1] == end else [*own[: self.max_length - 1], end] for own in ids]

    def is_truncated(self, row: Row) -> bool:
        """True if a text of the row is longer than `max_length`."""
        return max(row["sizes"]) > self.max_length

    def nothing_to_learn(self, rows: Dataset, batch_size: int) -> str:
        """Why batches of these rows have nothing to compare with; "" if they have."""
        kind = LOSSES[self.loss]
        if kind.compares and batch_size == 1 and max(map(len, rows["sizes"])) < 3:
            return (
                f"train.batch_size=1 leaves data.loss={self.loss} nothing to compare a row with: "
                "raise it, such as to 32"
            )
        if self.loss in ("triplet", "listwise"):
            alone = sum(len(sizes) < 3 for sizes in rows["sizes"])
            what = "negative" if self.loss == "triplet" else "second document"
            # a list of one document adds 0; a step of such rows alone has no triplet at all
            if alone and (self.loss == "triplet" or alone == len(rows)):
                return (
                    f"{alone} of {len(rows)} training rows have no {what}, with which "
                    f"data.loss={self.loss} compares: leave them out"
                )
        if kind.scored_pairs and len({score for (score,) in rows["scores"]}) == 1:
            return f"all {len(rows)} training rows have one score: nothing tells pairs apart"
        if self.loss == "supervised":
            values, counts = np.unique([score for (score,) in rows["scores"]], return_counts=True)
            if len(values) == 1:
                return f"all {len(rows)} training rows have one label: nothing tells texts apart"
            if (counts < 2).any():
                return (
                    "data.loss=supervised needs two training rows of each label, and "
                    f"{(counts < 2).sum()} of {len(values)} labels have one: leave their rows out"
                )
        if kind.queries and len(np.unique(rows["_group"])) == 1:
            return f"all {len(rows)} training rows have one query: nothing tells documents apart"
        if self.loss == "in_batch" and has_one_document(rows):
            return f"all {len(rows)} training rows have one document: nothing tells documents apart"
        return ""

    def rows_to_score(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Queries and documents, see `test_rows`; scored pairs as they are.

        Raises:
            InputError: the rows are labelled texts.
        """
        if LOSSES[self.loss].scored_pairs:
            return rows
        if "label" in rows[0]:
            raise InputError(
                "labelled texts are compared with those of training: evaluate the run without files"
            )
        return test_rows([], rows, are_held_out=False)

    def scored_rows(self, train: Dataset, validation: Dataset) -> Dataset:
        """The held-out rows as queries, and as documents those of all rows, see `held_out`."""
        if LOSSES[self.loss].scored_pairs:
            return validation
        return held_out(train, validation)

    # Batches

    def lengths(self, rows: Dataset) -> list[int]:
        """The length of the longest text of each row."""
        return [max(sizes) for sizes in values_of(rows, "sizes")]

    def collate(self, tokenizer: PreTrainedTokenizerBase, /, multiple: int = 1) -> Collate:
        """A collate function that pads all texts of the rows into one batch, see `batch_of`."""
        return partial(batch_of, Pad(pad_id(tokenizer), multiple))

    def positions(self, batch: Batch) -> int:
        """The positions of a batch that a model without hooks computes, padding included."""
        mask = batch["attention_mask"]
        layout = None if self.packing is None else layout_of(mask)
        if layout is not None:
            return layout.source.numel()
        parts = alike_parts(mask)
        return sum(len(rows) * length for rows, length in parts) or super().positions(batch)

    def items(self, batch: Batch) -> int:
        """Number of rows; with `triplet` of negatives, each of which has a term in the loss."""
        places = batch["places"]
        return int((places[:, 2:] >= 0).sum()) if self.loss == "triplet" else len(places)

    def whole_step(
        self,
        weighted: Sequence[tuple[Batch, float]],
        forward: Callable[[Batch], Outputs],
    ) -> Iterable[tuple[Batch, float]]:
        """With several micro-batches, each with the gradient of the whole step's loss."""
        if len(weighted) == 1 or self.loss not in COUPLED:
            return weighted
        return whole_step(self, weighted, forward)

    # Scores

    def score(self, outputs: Outputs, batch: Batch) -> Tensor:
        """The vector of each text, [B, D]; of scored pairs cosine and score, [B, 2]."""
        vectors = outputs.sentence_embedding.float()
        if batch["places"].shape[1] == 1:
            return vectors
        one, other = (vectors[batch["places"][:, i]] for i in (0, 1))
        return torch.stack([F.cosine_similarity(one, other), batch["scores"][:, 0]], -1)

    def summarize_rows(self, values: Tensor, rows: Dataset) -> dict[str, float]:
        """Scores of rankings, means over queries; or the correlations of scored pairs."""
        if "_role" in rows.column_names:
            return Rankings.of(values, rows, self.similarity).scores()
        found, given = values.double().cpu().unbind(-1)
        return {
            "spearman": correlation(ranks(found), ranks(given)),
            "pearson": correlation(found, given),
            "rows": float(len(given)),
        }

    def predict(self, outputs: Outputs, batch: Batch) -> Tensor:
        """What `score` returns."""
        return self.score(outputs, batch)

    def described(
        self, values: Iterable[np.ndarray], rows: Iterable[Row]
    ) -> Iterator[tuple[int, Prediction]]:
        """Of each query: its first document, the relevant one, its rank and the score.

        Of a pair its cosine and score; of a text that is neither its vector.
        """
        rows, values = list(rows), [*values]
        if not rows or "_role" not in rows[0]:
            for value, row in zip(values, rows, strict=True):
                yield row["_number"], {"vector": [rounded(each) for each in value]}
            return
        table = {name: [row[name] for row in rows] for name in rows[0]}
        each = zip(table["_role"], table["_id"], table["_text"], strict=True)
        texts = {name: text for role, name, text in each if role == DOCUMENT}
        found = Rankings.of(torch.from_numpy(np.stack(values)), table, self.similarity)
        for query in found.queries:
            yield rows[query.row]["_number"], query.described(texts.__getitem__)


def has_one_document(rows: Dataset) -> bool:
    """True if the texts of encoded rows behind the first of each, the query, are all equal."""
    first = rows[0]
    start, size = first["sizes"][:2]
    document = first["input_ids"][start : start + size]
    return all(
        {*row["sizes"][1:]} == {size}
        and row["input_ids"][row["sizes"][0] :] == document * (len(row["sizes"]) - 1)
        for row in rows
    )


def batch_of(pad: Pad, rows: Sequence[Row]) -> dict[str, Tensor]:
    """All texts of the rows as one padded batch, with their places.

    Returns:
        the padded inputs [N, T]; `places` [B, n]: which of these is each text of a row, -1: none;
        `identity` [B, n]: equal for equal texts; `labels` [B]: 1; `scores` [B, m] if rows have
        them, -inf: none.
    """
    texts: list[Row] = []
    count = max(len(row["sizes"]) for row in rows)
    places = torch.full((len(rows), count), -1)
    identity = torch.zeros(len(rows), count, dtype=torch.long)
    for number, row in enumerate(rows):
        start = 0
        for column, size in enumerate(row["sizes"]):
            ids = row["input_ids"][start : start + size]
            start += size
            places[number, column] = len(texts)
            # of integers, so that it is the same in all processes
            identity[number, column] = hash(tuple(ids))
            texts.append({"input_ids": ids, "attention_mask": [1] * size})
    batch = {**pad.inputs(texts), "places": places, "identity": identity}
    batch["labels"] = torch.ones(len(rows))
    if "scores" in rows[0]:
        width = max(len(row["scores"]) for row in rows)
        scores = torch.full((len(rows), width), -torch.inf)
        for number, row in enumerate(rows):
            scores[number, : len(row["scores"])] = torch.tensor(row["scores"])
        batch["scores"] = scores
    return batch
