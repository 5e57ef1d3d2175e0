"""Checkpoints are whole or not there, and hold plain data."""

import json
import random
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from petl.errors import InputError, RunStopped
from petl.system.files.disk import atomic_folder
from petl.training.optimizer import make_optimizer
from petl.training.runs.checkpoint import (
    checkpoints,
    clean,
    flatten,
    prune,
    restore_optimizer,
    restore_rng,
    rng_state,
    step_folder,
    verify,
    write,
)
from petl.training.runs.settings import TrainConfig

CPU = torch.device("cpu")


def small_model(seed=0):
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    return get_peft_model(base, LoraConfig(target_modules=["0", "2"], r=2, init_lora_weights=False))


def train_a_little(model, optimizer, steps=3):
    for _ in range(steps):
        model(torch.randn(5, 4)).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def trained():
    model = small_model()
    optimizer = make_optimizer(model, TrainConfig())
    train_a_little(model, optimizer)
    return model, optimizer


@pytest.fixture
def checkpoint(trained, tmp_path):
    target = step_folder(tmp_path, 3)
    write(target, *trained, {"ranks": torch.arange(3)}, [rng_state(CPU)], {"step": 3})
    return target


def test_a_checkpoint_holds_safetensors_and_json_only(checkpoint):
    names = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()}
    assert names == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "lifecycle.safetensors",
        "manifest.json",
        "optimizer.json",
        "optimizer.safetensors",
        "rng-0.safetensors",
        "state.json",
    }
    assert verify(checkpoint) == {"step": 3}


def test_the_optimizer_goes_on_as_if_it_had_not_stopped(trained, checkpoint):
    model, optimizer = trained
    other = small_model()
    other.load_state_dict(model.state_dict())
    restored = make_optimizer(other, TrainConfig())
    restore_optimizer(checkpoint, restored, other)
    for m, o in ((model, optimizer), (other, restored)):
        torch.manual_seed(7)
        train_a_little(m, o)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_optimizer_state_is_found_by_name_whatever_the_order_of_groups(trained):
    model, optimizer = trained
    tensors, rest = flatten(optimizer, model)
    name = "base_model.model.0.lora_A.default.weight"
    parameter = dict(model.named_parameters())[name]
    assert torch.equal(tensors[f"{name}.exp_avg"], optimizer.state[parameter]["exp_avg"])
    assert name in rest["groups"][0]["params"]


def test_an_optimizer_of_other_parameters_is_refused(checkpoint):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    model = get_peft_model(base, LoraConfig(target_modules=["0"], r=2))
    with pytest.raises(InputError):
        restore_optimizer(checkpoint, make_optimizer(model, TrainConfig()), model)


def damage(checkpoint, name, **entries):
    """Replace entries of a JSON file, or of its first group."""
    content = json.loads((checkpoint / name).read_text())
    for key, value in entries.items():
        (content if key in content else content["groups"][0])[key] = value
    (checkpoint / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ({"eps": "x"}, 'eps is "x", not a finite number'),
        ({"betas": [0.9, None]}, r"betas\[1\] is null, not a finite number"),
        ({"params": None}, r"groups\[0\].params is null, not a list"),
        ({"scalars": []}, "scalars is a list, not a mapping"),
        ({"scalars": {"nowhere.step": 1}}, "other parameters than this model"),
        ({"groups": []}, "other parameters than this model"),
    ],
)
def test_a_damaged_optimizer_is_refused(trained, checkpoint, entries, problem):
    damage(checkpoint, "optimizer.json", **entries)
    model, optimizer = trained
    with pytest.raises(InputError, match=problem):
        restore_optimizer(checkpoint, optimizer, model)


@pytest.mark.parametrize(
    "changes", [{"python": "[]"}, {"python": "x"}, {"numpy": "[1, 2, 3, 4, 5]"}, {"numpy": None}]
)
def test_damaged_random_states_are_refused(checkpoint, changes):
    tensors, texts = rng_state(CPU)
    texts = {key: text for key, text in (texts | changes).items() if text is not None}
    save_file(tensors, checkpoint / "rng-0.safetensors", metadata=texts)
    with pytest.raises(InputError, match="rng-0"):
        restore_rng(checkpoint, 0, CPU)


def draw():
    return torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist(), random.gauss(0, 1)


def test_all_generators_go_on_where_they_were(trained, tmp_path):
    random.gauss(0, 1)  # leaves half a pair behind, which belongs to the state too
    np.random.standard_normal()
    target = step_folder(tmp_path, 1)
    write(target, *trained, {}, [rng_state(CPU)], {})
    expected = draw(), np.random.standard_normal()
    draw()
    restore_rng(target, 0, CPU)
    assert (draw(), np.random.standard_normal()) == expected


