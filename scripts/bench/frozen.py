"""Section `frozen`: a training step that leaves out what need not be computed.

It reads its frozen blocks from a store, computes the last block at the position that a classifier
reads, or head and last block at the labelled positions of a decoder, or both.

LoRA is in the last blocks alone, at a rank that keeps the number of parameters. Its step is timed
relative to the lower bound, which computes all positions, without a store and from one. Filling a
store is one forward pass of the frozen blocks.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

import petl
from bench.clocks import Step, in_turn
from bench.records import Record
from bench.shapes import Bench, Shape, embeddings_of, random_vit, training_step
from bench.step import floor_of
from petl.core.spec.blocks import last_blocks
from petl.efficiency.skip_unread.read_positions import SkipUnread

TOPS = ("top:0.33", "top:0.25", "top:1")
RANK = 8  # of all blocks; of half as many, twice the rank
CLS, FEW = (
    "last block at [CLS]",
    "20% of the positions labelled",
)  # what a step computes, if not all
GOALS = {  # of the step from the store; of Llama, for 30 blocks
    ("minilm", "top:0.33", ""): 0.40,
    ("minilm", "top:1", ""): 0.21,
    ("minilm", "top:0.33", CLS): 0.28,
    ("minilm", "top:1", CLS): 0.09,
    ("llama", "top:0.25", ""): 0.44,
    ("llama", "top:0.25", FEW): 0.30,
    ("vit", "top:0.33", ""): 0.41,
    ("vit", "top:0.33", CLS): 0.33,
}
VIT: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
IMAGES = 8  # of a batch
LABELLED = 0.2  # fraction of the positions of a decoder that have a label in `FEW`
GOAL_LABELLED = 0.93


@dataclass(frozen=True)
class Subject:
    """A frozen model: copies of it to wrap, a batch, the step of the lower bound.

    Attributes:
        reads: the positions that its steps compute, `CLS` or `FEW`; "": all.
    """

    name: str
    shape: str
    blocks: int
    twin: Callable[[], Any]
    batch: dict[str, Tensor]
    floor: Step
    task_type: str | None
    device: str = "cpu"
    reads: str = ""


def measure(shape: Shape, rounds: int) -> list[Record]:
    """Return records of a text model: for each share of the blocks, with what is read alone."""
    bench = Bench(shape)
    subject = Subject(
        shape.name,
        str(shape),
        shape.layers,
        bench.twin,
        bench.batch,
        floor_of(bench)[0],
        shape.task_type,
        shape.device,
    )
    found = _records(subject, rounds)
    if not shape.is_decoder:
        return [*found, *_records(_classifier(shape), rounds)]
    few = replace(subject, batch=_few_labels(subject.batch), reads=FEW)
    return [*found, *_records(few, rounds), _labelled(few, rounds)]


def measure_images(rounds: int, **settings: Any) -> list[Record]:
    """Return the same of a ViT on random images; `settings` of its config, for tests."""
    base, batch = random_vit(IMAGES, **{**VIT, **settings})
    config: Any = base.requires_grad_(False).train().config
    layers = config.num_hidden_layers
    title = f"vit {layers} x {config.hidden_size}, {IMAGES} images"
    frozen = copy.deepcopy(base)
    inputs: Any = frozen.vit.embeddings
    floor = _floor(frozen, inputs, batch)
    subject = Subject("vit", title, layers, lambda: copy.deepcopy(base), batch, floor, None)
    return [*_records(subject, rounds), *_records(replace(subject, reads=CLS), rounds)]


def _classifier(shape: Shape) -> Subject:
    """An encoder with one label a row, whose head reads the first position."""
    config: Any = shape.model()[1]
    model_cls: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base: PreTrainedModel = model_cls._from_config(config)
    base = base.to(device=shape.device, dtype=shape.dtype).requires_grad_(False).train()
    tokens = shape.batch()
    batch = {"input_ids": tokens["input_ids"], "labels": tokens["labels"][:, 0]}
    frozen = copy.deepcopy(base)
    return Subject(
        shape.name,
        f"{shape}, a label a row",
        shape.layers,
        lambda: copy.deepcopy(base),
        batch,
        _floor(frozen, embeddings_of(frozen), batch),
        None,
        shape.device,
        CLS,
    )


def _few_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch with a part of its labels: as many in each row, at other places."""
    labels = batch["labels"]
    order = torch.rand(labels.shape, generator=torch.Generator().manual_seed(0)).argsort(1)
    chosen = (order < round(LABELLED * labels.shape[1])).to(labels.device)
    return {**batch, "labels": labels.masked_fill(~chosen, -100)}


