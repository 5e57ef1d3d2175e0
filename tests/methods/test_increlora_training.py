"""IncreLoRA in training: learning rates of components, resuming, processes, Trainer."""

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from training_fixtures import tiny, train
from transformers import Trainer, TrainerCallback, TrainingArguments

import petl
from petl import app
from petl.data import read_data
from petl.errors import InputError
from petl.models import load_base, load_tokenizer
from petl.steps import Plan
from petl.testing import in_processes, tiny_llama
from petl.testing.models import causal_batch

__all__ = ["tiny"]

STEPS = 12
FIELDS = {"tinit": 1, "deltaT": 3, "lora_alpha": 8, "target_total_rank": 23, "top_h": 3}


def wrap(**fields: Any) -> PeftModel:
    torch.manual_seed(0)
    return petl.wrap(
        tiny_llama(2), "increlora", **{**FIELDS, "total_step": STEPS, **fields}
    ).train()


def layers(model: PeftModel) -> dict[str, Any]:
    tuner: Any = model.base_model
    return tuner.active_layers


def trained(model: PeftModel) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def living(model: PeftModel) -> list[Tensor]:
    """All that counts of each layer, in one order."""
    found = []
    for layer in layers(model).values():
        R = layer.live
        rows = (layer.lora_A[:R], layer.lora_B[:, :R], layer.E[:R])
        found += [t.detach() for t in (*rows, layer.rank, layer.ema, layer.steps[:, :R])]
    return found


def backward(model: PeftModel, step: int) -> float:
    loss = model(**causal_batch(4, step)).loss
    loss.backward()
    return float(loss.detach())


# Learning rates of components


def share(step: int, end: int, warmup: int) -> float:
    """The published scheduler's lambda, for the steps that a group has taken."""
    if step < 0:
        return 0.0
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, (end - step) / max(1, end - warmup))


def components(layer: Any) -> list[tuple[str, int, Tensor, Tensor | None]]:
    """Kind, number, values and gradient of each component's tensors."""
    found = []
    for i in range(len(layer.E)):
        for kind, tensor, index in (
            ("A", layer.lora_A, (i,)),
            ("B", layer.lora_B, (slice(None), i)),
            ("E", layer.E, (i,)),
        ):
            grad = None if tensor.grad is None else tensor.grad[index].clone()
            found.append((kind, i, tensor.detach()[index].clone(), grad))
    return found


def rate_of(began: int, done: int, now: float, lr: float, warmup: int) -> float:
    """The rate after `done` steps of a component that came into being at step `began`, from 0."""
    if began < 0:
        return 0.0
    return now if began == 0 else lr * share(done - began - 1, STEPS - began - 1, warmup)


def start_of(layer: Any, kind: str, i: int) -> int:
    return int(layer.steps[1 if kind == "E" else 0, i])


@pytest.mark.parametrize("order", ["allocate, step", "step, allocate", "lifecycle"])
@pytest.mark.parametrize("warmup", [0, 2])
def test_each_component_has_its_own_rate_under_sgd(order, warmup):
    model = wrap(warmup_steps=warmup)
    tuner: Any = model.base_model
    optimizer = torch.optim.SGD(trained(model), lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: share(t, STEPS, warmup))
    life = petl.lifecycle(model)
    (life if order == "lifecycle" else tuner).attach_optimizer(optimizer)
    for t in range(STEPS):
        backward(model, t)
        kept = {key: components(layer) for key, layer in layers(model).items()}
        now = optimizer.param_groups[0]["lr"]
        if order == "allocate, step":
            tuner.update_and_allocate(t)
        optimizer.step()
        for key, layer in layers(model).items():
            for (kind, i, old, grad), (_, _, new, _) in zip(
                kept[key], components(layer), strict=True
            ):
                began = start_of(layer, kind, i)
                if order == "lifecycle" and began > 0:
                    began -= 1  # it says 3 after the third step, the others after the fourth
                rate = rate_of(began, t, now, 0.5, warmup)
                torch.testing.assert_close(new, old - rate * grad, rtol=1e-5, atol=1e-7)
        if order == "step, allocate":
            tuner.update_and_allocate(t)
        elif order == "lifecycle":
            life.after_step(t + 1, optimizer)
        optimizer.zero_grad()
        schedule.step()
    assert tuner.growth_finished


