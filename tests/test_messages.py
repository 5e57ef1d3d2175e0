"""Messages about wrong input: each has the value, what is allowed, and the way out.

The rows are in messages.yaml, by room and kind of input; the kinds are the functions below. A
mapping may have files to write, keys with a dot; what is done with them is then in `do`, unless it
is a mapping, too. Of one room: `pytest tests/test_messages.py -k data-`.
"""

import json
import re
import shlex
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from tiny_families import FAMILIES
from unchanged import everything

from petl.errors import InputError

TEXTS = "text,label\ngood film,pos\nbad film,neg\nfine,pos\n"
ROOMS = yaml.load(Path(__file__).with_name("messages.yaml").read_text(), yaml.CSafeLoader)


def each(given):
    """The inputs of a row: one for each method of a list."""
    methods = given.get("method") if isinstance(given, dict) else None
    return [{**given, "method": m} for m in methods] if isinstance(methods, list) else [given]


ROWS = [
    pytest.param(kind, given, words, id=f"{room}-{kind}-{ascii(given)[:60]}")
    for room, kinds in ROOMS.items()
    for kind, rows in kinds.items()
    for row, *words in rows
    for given in each(row)
]


def write(file, content):
    """Write a text, lines of JSON from a list, or JSON from a mapping."""
    if not isinstance(content, str):
        rows = content if isinstance(content, list) else [content]
        content = "\n".join(map(json.dumps, rows))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, newline="")


def run(given, folder, capsys):
    """Settings of a run, as words of the command line; nothing is loaded."""
    from petl.training.compose import compose
    from petl.training.runs.run_config import read_config

    read_config(compose(shlex.split(given)))


def command(given, folder, capsys):
    """A command of petl, which exits with status 2."""
    from petl.cli.main import main

    try:
        status = main(shlex.split(given))
    except SystemExit as left:  # of argparse
        status = left.code
    assert status == 2
    raise InputError(capsys.readouterr().err)


def wrap(given, folder, capsys):
    """A method with its fields, on the model of `base`, which is to stay as it was.

    A tiny Llama, another model of petl.testing or of the families, or linear layers of the widths
    in a list; `calibration: batch` is a batch of the model.
    """
    import petl
    from petl import testing

    fields = dict(given)
    name = fields.pop("base", "tiny_llama")
    base = model_of(name)
    if fields.get("calibration") == "batch":
        fields["calibration"] = [testing.TINY_MODELS[name.removeprefix("tiny_")].batch()]
    before = everything(base)
    method = fields.pop("method")
    if "of" in fields:  # the method of a loss
        fields["method"] = fields.pop("of")
    try:
        petl.wrap(base, method, **fields)
    finally:
        assert everything(base) == before


def model_of(name):
    """A model by its name, or linear layers of these widths."""
    from torch import nn

    from petl.testing import bases, models

    if isinstance(name, list):
        return nn.Sequential(*(nn.Linear(*widths) for widths in name))
    build = getattr(models, name, None) or getattr(bases, name, None)
    return (build or FAMILIES[name].build)()


def drafter(given, folder, capsys):
    """The fields of a drafter, for a tiny Llama or the model of `base`, a name."""
    from petl.efficiency import drafting

    fields = {"base": "tiny_llama", **given}
    base = fields.pop("base")
    drafting.drafter(**fields, model=model_of(base) if isinstance(base, str) else base)


def python(given, folder, capsys):
    """An expression, with modules of petl by their full names, torch, and the working `folder`."""
    names = {"folder": folder, "petl": import_module("petl")}
    if "torch." in given:
        names["torch"] = import_module("torch")
    for path in re.findall(r"\bpetl(?:\.\w+)+", given):
        parts = path.split(".")
        for end in range(2, len(parts) + 1):
            with suppress(ModuleNotFoundError):
                import_module(".".join(parts[:end]))
    eval(given, names)


def data(given, folder, capsys):
    """Settings of a data source, by default of the files that are written, or of one with texts."""
    from petl.data.base import read_data

    usual = {"name": "files", "source": "files", "task": "classification"}
    if given.get("source", "files") == "files":
        files = sorted(path.name for path in folder.glob("*.*"))
        if not files:
            write(folder / "rows.csv", TEXTS)
            files = ["rows.csv"]
        usual |= {"train": files if len(files) > 1 else files[0], "test": files[-1]}
    train = read_data({**usual, **given}).train
    list(train.rows() if given.get("streaming") else train)


def launch(given, folder, capsys):
    """Settings of `launch`, for the processes that the environment of the test announces."""
    from petl.training.distributed.launch import make_accelerator, read_launch

    make_accelerator(read_launch(given), "no")


def job(given, folder, capsys):
    """A job of petl.train_together on a tiny BERT: what differs from one of LoRA with one step."""
    import torch

    import petl
    from petl.testing import tiny_bert

    fields = given.pop("fields", {})
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.zeros(2).long()}
    together = given.pop("together", None)
    usual = {"method": "lora", "batches": [batch], "train": {"steps": 1}}
    if isinstance(fields, dict):
        fields = {"task_type": "SEQ_CLS", **fields}
    petl.train_together(
        tiny_bert(), [petl.Job(**{**usual, **given}, fields=fields)], together=together
    )


KINDS = {f.__name__: f for f in (run, command, wrap, drafter, python, data, launch, job)}


@pytest.mark.parametrize(("kind", "given", "words"), ROWS)
def test_the_message_has_the_value_what_is_allowed_and_the_way_out(
    tmp_path, monkeypatch, capsys, kind, given, words
):
    assert words, "what the message has"
    monkeypatch.chdir(tmp_path)
    if isinstance(given, dict):
        for name, content in given.items():
            if "." in name:
                write(tmp_path / name, content)
        given = {name: value for name, value in given.items() if "." not in name}
        given = given.get("do", given)
    with pytest.raises(InputError) as refused:
        KINDS[kind](given, tmp_path, capsys)
    message = str(refused.value)
    assert [word for word in map(str, words) if word not in message] == [], message
    assert len(message) < 1500
