"""Whole jobs: the section with tiny models in this process, its records, rates and curves."""

import ast
import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from bench.jobs import child, definitions, petl_job, section, trainer_job
from bench.jobs.definitions import Job, Settings
from bench.jobs.runs import Runner
from datasets import load_from_disk
from safetensors.torch import load_file
from training_fixtures import drawing_once, train

import petl
from petl.errors import RunStopped
from petl.training.runs.resume import ADAPTER

pytest_plugins = ["training_fixtures"]

MODULES = {"bench.jobs.petl_job": petl_job, "bench.jobs.trainer_job": trainer_job}
UPPER = ("petl, fast, fills the store", "petl, fast, reads the store")


@pytest.fixture
def job(tiny, monkeypatch):
    """A job of two blocks and a classifier, in place of the quickstart."""
    words = [word for word in tiny.classify if not word.startswith(("train.steps", "train.linear"))]
    made = Job("quickstart", "tiny", (*words, "train.epochs=2"), (), blocks=2, upper=1)
    monkeypatch.setitem(definitions.JOBS, "quickstart", made)
    return made


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Run the modules of processes in this one, and count them."""
    started = []

    def process(runner, module, request):
        started.append(module)
        monkeypatch.setenv("PETL_CACHE", str(runner.cache))
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(request)))
        monkeypatch.setattr(sys, "argv", ["petl"])
        command, loop = petl_job_targets()
        fit, evaluate = command.fit, loop.evaluate
        try:
            with drawing_once():
                status = MODULES[module].main()
        except SystemExit as ended:  # of `petl train`
            status = ended.code
        finally:
            command.fit, loop.evaluate = fit, evaluate
        assert not status
        return 12.0

    monkeypatch.setattr(Runner, "_process", process)
    return started


def petl_job_targets():
    from petl.cli import train as command
    from petl.training.loop import Loop

    return command, Loop


def settings(folder, **more):
    return Settings(folder=folder, names=("quickstart",), rates=(1e-3, 1e-2), **more)


def test_the_seconds_are_those_to_a_score_that_all_reach():
    curves = {
        "Trainer": [(10, 0.40), (20, 0.55), (30, 0.50)],
        "petl": [(5, 0.52), (15, 0.54), (25, 0.56)],
        "petl, fast, fills the store": [(1, 0.30), (2, 0.50)],
    }
    # the best of Trainer is the lower one of the two with all blocks
    assert section.seconds_to_score(curves, "accuracy") == {
        "Trainer": {"s to 55.0 %": 20}, "petl": {"s to 55.0 %": 25},
        "petl, fast, fills the store": {},
    }  # fmt: skip
    losses = {name: [(s, 2 - score) for s, score in curve] for name, curve in curves.items()}
    assert section.seconds_to_score(losses, "loss")["petl"] == {"s to loss 1.45": 25}
    assert section.seconds_to_score({}, "loss") == {}


@pytest.mark.thorough
def test_variants_share_rows_and_the_places_of_their_adapters(job, here, tmp_path):
    runner = Runner(job, settings(tmp_path), 1, lambda line: None)
    runner.prepare()
    data = tmp_path / "quickstart" / "data"
    parts = {name: load_from_disk(str(data / name)) for name in ("train", "rest", "validation")}
    texts = {name: {tuple(row["input_ids"]) for row in part} for name, part in parts.items()}
    assert len(parts["rest"]) + len(parts["validation"]) == len(parts["train"]) == 50
    assert texts["rest"] | texts["validation"] == texts["train"]

    kept = {}
    real = trainer_job.trainer_of

    def kept_trainer(*args):
        kept["trainer"] = real(*args)
        return kept["trainer"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_job, "trainer_of", kept_trainer)
        runner.run(job.variants[0], (1e-3, 1e-2), 0)
    trained = {n.replace(".default", "") for n, p in kept["trainer"].model.named_parameters()
               if p.requires_grad}  # fmt: skip
    groups = kept["trainer"].optimizer.param_groups
    assert {group["initial_lr"] for group in groups} == {1e-3, 1e-2}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.01}

    run = tmp_path / "run"
    no_buckets = next(v for v in job.variants if v.name == "petl, no buckets")
    words = runner._words(no_buckets, (1e-3, 1e-2), 0, run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PETL_CACHE", str(runner.cache))
        train([word for word in words if not word.startswith("train.run=")], run)
    names = load_file(run / ADAPTER / "adapter_model.safetensors")
    own = {name.replace(".modules_to_save", "") for name in names}
    assert own == {name.replace(".modules_to_save", "") for name in trained}


@pytest.mark.thorough
def test_stored_states_are_read_by_the_variant_that_reads_and_absent_for_the_one_that_fills(
    job, here, tmp_path
):
    runner = Runner(job, settings(tmp_path), 1, lambda line: None)
    runner.prepare()
    variants = {variant.name: variant for variant in job.variants}
    fills, reads = (variants[name] for name in UPPER)
    frozen = runner.cache / "frozen"
    runner.run(reads, (1e-3, 1e-2), 0)
    assert len(here) == 2  # the first has computed what the second has read
    stores = sorted(path.name for path in frozen.iterdir())
    assert stores
    (frozen / "other").mkdir()
    runner.run(fills, (1e-3, 1e-2), 0)
    assert sorted(path.name for path in frozen.iterdir()) == stores  # made again
    runner.run(reads, (1e-2, 1e-2), 0)
    assert len(here) == 4


def test_what_does_not_exist_is_refused(job, tmp_path):
    with pytest.raises(petl.InputError, match="'cooking'"):
        section.measure(replace(settings(tmp_path), names=("cooking",)), lambda line: None)
    runner = Runner(job, settings(tmp_path, variants=("Trainer, by luck",)), 1, lambda line: None)
    with pytest.raises(petl.InputError, match="'Trainer, by luck'"):
        _ = runner.variants


def test_a_failing_run_names_its_log(job, tmp_path):
    runner = Runner(job, settings(tmp_path), 1, lambda line: None)
    runner.folder.mkdir(parents=True)
    with pytest.raises(RunStopped, match="no_such_module"):
        runner._process("bench.jobs.no_such_module", {})


def test_a_stopped_benchmark_stops_its_run(job, tmp_path, monkeypatch):
    pid = tmp_path / "pid"
    code = f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\n"
    (tmp_path / "sleepy.py").write_text(f"{code}os.kill(os.getppid(), 15)\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    runner = Runner(job, settings(tmp_path), 1, lambda line: None)
    runner.folder.mkdir(parents=True)
    with pytest.raises(SystemExit, match="143"):
        runner._process("sleepy", {})
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_the_process_of_trainer_imports_nothing_of_petl():
    for module, own in ((trainer_job, {"bench"}), (child, set())):
        tree = ast.parse(Path(module.__file__).read_text())
        froms = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        roots = {name.split(".")[0] for name in (*froms, *names)}
        assert roots.isdisjoint({"petl", "bench"} - own)
        assert {name for name in froms if name.startswith("bench")} <= {"bench.jobs.child"}
