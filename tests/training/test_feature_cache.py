"""Features of the linear probe are read by runs on the same base and rows, and by no others."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import petl
from petl.data.base import read_data
from petl.data.models.loading import load_base, load_tokenizer
from petl.system.files.paths import cache_folder
from petl.training.compose import compose
from petl.training.dataloader import encode_splits
from petl.training.distributed.launch import start
from petl.training.linear_probe import BaselineScores, linear_probe
from petl.training.runs.run_config import read_config

pytest_plugins = ["training_fixtures"]
FOLDER = "features"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PETL_CACHE", str(tmp_path / "cache"))


class Job:
    """A run up to its linear probe, with a hidden batch size that gives several batches."""

    def __init__(self, tiny, method="lora", precision="no", seed=0, **fields):
        cfg = compose([*tiny.classify, f"+method={method}", "train.epochs=1", "train.steps=null"])
        self.settings = replace(read_config(cfg).train, linear_probe=True, eval_batch_size=4)
        self.accelerator = start(self.settings.seed, precision)
        data = read_data(cfg.data)
        self.splits = encode_splits(
            data, load_tokenizer(cfg.model), self.settings, self.accelerator
        )
        base = load_base(cfg.model, data.task)
        torch.manual_seed(seed)
        torch.nn.init.normal_(base.classifier.weight)
        self.model = petl.wrap(base, method, task_type="SEQ_CLS", **fields)

    def probe(self):
        """The scores of the probe and of the frozen model, and the batches that were computed."""
        untrained = BaselineScores()
        with passes(self.model) as computed:
            scores = linear_probe(
                self.model, self.splits, self.settings, self.accelerator, untrained
            )
        return (scores, untrained.scores), len(computed)


@contextmanager
def passes(model):
    computed = []
    embeddings = model.get_base_model().get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda *call: computed.append(None))
    with hook:
        yield computed


def batches(job):
    counts = (len(job.splits.train), len(job.splits.test))
    return sum(-(-count // job.settings.eval_batch_size) for count in counts)


FIRST = 2  # batches that are always computed: one of the train rows, one of the test rows


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_second_run_computes_one_batch_of_each_and_has_the_same_bits(tiny, precision):
    job = Job(tiny, precision=precision)
    expected, computed = job.probe()
    assert computed == batches(job) > 2 * FIRST
    assert Job(tiny, precision=precision).probe() == (expected, FIRST)


def test_another_method_and_another_head_read_them_too(tiny):
    Job(tiny).probe()
    others = Job(tiny, "mola", seed=1, num_experts=2, target_modules=["query", "key"])
    found, computed = others.probe()
    assert computed == FIRST
    (cache_folder() / FOLDER).rename(cache_folder() / "away")
    expected, computed = others.probe()
    assert computed == batches(others)
    for read, made in zip(found, expected, strict=True):
        assert read == pytest.approx(made, rel=1e-4)


def changed_weight(job):
    with torch.no_grad():
        base = job.model.get_base_model()
        base.bert.encoder.layer[-1].output.LayerNorm.bias[0] += 1e-6


def changed_config(job):
    job.model.get_base_model().config.layer_norm_eps = 1e-3


def other_rows(job):
    def changed(rows):
        ids = [[*row[:-1], 5 if row[-1] != 5 else 6] for row in rows["input_ids"]]
        return rows.map(lambda row, i: {**row, "input_ids": ids[i]}, with_indices=True)

    parts = {name: changed(getattr(job.splits, name)) for name in ("train", "test")}
    job.splits = replace(job.splits, **parts)


@pytest.mark.cells(1)
@pytest.mark.parametrize("change", [changed_weight, changed_config, other_rows])
def test_what_changes_them_has_them_computed(tiny, change):
    Job(tiny).probe()
    job = Job(tiny)
    change(job)
    assert job.probe()[1] == batches(job)


@pytest.mark.thorough
def test_another_precision_has_them_computed(tiny):
    Job(tiny).probe()
    job = Job(tiny, precision="bf16")
    assert job.probe()[1] == batches(job)


def test_a_model_that_computes_with_its_adapter_keeps_nothing(tiny):
    job = Job(tiny, "lora", init_lora_weights="pissa", target_modules=["query"], r=2)
    assert job.probe()[1] == batches(job)
    assert not (cache_folder() / FOLDER).exists()


@pytest.mark.thorough
def test_a_damaged_file_is_made_again(tiny):
    expected, _ = Job(tiny).probe()
    for file in (cache_folder() / FOLDER).glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-3] ^= 64
        file.write_bytes(content)
    job = Job(tiny)
    assert job.probe() == (expected, batches(job))
    assert Job(tiny).probe() == (expected, FIRST)


def test_a_folder_that_cannot_be_written_costs_a_line(tiny, petl_log):
    cache_folder().mkdir(parents=True, exist_ok=True)
    (cache_folder() / FOLDER).write_text("a file")
    job = Job(tiny)
    assert job.probe()[1] == batches(job)
    assert "cannot be written" in petl_log.text
