"""Section `watch`: a step under `petl.watch` after the first ones, relative to one without."""

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

import petl
from bench.clocks import in_turn
from bench.records import Record
from bench.shapes import Bench, Shape

FIRST = 3  # steps after which all is known


def measure(shape: Shape, rounds: int) -> list[Record]:
    """Return the record of a LoRA's step with optimizer and callback, over the same without."""
    bench = Bench(shape)
    plain, watched = (_step(bench, callbacks) for callbacks in ([], [petl.Watch(on="warn")]))
    for step in (plain, watched):
        for _ in range(FIRST):
            step()
    steps = {"without": plain, "with": watched}
    times = in_turn(plain, steps, rounds=rounds, warm_up=1, device=shape.device)
    ratios = {"watched / not": times.over("with", "without")}
    return [Record("watch", str(shape), "lora", ratios=ratios)]


def _step(bench: Bench, callbacks: list[petl.Watch]) -> Callable[[], Any]:
    model: Any = petl.wrap(bench.twin(shared=False), "lora", task_type=bench.shape.task_type)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    # as Trainer calls them
    args = TrainingArguments(tempfile.mkdtemp(), report_to="none")
    call = partial(_events, callbacks, args, TrainerState(), TrainerControl())
    call("on_train_begin", model=model, optimizer=optimizer)
    run = bench.step(model)

    def step() -> None:
        call("on_step_begin")
        run()
        optimizer.step()
        optimizer.zero_grad()
        call("on_log", logs={"loss": 0.0})

    return step


def _events(callbacks: list[petl.Watch], *given: Any, **kwargs: Any) -> None:
    *arguments, event = given
    for callback in callbacks:
        getattr(callback, event)(*arguments, **kwargs)
