"""Bad input stops before training: one message, no traceback, exit status 2."""

import runpy
import shlex
import subprocess
import sys

import pytest
from training_fixtures import ROOT, command_line

from petl.data.files import Files
from petl.errors import InputError, RunStopped
from petl.training import program as app
from petl.training.compose import compose, explain

pytest_plugins = ["training_fixtures"]


@pytest.fixture
def typed(tmp_path, monkeypatch, capfd):
    """Run train.py as a program in this process; its exit status and what it wrote to stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py"), *words])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        return left.value.code, capfd.readouterr().err

    return run


# of the program as a whole; messages by their words are in tests/messages.yaml
PROGRAM = [
    (["+method=mloa"], "no method 'mloa'; did you mean 'mola'"),
    (["+method=mola,lora"], "add --multirun"),
    (["+method=lora", "hydra.run.dir=abc"], "hydra.run.dir=abc has no effect on a run: set train"),
    ([f"+method={'a' * 5000}"], "...[4,923 characters]...aaaa"),
    (["+method=lora", f"{'a' * 5000}=1"], "File name too long"),
    (["+method=lora", f"train.steps={'1' * 5000}"], "Exceeds the limit (4300 digits)"),
    (["+method=lora", f"train.betas={'[' * 300}{']' * 300}"], "nested too deeply"),
    (["+method=lora", f"train.run={'a' * 5000}"], "is not a path"),
]
READ = [  # data and model
    (["train.warmup=500"], "train.warmup=500 is 500 steps, and the run has only 4"),
    (["train.loraplus_ratio=4", "+method=ia3"], "tensors named lora_B"),
    (["method.top_k=9"], "top_k"),
    (["++method.target_modules=7"], "target_modules=7 is not of type"),
    (["method.r=1000000000000"], "r=1000000000000 is above 32"),
    (["train.epochs=1e300", "train.steps=null"], "train.epochs=1e+300 is "),
    (["train.run=/dev/null"], "/dev/null"),
    (["train.output=/proc/petl"], "cannot write to /proc"),
    (["data.label=klass"], "klass"),
]


def check(status, output, message, folder):
    assert list(folder.iterdir()) == []  # nothing is left behind
    assert status == 2, output
    assert message in output
    assert "Traceback" not in output
    assert "Error executing job" not in output
    # lines about the progress may come before
    before = ("loading model path", "adapters reach", "train.precision=auto: ")
    output = "".join(x for x in output.splitlines(keepends=True) if not x.startswith(before))
    assert output.startswith("error: "), output
    assert output.count("\n") == 1, output


@pytest.mark.parametrize(("words", "message"), PROGRAM, ids=lambda value: str(value)[:40])
def test_bad_input_ends_the_program_with_one_message(typed, tmp_path, words, message):
    check(*typed(*words), message, tmp_path)


@pytest.mark.cells(2)
@pytest.mark.parametrize(("words", "message"), READ, ids=lambda value: str(value)[:40])
def test_what_does_not_fit_data_or_model_leaves_nothing_behind(
    typed, tiny, tmp_path, words, message
):
    method = [] if "+method=ia3" in words else ["+method=mola"]
    check(*typed(*tiny.classify, *method, *words), message, tmp_path)


@pytest.mark.cells(2)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.r=a"], "method.r='a' is not an integer"),
        (["train.num_workers=100000"], "is too many for this machine"),
        (["data.test=missing.csv"], "data.test=missing.csv does not exist"),
        (["model.path=nowhere"], "is not a directory"),
        (["train.run=FULL"], "exists already"),
        (["train.resume=nowhere"], "is not a directory"),
    ],
)
def test_settings_are_checked_before_data_is_read(
    typed, tiny, tmp_path_factory, monkeypatch, words, message
):
    full = tmp_path_factory.mktemp("full")
    (full / "file").touch()
    monkeypatch.setattr(Files, "read", None)
    status, output = typed(
        *tiny.classify, "+method=mola", *(word.replace("FULL", str(full)) for word in words)
    )
    assert (status, output.count("\n")) == (2, 1)
    assert message in output


@pytest.mark.thorough
def test_an_adapter_that_does_not_fit_is_refused_before_weights_are_loaded(
    typed, tiny, monkeypatch
):
    monkeypatch.setattr("petl.data.models.loading.pretrained_model", None)
    status, output = typed(*tiny.classify, "+method=mola", "method.target_modules=[qery]")
    assert status == 2
    assert "qery" in output


def test_a_real_process_leaves_with_status_two(tmp_path):
    line = command_line(["+method=mloa"])
    ran = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: no method 'mloa'; did you mean 'mola'")
    assert ran.stderr.count("\n") == 1
    assert ran.stdout == ""


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch):
    def broken():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        app.reported(broken)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InputError("r=0 is not from 1"), 2, "error: r=0 is not from 1\n"),
        (RunStopped("stopped by SIGTERM", 143), 143, "stopped by SIGTERM\n"),
        (RunStopped("the loss was nan"), 1, "the loss was nan\n"),
    ],
)
def test_each_error_has_its_exit_status(capsys, error, status, message):
    def ending():
        raise error

    assert app.reported(ending) == status
    assert capsys.readouterr().err == message


def test_ctrl_c_before_training_is_reported(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert app.reported(interrupted) == 130
    assert capsys.readouterr().err.startswith("interrupted")


def test_only_the_first_process_reports(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    app.report("something")
    assert capsys.readouterr().err == ""


def test_an_option_before_a_wrong_value_is_not_blamed():
    word = f"train.steps={'9' * 5000}"
    with pytest.raises(InputError) as refused:
        compose([word])
    options = ["-m", "--config-dir", "mine", "--config-dir=mine"]
    assert explain(refused.value.__cause__, [*options, word]) == explain(
        refused.value.__cause__, [word]
    )


@pytest.mark.parametrize("text", ["Review Text (EN)", "Größe", "it's; so", 'a "b" = c'])
def test_a_text_that_cannot_be_parsed_is_shown_as_it_is_typed(text):
    files = ["data=files", "data.train=x.csv"]
    with pytest.raises(InputError) as refused:
        compose([*files, f"data.text={text}"])
    (word,) = shlex.split(str(refused.value).partition("those of the shell: ")[2])
    assert compose([*files, word]).data.text == text
    with pytest.raises(InputError) as refused:
        compose([*files, "data.labels=[a"])
    assert "of the shell" not in str(refused.value)