def test_each_late_component_trains_under_an_adamw_of_its_own():
    model = wrap(warmup_steps=1)
    tuner: Any = model.base_model
    lr, betas, decay = 0.02, (0.8, 0.95), 0.1
    kind_of_adam = partial(torch.optim.AdamW, lr=lr, betas=betas, weight_decay=decay, eps=1e-14)
    optimizer = kind_of_adam(trained(model))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: share(t, STEPS, 1))
    tuner.attach_optimizer(optimizer)
    objects = trained(model)
    own: dict[tuple[str, str, int], Any] = {}
    late = 0
    for t in range(STEPS):
        backward(model, t)
        now = optimizer.param_groups[0]["lr"]
        expected = {}
        for key, layer in layers(model).items():
            for kind, i, old, grad in components(layer):
                began = start_of(layer, kind, i)
                if began < 0:
                    expected[key, kind, i] = old
                    continue
                if (key, kind, i) not in own:  # a fresh parameter and optimizer at its birth
                    alone = nn.Parameter(old.clone())
                    own[key, kind, i] = alone, kind_of_adam([alone])
                    late += began > 0
                alone, adam = own[key, kind, i]
                adam.param_groups[0]["lr"] = rate_of(began, t, now, lr, 1)
                alone.grad = grad
                adam.step()
                expected[key, kind, i] = alone.detach()
        optimizer.step()
        for key, layer in layers(model).items():
            for kind, i, new, _ in components(layer):
                torch.testing.assert_close(new, expected[key, kind, i], rtol=1e-4, atol=1e-6)
        tuner.update_and_allocate(t)
        optimizer.zero_grad()
        schedule.step()
    assert late > 20
    assert len(optimizer.param_groups) == 1
    assert all(a is b for a, b in zip(trained(model), objects, strict=True))


def test_rows_not_born_yet_do_not_decay():
    model = wrap()
    tuner: Any = model.base_model
    optimizer = torch.optim.AdamW(trained(model), lr=0.1, weight_decay=0.5)
    tuner.attach_optimizer(optimizer)
    first = next(iter(layers(model).values()))
    kept = copy.deepcopy(first.lora_A.data), copy.deepcopy(first.E.data)
    backward(model, 0)
    optimizer.step()
    assert torch.equal(first.lora_A[2:], kept[0][2:])
    assert not torch.equal(first.lora_A[:2], kept[0][:2])
    assert torch.equal(first.E[1:], kept[1][1:])


def test_attaching_needs_the_length_of_the_training():
    model = wrap(total_step=None)
    tuner: Any = model.base_model
    optimizer = torch.optim.AdamW(trained(model))
    with pytest.raises(InputError, match="total_step is not given"):
        tuner.attach_optimizer(optimizer)
    petl.lifecycle(model).attach_optimizer(optimizer, total_steps=9)
    with pytest.raises(InputError, match="restart_warmup=false"):
        tuner.attach_optimizer(torch.optim.SGD([nn.Parameter(torch.zeros(2))]), total_steps=9)


@pytest.mark.parametrize(
    ("total", "message"),
    [
        (3, "no rank will grow: the first growth comes after step 3, and the training ends after"),
        (7, "ranks will not all grow: the last of 3 growths comes after step 9, and the training"),
        (7, "ends after step 7; with tinit=1 and deltaT=1 all 3 fit in"),
        (4, "ends after step 4; set a larger top_h or rank_step"),
    ],
)
def test_growth_that_the_training_is_too_short_for_is_warned_of(total, message, caplog):
    wrap(total_step=total)
    assert message in caplog.text
    caplog.clear()
    petl.lifecycle(model := wrap(total_step=None)).attach_optimizer(
        torch.optim.SGD(trained(model), lr=0.1), total_steps=total
    )
    assert message in caplog.text


@pytest.mark.parametrize("total", [5, 23, 60, 375])
def test_what_the_warning_advises_makes_all_growths_fit(total, caplog):
    wrap(tinit=100, deltaT=100, total_step=total)
    advised = {key: int(value) for key, value in re.findall(r"(tinit|deltaT)=(\d+)", caplog.text)}
    caplog.clear()
    model = wrap(**advised, total_step=total)
    assert not caplog.text
    for step in range(1, total):
        model.base_model.update_and_allocate(step)
    assert model.base_model.growth_finished


