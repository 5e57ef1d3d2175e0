"""Bad input stops before training: one message, no traceback, exit status 2."""

import runpy
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


NAMES = [
    (["+method=mloa"], "no method 'mloa'; did you mean 'mola'"),
    ([], "no method is chosen: add +method=NAME; available: "),
    (["method=mola"], "write +method=NAME instead of method=NAME"),
    (["launch=ddp"], "the launch is added with a plus: write +launch=NAME"),
    (["+methd=mola"], "no setting methd; did you mean 'method'"),
    (["+method=mola", "model=minilmm"], "no model 'minilmm'; did you mean 'minilm'"),
    (["+method=mola", "modle=minilm"], "no setting modle; did you mean 'model'"),
    (["+method=mola", "data=wordnt"], "no data 'wordnt'; did you mean 'wordnet'"),
    (["+method=mola", "method.rr=4"], "no setting method.rr; did you mean 'r'"),
    (["+method=mola", "+method.num_expert=4"], "no field 'num_expert'; did you mean 'num_experts'"),
    (["+method=lora", "method.lora_bais=true"], "no setting method.lora_bais; did you mean"),
    (["+method=lora", "method.lora_bias=true"], "write +method.lora_bias="),
    (["method.r=4"], "method.r needs a method: add +method=NAME"),
    (["+method=binary", "method.r=4"], "write +method.r="),
    (
        ["+method=binary", "method.inner=mos", "method.private_rank=2"],
        "write +method.private_rank=",
    ),
    (["+method=binary", "method.inner=mos", "method.private_rnk=2"], "did you mean 'private_rank'"),
    (["+method=binary", "method.inner=mos", "+method.rr=2"], "has no field 'rr'; did you mean 'r'"),
    (["+method=binary", "method.inner=mso", "method.r=4"], "no method 'mso'; did you mean 'mos'"),
    (["+method=mola", "train.lrr=1"], "no setting train.lrr; did you mean 'lr'"),
    (["+method=mola", "+train.lrr=1"], "no setting train.lrr; did you mean 'lr'"),
    (["+method=mola", "model.dtyp=float32"], "no setting model.dtyp; did you mean 'dtype'"),
    (
        ["+method=mola", "data.max_lenght=9"],
        "no setting data.max_lenght; did you mean 'max_length'",
    ),
    (["+method=deft", "+loss=density"], "loss is chosen twice; a recipe such as +method=deft"),
    (["+method=mola", "mehtod.r=4"], "no setting mehtod.r; did you mean 'method'"),
    (
        ["+method=mola", "data.pack=true"],
        "no setting data.pack here; it belongs to data=files, data=hub",
    ),
    (["+method=mola", "train.lr=[1"], "'train.lr=[1' cannot be read"),
    (["+method=mola", "train.lr"], "'train.lr' has no value: write train.lr=VALUE"),
    (["mola"], "'mola' names a configuration: write +method=mola"),
    (["+method=mola", "smollm2"], "'smollm2' names a configuration: write model=smollm2"),
    (["+method=mola,lora"], "add --multirun"),
    (["+method=7"], "no method 7; available: "),
    (["+method=lora", "method=null"], "no method None; available: "),
    (["+method=lora", "method.name=[a]"], "no method ['a']; available: "),
    (["+method=lora", "data.source=[a]"], "no data source ['a']; "),
    (["+method=lora", "model.source={a:1}"], "no model source {'a': 1}; "),
    (["+method=lora", "tracker.name=[a]"], "no tracker ['a']; "),
    (["+method=lora", "=1"], "'=1' names no setting: write SETTING=VALUE"),
    (["+method=lora", "train=7"], "train=7 is not a group of settings"),
    (["+method=lora", "~train"], "the group train is not a group of settings"),
    ([f"+method={'a' * 5000}"], "...[4,923 characters]...aaaa"),
    (["+method=lora", "hydra.run.dir=abc"], "hydra.run.dir=abc has no effect on a run: set train"),
    (["+method=lora", f"{'a' * 5000}=1"], "File name too long"),
    (["+method=lora", f"train.steps={'1' * 5000}"], "Exceeds the limit (4300 digits)"),
    (["+method=lora", f"train.betas={'[' * 300}{']' * 300}"], "nested too deeply"),
]
VALUES = [
    (["train.lr=abc"], "train.lr='abc' is not of type float"),
    (["train.lr=-1"], "train.lr=-1.0 is not a number above 0"),
    (["train.lr=1e-3x"], "is not of type float"),
    (["train.batch_size=0"], "train.batch_size=0 is not an integer from 1"),
    (["train.steps=2.5"], "train.steps=2.5 is not of type int"),
    (["train.schedule=liner"], "train.schedule='liner' is not one of linear, cosine, constant"),
    (["train.precision=fp16"], "train.precision='fp16' is not one of no, bf16, auto"),
    (["train.early_stopping=2"], "needs train.eval_steps"),
    (["train.warmup=500"], "train.warmup=500 is 500 steps, and the run has only 4"),
    (["train.loraplus_ratio=4", "+method=ia3"], "tensors named lora_B"),
    (["method.r=0"], "r=0"),
    (["method.top_k=9"], "top_k"),
    (["method.target_modules=[qery]"], "qery"),
    (["++method.target_modules=7"], "target_modules=7 is not of type"),
    (["method.r=1000000000000"], "r=1000000000000 is above 32"),
    (["train.num_workers=100000"], "train.num_workers=100000 is too many for this machine"),
    (["train.steps=99999999999999999999"], "train.steps=99999999999999999999 is out of range"),
    (["train.epochs=1e300", "train.steps=null"], "train.epochs=1e+300 is "),
    (["data.max_length=99999999999999999999"], "is out of range"),
    ([f"train.run={'a' * 5000}"], "is not a path"),
    ([f"train.output={'a' * 5000}"], "is not a path"),
    ([f"train.batch_sizes={'a' * 5000}"], "is not a path"),
    ([f"data.train={'a' * 5000}.csv"], "is not a path"),
    ([f"model.path={'a' * 5000}"], "is not a path"),
    (["train.run=/dev/null"], "/dev/null"),
    (["train.resume=/dev/null"], "train.resume=/dev/null is not a directory"),
    (["model.dtype=fp8"], "model.dtype='fp8'"),
    (["train.resume=nowhere"], "train.resume=nowhere is not a directory"),
    (["train.output=/proc/petl"], "cannot write to /proc"),
    (["data.train=missing.csv"], "missing.csv"),
    (["data.label=klass"], "klass"),
    (["model.path=nowhere"], "model.path=nowhere is not a directory"),
]


