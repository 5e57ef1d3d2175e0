"""The folder of a run."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import warm_python
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from task_runs import code_of
from training_fixtures import train

import petl
from petl.data.base import read_data
from petl.data.models.loading import load_base, load_tokenizer
from petl.errors import InputError, RunStopped
from petl.system.files.disk import check_free_space
from petl.system.settings.command_line import config_dir, preset_of
from petl.training.compose import compose
from petl.training.dataloader import encode_splits
from petl.training.distributed.launch import start
from petl.training.evaluate import Evaluator
from petl.training.runs.run_config import read_config
from petl.training.runs.run_folder import Run

pytest_plugins = ["training_fixtures"]


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    return train([*tiny.classify, "+method=mola", "train.linear_probe=true"], folder)


def test_a_run_folder_holds_what_is_promised(finished):
    names = {path.name for path in finished.path.iterdir()}
    assert names == {
        *("heat_maps.json", "expert_load.png", "expert_balance.png"),  # of MoLA
        *("adapter", "checkpoints", "config.yaml", "environment.json"),
        *("metrics.jsonl", "predictions.jsonl", "scores.json", "report.html", ".lock"),
    }
    assert {path.name for path in (finished.path / "adapter").iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "labels.json"),
        *("base_fingerprint.json", "task.json", "tokenizer.json", "tokenizer_config.json"),
    }


def test_the_environment_says_what_ran_where(finished):
    environment = json.loads((finished.path / "environment.json").read_text())
    assert environment["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert environment["processes"] == 1
    assert environment["seed"] == 0
    assert "petl train" in environment["command"]
    revision = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=config_dir()
    )
    assert environment["git"] is None or environment["git"].startswith(revision.stdout.strip())


def test_scores_are_those_of_test_rows_and_sizes_are_right(finished):
    scores = finished.scores
    for name in ("before", "linear_probe", "after"):
        assert scores[name]["rows"] == 20
        assert 0 <= scores[name]["accuracy"] <= 1
    weights = finished.path / "adapter" / "adapter_model.safetensors"
    assert scores["adapter_bytes"] == weights.stat().st_size
    assert scores["trainable_parameters"] == sum(t.numel() for t in finished.adapter.values())
    assert scores["steps"] == 4
    assert scores["tokens"] > 0


@pytest.mark.thorough
def test_the_readme_loads_the_adapter_in_a_fresh_process(finished, tiny):
    code = code_of(finished.path / "adapter", tiny.folder / "bert")
    assert code.startswith("import torch\nimport petl\n")
    asked = "\nbatch = tokenizer('the red dog', return_tensors='pt')\n"
    asked += "print(model(**batch).logits.tolist(), classes)"
    ran = subprocess.run(
        [warm_python.python(), "-W", "error::UserWarning", "-c", code + asked],
        capture_output=True,
        text=True,
        cwd=finished.path / "adapter",
    )
    assert ran.returncode == 0, ran.stderr
    predicted, shown = ran.stdout.split("\n", 1)
    assert predicted in ("beast", "color", "tool")
    assert "['beast', 'color', 'tool']" in shown
    logits = json.loads(shown.partition("]]")[0] + "]]")
    assert logits[0] == pytest.approx(logits_in_memory(finished, tiny), abs=1e-6)


def logits_in_memory(finished, tiny):
    """The trained adapter on a base that petl's own loader made."""
    cfg = compose([*tiny.classify, "+method=mola"])
    model = petl.load(load_base(cfg.model, read_data(cfg.data).task), finished.path / "adapter")
    batch = load_tokenizer(cfg.model)("the red dog", return_tensors="pt")
    return model.eval()(**batch).logits[0].tolist()


def test_the_saved_adapter_scores_what_the_run_reported(finished, tiny):
    cfg = compose([*tiny.classify, "+method=mola"])
    settings = read_config(cfg).train
    accelerator = start(settings.seed, "no")
    data = read_data(cfg.data)
    splits = encode_splits(data, load_tokenizer(cfg.model), settings, accelerator)
    model = petl.load(load_base(cfg.model, data.task), finished.path / "adapter")
    again = Evaluator(model, splits, accelerator, 7).rows(splits.test)
    assert again == pytest.approx(finished.scores["after"], rel=1e-5)


# Where the folder is


def run_of(tiny, *changes, method="lora"):
    cfg = compose([*tiny.classify, f"+method={method}", *changes])
    config = read_config(cfg)
    return Run(config, start(config.train.seed, config.precision))


def small_model():
    base = torch.nn.Sequential(torch.nn.Linear(2, 2))
    return get_peft_model(base, LoraConfig(target_modules=["0"]))


def test_names_say_method_model_and_data_and_never_collide(tiny, tmp_path):
    runs = [run_of(tiny, f"train.output={tmp_path}/runs") for _ in range(3)]
    for run in runs:
        run.begin(small_model())
    paths = [run.path.name for run in runs]
    assert len(set(paths)) == 3
    model = Path(runs[0].config.model.path).name  # a folder is named, not `model=path`
    assert all(re.fullmatch(rf"lora-{model}-files-\d{{8}}-\d{{6}}(-\d+)?", name) for name in paths)


def test_a_name_from_the_hub_makes_one_folder(tiny, tmp_path):
    run = run_of(tiny, "model.name=org/some model", f"train.output={tmp_path}")
    run.begin(small_model())
    assert run.path.parent == tmp_path
    assert run.path.name.startswith("lora-org-some-model-files-")


def test_the_configuration_holds_what_the_inner_method_s_yaml_said(tiny, tmp_path):
    changes = ("method.inner=lora", "+method.r=3", f"train.output={tmp_path}")
    run = run_of(tiny, *changes, method="binary")
    run.begin(small_model())
    written = OmegaConf.load(run.path / "config.yaml").method
    expected = {**preset_of("lora"), **preset_of("binary"), "inner": "lora", "r": 3}
    assert OmegaConf.to_container(written) == expected


def test_nothing_is_written_before_training_can_begin(tiny, tmp_path):
    run_of(tiny, f"train.output={tmp_path}/deep/runs")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_not_overwritten(tiny, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("keep me")
    for resume in ("null", "auto"):
        with pytest.raises(InputError):
            run_of(tiny, f"train.run={tmp_path}/mine", f"train.resume={resume}")
    assert (tmp_path / "mine" / "notes").read_text() == "keep me"


def test_an_empty_folder_may_be_given(tiny, tmp_path):
    run = run_of(tiny, f"train.run={tmp_path}")
    run.begin(small_model())
    assert run.path == tmp_path


def test_a_disk_with_too_little_room_is_refused_with_both_numbers(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(InputError):
        check_free_space(tmp_path / "runs", 2 * free)
    check_free_space(tmp_path / "runs", 1)


@pytest.mark.parametrize("words", [["train.log_steps=1"], ["train.save_steps=3"]])
def test_a_folder_that_is_deleted_under_a_running_job_is_named(tiny, tmp_path, monkeypatch, words):
    run, after_step = tmp_path / "run", petl.Lifecycle.after_step

    def delete(self, step, optimizer):
        after_step(self, step, optimizer)
        if step == 2:
            shutil.rmtree(run)

    monkeypatch.setattr(petl.Lifecycle, "after_step", delete)
    with pytest.raises(RunStopped):
        train([*tiny.steady, "+method=lora", "train.log_steps=4", *words], run)
    assert not run.exists()