@pytest.mark.parametrize(("tinit", "events"), [(None, [14, 21, 28]), (10, [12, 18, 24])])
def test_without_an_interval_growth_ends_after_35_percent_of_the_training(tinit, events):
    tuner: Any = wrap(tinit=tinit, deltaT=None, total_step=81).base_model  # 28 steps for three
    assert [step for step in range(1, 82) if tuner.update_and_allocate(step)] == events
    assert tuner.growth_finished


def test_without_an_interval_the_length_of_the_training_must_be_known():
    with pytest.raises(InputError, match="deltaT is null and total_step is not given"):
        wrap(deltaT=None, total_step=None)


def test_an_adapter_at_its_parameter_budget_is_finished_and_so_is_its_file(tmp_path):
    base = wrap().base_model
    smallest = min(sum(layer.shape) + 1 for layer in base.active_layers.values())
    budget = 2 * sum(sum(layer.shape) + 1 for layer in base.active_layers.values())
    model = wrap(target_total_rank=None, target_r=2, parameter_budget=budget)
    tuner: Any = model.base_model
    for step in range(1, 40):
        backward(model, step)
        tuner.update_and_allocate(step)
    assert tuner.growth_finished
    assert budget - smallest < tuner.active_parameter_count() <= budget
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    rows = sum(t.shape[0] for name, t in saved.items() if name.endswith("lora_A"))
    assert rows == sum(tuner.get_rank_pattern().values())
    back = petl.load(tiny_llama(2), tmp_path, is_trainable=True)
    assert back.base_model.growth_finished
    assert back.base_model.get_rank_pattern() == tuner.get_rank_pattern()


def test_a_budget_below_the_start_is_refused():
    with pytest.raises(InputError, match="parameter_budget=10 is below the"):
        wrap(target_total_rank=None, parameter_budget=10)


def test_warnings_name_what_will_not_happen(caplog):
    model = wrap()
    assert not caplog.text
    model.base_model.update_and_allocate(3)
    assert "attach_optimizer was not called" in caplog.text
    caplog.clear()
    model = wrap()
    model.base_model.attach_optimizer(torch.optim.Adagrad(trained(model)))
    assert "Adagrad: late components get learning rates of their own" in caplog.text


def test_copies_of_a_model_are_attached_to_no_optimizer():
    model = wrap()
    optimizer = torch.optim.AdamW(trained(model))
    model.base_model.attach_optimizer(optimizer)
    twin = copy.deepcopy(model)
    assert not twin.base_model.rates.handles
    assert model.base_model.rates.handles
    model.base_model.attach_optimizer(optimizer)
    assert len(optimizer._optimizer_step_post_hooks) == 1


# Resuming


@pytest.mark.parametrize("stop", [4, 10], ids=["in growth", "after growth"])
@pytest.mark.parametrize("score_window", [None, 1])
def test_resumed_training_equals_training_in_one_go(tmp_path, stop, score_window):
    fields = {"warmup_steps": 1, "score_window": score_window}

    def run(model: PeftModel, optimizer: Any, start: int, end: int) -> list[float]:
        life = petl.lifecycle(model)
        life.attach_optimizer(optimizer, start)
        losses = []
        for step in range(start + 1, end + 1):
            losses.append(backward(model, step))
            optimizer.step()
            life.after_step(step, optimizer)
            optimizer.zero_grad()
        return losses

    def begin() -> tuple[PeftModel, Any]:
        model = wrap(**fields)
        return model, torch.optim.AdamW(trained(model), lr=0.01)

    whole, optimizer = begin()
    expected = run(whole, optimizer, 0, STEPS)
    model, optimizer = begin()
    losses = run(model, optimizer, 0, stop)
    assert model.base_model.growth_finished == (stop == 10)
    model.save_pretrained(tmp_path)
    state, kept = copy.deepcopy(optimizer.state_dict()), petl.lifecycle(model).state_dict()
    model, optimizer = begin()
    model.load_adapter(tmp_path, "default", is_trainable=True)
    optimizer.load_state_dict(state)
    petl.lifecycle(model).load_state_dict(kept)
    assert stop == 10 or model.base_model.coming == stop + 1
    losses += run(model.train(), optimizer, stop, STEPS)
    assert losses == expected
    for found, tensor in zip(living(model), living(whole), strict=True):
        assert torch.equal(found, tensor)


# Processes