def check(status, output, message, folder):
    assert list(folder.iterdir()) == []  # nothing is left behind
    assert status == 2, output
    assert message in output
    assert "Traceback" not in output
    assert "Error executing job" not in output
    # lines about the progress may come before
    before = ("loading model path", "adapters reach")
    output = "".join(x for x in output.splitlines(keepends=True) if not x.startswith(before))
    assert output.startswith("error: "), output
    assert output.count("\n") == 1, output


@pytest.mark.parametrize(("words", "message"), NAMES, ids=lambda value: str(value)[:40])
def test_an_unknown_name_is_refused_with_similar_ones(typed, tmp_path, words, message):
    check(*typed(*words), message, tmp_path)


@pytest.mark.parametrize(("words", "message"), VALUES, ids=lambda value: str(value)[:40])
def test_a_value_out_of_range_is_refused_with_what_is_allowed(
    typed, tiny, tmp_path, words, message
):
    method = [] if "+method=ia3" in words else ["+method=mola"]
    check(*typed(*tiny.classify, *method, *words), message, tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.r=a"], "r='a' is not of type int"),
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

    with pytest.raises(KeyError, match="a bug"):
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


def test_compose_explains_errors_in_other_commands():
    with pytest.raises(InputError, match=r"no setting train\.lrr; did you mean 'lr'"):
        compose(["+method=mola", "train.lrr=1"])
    assert compose(["+method=mola", "method.r=3"]).method.r == 3


def test_an_option_before_a_wrong_value_is_not_blamed():
    word = f"train.steps={'9' * 5000}"
    with pytest.raises(InputError, match="cannot be read: Exceeds the limit") as refused:
        compose([word])
    options = ["-m", "--config-dir", "mine", "--config-dir=mine"]
    assert explain(refused.value.__cause__, [*options, word]) == explain(
        refused.value.__cause__, [word]
    )
