"""Write the recorded files of tests/compatibility: adapters, stopped runs, losses.

    python scripts/make_compatibility_fixtures.py                # write what is not there yet
    python scripts/make_compatibility_fixtures.py --record FILE  # write all results, bit-exact
    python scripts/make_compatibility_fixtures.py --check FILE   # compare all results with a record

The files are a promise, from version 0.2.0 on, to users who have saved adapters and stopped runs:
they are only added to, and this script changes no file that exists. To pin something new, add an
entry to tests/fixtures/compatibility_cases.yaml and run it again.

The tests compare within tolerances, so that they pass on other processors. `--record` and `--check`
compare bits, on one machine with the same packages: run the first before a refactor and the second
after it. Results are logits, losses, and what was trained; the order of tensors is left out.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see train.py
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests" / "fixtures"))

import compatibility_cases as cases
import compatibility_runs as runs
import torch
from compatibility_bases import base, batch, logits
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from training_fixtures import Finished, launch, train

import petl
from petl.cli.arguments import file_to_read, file_to_write

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "compatibility"
LOADERS = {"petl.load": petl.load, "PeftModel.from_pretrained": PeftModel.from_pretrained}
WEIGHTS = "adapter_model.safetensors"


# Writing


def write_adapters(folder: Path) -> None:
    """A folder for each saved adapter that has none."""
    for name in cases.SAVED:
        case = cases.ADAPTERS[name]
        if (folder / name).exists():
            continue
        model = cases.stir(cases.wrap(name))
        cases.train(model, case.base, case.steps)
        inputs = batch(case.base, number=100)
        found = logits(model, inputs)
        model.save_pretrained(str(folder / name), save_embedding_layers=False)
        (folder / name / "README.md").unlink()  # PEFT's template of a model card
        plain = logits(base(case.base), inputs)
        loaded = logits(petl.load(base(case.base), folder / name), inputs)
        gap, change = (float((one - found).abs().max()) for one in (loaded, plain))
        print(f"{name}: loaded {gap:.1e} off, the adapter changes logits by up to {change:.2f}")
        tensors: dict[str, Any] = {f"inputs.{key}": value for key, value in inputs.items()}
        tensors |= {"logits": found, "base_logits": plain}
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(tensors, folder / name / "expected.safetensors")


def write_losses(file: Path) -> None:
    """The losses of each case, and of the quickstart, that the file lacks."""
    there = json.loads(file.read_text()) if file.exists() else {"methods": {}}
    for name in cases.LOSSES:
        if name not in there["methods"]:
            there["methods"][name] = cases.losses(name)
    if "quickstart" not in there:
        with tempfile.TemporaryDirectory() as folder:
            run = quickstart(Path(folder))
            there["quickstart"] = {
                "losses": [line["loss"] for line in run.metrics],
                **{name: run.scores[name]["loss"] for name in ("before", "after")},
            }
    file.write_text(json.dumps(there, indent=1) + "\n")


def quickstart(folder: Path) -> Finished:
    """Run the README's command, shortened, in a process of its own."""
    done = launch([*cases.QUICKSTART, "train.run=run"], folder)
    assert done.returncode == 0, done.stderr
    return Finished(folder / "run")


