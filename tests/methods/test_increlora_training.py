"""IncreLoRA in training: resuming, processes, Trainer."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from increlora_fixtures import STEPS, active_tensors, backward, layers, trained, wrap
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel
from training_fixtures import train
from transformers import Trainer, TrainerCallback, TrainingArguments

import petl
from petl.data.base import read_data
from petl.data.batch_sampler import StepSampler
from petl.data.models.loading import load_base, load_tokenizer
from petl.methods.increlora import growth_finished, importance_scores, rank_pattern
from petl.methods.increlora.method import NEXT, RATES
from petl.testing import in_processes
from petl.testing.models import causal_batch
from petl.training.compose import compose

pytest_plugins = ["training_fixtures"]


# Resuming


@pytest.mark.parametrize(
    ("stop", "score_window"),
    [(4, None), pytest.param(4, 1, marks=pytest.mark.thorough), (10, None)],
)
def test_resumed_training_equals_uninterrupted_training(tmp_path, stop, score_window):
    fields = {"warmup_steps": 1, "score_window": score_window}

    def run(model: PeftModel, optimizer: Any, start: int, end: int) -> list[float]:
        lifecycle = petl.lifecycle(model)
        lifecycle.attach_optimizer(optimizer, start)
        losses = []
        for step in range(start + 1, end + 1):
            losses.append(backward(model, step))
            optimizer.step()
            lifecycle.after_step(step, optimizer)
            optimizer.zero_grad()
        return losses

    def begin() -> tuple[PeftModel, Any]:
        model = wrap(**fields)
        return model, torch.optim.AdamW(trained(model), lr=0.01)

    uninterrupted, optimizer = begin()
    expected = run(uninterrupted, optimizer, 0, STEPS)
    model, optimizer = begin()
    losses = run(model, optimizer, 0, stop)
    assert growth_finished(model) == (stop == 10)
    model.save_pretrained(tmp_path)
    state, kept = copy.deepcopy(optimizer.state_dict()), petl.lifecycle(model).state_dict()
    model, optimizer = begin()
    model.load_adapter(tmp_path, "default", is_trainable=True)
    optimizer.load_state_dict(state)
    petl.lifecycle(model).load_state_dict(kept)
    assert stop == 10 or model.base_model.kept[NEXT] == stop + 1
    losses += run(model.train(), optimizer, stop, STEPS)
    assert losses == expected
    for found, tensor in zip(active_tensors(model), active_tensors(uninterrupted), strict=True):
        assert torch.equal(found, tensor)


# Processes


@pytest.mark.thorough
def test_processes_with_different_data_agree_on_ranks_and_every_bit():
    ranks = in_processes(2, _train_share)
    first, second = ranks
    assert first["scores"] != second["scores"]  # each of its own data
    assert first["pattern"] == second["pattern"]
    assert sum(first["pattern"].values()) == 23
    for name, tensor in first["state"].items():
        assert torch.equal(tensor, second["state"][name]), name
    mean = [(a + b) / 2 for a, b in zip(first["scores"], second["scores"], strict=True)]
    assert first["importance"] == pytest.approx([0.15 * score for score in mean], rel=1e-5)


def _train_share() -> dict[str, Any]:
    rank = distributed.get_rank()
    model = wrap()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(trained(model), lr=0.01)
    lifecycle = petl.lifecycle(parallel)
    lifecycle.attach_optimizer(optimizer)
    found: dict[str, Any] = {}
    for step in range(1, STEPS + 1):
        parallel(**causal_batch(2, 100 * rank + step)).loss.backward()
        if step == 1:
            found["scores"] = [float(layer.probe.grad) for layer in layers(model).values()]
        optimizer.step()
        lifecycle.after_step(step, optimizer)
        if step == 1:
            found["importance"] = [s["I"] for s in importance_scores(model).values()]
        optimizer.zero_grad()
    found["state"] = get_peft_model_state_dict(model)
    found["pattern"] = rank_pattern(model)
    return found


# Trainer


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[0] for name, tensor in causal_batch(1, index).items()}


class InOrder(Trainer):
    """A Trainer without shuffling."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Ranks(TrainerCallback):
    """Records the total rank of each log entry."""

    def __init__(self) -> None:
        self.totals: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "total_rank" in logs:
            self.totals.append(logs["total_rank"])