def test_a_checkpoint_of_a_cpu_is_restored_on_another_device_with_a_warning(
    tmp_path, trained, caplog
):
    target = tmp_path / "step-000003"
    write(target, *trained, {}, [rng_state(CPU)], {})
    drawn = torch.rand(3)
    torch.manual_seed(7)
    with caplog.at_level("WARNING"):
        restore_rng(target, 0, torch.device("cuda"))  # whose generator it leaves alone
    assert "on cuda dropout draws other masks" in caplog.text
    assert torch.equal(torch.rand(3), drawn)


DAMAGES = {
    "bytes, not the": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "was altered": lambda file: file.write_bytes(file.read_bytes()[:-1] + b"?"),
    "is missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("said", DAMAGES)
@pytest.mark.parametrize(
    "name", ["adapter/adapter_model.safetensors", "optimizer.safetensors", "state.json"]
)
def test_a_damaged_file_is_named(checkpoint, name, said):
    DAMAGES[said](checkpoint / name)
    with pytest.raises(InputError, match=rf"{name} .*{said}"):
        verify(checkpoint)


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", '{"files": 3}'),
        *(
            json.dumps({"files": {name: {"bytes": 1, "sha256": "x"}}})
            for name in ("../outside", "a\0b", "x" * 300, "x/" * 3000)
        ),
    ],
    ids=range(8),
)
def test_a_manifest_is_one_of_files_that_are_inside(checkpoint, content):
    (checkpoint.parent / "outside").write_text("x")
    (checkpoint / "manifest.json").write_text(content)
    with pytest.raises(InputError):
        verify(checkpoint)


def test_a_write_that_fails_leaves_nothing_behind(tmp_path):
    def fail_halfway():
        with atomic_folder(tmp_path / "new") as folder:
            (folder / "part").write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(RunStopped):
        fail_halfway()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_while_saving_keeps_the_checkpoints_before(trained, checkpoint):
    before = sorted(p for p in checkpoint.parent.rglob("*"))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limit[1]))  # the kernel cuts files at 300 bytes
    try:
        with pytest.raises(RunStopped):
            write(step_folder(checkpoint.parent, 4), *trained, {}, [rng_state(CPU)], {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert sorted(p for p in checkpoint.parent.rglob("*")) == before
    verify(checkpoint)


def test_nothing_bears_its_final_name_before_it_is_complete(tmp_path):
    with atomic_folder(tmp_path / "new", manifest=True) as folder:
        (folder / "part").write_text("all of it")
        assert not (tmp_path / "new").exists()
    assert json.loads((tmp_path / "new" / "manifest.json").read_text())["files"]["part"] == {
        "bytes": 9,
        "sha256": "07630777646b9ad0ad5940c20f7703e5ba431d90dc8f191af6916bffca3e859c",
    }


def test_a_kill_while_a_folder_is_replaced_leaves_no_part_of_the_old_one(tmp_path, monkeypatch):
    class Killed(BaseException): ...

    def killed_after_one_file(folder, **_):
        for path in sorted(Path(folder).rglob("*"))[:1]:
            path.unlink()
            raise Killed

    for name in "ab":
        (tmp_path / "adapter").mkdir(exist_ok=True)
        (tmp_path / "adapter" / name).write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed_after_one_file)
        with pytest.raises(Killed), atomic_folder(tmp_path / "adapter") as folder:
            (folder / "c").write_text("new")
    assert {path.name for path in tmp_path.glob("adapter/*")} == {"c"}
    with atomic_folder(tmp_path / "adapter") as folder:
        (folder / "d").write_text("newer")
    assert [path.name for path in tmp_path.rglob("*")] == ["adapter", "d"]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(trained, checkpoint):
    (checkpoint / "state.json").write_text("{}")
    write(checkpoint, *trained, {}, [rng_state(CPU)], {"step": 3})
    assert verify(checkpoint) == {"step": 3}


def test_the_last_checkpoints_and_the_best_are_kept(checkpoint):
    folder = checkpoint.parent
    for step in (10, 200, 1_000_000):
        shutil.copytree(checkpoint, step_folder(folder, step))
    assert [path.name for path in checkpoints(folder)] == [
        *("step-000003", "step-000010", "step-000200", "step-1000000"),
    ]
    prune(step_folder(folder, 1_000_000), keep=2, best_step=3)
    assert [path.name for path in checkpoints(folder)] == [
        *("step-000003", "step-000200", "step-1000000"),
    ]


def test_a_new_checkpoint_is_kept_whatever_damaged_ones_come_after_it(checkpoint):
    folder = checkpoint.parent
    for step in (4, 6):  # the run went on from step 3 because step 6 was damaged
        shutil.copytree(checkpoint, step_folder(folder, step))
    prune(step_folder(folder, 4), keep=1, best_step=None)
    assert [path.name for path in checkpoints(folder)] == ["step-000004", "step-000006"]


def test_leftovers_of_a_killed_process_are_cleared(checkpoint):
    folder = checkpoint.parent
    (folder / ".unfinished-step-000004").mkdir()
    (folder / ".unfinished-scores.json").write_text("{")
    clean(folder)
    assert [path.name for path in folder.iterdir()] == ["step-000003"]
