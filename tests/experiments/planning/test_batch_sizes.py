"""Sizes for each bucket: found for a run, written, and trained with."""

import math
import shlex

import numpy as np
import pytest
import torch
from datasets import Dataset
from omegaconf import OmegaConf
from training_fixtures import Tiny, train, train_until_killed
from transformers import BertForSequenceClassification

from petl.cli import main
from petl.data.models.loading import load_processor
from petl.data.tasks.seq2seq import Seq2Seq
from petl.errors import InputError
from petl.experiments.planning.batch_sizes import (
    by_trials,
    bytes_of,
    equal_buckets,
    find,
    longest_row,
    search,
)
from petl.experiments.planning.plan import plan_run
from petl.training.compose import compose
from petl.training.dataloader import Splits, encode_splits, row_lengths
from petl.training.distributed.launch import start
from petl.training.runs.run_config import read_config

pytest_plugins = ["training_fixtures"]
MEMORY = 750_000  # bytes: the tiny BERT, its adapter, and the pass of some rows


@pytest.mark.thorough
def test_the_command_writes_a_file_that_a_run_trains_with(tiny, tmp_path, capsys):
    common = [*tiny.steady, "+method=lora", "train.log_steps=1"]
    words = [*common, "train.buckets=3", f"--memory={MEMORY}", f"--output={tmp_path}/sizes.yaml"]
    assert main.main(["batch-sizes", *words]) == 0
    found = OmegaConf.to_container(OmegaConf.load(tmp_path / "sizes.yaml"))
    sizes = {bucket["longest"]: bucket["batch_size"] for bucket in found["buckets"]}
    assert found["edges"] == list(sizes)[:-1]
    assert sum(bucket["rows"] for bucket in found["buckets"]) == found["rows"] == 50
    assert any(bucket["batch_size"] < bucket["rows"] for bucket in found["buckets"])
    line = shlex.split(found["command"])
    assert found["command"] in capsys.readouterr().out
    program, settings = line[: -len(common) - 1], line[-len(common) - 1 :]
    assert program[-2:] == ["petl", "train"]
    straight = train(settings, tmp_path / "straight")
    kept = OmegaConf.to_container(OmegaConf.load(straight.path / "config.yaml"))
    assert kept["train"]["batch_sizes"] == sizes
    train_until_killed([*settings, "train.save_steps=2"], tmp_path / "killed", 3)
    again = train([*settings, "train.resume=auto"], tmp_path / "killed")
    assert again.metrics[-1]["loss"] == straight.metrics[-1]["loss"]
    train_until_killed([*settings, "train.save_steps=2"], tmp_path / "other", 3)
    other = dict(sizes) | {max(sizes): 1}
    (tmp_path / "sizes.yaml").write_text(
        OmegaConf.to_yaml({"buckets": [{"longest": k, "batch_size": n} for k, n in other.items()]})
    )
    resumed = [*settings, f"train.resume={tmp_path}/other"]
    with pytest.raises(InputError, match=rf"train.batch_sizes.{max(sizes)}="):
        train(resumed, tmp_path / "other")


@pytest.mark.thorough
@pytest.mark.parametrize("task", ["steady", "complete"])
def test_sizes_from_shapes_fit_into_the_memory_of_the_plan(tiny, task):
    common = [*getattr(tiny, task), "+method=mola"]
    memory = plan_run(compose([*common, "train.batch_sizes={12: 25}"])).memory
    assert memory.rows == 25
    copies = memory.optimizer // 2
    needed = memory.weights + memory.optimizer + copies + memory.pass_.peak
    for given, expected in ((needed, 25), (needed - 2, 24)):
        found = find(compose([*common, "train.buckets=1"]), math.ceil(given / 0.9))
        assert found["buckets"][0]["batch_size"] == expected


