"""Whatever a file of a run contains, a command reads it or refuses it in a message that names it.

`pytest --hypothesis-profile long tests/security/test_damaged_runs.py` searches for longer.
"""

import contextlib
import copy
import json
import math
import os
import shutil

import pytest
import yaml
from compatibility_runs import write_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import STEP, seal, small_run

from petl.adapters.export.saved_adapter import find, scores_of
from petl.cli import main
from petl.errors import InputError, JobSkipped
from petl.experiments.reports import comparison_report, run_report
from petl.experiments.reports.comparison import compare_runs
from petl.experiments.reports.find_runs import find_runs
from petl.system.files.read import parse_yaml
from petl.system.processes import release_all
from petl.training.runs.resume import choose_checkpoint, identity_of
from petl.training.runs.settings import TrainConfig

pytestmark = pytest.mark.every_cell

READERS = {  # the commands that read a file
    "config.yaml": ("report", "compare", "eval", "auto"),
    "scores.json": ("report", "compare", "eval", "auto"),
    "environment.json": ("report", "compare"),
    "metrics.jsonl": ("report",),
    "predictions.jsonl": ("report",),
    "adapter/README.md": ("report",),
    "adapter/adapter_config.json": ("eval",),
    f"{STEP}/state.json": ("resume",),
    f"{STEP}/manifest.json": ("resume",),
}
STRUCTURED = [name for name in READERS if not name.startswith("adapter")]
WHOLE = {
    "empty": b"",
    "binary": bytes(range(256)),
    "utf-16": "{}".encode("utf-16"),
    "null": b"null",
    "number": b"3",
    "NaN": b"NaN",
    "text": b'"x"',
    "list": b"[]",
    "mapping": b"{}",
    "mappings": b"[{}]",
    "deep": b"[" * 100_000,
    "deep mapping": b'{"a":' * 5000,
    "huge integer": b'{"after": ' + b"9" * 5000 + b"}",
    "repeated key": b'{"after": null, "after": {}}',
    "surrogate": b'{"after": "\\ud800"}',
    "aliases": b"a: &a [x]\nb: [*a, *a]\n",
    "tag": b"!!python/object/apply:os.mkdir [ran]\n",
    "spaces": b" " * 10_000,
}
VALUES = [
    *(None, True, 0, -1, 3, 0.5, 2**63, 10**30, 1e308, -1e308, 5e-324, math.nan, math.inf),
    *("", "x", "3", "$\\bad$", "<b>", "\x1b]52;", "${oc.env:PATH}", "???", "a" * 5000, "2026"),
    *([], {}, [1], [[]], ["x"], {"a": 1}, {"name": None}, {"accuracy": 0.5}, {"": {"": []}}),
]
REMOVED = object()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("good") / "r-1")


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A run that tests damage and repair."""
    return small_run(tmp_path_factory.mktemp("bad") / "r-1")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The folder of model and data, whose paths in the settings are relative."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(autouse=True)
def _in_inputs(inputs, monkeypatch):
    monkeypatch.chdir(inputs)


@pytest.fixture(autouse=True)
def _quick(request, monkeypatch):
    """Leave out drawing, which takes a second for each page, except in the long search."""
    if request.config.getoption("--hypothesis-profile") != "long":
        monkeypatch.setattr(run_report, "line_chart", lambda *_, **__: "")
        monkeypatch.setattr(run_report, "bar_chart", lambda *_, **__: "")
        monkeypatch.setattr(comparison_report, "charts_of", lambda _: {})


def report(run):
    run_report.write_page(run)


def compare(good, run):
    found = find_runs([good, run])
    assert good in [result.path for result in found.runs]
    comparisons = compare_runs(found.runs)
    comparison_report.write_page(comparisons, run.parent / "comparison")
    if found.left_out:
        raise InputError("; ".join(found.left_out))


def evaluate(run):
    saved = find(run)
    assert saved.config.peft_type
    assert saved.run_config
    scores_of(saved.run)


def resume(run, identity):
    """Choose the checkpoint of a run as if it had not been scored, since it is finished then."""
    scores, aside = run / "scores.json", run / "aside"
    if scores.exists():
        scores.rename(aside)
    try:
        choose_checkpoint(TrainConfig(resume=str(run / STEP)), identity)
    finally:
        release_all()
        if aside.exists():
            aside.rename(scores)


def resume_automatically(run, identity):
    try:
        with contextlib.suppress(JobSkipped):  # it is finished
            choose_checkpoint(TrainConfig(resume="auto", output=str(run.parent)), identity)
    finally:
        release_all()


def commands(good, bad, name):
    """The commands that read a file of `bad`."""
    identity = identity_of(good)
    known = {
        "report": lambda: report(bad),
        "compare": lambda: compare(good, bad),
        "eval": lambda: evaluate(bad),
        "resume": lambda: resume(bad, identity),
        "auto": lambda: resume_automatically(bad, identity),
    }
    return {command: known[command] for command in READERS[name]}


def check(run_commands, file):
    """Assert that each command works, or refuses the file by its name in a short message."""
    refusals = 0
    for name, command in run_commands.items():
        try:
            command()
        except InputError as error:
            message = str(error)
            assert message.count("\n") < 3, (name, message)
            assert len(message) < 15_000, (name, message)  # values are cut where it is printed
            # the folder is named where scores are not final, a state has other settings, ...
            named = (file.name, "no finished run in", "is of another run", "needs code of its own")
            named += (f"{STEP}/",)  # a file that differs from the manifest
            assert any(text in message for text in named), (name, message)
            refusals += 1
    return refusals


class Damaged:
    """Replaces a file inside a `with` block."""

    def __init__(self, run, name, content):
        self.run, self.file, self.content = run, run / name, content
        self.before = self.file.read_bytes()

    def __enter__(self):
        self.file.unlink()
        if self.content is not None:
            self.file.write_bytes(self.content)
        self._seal()
        return self.file

    def __exit__(self, *_):
        self.file.write_bytes(self.before)
        self._seal()

    def _seal(self):
        if self.file.parent == self.run / STEP and self.file.name != "manifest.json":
            seal(self.run / STEP)


@pytest.mark.cells(60)
@pytest.mark.parametrize("kind", ["missing", "cut", *WHOLE])
@pytest.mark.parametrize("name", READERS)
def test_a_file_of_another_kind_is_named(good, bad, name, kind):
    whole = (bad / name).read_bytes()
    content = {"missing": None, "cut": whole[: len(whole) // 2]}.get(kind, WHOLE.get(kind))
    with Damaged(bad, name, content) as file:
        if kind == "missing":  # the commands name the folder, or do without
            for command in commands(good, bad, name).values():
                with contextlib.suppress(InputError):
                    command()
        else:
            check(commands(good, bad, name), file)


def places(value, path=()):
    """The path of every entry inside a value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in entries:
        yield (*path, key)
        if isinstance(entry, dict | list):
            yield from places(entry, (*path, key))


