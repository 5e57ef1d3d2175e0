"""Section `frozen`: a training step that leaves out what need not be computed.

It reads its frozen blocks from a store, or computes the labelled positions of a decoder alone.

LoRA is in the last blocks alone, at a rank that keeps the number of parameters. Its step is timed
relative to the lower bound, without a store and from one. Filling a store is one forward pass of
the frozen blocks.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

import petl
from bench.clocks import Step, in_turn
from bench.records import Record
from bench.shapes import Bench, Shape
from bench.step import floor_of
from petl.core.read_positions import skip_unread
from petl.core.spec.blocks import last_blocks

TOPS = ("top:0.33", "top:0.25", "top:1")
RANK = 8  # of all blocks; of half as many, twice the rank
GOALS = {  # of the step from the store
    ("minilm", "top:0.33"): 0.40,
    ("minilm", "top:1"): 0.21,
    ("llama", "top:0.25"): 0.44,
    ("vit", "top:0.33"): 0.41,
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
LABELLED = 0.2  # fraction of the positions of a decoder that have a label
GOAL_LABELLED = 0.93


@dataclass(frozen=True)
class Subject:
    """A frozen model: copies of it to wrap, a batch, the step of the lower bound."""

    name: str
    shape: str
    blocks: int
    twin: Callable[[], Any]
    batch: dict[str, Tensor]
    floor: Step
    task_type: str | None
    device: str = "cpu"


def measure(shape: Shape, rounds: int) -> list[Record]:
    """Return a record for each share of the blocks of a text model."""
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
    return [*found, _labelled(subject, rounds)] if shape.is_decoder else found


def measure_images(rounds: int, **settings: Any) -> list[Record]:
    """Return the same of a ViT on random images; `settings` of its config, for tests."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config: Any = ViTConfig(**{**VIT, **settings})
        base = ViTForImageClassification(config).requires_grad_(False).train()
    size = config.image_size
    batch = {
        "pixel_values": torch.randn(IMAGES, 3, size, size),
        "labels": torch.zeros(IMAGES, dtype=torch.long),
    }
    frozen = copy.deepcopy(base)
    embeddings: Any = frozen.vit.embeddings
    embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_())
    subject = Subject(
        "vit",
        f"vit {config.num_hidden_layers} x {config.hidden_size}, {IMAGES} images",
        config.num_hidden_layers,
        lambda: copy.deepcopy(base),
        batch,
        _training(frozen, batch),
        None,
    )
    return _records(subject, rounds)


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
            "plain": _training(plain, subject.batch),
            "stored": _training(stored, subject.batch),
        }
        times = in_turn(subject.floor, steps, rounds=rounds, warm_up=1, device=subject.device)
        assert not cache.misses, cache.reason
        kind = cache.prefix.body.dtype.itemsize
    goal = GOALS.get((subject.name, top))
    return Record(
        "frozen",
        subject.shape,
        f"lora in the last {count} of {subject.blocks}",
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
    plain, head, both = (_upper(subject, "top:1.0", subject.blocks) for _ in range(3))
    petl.segment_loss(head)
    petl.segment_loss(both)
    reason = skip_unread(both)
    assert reason is None, reason
    assert both.get_base_model().last_block is not None
    labels = subject.batch["labels"]
    # as many in each row, at other places
    order = torch.rand(labels.shape, generator=torch.Generator().manual_seed(0)).argsort(1)
    chosen = (order < round(LABELLED * labels.shape[1])).to(labels.device)
    batch = {**subject.batch, "labels": labels.masked_fill(~chosen, -100)}
    steps = {
        "plain": _training(plain, batch),
        "head": _training(head, batch),
        "both": _training(both, batch),
    }
    times = in_turn(subject.floor, steps, rounds=rounds, warm_up=1, device=subject.device)
    return Record(
        "frozen",
        subject.shape,
        f"lora, {LABELLED:.0%} of the positions labelled",
        ratios={
            "time / floor": times.over_floor("both"),
            "head alone / floor": times.over_floor("head"),
            "all positions / floor": times.over_floor("plain"),
        },
        facts={"goal": GOAL_LABELLED} if subject.name == "llama" else {},
    )


def _upper(subject: Subject, top: str, count: int) -> PeftModel:
    """Return a copy with LoRA in its last `count` blocks."""
    rank = RANK * subject.blocks // count
    targets = {"target_modules": "block-linear", "layers_to_transform": top}
    model = petl.wrap(
        subject.twin(), "lora", r=rank, lora_alpha=16, task_type=subject.task_type, **targets
    )
    petl.fuse_lora(model)  # as train.py does
    return model.train()


def _training(model: Any, batch: dict[str, Tensor]) -> Step:
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        for parameter in trained:
            parameter.grad = None
        model(**batch).loss.backward()

    return step
