"""A method of another package: listed, shown, planned, trained, scored, loaded, tested."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import warm_python
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf
from plugin_package import ROOT, environment, write_metadata, write_module
from training_fixtures import Finished, Tiny

from petl.adapters.export.saved_adapter import find
from petl.errors import InputError
from petl.system.settings.command_line import command
from petl.training.runs.resume import identity

pytest_plugins = ["training_fixtures"]

# wraps, saves and loads, then runs quick checks of petl.testing
LIBRARY = """
import sys, torch, petl
from petl import testing
case = testing.Case("diag", "llama", {"strength": 2.0}, lr=0.1)
model = testing.stir(case.wrap())
model.save_pretrained(sys.argv[1])
loaded = petl.load(case.base(), sys.argv[1])
assert torch.equal(testing.logits(loaded, case.batch()), testing.logits(model, case.batch()))
for name in testing.checks(case, slow=False)[::3]:  # of petl's own methods, all are run
    if "process" not in name and not testing.CHECKS[name].package:
        testing.run(name, case)
        print(name)
config = petl.method("diag").config_cls(target_modules=["q_proj"])
assert len(testing.tuner_layers(petl.wrap(case.base(), config))) == 3
"""


def python(words: Sequence[object], *folders: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments; it finds petl and the modules in `folders`."""
    return subprocess.run(
        [warm_python.python(), *map(str, words)],
        env=environment(*folders),
        cwd=folders[0],
        capture_output=True,
        text=True,
        timeout=280,
    )


def output_of(words: Sequence[object], *folders: Path) -> str:
    """The standard output of Python with these arguments, which must end with status 0."""
    done = python(words, *folders)
    assert done.returncode == 0, done.stderr
    return done.stdout


PETL = ["-m", "petl"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed package."""
    folder = tmp_path_factory.mktemp("installed")
    write_module(folder)
    write_metadata(folder)
    return folder


@pytest.fixture(scope="module")
def loose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same module and YAML, and no metadata."""
    folder = tmp_path_factory.mktemp("loose")
    write_module(folder)
    return folder


@pytest.fixture(scope="module")
def run(tiny: Tiny, installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A finished run of three steps of train.py with the installed method."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = ["--config-dir", "configs", "+method=diag", *tiny.classify, "train.steps=3"]
    output_of([ROOT / "train.py", *options, f"train.run={folder}"], installed)
    return Finished(folder)


def test_it_trains_with_the_settings_of_its_yaml(run):
    assert [line["step"] for line in run.metrics][-1] == 3
    adapter = (run.path / "adapter" / "adapter_config.json").read_text()
    assert '"strength": 2.0' in adapter
    assert any(name.endswith("petl_diag_adapters.scale") for name in run.adapter)


@pytest.mark.thorough
def test_petl_eval_scores_its_run(run, installed):
    assert "accuracy" in output_of([*PETL, "eval", run.path], installed)


@pytest.mark.thorough
def test_petl_lists_and_shows_it_with_its_yaml(installed):
    lines = output_of([*PETL, "methods", "--config-dir", "configs"], installed).splitlines()
    (row,) = [line.split() for line in lines if line.startswith("diag ")]
    trained = 6 * (5 * 384 + 1536)  # outputs of the linear layers in each of 6 blocks
    assert row[:5] == ["diag", f"{trained:,}", "no", "no", "diag_methods"]
    assert any(line.startswith("mola ") for line in lines)
    shown = output_of([*PETL, "show", "diag", "--config-dir", "configs"], installed)
    assert "implemented by: diag_methods" in shown
    assert "merging: not supported" in shown
    (field,) = [line.split() for line in shown.splitlines() if line.startswith("strength ")]
    assert field[:4] == ["strength", "float", "1.0", "2.0"]


@pytest.mark.thorough
def test_petl_plans_a_run_of_a_module_that_is_not_installed(tiny, loose):
    options = ["plan", "+method=diag", "--config-dir", "configs", *tiny.classify]
    planned = output_of([*PETL, *options, "imports=[diag_methods]"], loose)
    assert planned.startswith("diag · ")
    refused = python([*PETL, *options], loose)
    assert refused.returncode == 2
    assert "no method 'diag'" in refused.stderr
    assert "imports=[MODULE]" in refused.stderr


@pytest.mark.thorough
def test_a_method_without_a_yaml_is_told_which_file_to_write(loose, tmp_path):
    refused = python([*PETL, "plan", "+method=diag", "imports=[diag_methods]"], tmp_path, loose)
    assert refused.returncode == 2
    assert "write ./configs/method/diag.yaml" in refused.stderr
    assert "name: diag\ntarget_modules: all-linear\nstrength: 1.0\n" in refused.stderr


@pytest.mark.thorough
def test_it_saves_loads_and_keeps_the_contract(installed, tmp_path):
    passed = output_of(["-c", LIBRARY, tmp_path / "adapter"], installed).split()
    assert len(passed) > 8


# The setting `imports` in a saved run


def test_a_saved_run_imports_modules_only_with_permission(run, tmp_path):
    copy = shutil.copytree(run.path, tmp_path / "run")
    config = (copy / "config.yaml").read_text()
    assert "imports: []\n" in config
    (copy / "config.yaml").write_text(config.replace("imports: []", "imports: [diag_stranger]"))
    for trusted, words in ((False, "diag_stranger: "), (True, "no module 'diag_stranger'")):
        with pytest.raises(InputError, match=words):
            find(copy, trust_remote_code=trusted)


def test_imports_do_not_change_the_identity_of_a_run(run):
    config = OmegaConf.to_container(OmegaConf.load(run.path / "config.yaml"))
    without = {key: value for key, value in config.items() if key != "imports"}
    assert identity({**config, "imports": ["diag_methods"]}) == identity(without)


def test_the_command_that_resumes_a_run_has_the_folder_of_its_yaml(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--config-dir", "a dir", "+method=diag"])
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    hydra = OmegaConf.create({"overrides": {"task": ["+method=diag"]}, "mode": RunMode.RUN})
    monkeypatch.setattr(HydraConfig, "get", lambda: hydra)
    assert command(resume="x") == (
        "python train.py --config-dir 'a dir' +method=diag train.resume=x"
    )