def trainer(model: PeftModel, folder: Path, *callbacks: TrainerCallback) -> Trainer:
    args = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        save_steps=4,
        logging_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(model, args, train_dataset=Rows(), callbacks=[petl.Callback(), *callbacks])


@pytest.mark.thorough
def test_ranks_grow_in_trainer_and_resuming_equals_an_uninterrupted_run(tmp_path):
    model = wrap(total_step=None)
    ranks = Ranks()
    trainer(model, tmp_path, ranks).train()
    tuner: Any = model.base_model
    assert sum(rank_pattern(model).values()) == 23
    assert tuner.kept[RATES].end == STEPS + 1
    assert ranks.totals == [17, 20, 23]
    for step in (4, 8):
        other = wrap(total_step=None)
        trainer(other, tmp_path).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        for found, tensor in zip(active_tensors(other), active_tensors(model), strict=True):
            assert torch.equal(found, tensor)


# train.py


def test_train_py_trainer_and_an_explicit_loop_grow_the_same_ranks(tiny, tmp_path):
    steps, fields = 6, {"tinit": 1, "deltaT": 2, "top_h": 6}
    constant = ["train.lr=1e-3", "train.schedule=constant", "train.warmup=0"]
    constant += ["train.weight_decay=0"]
    common = [*tiny.steady, "+method=increlora", *(f"method.{k}={v}" for k, v in fields.items())]
    common += [f"train.steps={steps}", *constant, "train.head_lr=null", "train.max_grad_norm=null"]
    live = train(common, tmp_path / "live").adapter
    expected = {key: int(rank) for key, rank in live.items() if key.endswith(".rank")}
    assert sum(expected.values()) == 12 + 2 * 6  # grown after steps 2 and 4
    assert len(set(expected.values())) > 1

    cfg = compose(common)
    data, tokenizer = read_data(cfg.data), load_tokenizer(cfg.model)
    encoded, collate = data.task.encode(tokenizer, data.train), data.task.collate(tokenizer)
    plan = list(StepSampler(len(encoded), 8, None, steps, seed=0))
    rows = encoded.select([row for batch in plan for row in batch])

    def begin() -> tuple[PeftModel, torch.optim.Optimizer]:
        torch.manual_seed(0)
        base = load_base(cfg.model, data.task)
        model = petl.wrap(base, "increlora", task_type="SEQ_CLS", **fields)
        return model.train(), torch.optim.AdamW(trained(model), lr=1e-3, weight_decay=0)

    by_hand, optimizer = begin()
    lifecycle = petl.lifecycle(by_hand)
    lifecycle.attach_optimizer(optimizer, total_steps=steps)
    for step in range(1, steps + 1):
        by_hand(**collate([rows[i] for i in range(8 * step - 8, 8 * step)])).loss.backward()
        optimizer.step()
        lifecycle.after_step(step, optimizer)
        optimizer.zero_grad()

    in_trainer, optimizer = begin()
    args = TrainingArguments(
        str(tmp_path),
        max_steps=steps,
        per_device_train_batch_size=8,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    InOrder(
        in_trainer,
        args,
        train_dataset=rows,
        data_collator=collate,
        optimizers=(optimizer, None),
        callbacks=[petl.Callback()],
    ).train()
    for model in (by_hand, in_trainer):
        found = get_peft_model_state_dict(model)
        assert {key: int(found[key]) for key in expected} == expected
        for key, tensor in live.items():
            torch.testing.assert_close(found[key], tensor, atol=2e-6, rtol=1e-4)
