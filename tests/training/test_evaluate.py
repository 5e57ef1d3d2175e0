"""Scores over several processes are those of one, also where they are no sums of batches."""

import os

import pytest
import torch
from kept_processes import in_processes
from kept_runs import lines
from task_fixtures import Families

import petl
from petl.data.base import read_data
from petl.data.models.loading import load_base, load_processor
from petl.training.compose import compose
from petl.training.dataloader import encode_splits
from petl.training.distributed.launch import start
from petl.training.evaluate import Evaluator
from petl.training.runs.run_config import read_config

pytest_plugins = ["task_fixtures"]
TASKS = ("question_answering", "regression", "causal_lm", "token_classification")


def scores(folder, kept) -> dict[str, dict[str, float]]:
    """Of each task, those of a model with the same adapter in every process.

    The predictions are kept in the folder `kept`.
    """
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # Accelerate asks for them
    found = {}
    for task in TASKS:
        cfg = compose(Families(folder)(task, "+method=lora", "data.test_rows=11"))
        settings = read_config(cfg).train
        accelerator = start(settings.seed, "no")
        data = read_data(cfg.data)
        splits = encode_splits(data, load_processor(cfg.model, data.task), settings, accelerator)
        base = load_base(cfg.model, data.task)
        torch.manual_seed(5)
        for parameter in base.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        base.to(accelerator.device)
        model = petl.wrap(
            base, "lora", task_type=data.task.peft_task_type, target_modules=".*query|.*q_proj"
        )
        file = kept / f"{task}-{accelerator.num_processes}.jsonl"
        # two batches of the first process, one of the second
        found[task] = Evaluator(model, splits, accelerator, 5).test(kept=file)
    return found


@pytest.mark.thorough
def test_two_processes_score_as_one(families, tmp_path, monkeypatch):
    monkeypatch.setenv("PETL_CACHE", str(tmp_path))
    monkeypatch.setenv("MASTER_ADDR", "localhost")  # both are put back after the test
    monkeypatch.setenv("MASTER_PORT", "0")
    expected = scores(families.folder, tmp_path)
    first, second = in_processes(2, scores, families.folder, tmp_path)
    for task in TASKS:
        assert first[task] == second[task] == pytest.approx(expected[task], abs=1e-4)
        assert len(expected[task]) > 0
        one, two = (lines(tmp_path / f"{task}-{count}.jsonl") for count in (1, 2))
        assert len(one) == 11
        for own, other in zip(one, two, strict=True):
            assert own["row"] == other["row"]
            numbers = {k: v for k, v in own.items() if isinstance(v, float)}
            assert {k: other[k] for k in numbers} == pytest.approx(numbers, abs=1e-3)
            assert own.get("label") == other.get("label")