def test_processes_with_different_data_agree_on_ranks_and_every_bit():
    ranks = in_processes(2, _train_share)
    first, second = ranks
    assert first["scores"] != second["scores"]  # of their own data
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
    tuner: Any = model.base_model
    optimizer = torch.optim.AdamW(trained(model), lr=0.01)
    life = petl.lifecycle(parallel)
    life.attach_optimizer(optimizer)
    found: dict[str, Any] = {}
    for step in range(1, STEPS + 1):
        parallel(**causal_batch(2, 100 * rank + step)).loss.backward()
        if step == 1:
            found["scores"] = [float(layer.probe.grad) for layer in layers(model).values()]
        optimizer.step()
        life.after_step(step, optimizer)
        if step == 1:
            found["importance"] = [s["I"] for s in tuner.importance_scores().values()]
        optimizer.zero_grad()
    found["state"] = get_peft_model_state_dict(model)
    found["pattern"] = tuner.get_rank_pattern()
    return found


# Trainer


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[0] for name, tensor in causal_batch(1, index).items()}


class InOrder(Trainer):
    """A Trainer that visits the rows in their order."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Ranks(TrainerCallback):
    """Keeps the total rank of each log entry."""

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


def test_ranks_grow_in_trainer_and_resuming_equals_one_go(tmp_path):
    model = wrap(total_step=None)
    ranks = Ranks()
    trainer(model, tmp_path, ranks).train()
    tuner: Any = model.base_model
    assert sum(tuner.get_rank_pattern().values()) == 23
    assert tuner.rates.end == STEPS + 1
    assert ranks.totals == [17, 20, 23]
    for step in (4, 8):
        other = wrap(total_step=None)
        trainer(other, tmp_path).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        for found, tensor in zip(living(other), living(model), strict=True):
            assert torch.equal(found, tensor)


# train.py


def test_increlora_draws_its_ranks_and_resumes_as_in_one_go(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    common = [*tiny.classify, "+method=increlora", "method.tinit=0", "method.deltaT=1"]
    common += ["train.save_steps=2", "train.log_steps=1", "method.top_h=4"]
    whole = train(common, tmp_path / "whole")
    totals = [line["total_rank"] for line in whole.metrics if "total_rank" in line]
    assert totals == [16, 20, 24, 24]
    assert (whole.path / "ranks.png").stat().st_size > 1000
    half = train(common, tmp_path / "half")
    resumed = half.path / "checkpoints" / "step-000002"
    for later in ("scores.json", "adapter", "checkpoints/step-000004"):
        target = half.path / later
        target.rename(tmp_path / later.replace("/", "-"))
    train([*common, f"train.resume={resumed}"], half.path)
    for name, tensor in whole.adapter.items():
        assert torch.equal(half.adapter[name], tensor), name


def test_the_live_loop_trainer_and_a_loop_by_hand_grow_the_same_ranks(tiny, tmp_path):
    steps, fields = 6, {"tinit": 1, "deltaT": 2, "top_h": 6}
    constant = ["train.lr=1e-3", "train.schedule=constant", "train.warmup=0"]
    constant += ["train.weight_decay=0"]
    common = [*tiny.steady, "+method=increlora", *(f"method.{k}={v}" for k, v in fields.items())]
    common += [f"train.steps={steps}", *constant, "train.head_lr=null", "train.max_grad_norm=null"]
    live = train(common, tmp_path / "live").adapter
    expected = {key: int(rank) for key, rank in live.items() if key.endswith(".rank")}
    assert sum(expected.values()) == 12 + 2 * 6  # grown after steps 2 and 4
    assert len(set(expected.values())) > 1

    cfg = app.compose(common)
    data, tokenizer = read_data(cfg.data), load_tokenizer(cfg.model)
    encoded, collate = data.task.encode(tokenizer, data.train), data.task.collate(tokenizer)
    plan = list(Plan(len(encoded), 8, None, steps, seed=0))
    rows = encoded.select([row for batch in plan for row in batch])

    def begin() -> tuple[PeftModel, torch.optim.Optimizer]:
        torch.manual_seed(0)
        base = load_base(cfg.model, data.task)
        model = petl.wrap(base, "increlora", task_type="SEQ_CLS", **fields)
        return model.train(), torch.optim.AdamW(trained(model), lr=1e-3, weight_decay=0)

    by_hand, optimizer = begin()
    life = petl.lifecycle(by_hand)
    life.attach_optimizer(optimizer, total_steps=steps)
    for step in range(1, steps + 1):
        by_hand(**collate([rows[i] for i in range(8 * step - 8, 8 * step)])).loss.backward()
        optimizer.step()
        life.after_step(step, optimizer)
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
