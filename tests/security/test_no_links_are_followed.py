"""No link in a stranger's folder is followed: nothing is written, copied or shown through one.

`private` is a file of the user, at which the links point; pipes must not make a command wait.
"""

import ast
import json
import os
import shutil

import pytest
from comparable import write_run
from peft import LoraConfig, get_peft_model
from torch import nn
from training_fixtures import ROOT, train

from petl.adapters.export.saved_adapter import find
from petl.cli import main
from petl.data.models.loading import save_processor
from petl.data.tasks.classification import Classification
from petl.errors import InputError
from petl.experiments.reports.comparison import compare
from petl.experiments.reports.page import embed_png
from petl.experiments.reports.run_report import write_page
from petl.system.files.disk import (
    append_to,
    atomic_folder,
    check_links,
    copy_file,
    open_inside,
    remove,
    write_atomic,
    write_json,
)
from petl.system.processes import LOCK, claim, release_all
from petl.training.runs.checkpoint import METRICS, clean, prune, step_folder
from petl.training.runs.resume import find_checkpoint, is_finished
from petl.training.runs.run_folder import MetricsLog
from petl.training.runs.settings import TrainConfig

pytest_plugins = ["training_fixtures"]
# instead of a command that waits for a pipe
pytestmark = [pytest.mark.every_cell, pytest.mark.timeout(120)]

SECRET = "the secret of the user\n"
OUTSIDE = r"is a link to .*, outside of .*: such links are not followed; remove it"


@pytest.fixture(autouse=True)
def _unlocked():
    yield
    release_all()


@pytest.fixture
def private(tmp_path):
    """A file of the user's, in a folder of theirs."""
    file = tmp_path / "home" / "private"
    file.parent.mkdir()
    file.write_text(SECRET)
    return file


@pytest.fixture(autouse=True)
def _untouched(private):
    yield
    assert private.read_text() == SECRET
    assert list(private.parent.iterdir()) == [private]


@pytest.fixture
def run(tmp_path):
    """The folder of a finished run from a stranger."""
    folder = write_run(tmp_path / "run", 0.5, "+method=lora")
    adapter = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    adapter.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def stopped(run):
    """The same with a complete checkpoint, not finished."""
    (run / "scores.json").unlink()
    with atomic_folder(step_folder(run / "checkpoints", 4), manifest=True) as folder:
        state = {"identity": {}, "processes": 1, "rows": "", "progress": {"step": 4}}
        write_json(folder / "state.json", state)
    return run


def put(kind, path, private):
    """Put something hostile in place of `path`."""
    remove(path)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        targets = {"file": private, "folder": private.parent, "missing": private.with_name("no")}
        path.symlink_to(targets[kind])


KINDS = ["file", "folder", "missing", "pipe"]


# Folders as a whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", [LOCK, "wandb", "checkpoints", "adapter", "adapter/adapter_model.safetensors"]
)
def test_what_leads_out_of_a_folder_is_refused(run, private, kind, name):
    check_links(run)
    put(kind, run / name, private)
    with pytest.raises(InputError, match=str(run / name)):
        check_links(run)


def test_links_that_stay_inside_are_allowed(run):
    (run / "best").symlink_to("adapter")
    (run / "missing").symlink_to("adapter/missing")
    (run / "loop").symlink_to("loop")
    (run / "itself").symlink_to(".")
    check_links(run)


def test_only_in_its_own_folder_may_wandb_link_to_the_log_in_its_cache(run, private):
    (run / "wandb" / "run-1").mkdir(parents=True)
    (run / "wandb" / "run-1" / "debug-core.log").symlink_to(private)
    check_links(run)
    (run / "wandb").rename(run / "adapter" / "wandb")
    with pytest.raises(InputError):
        check_links(run)


