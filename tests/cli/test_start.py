"""What is wrong in the words of a command is answered without torch, as it is found later."""

import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import warm_python
from safetensors.torch import save_file

from petl.data.base import check_early, read_data
from petl.data.models.sources import SMOLLM2_FOLDER
from petl.errors import InputError
from petl.system.settings.command_line import options_of, plus
from petl.system.settings.schema import plain
from petl.training.compose import compose
from petl.training.runs.early import look_up_fields
from petl.training.runs.run_config import read_config

# runs `petl`, and prints which of the slow packages it has imported
RUN = """
import atexit, runpy, sys

def end():
    slow = {"torch", "transformers", "datasets", "peft"} & {*sys.modules}
    print("imported:", *sorted(slow))

atexit.register(end)
sys.argv = ["petl", *sys.argv[1:]]
runpy.run_module("petl", run_name="__main__")
"""
FILES = "data=files data.train=rows.csv"
NO_RUN = (
    *("chat runs/mine", "merge runs/mine out", "eval runs/mine", "predict runs/mine rows.csv"),
    *("export runs/mine out --lora", "retrieve runs/mine rows.csv --query a"),
    *("push runs/mine a/b", "compress runs/mine out", "strength runs/mine"),
    *("prune runs/mine out --drop 0.5", "combine runs/mina runs/mine --out out"),
    *("squeeze runs/mine --share 1", "mine runs/mine rows.csv rows.csv --out triples.jsonl"),
)
WRONG = {
    "train +method=moal": ("'moal'", "'mola'"),
    "train +method=lora train.lrr=1": ("train.lrr", "'lr'"),
    "train +method=lora method.rr=1": ("method.rr", "'r'"),
    "train +method=lora +loss=densty": ("'densty'", "'density'"),
    "train +method=lora model=minllm": ("'minllm'", "'minilm'"),
    "train +method=lora data.task=clasification": ("'clasification'", "'classification'"),
    "train +method=lora data=files data.train=row.csv": ("row.csv", "'rows.csv'"),
    f"train +method=lora {FILES} data.test=rows.txt": ("rows.txt", ".csv"),
    f"train +method=lora {FILES} data.label=labl": ("'labl'", "'label'"),
    "train +method=lora data=files data.train=faulty.csv": ("line 3", "line 4", "bad_rows=skip"),
    "plan +method=lora data=files data.train=cells.csv": ("'data.separator=\"|\"'", "multi_label"),
    f"train +method=lora {FILES} data.test=faulty.csv": ("line 3", "line 4", "bad_rows=skip"),
    f"data {FILES} data.task=regression": ("'a', not a number", "40 of 40 rows"),
    "train +method=lora model=hub model.name=a/b": ("a/b", "model=path"),
    "plan +method=moal": ("'moal'", "'mola'"),
    f"data {FILES} data.text=txt": ("'txt'", "'text'"),
    "pln": ("'pln'", "'plan'"),
    "train": ("+method=NAME", "mola"),
    "train -m +method=lora,moal": ("'moal'", "'mola'"),
    "train +method=lora model=path model.path=none": ("none", "save_pretrained"),
    "train +method=lora train.resume=runs/mine": ("train.resume=runs/mine", "runs/mina"),
    "train +method=lora train.init_from=mine": ("train.init_from=mine", "runs/mina"),
    f"train +method=lora {FILES} train.class_weights={{c:2}}": ("'c'", "a, b"),
    "train +method=lora train.class_weights={wether:2}": ("'wether'", "'weather'"),
    "train +method=lora method.r=-1": ("method.r=-1", "at least 1"),
    "train +method=lora method.target_modules=[key,quer]": ("'quer'", "'query'"),
    "train +method=lora model.dtype=foo": ("model.dtype='foo'", "bfloat16"),
    "train +method=lora +loss=density loss.weight=x": ("loss.weight='x'", "number"),
    "train +method=lora retain.rows=-1": ("retain.rows=-1", "integer from 1"),
    "train +method=lora learning_rate=1": ("learning_rate", "train.lr"),
    "train +method=lora train.output_dir=runs": ("train.output_dir", "train.run=FOLDER"),
    "predict runs/meno rows.csv data.text=txt": ("'txt'", "'text'"),
    "eval runs/meno --data other.csv": ("'label'", "labels"),
    "study new --methods lora,moal": ("'moal'", "'mola'"),
    "show moal": ("'moal'", "'mola'"),
    "show mola rr": ("'rr'", "'r'"),
    "report mina": ("mina", "runs/mina"),
    "compare runs/mine": ("runs/mine does not exist", "runs/mina"),
    "serve a=runs/mine": ("runs/mine", "runs/mina"),
    "serve file.gguf": ("file.gguf", "llama-server"),
    "generate runs/mina --prompt a --adapter b=runs/mine": ("runs/mine", "runs/mina"),
    "generate runs/mina --prompt a --drafter fre": ("'fre'", "'free'"),
    "predict runs/mina row.csv": ("row.csv", "'rows.csv'"),
    "draft runs/mina +drafter=hydar": ("'hydar'", "'hydra'"),
    "train +method=mola method.num_experts=abc": ("method.num_experts='abc'", "hourglass"),
    "train +method=pyra method.schedule=[1,-1]": ("method.schedule=[1, -1]", "low|high"),
    "train +method=compacter method.scaling=lerned": ("method.scaling='lerned'", "learned"),
    "predict runs/meno rows.xlsx": ("rows.xlsx", ".csv"),
    "retrieve runs/moni rows.csv --query a": ("data.task=classification", "retrieval"),
    "mine runs/mina rows.csv rows.xlsx --out triples.jsonl": ("rows.xlsx", ".csv"),
    "chat runs/moni": ("SEQ_CLS", "petl predict"),
    **dict.fromkeys(NO_RUN, ("runs/mine", "runs/mina")),
}
RIGHT = {
    "--help": "compare",
    "train --help": "train.steps",
    "methods": "mola",
    "configs": "method",
    f"data {FILES}": "[CLS] bad [SEP]",
    "data": "weather",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Rows; an adapter in runs/mina, that of a classifier in runs/moni, a run in runs/meno."""
    made = tmp_path_factory.mktemp("start")
    (made / "rows.csv").write_text("text,label\n" + "good,a\nbad,b\n" * 20)
    (made / "faulty.csv").write_text("text,label\n" + "good,a\n,b\nbad,\n" * 9)
    (made / "cells.csv").write_text("text,label\n" + "both,a|b\nlast,b|c\none,c\none,a\n" * 9)
    (made / "other.csv").write_text("text,labels\ngood,a\n")
    (made / "file.gguf").touch()
    (made / "runs/meno/adapter").mkdir(parents=True)
    (made / "runs/meno/adapter/adapter_config.json").write_text("{}")
    (made / "runs/meno/config.yaml").write_text("data: {task: classification, source: files}")
    (made / "rows.xlsx").touch()
    (made / "runs/moni").mkdir()
    (made / "runs/moni/adapter_config.json").write_text('{"task_type": "SEQ_CLS"}')
    (made / "runs/moni/task.json").write_text('{"task": "classification"}')
    (made / "runs/mina").mkdir(parents=True)
    (made / "runs/mina/adapter_config.json").write_text("{}")
    return made


@cache
def petl(words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What `petl` does in a new process, in the folder."""
    code = [warm_python.without_torch(), "-c", RUN, *words.split()]
    return subprocess.run(code, cwd=folder, capture_output=True, text=True, timeout=280)


@pytest.mark.cells(4)
@pytest.mark.parametrize("words", WRONG)
def test_wrong_words_are_answered_without_torch(words, folder):
    done = petl(words, folder)
    assert done.returncode in (1, 2), done.stderr
    for word in WRONG[words]:
        assert word in done.stderr
    assert "imported:\n" in done.stdout, done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.cells(2)
@pytest.mark.parametrize("words", RIGHT)
def test_help_and_lists_need_no_torch(words, folder):
    done = petl(words, folder)
    assert done.returncode == 0, done.stderr
    assert RIGHT[words] in done.stdout
    assert "imported:\n" in done.stdout, done.stdout


@pytest.mark.parametrize("words", [w for w in WRONG if "lora data" in w and "weights" not in w])
def test_the_message_is_that_of_the_check_of_all_settings(words, folder, monkeypatch):
    done = petl(words, folder)
    monkeypatch.chdir(folder)
    cfg = compose(words.split()[1:])
    with pytest.raises(InputError) as raised:
        read_data(read_config(cfg).resolved["data"])
    assert done.stderr == f"error: {raised.value}\n"


@pytest.mark.thorough
def test_no_configuration_of_petl_is_refused_early():
    for group in ("method", "loss", "model"):
        for name in options_of(group):
            words = [f"{plus(k)}{k}={v}" for k, v in {"method": "lora", group: name}.items()]
            more = {"config": ["model.architecture=bert"]}.get(name, [])
            if name not in ("path", "hub"):  # which have to be there
                look_up_fields(plain(compose([*words, *more])))


def test_a_target_is_looked_up_in_a_model_of_the_cache(tmp_path, monkeypatch):
    folder = tmp_path / SMOLLM2_FOLDER
    folder.mkdir()
    save_file(
        {"model.layers.0.self_attn.q_proj.weight": torch.zeros(1)}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setenv("PETL_CACHE", str(tmp_path))
    words = ["+method=lora", "model=smollm2"]
    look_up_fields(plain(compose([*words, "method.target_modules=[q_proj]"])))
    with pytest.raises(InputError, match=r"'q_prj'.*'q_proj'"):
        look_up_fields(plain(compose([*words, "method.target_modules=[q_prj]"])))


def test_rows_of_streams_are_not_read_early(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "good", "label": "a"}\n{"text": ""}\n' * 9)
    files = {"source": "files", "name": "files", "train": str(tmp_path / "rows.jsonl")}
    stream = {"streaming": True, "test": str(tmp_path / "rows.jsonl")}
    check_early({"data": {**files, **stream}})
    with pytest.raises(InputError):
        check_early({"data": files})


def test_output_that_nobody_reads_ends_a_command_silently():
    code = "from petl.training.program import reported; import sys; "
    code += "sys.exit(reported(lambda: [print('line' * 99) for _ in range(9999)]))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


def test_a_table_that_nobody_reads_ends_a_command_as_a_shell_does():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "petl", "methods"],
            stdout=writer,
            stderr=subprocess.PIPE,
            check=False,
        )
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, b"")


def test_how_a_file_is_read_is_said_by_the_run_alone(tmp_path, caplog):
    caplog.set_level("INFO", logger="petl")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "completion": "a"}\n' * 9)
    files = {"source": "files", "name": "files", "train": str(tmp_path / "rows.jsonl")}
    check_early({"data": {**files, "task": "causal_lm", "test": None}})
    assert not caplog.text
    read_data({**files, "task": "causal_lm", "test": None, "allow_overlap": True})
    assert "rows.jsonl is read as" in caplog.text