@pytest.mark.thorough
def test_sizes_are_global(tiny, monkeypatch):
    cfg = compose([*tiny.complete, "+method=lora", "train.buckets=1"])
    alone = find(cfg, MEMORY)
    monkeypatch.setenv("WORLD_SIZE", "2")
    both = find(cfg, MEMORY)
    (one,), (two,) = alone["buckets"], both["buckets"]
    assert both["processes"] == 2
    assert two["batch_size"] == pytest.approx(2 * one["batch_size"], rel=0.05)
    assert two["batch_size"] % 2 == 0


def splits_of(tiny: Tiny, *words: str) -> tuple:
    cfg = compose([*tiny.classify, *words])
    config = read_config(cfg)
    accelerator = start(config.train.seed, config.precision)
    data = config.data.read()
    processor = load_processor(config.model, data.task)
    return config, encode_splits(data, processor, config.train, accelerator), accelerator


@pytest.mark.cells(1)
@pytest.mark.parametrize("method", ["lora", "corda"])
def test_trial_steps_find_a_hidden_size(tiny, monkeypatch, method):
    forward = BertForSequenceClassification.forward

    def bounded(self, input_ids, **others):
        if input_ids.numel() > 150:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, input_ids=input_ids, **others)

    config, splits, accelerator = splits_of(tiny, f"+method={method}", "train.batch_size=4")
    monkeypatch.setattr(BertForSequenceClassification, "forward", bounded)
    lengths = row_lengths(splits.task, splits.known)
    parts = equal_buckets(lengths, 3)
    with by_trials(config, splits, accelerator) as fits:
        shares = search(splits, lengths, parts, fits, 4, 1)
    for share, rows in zip(shares, parts, strict=True):
        room = min(150 // int(lengths[rows].max()), len(rows))
        assert 0.95 * room - 1 < share <= room


def test_buckets_of_the_search_end_at_its_edges():
    lengths = np.array([5, 3, 9, 3, 4, 8, 9], np.int32)
    parts = equal_buckets(lengths, 3)
    assert [sorted(lengths[rows]) for rows in parts] == [[3, 3, 4, 5], [8, 9, 9]]


def test_a_row_of_the_search_has_the_longest_list_in_each_column():
    rows = {
        "input_ids": [[1, 2, 3, 4], [1], [1, 2, 3]],
        "attention_mask": [[1] * 4, [1], [1] * 3],
        "labels": [[7], [7, 8, 9], [7, 8, 9, 9, 9]],
        "_answer": ["a", "b", "c"],
    }
    data = Dataset.from_dict(rows)
    splits = Splits(Seq2Seq(), lambda some: {}, data, None, data, None)
    made = longest_row(splits, np.array([1, 0, 2]))
    assert {name: len(value) for name, value in made.items()} == {
        "input_ids": 4,
        "attention_mask": 4,
        "labels": 5,
    }


@pytest.mark.parametrize(
    ("text", "number"),
    [("8GB", 8 * 10**9), ("7.5 GiB", 7.5 * 2**30), ("500mb", 5 * 10**8), ("1024", 1024)],
)
def test_amounts_of_memory_have_units(text, number):
    assert bytes_of(text) == number


@pytest.mark.cells(2)
@pytest.mark.parametrize(
    ("words", "memory", "message"),
    [
        (
            ["train.micro_batch_size=4"],
            MEMORY,
            "train.micro_batch_size=4 already limits the size of a pass",
        ),
        (["train.buckets=2", "train.max_tokens=99"], MEMORY, "train.max_tokens=99 already limits"),
        (["train.batch_sizes={16: 4}"], MEMORY, "already limits the size of a pass"),
        (["data.order=by_class"], MEMORY, "data.order=by_class decides which rows a step has"),
        ([], 100_000, r"not even one example of \d+ tokens fits"),
    ],
)
def test_settings_that_leave_nothing_to_find_are_refused(tiny, words, memory, message):
    with pytest.raises(InputError, match=message):
        find(compose([*tiny.steady, "+method=lora", *words]), memory)


def test_sharded_memory_is_not_tried_on_one_device(tiny):
    config, *others = splits_of(tiny, "+method=lora", "+launch=fsdp")
    with pytest.raises(InputError), by_trials(config, *others):
        pass