def test_a_link_that_the_user_names_is_followed(stopped, tmp_path):
    links = tmp_path / "links" / "of" / "mine"
    links.mkdir(parents=True)
    (links / "run").symlink_to(stopped)
    found = find_checkpoint(TrainConfig(resume=str(links / "run")), {})
    assert found.resolve() == step_folder(stopped / "checkpoints", 4)
    release_all()
    (links / "best").symlink_to(found)
    assert find_checkpoint(TrainConfig(resume=str(links / "best")), {}) == found
    assert not list((tmp_path / "links").rglob(LOCK))  # the run is not looked for around the link


def test_the_cache_of_the_hub_is_allowed_whose_files_are_links(run, tmp_path):
    blobs, snapshot = tmp_path / "models--o--n" / "blobs", tmp_path / "models--o--n/snapshots/1"
    blobs.mkdir(parents=True)
    shutil.move(run, snapshot)
    for i, file in enumerate([f for f in snapshot.rglob("*") if f.is_file()]):
        file.rename(blobs / str(i))
        file.symlink_to(os.path.relpath(blobs / str(i), file.parent))
    check_links(snapshot)
    check_links(snapshot / "adapter")
    assert find(snapshot / "adapter").config.r == 8
    copy_file(snapshot / "adapter" / "adapter_config.json", tmp_path / "copy")
    assert json.loads((tmp_path / "copy").read_text())["r"] == 8
    assert is_finished(snapshot)


def test_a_folder_that_looks_like_the_cache_of_the_hub_is_not_enough(run, private, tmp_path):
    snapshot = tmp_path / "theirs" / "snapshots" / "run"
    shutil.copytree(run, snapshot)
    (tmp_path / "theirs" / "blobs").symlink_to(private.parent)
    (snapshot / "x.png").symlink_to(tmp_path / "theirs" / "blobs" / private.name)
    with pytest.raises(InputError):
        check_links(snapshot)


# Writing


@pytest.mark.parametrize("kind", KINDS)
def test_a_lock_is_not_written_through_a_link(stopped, private, kind):
    put(kind, stopped / LOCK, private)
    with pytest.raises(InputError):
        claim(stopped)
    with pytest.raises(InputError):
        find_checkpoint(TrainConfig(resume=str(stopped)), {})


def test_a_lock_with_a_second_name_is_not_written(stopped, private):
    (stopped / LOCK).hardlink_to(private)
    with pytest.raises(InputError):
        claim(stopped)


