"""What a method that looks at data is shown, through whole runs of train.py."""

import json
from types import SimpleNamespace

import torch
from datasets import Dataset
from training_fixtures import stopped_before, train

from petl.data.models.loading import load_tokenizer
from petl.training import calibration
from petl.training.calibration import (
    CalibrationBatches,
    CalibrationData,
    calibration_batches,
    read_calibration,
)
from petl.training.compose import compose

pytest_plugins = ["training_fixtures"]

CORDA = ["+method=corda", "method.r=2", "method.lora_alpha=2"]


def rows(count=20):
    return Dataset.from_dict(
        {
            "input_ids": [[i] * (1 + i % 5) for i in range(count)],
            "attention_mask": [[1] * (1 + i % 5) for i in range(count)],
            "labels": list(range(count)),
        }
    )


def collate(batch):
    width = max(len(row["input_ids"]) for row in batch)
    padded = {
        key: torch.tensor([row[key] + [0] * (width - len(row[key])) for row in batch])
        for key in ("input_ids", "attention_mask")
    }
    return {**padded, "labels": torch.tensor([row["labels"] for row in batch])}


def test_samples_are_drawn_cut_and_grouped_as_asked():
    settings = CalibrationData(num_samples=7, seq_len=3, batch_size=2)
    batches = CalibrationBatches(rows(), collate, settings)
    found = list(batches)
    assert [len(batch["input_ids"]) for batch in found] == [2, 2, 2, 1]
    assert all(batch["input_ids"].shape[1] <= 3 for batch in found)
    assert all("labels" not in batch for batch in found)
    numbers = {int(row[0]) for batch in found for row in batch["input_ids"]}
    assert len(numbers) == 7
    again = list(batches)
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(found, again, strict=True)
    )
    other = CalibrationBatches(rows(), collate, CalibrationData(num_samples=7, seed=5))
    assert other.order != batches.order


def test_each_process_takes_its_share(monkeypatch):
    settings = CalibrationData(num_samples=8)
    orders = []
    for index in range(3):
        state = SimpleNamespace(process_index=index, num_processes=3)
        monkeypatch.setattr(calibration, "PartialState", lambda state=state: state)
        orders.append(CalibrationBatches(rows(), collate, settings).order)
    assert [len(order) for order in orders] == [3, 3, 2]
    assert len({number for order in orders for number in order}) == 8


def test_other_data_are_encoded_by_the_run_s_tokenizer(tiny):
    words = [*tiny.complete, *CORDA, "+data@method.calibration_data.data=files"]
    words += [f"method.calibration_data.data.train={tiny.folder}/test.csv"]
    words += [
        "method.calibration_data.data.task=causal_lm",
        "method.calibration_data.num_samples=5",
    ]
    cfg = compose(words)
    found = calibration_batches(
        read_calibration(cfg.method.calibration_data), cfg.model, splits=None
    )
    tokenizer = load_tokenizer(cfg.model)
    texts = (tiny.folder / "test.csv").read_text()
    for batch in found:
        text = tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True)
        assert text.removeprefix("[CLS] ") in texts
    assert len(list(found)) == 5


def test_corda_trains_and_resumes_as_in_one_go(tiny, tmp_path):
    common = [*tiny.classify, *CORDA, "method.corda_method=kpm", "train.save_steps=2"]
    common.append("++method.rank_pattern.value=3")
    whole = train(common, tmp_path / "whole")
    half = stopped_before(whole, tmp_path / "half", "step-000004")
    train([*common, f"train.resume={half.path}"], half.path)
    for name, tensor in whole.adapter.items():
        assert torch.equal(half.adapter[name], tensor), name
    for run in (whole, half):
        saved = json.loads((run.path / "adapter" / "adapter_config.json").read_text())
        assert (saved["r"], saved["rank_pattern"]) == (4, {"value": 6})
