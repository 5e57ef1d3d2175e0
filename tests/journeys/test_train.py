"""train.py from end to end, as a program and as a function."""

import ast
import json
import runpy
import sys

import pytest
import torch
from safetensors.torch import load_file
from training_fixtures import ROOT, Finished, drawing_once, main, train

from petl.training.compose import compose

pytest_plugins = ["training_fixtures"]


@pytest.fixture
def program(tmp_path, monkeypatch, capfd):
    """Run train.py as a program in this process: its status, output and messages."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py"), *words])
        with drawing_once(), pytest.raises(SystemExit) as left:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        return left.value.code, *capfd.readouterr()

    return run


def test_the_body_of_a_run_is_one_screen():
    tree = ast.parse((ROOT / "petl/cli/train.py").read_text())
    body = next(node for node in tree.body if isinstance(node, ast.FunctionDef))
    assert body.end_lineno - body.lineno < 30
    # an `if` only guards a feature that is off
    assert not any(isinstance(node, ast.For | ast.Try) for node in ast.walk(body))
    assert not any(node.orelse for node in ast.walk(body) if isinstance(node, ast.If))


def test_a_run_shows_no_warning_of_libraries_about_one_another(program, tiny, recwarn):
    words = [*tiny.classify, "+method=ln_tuning", "train.gradient_checkpointing=true"]
    status, _, err = program(*words)
    assert status == 0, err
    shown = [str(warning.message) for warning in recwarn]
    assert not [text for text in shown if "gradient_checkpointing" in text or "own risk" in text]


def test_a_run_prints_its_scores_and_where_the_adapter_is(program, tiny, tmp_path):
    words = [*tiny.classify, "+method=mola", "train.linear_probe=true", "train.log_steps=2"]
    status, out, err = program(*words)
    assert status == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    scores = Finished(folder).scores
    for label, key in (
        *(
            ("before training", "before"),
            ("linear probe (head only, frozen backbone)", "linear_probe"),
        ),
        ("adapted", "after"),
    ):
        lines = (x for x in out.splitlines() if label in x and "interval" not in x)
        (line,) = lines
        assert f"{100 * scores[key]['accuracy']:.1f} %" in line
    assert f"trainable parameters: {scores['trainable_parameters']:,};" in out
    assert scores["coverage"]["summary"] in out
    assert "of the block weights" in (folder / "adapter" / "README.md").read_text()
    assert f"saved in runs/{folder.name}/adapter" in out
    assert "petl.load(base" in out
    assert "step 4/4" in err
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]  # Hydra adds nothing of its own


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tiny, tmp_path):
    common = [*tiny.classify, "+method=mola"]
    one, same = (train(common, tmp_path / name) for name in ("one", "same"))
    other = train([*common, "train.seed=1"], tmp_path / "other")
    weights = [(r.path / "adapter" / "adapter_model.safetensors") for r in (one, same, other)]
    first, second, third = (path.read_bytes() for path in weights)
    assert first == second
    assert first != third


@pytest.mark.thorough
def test_the_run_gives_the_metric_of_its_task_to_a_sweeper(tiny, tmp_path):
    for overrides, metric in ((tiny.classify, "accuracy"), (tiny.complete, "loss")):
        folder = tmp_path / metric
        cfg = compose([*overrides, "+method=lora", f"train.run={folder}"])
        assert main()(cfg) == Finished(folder).scores["after"][metric]


@pytest.mark.thorough
def test_a_job_of_a_sweep_that_fails_does_not_stop_the_others(program, tiny, tmp_path):
    status, _, err = program("-m", *tiny.classify, "+method=mola", "method.top_k=9,2")
    assert status == 2
    assert "Traceback" not in err
    (folder,) = (path for path in (tmp_path / "runs").iterdir() if path.name != "sweeps")
    assert "top_k: 2" in (folder / "config.yaml").read_text()


@pytest.mark.thorough
def test_a_method_that_needs_data_to_begin_gets_train_batches(tiny, tmp_path):
    eva = ["+method=lora", "method.init_lora_weights=eva", "method.r=4"]
    still = ["train.lr=1e-12", "train.weight_decay=0"]  # to see the start at the end
    run = train([*tiny.complete, *eva, *still], tmp_path / "run")
    found = [t for name, t in run.adapter.items() if "lora_A" in name]
    assert found
    for (
        rows
    ) in found:  # EVA begins with right singular vectors: rows of length one, at right angles
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), atol=1e-3, rtol=0.0)


def test_a_start_that_rewrites_the_base_is_saved_relative_to_it(tiny, tmp_path):
    run = train([*tiny.steady, "+method=lora", "method.init_lora_weights=pissa"], tmp_path / "run")
    config = json.loads((run.path / "adapter" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["r"] == 16  # twice 8: the trained pair and the one it began with
    start = load_file(run.path / "start" / "adapter_model.safetensors")
    name = next(name for name in start if "lora_A" in name)
    assert (run.adapter[name][8:] == start[name]).all()