def replaced(value, path, new):
    """A copy of a value with another entry at `path`, or without it."""
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if new is REMOVED:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return value


def parsed(file):
    text = file.read_text()
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return parse_yaml(text) if file.suffix == ".yaml" else json.loads(text)


def formatted(value, suffix):
    if suffix == ".jsonl":
        return "".join(f"{json.dumps(line)}\n" for line in value).encode()
    dump = yaml.safe_dump if suffix == ".yaml" else json.dumps
    return dump(value).encode("utf-8", "surrogatepass")


@pytest.mark.cells(1)
@settings(max_examples=settings().max_examples // 3)  # each takes tenths of a second
@given(data=st.data())
@pytest.mark.parametrize("name", STRUCTURED)
def test_an_entry_of_another_kind_is_named(good, bad, name, data):
    content = parsed(bad / name)
    paths = list(places(content))
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(paths))
        value = data.draw(st.sampled_from([*VALUES, REMOVED]))
        try:
            content = replaced(content, path, value)
        except (KeyError, IndexError, TypeError):  # an entry of the first one
            continue
    with Damaged(bad, name, formatted(content, (bad / name).suffix)) as file:
        check(commands(good, bad, name), file)


# The commands


@pytest.fixture
def petl_command(capsys):
    def run(*words):
        status = main.main([str(word) for word in words])
        return status, *capsys.readouterr()

    return run