@pytest.mark.parametrize("where", ["report.html", ".unfinished-report.html"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_written_in_place_of_a_link(tmp_path, private, kind, where):
    put(kind, tmp_path / where, private)
    write_atomic(tmp_path / "report.html", "new")
    assert (tmp_path / "report.html").read_text() == "new"
    assert not (tmp_path / "report.html").is_symlink()
    assert not (tmp_path / ".unfinished-report.html").exists()


@pytest.mark.parametrize("where", ["adapter", ".unfinished-adapter"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_written_in_place_of_a_link(tmp_path, private, kind, where):
    put(kind, tmp_path / where, private)
    with atomic_folder(tmp_path / "adapter", manifest=True) as draft:
        (draft / "file").write_text("new")
    assert (tmp_path / "adapter" / "file").read_text() == "new"
    assert not (tmp_path / "adapter").is_symlink()


@pytest.mark.parametrize("kind", KINDS)
def test_the_log_is_not_appended_to_a_link(tmp_path, private, kind):
    put(kind, tmp_path / METRICS, private)
    with pytest.raises(InputError):
        MetricsLog(tmp_path, None, writes=True).append({"step": 1})
    with pytest.raises(InputError):
        append_to(tmp_path / METRICS)


@pytest.mark.parametrize("kind", KINDS)
def test_links_are_deleted_and_not_what_they_name(tmp_path, private, kind):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in (".unfinished-step-000001", "step-000001"):
        put(kind, folder / name, private)
    (folder / ".unfinished-x").mkdir()
    put(kind, folder / ".unfinished-x" / "inside", private)
    step_folder(folder, 2).mkdir()
    clean(folder)
    prune(step_folder(folder, 2), 1, None)
    assert list(folder.iterdir()) == [step_folder(folder, 2)]


# Copying and embedding


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_contains_no_file_from_outside(run, private, kind):
    put(kind, run / "x.png", private)
    with pytest.raises(InputError):
        write_page(run)
    assert not (run / "report.html").exists()
    if kind != "missing":
        with pytest.raises(InputError):
            embed_png(run / "x.png")


@pytest.mark.parametrize(
    "name", ["config.yaml", "environment.json", "scores.json", ".unfinished-report.html"]
)
def test_a_report_and_a_comparison_read_no_file_from_outside(run, private, name):
    put("file", run / name, private)
    assert main.main(["report", str(run)]) == 2
    with pytest.raises(InputError):
        compare([run])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_no_file_from_outside_is_exported(run, private, kind, name):
    put(kind, run / "adapter" / name, private)
    with pytest.raises(InputError):
        find(run)
    with pytest.raises((InputError, FileNotFoundError)):
        copy_file(run / "adapter" / name, run / "copy")
    assert not (run / "copy").exists()


def test_no_linked_adapter_is_exported(run, private):
    shutil.move(run / "adapter", run.parent / "elsewhere")
    (run / "adapter").symlink_to(run.parent / "elsewhere")
    with pytest.raises(InputError):
        find(run)


def test_a_merged_model_and_a_model_card_contain_no_file_from_outside_of_the_base(
    tiny, tmp_path, private
):
    base, task = tmp_path / "base", Classification(classes=["a", "b"], max_length=8)
    shutil.copytree(tiny.folder / "bert", base)
    (base / "model.safetensors").rename(tmp_path / "weights")
    (base / "model.safetensors").symlink_to(tmp_path / "weights")  # on another disk, say
    source = {"name": "path", "source": "path", "path": str(base)}
    save_processor(source, task, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()
    (base / "chat_template.jinja").symlink_to(private)  # `save_pretrained` writes its text
    with pytest.raises(InputError):
        save_processor(source, task, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", ["file", "folder", "pipe"])
def test_a_checkpoint_contains_no_log_from_outside(tmp_path, private, kind):
    run = tmp_path / "run"
    run.mkdir()
    put(kind, run / METRICS, private)
    with pytest.raises(InputError):
        copy_file(run / METRICS, run / "copy")
    assert not (run / "copy").exists()


@pytest.mark.parametrize("name", ["scores.json", "checkpoints/step-000004/manifest.json"])
def test_a_pipe_in_place_of_a_file_makes_no_command_wait(stopped, private, name):
    put("pipe", stopped / name, private)
    with pytest.raises(InputError):
        find_checkpoint(TrainConfig(resume=str(stopped)), {})
    with pytest.raises(InputError):
        open_inside(stopped / name)


def test_a_run_is_not_resumed_with_a_link_in_it(tiny, tmp_path, private):
    """As the user calls it: the folder of a run that was stopped before its first checkpoint."""
    run = tmp_path / "run"
    run.mkdir()
    put("file", run / LOCK, private)
    with pytest.raises(InputError, match=OUTSIDE):
        train([*tiny.classify, "+method=lora", "train.resume=auto"], run)


# The code of petl

WRITE = {"write_text", "write_bytes", "touch", "symlink_to", "hardlink_to"}
COPY = {f"shutil.{name}" for name in ("copy", "copy2", "copyfile", "copytree", "move")}


def writes(call: ast.Call) -> bool:
    """True for a call that writes a file by its path."""
    name = ast.unparse(call.func)
    last = name.rpartition(".")[2]
    mode = next((str(a.value) for a in call.args if isinstance(a, ast.Constant)), "")
    return last in WRITE or name in COPY or (last == "open" and bool(set(mode) & set("wax+")))


def test_every_file_is_written_by_the_functions_that_follow_no_link():
    """Libraries write into drafts only, which are new folders."""
    own = {ROOT / "petl" / "testing", ROOT / "petl" / "system" / "files"}
    files = [f for f in (ROOT / "petl").rglob("*.py") if not own & set(f.parents)]
    assert len(files) > 100
    for file in files:
        calls = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)]
        assert not [ast.unparse(call) for call in calls if writes(call)], file
