"""Section `merge`: a ViT that merges tokens, relative to the same ViT with all of its tokens.

Of 12 blocks and 197 tokens, on random images: the forward pass without gradients relative to the
base model's and to plain merging's, a training step beside LoRA relative to LoRA's alone, and the
bytes that autograd saves in it.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

import petl
from bench.clocks import in_turn
from bench.counters import kept_bytes
from bench.records import Record
from bench.shapes import random_vit, training_step

WIDTHS = {384: 4, 768: 2}  # and the images of a batch
GOAL = {"high": 1 / 2.5, "low": 1 / 1.6}  # of the forward pass relative to the base model's
GOAL_PLAIN, GOAL_SAVED = 1 / 0.95, 0.45  # relative to plain merging, and to the inner method
INNER: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}


def measure(rounds: int, widths: dict[int, int] | None = None, **settings: Any) -> list[Record]:
    """Return a record for each width and schedule.

    Args:
        rounds: timed rounds.
        widths: other widths, with the images of a batch.
        settings: of the ViT and of the schedules (`schedules`), for tests.
    """
    schedules = settings.pop("schedules", {name: name for name in GOAL})
    return [
        _record(name, schedule, width, images, rounds, settings)
        for width, images in (widths or WIDTHS).items()
        for name, schedule in schedules.items()
    ]


def _record(
    name: str, schedule: Any, width: int, images: int, rounds: int, settings: dict[str, Any]
) -> Record:
    fields = {"hidden_size": width, "intermediate_size": 4 * width, **settings}
    fields.setdefault("num_attention_heads", max(1, width // 64))
    base, batch = random_vit(images, **fields)

    def twin() -> nn.Module:
        return copy.deepcopy(base)

    base.eval()
    merging: dict[str, Any] = {
        "pyra": petl.wrap(twin(), "pyra", schedule=schedule),
        "plain": petl.wrap(twin(), "pyra", schedule=schedule, reactivate=False),
    }
    with torch.no_grad():
        steps = {key: _forward(model.eval(), batch) for key, model in merging.items()}
        forward = in_turn(_forward(base, batch), steps, rounds=rounds, warm_up=1, device="cpu")
    inner = petl.wrap(twin(), "lora", **INNER).train()
    both = petl.wrap(twin(), "pyra", schedule=schedule, inner="lora", **INNER).train()
    petl.fuse_lora(inner)  # as train.py does
    petl.fuse_lora(both)
    step = {"step": training_step(both, batch)}
    training = in_turn(training_step(inner, batch), step, rounds=rounds, warm_up=1, device="cpu")
    saved = [kept_bytes(lambda m=m: m(**batch).loss, _own(m, batch)) for m in (both, inner)]
    return Record(
        "merge",
        f"vit 12 x {width}",
        f"pyra, {name}",
        ratios={
            "time / base": forward.over_floor("pyra"),
            "time / plain merging": forward.over("pyra", "plain"),
            "step / inner": training.over_floor("step"),
        },
        counts={"saved / inner": saved[0] / saved[1]},
        facts={
            "goal base": GOAL.get(name, 1.0),
            "goal plain": GOAL_PLAIN,
            "goal saved": GOAL_SAVED,
        },
    )


def _forward(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return lambda: model(pixel_values=batch["pixel_values"])


def _own(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    return [*model.parameters(), *model.buffers(), *batch.values()]
