"""Healthy trainings in TRL's trainers are left alone, with adapters and without."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForSequenceClassification
from watch_fixtures import TOKENIZER, decoder, lora

import petl
from petl import testing

trl = pytest.importorskip("trl", reason="pip install 'petl-peft[trl]'")

PAIRS = {"prompt": ["who? ", "what? "], "chosen": ["a fox", "it"], "rejected": ["no", "none"]}
GIVEN = {"prompt": PAIRS["prompt"], "completion": PAIRS["chosen"]}


def rewards(completions, **others):
    return [float(number) for number in range(len(completions))]


def scorer() -> Any:
    config = decoder().config
    config.num_labels, config.pad_token_id = 1, TOKENIZER.pad_token_id
    torch.manual_seed(3)
    return LlamaForSequenceClassification(config)


def run_of(name: str, model: Any, folder: Path, data: dict[str, list[Any]], **options: Any) -> Any:
    """A trainer of TRL for three steps of two rows."""
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
    steps = {"per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 1e-3}
    args = {**settings, **steps, "disable_tqdm": True, **options.pop("args", {})}
    return getattr(trl, f"{name}Trainer")(
        model=model,
        args=getattr(trl, f"{name}Config")(str(folder), **args),
        train_dataset=Dataset.from_dict(data),
        processing_class=TOKENIZER,
        **options,
    )


RUNS = {
    "SFT": lambda model, folder: run_of("SFT", model, folder, GIVEN),
    "SFT-texts": lambda model, folder: run_of("SFT", model, folder, {"text": PAIRS["chosen"]}),
    "DPO": lambda model, folder: run_of("DPO", model, folder, PAIRS),
    "KTO": lambda model, folder: run_of("KTO", model, folder, {**GIVEN, "label": [True, False]}),
    "GRPO": lambda model, folder: run_of(
        "GRPO",
        model,
        folder,
        {"prompt": PAIRS["prompt"]},
        args={"num_generations": 2, "max_completion_length": 3, "beta": 0.1},
        reward_funcs=rewards,
    ),
    "Reward": lambda model, folder: run_of(
        "Reward", model, folder, {name: PAIRS[name] for name in ("chosen", "rejected")}
    ),
}
USUAL = ("SFT", "DPO")
PARAMS = [n if n in USUAL else pytest.param(n, marks=pytest.mark.thorough) for n in RUNS]


def watched(name: str, model: Any, folder: Path) -> Any:
    run = RUNS[name](model, folder)
    watcher = petl.watch(run)
    run.train()
    return watcher.report()


@pytest.mark.parametrize("name", PARAMS)
def test_a_healthy_training_of_an_adapter_is_left_alone(name, tmp_path):
    model = lora(scorer(), task_type="SEQ_CLS") if name == "Reward" else lora(lora_dropout=0.1)
    report = watched(name, testing.stir(model), tmp_path)
    assert report.ok, report
    assert {"gradient", "optimizer", "base", "coverage"}.isdisjoint(report.not_checked)
    assert ("reference" in report.not_checked) == (name not in ("DPO", "KTO", "GRPO"))


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["SFT", "Reward"])
def test_a_healthy_training_of_the_whole_model_is_left_alone(name, tmp_path):
    report = watched(name, scorer() if name == "Reward" else decoder(), tmp_path)
    assert report.ok, report