def write_checkpoints(folder: Path) -> None:
    """A stopped run, and the losses of the uninterrupted one, for each of `RUNS` that has none."""
    if not (folder / "train.csv").exists():
        folder.mkdir(exist_ok=True)
        runs.write_data(folder)
    for name, words in runs.RUNS.items():
        if (folder / name).exists():
            continue
        overrides = [*runs.COMMON, *words]
        with tempfile.TemporaryDirectory() as there, chdir(there):
            runs.write_inputs(Path())
            whole = train(overrides, Path("whole"))
            with killed_at(runs.KILLED):
                train(overrides, Path("run"))
            for left in ("environment.json", ".lock"):  # describe this machine and process
                (Path("run") / left).unlink()
            expected = {
                "overrides": overrides,
                "losses": [line["loss"] for line in whole.metrics],
                "after": whole.scores["after"]["loss"],
            }
            shutil.copytree("run", folder / name / "run")
        (folder / name / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
        print(f"{name}: {expected['losses']}, {expected['after']}")


@contextmanager
def killed_at(step: int) -> Generator[None]:
    """Kill training in its block after this step, before the method acts on it."""

    class Killed(BaseException):
        pass

    after_step = petl.Lifecycle.after_step

    def killing(self: petl.Lifecycle, now: int, optimizer: Any) -> None:
        if now == step:
            raise Killed
        after_step(self, now, optimizer)

    petl.Lifecycle.after_step = killing
    try:
        yield
    except Killed:
        pass
    else:
        raise AssertionError(f"the run went on after step {step}")
    finally:
        petl.Lifecycle.after_step = after_step


# Comparing bits


def results() -> Iterator[tuple[str, Any]]:
    """Everything that is compared, with a name."""
    for name in cases.SAVED:
        case = cases.ADAPTERS[name]
        folder = FOLDER / "adapters" / name
        inputs = batch(case.base, number=100)
        for way, loader in LOADERS.items():
            model: Any = loader(base(case.base), folder)
            yield f"adapter {name}, {way}: logits", digest([logits(model, inputs)])
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        yield f"adapter {name}: tensors when saved again", named_digest(state)
    for name, case in cases.LOSSES.items():
        model = cases.stir(cases.wrap(name))
        found = cases.train(model, case.base, cases.STEPS)
        yield f"training {name}: losses", found
        trained = [p for p in model.parameters() if p.requires_grad]
        yield f"training {name}: trained tensors", digest(trained)
        yield f"training {name}: buffers", digest(model.buffers())
    with tempfile.TemporaryDirectory() as folder:
        yield from of_run("quickstart", quickstart(Path(folder)))
    for name in runs.RUNS:
        with tempfile.TemporaryDirectory() as folder, chdir(folder):
            runs.write_inputs(Path())
            shutil.copytree(FOLDER / "checkpoints" / name / "run", "run")
            given = runs.expected_of(name)
            run = train([*given["overrides"], "train.resume=run"], Path("run"))
            yield from of_run(f"resumed {name}", run)


def of_run(what: str, run: Finished) -> Iterator[tuple[str, Any]]:
    yield f"{what}: log", [{k: v for k, v in m.items() if k != "seconds"} for m in run.metrics]
    yield f"{what}: scores", run.scores["after"]
    yield f"{what}: adapter", named_digest(load_file(run.path / "adapter" / WEIGHTS))


def digest(tensors: Iterable[Tensor]) -> str:
    """A hash of tensors that depends neither on their order nor on their names."""
    return sha256("".join(sorted(sha256(raw(tensor)) for tensor in tensors)).encode())


def named_digest(tensors: dict[str, Tensor]) -> str:
    """A hash of tensors with their names."""
    return sha256("".join(f"{n} {sha256(raw(t))}" for n, t in sorted(tensors.items())).encode())


def raw(tensor: Tensor) -> bytes:
    whole = tensor.detach().cpu().contiguous()
    return (
        f"{whole.dtype} {list(whole.shape)} ".encode()
        + whole.flatten().view(torch.uint8).numpy().tobytes()
    )


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def record(file: Path) -> int:
    """Write all results to a file."""
    found = {}
    for name, value in results():
        found[name] = value
        file.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{len(found)} results: {file}")
    return 0


def check(file: Path) -> int:
    """Print each result that is not bit-exact as in the file; 1 if there is one."""
    expected = json.loads(file.read_text())
    different = 0
    for name, value in results():
        if expected.pop(name, None) != json.loads(json.dumps(value)):
            different += 1
            print(f"different: {name}")
    for name in expected:
        print(f"missing: {name}")
    print(f"{different} results differ, {len(expected)} are missing")
    return int(bool(different or expected))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ways: dict[str, Callable[[Path], int]] = {"record": record, "check": check}
    for way, kind in (("record", file_to_write), ("check", file_to_read)):
        parser.add_argument(f"--{way}", type=kind, metavar="FILE")
    chosen = {way: file for way, file in vars(parser.parse_args()).items() if file}
    torch.set_num_threads(1)
    if chosen:
        return max(ways[way](file.resolve()) for way, file in chosen.items())
    write_adapters(FOLDER / "adapters")
    write_losses(FOLDER / "losses.json")
    write_checkpoints(FOLDER / "checkpoints")
    return 0


if __name__ == "__main__":
    sys.exit(main())