def _floor(frozen: Any, embeddings: torch.nn.Module, batch: dict[str, Tensor]) -> Step:
    """The step of the lower bound: of a frozen model, with a gradient of its embeddings."""
    embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_())
    return training_step(frozen, batch)


def _records(subject: Subject, rounds: int) -> list[Record]:
    named: dict[int, str] = {}
    for top in TOPS:  # of few blocks, several words mean the same
        named.setdefault(len(last_blocks(top, subject.blocks)), top)
    return [_record(subject, top, count, rounds) for count, top in named.items()]


def _record(subject: Subject, top: str, count: int, rounds: int) -> Record:
    plain, stored = (_upper(subject, top, count) for _ in range(2))
    rows = [
        {name: value[i].cpu() for name, value in subject.batch.items()}
        for i in range(len(next(iter(subject.batch.values()))))
    ]
    with TemporaryDirectory() as folder, petl.cache_frozen(stored, folder) as cache:
        cache.fill(rows, lambda rows: {k: torch.stack([row[k] for row in rows]) for k in rows[0]})
        steps = {
            "plain": training_step(plain, subject.batch),
            "stored": training_step(stored, subject.batch),
        }
        steps["stored"]()  # the first step with a segmented loss also runs its model on one token
        missed = cache.misses
        times = in_turn(subject.floor, steps, rounds=rounds, warm_up=1, device=subject.device)
        assert cache.misses == missed < cache.hits, cache.reason
        kind = cache.prefix.body.dtype.itemsize
    goal = GOALS.get((subject.name, top, subject.reads))
    reads = f", {subject.reads}" if subject.reads else ""
    return Record(
        "frozen",
        subject.shape,
        f"lora in the last {count} of {subject.blocks}{reads}",
        ratios={
            "time / floor": times.over_floor("stored"),
            "without a store / floor": times.over_floor("plain"),
        },
        facts={
            **({} if goal is None else {"goal": goal}),
            "B / position": kind * int(cache.prefix.body.config.hidden_size),
        },
    )


def _labelled(subject: Subject, rounds: int) -> Record:
    """LoRA in all blocks, where few positions have a label; the lower bound has all of them."""
    wrapped = replace(subject, reads="")
    plain, head = (_upper(wrapped, "top:1.0", subject.blocks) for _ in range(2))
    petl.segment_loss(head)
    both = _upper(subject, "top:1.0", subject.blocks)
    steps = {
        name: training_step(model, subject.batch)
        for name, model in (("plain", plain), ("head", head), ("both", both))
    }
    times = in_turn(subject.floor, steps, rounds=rounds, warm_up=1, device=subject.device)
    return Record(
        "frozen",
        subject.shape,
        f"lora, {subject.reads}",
        ratios={
            "time / floor": times.over_floor("both"),
            "head alone / floor": times.over_floor("head"),
            "all positions / floor": times.over_floor("plain"),
        },
        facts={"goal": GOAL_LABELLED} if subject.name == "llama" else {},
    )


def _upper(subject: Subject, top: str, count: int) -> PeftModel:
    """Return a copy with LoRA in its last `count` blocks, which computes what the subject reads."""
    rank = RANK * subject.blocks // count
    targets = {"target_modules": "block-linear", "layers_to_transform": top}
    model = petl.wrap(
        subject.twin(), "lora", r=rank, lora_alpha=16, task_type=subject.task_type, **targets
    )
    petl.fuse_lora(model)  # as train.py does, and what follows
    if subject.reads == FEW:
        petl.segment_loss(model)
    if subject.reads:
        SkipUnread().apply(model)
        assert model.get_base_model().last_block is not None  # head and last block
    return model.train()