def test_compare_names_a_damaged_run_and_compares_the_others(petl_command, good, bad):
    with Damaged(bad, "environment.json", b"{") as file:
        status, out, err = petl_command("compare", good, bad)
    assert status == 1
    assert out.splitlines()[1].startswith("mola")
    assert f"left out: {file} cannot be used: it is not JSON" in err
    assert "compared 1 run; left out: 1" in err


def test_compare_names_a_path_without_a_run(petl_command, good, tmp_path):
    status, out, err = petl_command("compare", good, "nope", tmp_path)
    assert status == 1
    assert "mola" in out
    assert "left out: nope does not exist" in err
    assert f"left out: no finished run in {tmp_path}" in err
    status, out, err = petl_command("compare", "nope")
    assert (status, out) == (2, "")
    assert err.startswith("error: no finished run to compare: nope does not exist")


def test_a_report_names_the_field_that_is_damaged(petl_command, bad):
    content = replaced(parsed(bad / "scores.json"), ("after", "accuracy"), "high")
    with Damaged(bad, "scores.json", formatted(content, ".json")) as file:
        status, _, err = petl_command("report", bad)
    assert status == 2
    assert err == f'error: {file} cannot be used: after.accuracy is "high", not a number\n'


def test_a_run_whose_scores_are_damaged_can_resume_without_them(bad, good):
    with Damaged(bad, "scores.json", b"{"), pytest.raises(InputError, match=r"scores\.json"):
        choose_checkpoint(TrainConfig(resume=str(bad)), identity_of(good))
    release_all()


# Interpolations


@pytest.fixture
def with_token(bad, monkeypatch):
    """A run whose configuration asks for a secret of the reader."""
    monkeypatch.setenv("TOKEN", "the secret")
    content = parsed(bad / "config.yaml")
    content["model"]["path"] = content["data"]["train"] = "${oc.env:TOKEN}"
    content["train"]["output"] = "${train.run}"
    with Damaged(bad, "config.yaml", formatted(content, ".yaml")):
        yield bad


def test_a_report_shows_an_interpolation_as_text(with_token):
    report(with_token)
    page = (with_token / "report.html").read_text()
    assert "the secret" not in page
    assert "${oc.env:TOKEN}" in page


def test_a_comparison_shows_an_interpolation_as_text(with_token, tmp_path, petl_command):
    status, out, err = petl_command("compare", with_token, "--out", tmp_path / "page")
    assert status == 0
    written = "".join(file.read_text() for file in (tmp_path / "page").iterdir())
    assert "the secret" not in out + err + written
    assert "oc.env:TOKEN" in written


@pytest.mark.parametrize("command", ["eval", "merge", "export"])
def test_a_command_that_needs_the_value_refuses_an_interpolation(
    with_token, tmp_path, petl_command, command
):
    options = {"merge": [tmp_path / "out"], "export": [tmp_path / "out", "--lora"]}
    status, out, err = petl_command(command, with_token, *options.get(command, []))
    assert status == 2
    assert "config.yaml cannot be used: model.path is an interpolation" in err
    assert "the secret" not in out + err


def test_a_resumed_run_resolves_nothing_of_its_folder(with_token, good):
    resume_automatically(with_token, identity_of(good))
    assert identity_of(with_token)["model.path"] == "${oc.env:TOKEN}"


def test_a_pipe_in_place_of_a_file_is_not_waited_for(bad, tmp_path):
    run = shutil.copytree(bad, tmp_path / "run")
    (run / "scores.json").unlink()
    os.mkfifo(run / "scores.json")
    with pytest.raises(InputError, match=r"scores\.json"):
        report(run)
