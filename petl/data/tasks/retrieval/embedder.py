"""A base model that returns vectors, and the loss of a batch of them.

B rows, n texts of a row, N texts of a batch, D numbers of a vector, P processes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from petl.core.layers.class_swap import SwappedClass
from petl.data.tasks.base import Batch, Outputs
from petl.data.tasks.retrieval.dense import NAME
from petl.data.tasks.retrieval.packed import Packing, layout_of
from petl.ops.retrieval import (
    cosent,
    cosine,
    in_batch,
    listwise,
    matryoshka,
    pool,
    supervised,
    triplet,
)
from petl.system.random_states import restore, states

# positions that are computed in the time that a pass takes beside them: of MiniLM with LoRA,
# forward and backward, a core needs 22 ms a pass and 0.59 ms a position, in bfloat16 42 and 0.23
CALL, BF16_CALL = 40, 180
DEVICE_CALL = 8192  # of another device; assumption


class Settings(Protocol):
    """What an embedder and its loss read of the task, see `Retrieval`."""

    loss: str
    pooling: str | None
    normalize: bool | None
    dims: list[int] | None
    mask_duplicates: bool
    scale: float | None
    margin: float | None
    symmetric: bool | None
    distance: str | None
    temperature: float | None
    packing: Packing | None
    label_columns: ClassVar[tuple[str, ...]]


class Texts(NamedTuple):
    """The vectors of the rows that a loss is computed of.

    Attributes:
        vectors: [B, n, D].
        there: [B, n], False where a row has fewer texts.
        identity: [B, n], equal for equal texts.
        scores: [B, m], or [B, 0].
    """

    vectors: Tensor
    there: Tensor
    identity: Tensor
    scores: Tensor

    @classmethod
    def of(cls, vectors: Tensor, batch: Batch) -> "Texts":
        """The texts of the rows of a batch from its vectors, [N, D]."""
        places = batch["places"]
        scores = batch.get("scores", vectors.new_zeros(len(places), 0))
        return cls(vectors[places.clamp(min=0)], places >= 0, batch["identity"], scores)

    def column(self, number: int) -> Tensor:
        """The vectors of a text of each row, [B, D]."""
        return self.vectors[:, number]


@dataclass
class Embedded(ModelOutput):
    """What an `Embedder` returns; `loss` of batches with the columns of a loss."""

    loss: Tensor | None = None
    last_hidden_state: Tensor | None = None
    sentence_embedding: Tensor | None = None


class Embedder(SwappedClass):
    """Mixin of a base model without head: pools its states, and computes the loss."""

    petl_task: Settings

    def forward(self, *args: object, **inputs: Any) -> Embedded:
        """Return vectors [N, D], and the loss if there are `places`, see `batch_of`."""
        names = self.petl_task.label_columns
        batch = {name: inputs.pop(name) for name in names if name in inputs}
        # other batches than those of training are of alike texts already
        trained = cast("nn.Module", self).training and not args and self.may_split(inputs)
        states, vectors = None, self.split_vectors(inputs) if trained else None
        if vectors is None:
            states, vectors = self.embedded(*args, **inputs)
        task = self.petl_task
        # a row to embed or to rank is one text without a label
        places = batch.get("places")
        trains = places is not None and (places.shape[1] > 1 or "scores" in batch)
        return Embedded(loss_of(task, vectors, batch) if trains else None, states, vectors)

    def embedded(self, *args: object, **inputs: Any) -> tuple[Tensor, Tensor]:
        """The states of tokens, [N, T, D], and the vectors of texts, [N, D]."""
        states = self.states_of(*args, **inputs)
        return states, self.vectors_of(states, inputs.get("attention_mask"))

    def states_of(self, *args: object, **inputs: object) -> Tensor:
        """The states of tokens by the base model's own forward pass, [N, T, D]."""
        return cast("Any", super()).forward(*args, **inputs).last_hidden_state

    def vectors_of(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """The vectors of texts, [N, D]."""
        if mask is None:
            mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
        # the mask also covers the keys of a prefix, which have no states
        vectors = pool(states, mask[:, -states.shape[1] :], self.petl_task.pooling or "mean")
        dense = getattr(self, NAME, None)
        vectors = vectors if dense is None else dense(vectors)
        return F.normalize(vectors, dim=-1) if self.petl_task.normalize else vectors

    def split_vectors(self, inputs: Mapping[str, Tensor | None]) -> Tensor | None:
        """The vectors of a padded batch from rows of several texts, or from parts of alike texts.

        None if one pass of the batch costs no more.
        """
        given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        mask, packing = given["attention_mask"], self.petl_task.packing
        layout = layout_of(mask) if packing is not None else None
        if layout is not None and packing is not None:
            arguments = packing.arguments(cast("PreTrainedModel", self), given, layout)
            return self.vectors_of(layout.unpacked(self.states_of(**arguments), mask), mask)
        parts = alike_parts(mask)
        if not parts:
            return None
        found = [self.embedded(**part_of(given, rows, length))[1] for rows, length in parts]
        # back to the order of the batch, which `places` count in
        order = torch.cat([rows for rows, _ in parts])
        return torch.cat(found)[order.argsort()]

    def may_split(self, inputs: Mapping[str, object]) -> bool:
        """True if the texts of a padded batch may be computed in other passes and rows."""
        mask, base = inputs.get("attention_mask"), cast("nn.Module", self)
        # a hook has the mask, or a state, of one forward pass
        if not isinstance(mask, Tensor) or base._forward_hooks or base._forward_pre_hooks:
            return False
        given = [each for each in inputs.values() if each is not None]
        if any(not isinstance(t, Tensor) or t.shape != mask.shape for t in given):
            return False
        # processes gather the weights of a pass together: all of them need equally many
        return not any(isinstance(parameter, DTensor) for parameter in base.parameters())


@torch.no_grad()
def first_sees_itself_alone(base: Embedder) -> bool:
    """Return True if the state of the first token does not depend on those behind it."""
    model = cast("PreTrainedModel", base)
    ids = torch.tensor([[1, 2, 3], [1, 4, 5]], device=model.device)
    was_training = model.training  # dropout would change the states
    model.eval()
    states = base.states_of(input_ids=ids, attention_mask=torch.ones_like(ids))
    model.train(was_training)
    return torch.equal(*states[:, 0])


def alike_parts(mask: Tensor) -> list[tuple[Tensor, int]]:
    """Rows of a padded batch that are computed apart, with their length; [] for all at once.

    Args:
        mask: [N, T].
    """
    call = DEVICE_CALL
    if mask.device.type == "cpu":
        call = BF16_CALL if torch.is_autocast_enabled("cpu") else CALL
    if mask.numel() <= 2 * call:
        return []
    # the last token of each text, whose padding may be on either side
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    lengths, rows = (mask * columns).amax(1).sort(stable=True)
    sizes = of_alike(lengths.tolist(), call)
    return [
        (part, int(own[-1]))
        for part, own in zip(rows.split(sizes), lengths.split(sizes), strict=True)
    ]


def part_of(inputs: Mapping[str, Tensor], rows: Tensor, length: int) -> dict[str, Tensor]:
    """These rows of a batch, without what is padding in all of them."""
    return {name: tensor[rows, :length] for name, tensor in inputs.items()}


def of_alike(lengths: Sequence[int], call: int) -> list[int]:
    """Sizes of neighboring parts of ascending lengths, which save padding.

    Args:
        call: positions that a further pass must save.
    """
    own = np.asarray(lengths)
    before = np.arange(1, len(own))
    saved = before * (own[-1] - own[:-1])
    best = int(saved.argmax()) if len(saved) else 0
    if not len(saved) or saved[best] <= call:
        return [len(own)]
    # where one cut saves most, both sides may be cut again
    return [
        *of_alike(own[: best + 1].tolist(), call),
        *of_alike(own[best + 1 :].tolist(), call),
    ]


def loss_of(task: Settings, vectors: Tensor, batch: Batch) -> Tensor:
    """The loss of a batch, or what has the gradient that `whole_step` has found for it."""
    with torch.autocast(vectors.device.type, enabled=False):
        # similarities of half precision are too coarse for a softmax with scale 20
        vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
        if "gradient" in batch:
            inner = (vectors * batch["gradient"]).sum()
            return batch["value"] + inner - inner.detach()
        texts = Texts.of(vectors, batch)
        coupled = task.loss in COUPLED
        return _loss(task, everybodys(texts, batch["labels"]) if coupled else texts)


def _loss(task: Settings, texts: Texts) -> Tensor:
    kind = LOSSES[task.loss]
    arguments, settings = kind.arguments(task, texts)
    given = {name: getattr(task, name) for name in kind.options}
    settings |= {name: value for name, value in given.items() if value is not None}
    function = kind.function
    if task.dims is None:
        return function(*arguments, **settings)
    return matryoshka(function, task.dims, *arguments, **settings)


Arguments = tuple[Sequence[Tensor | Sequence[Tensor]], dict[str, object]]


def _in_batch(task: Settings, texts: Texts) -> Arguments:
    rows, count = texts.there.shape
    # in the order of the documents of `in_batch`: positives, first negatives, ...
    keep = texts.there.T[1:].reshape(1, -1).expand(rows, -1)
    if task.mask_duplicates:
        keep = keep & (texts.identity.T[1:].reshape(1, -1) != texts.identity[:, 1:2])
    negatives = [texts.column(number) for number in range(2, count)]
    return (texts.column(0), texts.column(1), negatives), {"keep": keep}


def _triplet(task: Settings, texts: Texts) -> Arguments:
    # a term for each negative that is there
    rows, numbers = texts.there[:, 2:].nonzero(as_tuple=True)
    anchors, positives = texts.column(0)[rows], texts.column(1)[rows]
    return (anchors, positives, texts.vectors[rows, numbers + 2]), {}


def _pairs(task: Settings, texts: Texts) -> Arguments:
    return (texts.column(0), texts.column(1)), {"scores": texts.scores[:, 0]}


def _listwise(task: Settings, texts: Texts) -> Arguments:
    return (texts.column(0), texts.vectors[:, 1:]), {"scores": texts.scores}


def _labelled(task: Settings, texts: Texts) -> Arguments:
    return (texts.column(0),), {"labels": texts.scores[:, 0]}


class LossKind(NamedTuple):
    """A loss, and the arguments that it takes of the texts of rows.

    Attributes:
        compares: rows of a step with one another: each row's loss depends on all.
        queries: rows begin with a query.
        scored_pairs: rows are pairs with a score.
        products: scalar products in place of cosines.
        options: its further arguments that settings give; None there: the function's default.
    """

    function: Callable[..., Tensor]
    arguments: Callable[[Settings, Texts], Arguments]
    compares: bool = False
    queries: bool = False
    scored_pairs: bool = False
    products: bool = False
    options: tuple[str, ...] = ()


LOSSES = {  # by data.loss
    "in_batch": LossKind(
        in_batch, _in_batch, compares=True, queries=True, options=("scale", "margin", "symmetric")
    ),
    "triplet": LossKind(triplet, _triplet, queries=True, options=("margin", "distance")),
    "cosent": LossKind(cosent, _pairs, compares=True, scored_pairs=True, options=("scale",)),
    "cosine": LossKind(cosine, _pairs, scored_pairs=True),
    "listwise": LossKind(
        listwise, _listwise, queries=True, products=True, options=("temperature",)
    ),
    "supervised": LossKind(supervised, _labelled, compares=True, options=("scale",)),
}
OPTIONS = tuple(dict.fromkeys(name for kind in LOSSES.values() for name in kind.options))
COUPLED = tuple(name for name, kind in LOSSES.items() if kind.compares)


# Several micro-batches, several processes


def whole_step(
    task: Settings,
    weighted: Sequence[tuple[Batch, float]],
    forward: Callable[[Batch], Outputs],
) -> Iterator[tuple[Batch, float]]:
    """Yield micro-batches with the gradient of the loss of all of them at their vectors.

    The random state is then that in which their vectors were computed: the forward pass that
    follows draws the same numbers.

    Args:
        weighted: micro-batches with their weight in the loss.
        forward: a pass without graph.
    """
    before, leaves, texts = [], [], []
    for batch, weight in weighted:
        inputs = {name: t for name, t in batch.items() if name not in task.label_columns}
        # before the pass: the one with a graph draws the same numbers again
        before.append(states(_device()))
        # new leaves: the gradient of the loss ends at the vectors
        vectors = forward(inputs).sentence_embedding.detach()
        vectors = (vectors if vectors.dtype == torch.float64 else vectors.float()).requires_grad_()
        leaves.append(vectors)
        own = {name: t.to(vectors.device) for name, t in batch.items() if name not in inputs}
        texts.append((Texts.of(vectors, own), own["labels"] if weight else 0 * own["labels"]))
    after = states(_device())
    everything = everybodys(_joined([t for t, _ in texts]), torch.cat([w for _, w in texts]))
    value = _loss(task, everything)
    gradients = torch.autograd.grad(value, leaves)
    for (batch, weight), state, gradient in zip(weighted, before, gradients, strict=True):
        restore(state, _device())
        # the loop multiplies by the weight; a micro-batch of weight 0 takes part in nothing
        scaled = gradient / weight if weight else torch.zeros_like(gradient)
        yield {**batch, "gradient": scaled, "value": value.detach()}, weight
    restore(after, _device())


def _device() -> torch.device:
    """The device that forward passes draw random numbers on."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else found


def _joined(parts: Sequence[Texts]) -> Texts:
    """The rows of several micro-batches, with as many texts each as the longest."""
    n, m = (max(getattr(p, name).shape[1] for p in parts) for name in ("there", "scores"))
    return Texts(
        *(torch.cat(column) for column in zip(*(widened(p, n, m) for p in parts), strict=True))
    )


def widened(texts: Texts, n: int, m: int) -> Texts:
    """Rows of `n` texts and `m` scores, of which the further ones are not there."""
    more = n - texts.there.shape[1]
    return Texts(
        F.pad(texts.vectors, (0, 0, 0, more)),
        F.pad(texts.there, (0, more)),
        F.pad(texts.identity, (0, more)),
        F.pad(texts.scores, (0, m - texts.scores.shape[1]), value=-torch.inf),
    )


def everybodys(texts: Texts, counted: Tensor) -> Texts:
    """The rows of all processes, in the same order in each; gradients flow back to their own.

    Each process computes the loss of all rows. The gradient of a vector is then the sum over
    processes, and DDP's mean of it that of one process with the whole batch.

    Args:
        counted: [B], 0 for rows that only keep processes in step.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return texts
    sizes = torch.tensor(
        [len(texts.there), texts.there.shape[1], texts.scores.shape[1]], device=counted.device
    )
    dist.all_reduce(sizes, op=dist.ReduceOp.MAX)
    rows, n, m = sizes.tolist()
    # gather takes tensors of one shape
    wide = widened(texts, n, m)
    missing = rows - len(counted)
    kept = _gathered(F.pad(counted, (0, missing))) > 0
    parts = []
    for tensor in wide:
        filled = torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
        parts.append(_gathered(filled)[kept])
    return Texts(*parts)


def _gathered(tensor: Tensor) -> Tensor:
    """The rows of all processes; with a gradient if the tensor has one."""
    if tensor.requires_grad:
        return torch.cat(all_gather(tensor))
    # gloo does not gather booleans
    is_bool = tensor.dtype == torch.bool
    own = tensor.to(torch.uint8).contiguous() if is_bool else tensor.contiguous()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    return torch.cat(parts).bool() if is_bool else torch.cat(parts)
