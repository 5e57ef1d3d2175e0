"""The `petl` command: tables, messages, exit statuses."""

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from training_fixtures import Finished, Tiny, train

import petl
from petl.adapters.export.checked_folder import Difference, OutputFolder
from petl.adapters.export.saved_adapter import SavedAdapter
from petl.cli import commands, main
from petl.cli.catalog.listing import short_paper
from petl.cli.catalog.recipes import list_recipes
from petl.cli.table import COMMANDS
from petl.core.losses import LossConfig, loss, register_loss
from petl.core.spec.config import config_field
from petl.errors import RunStopped
from petl.experiments.reports.fields import UNDOCUMENTED, fields_of
from petl.system.imports.tables import LOSSES
from petl.system.settings.command_line import config_dir, groups, plus, preset_of
from petl.system.settings.schema import plain
from petl.training.compose import compose

pytest_plugins = ["training_fixtures"]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return train([*tiny.steady, "+method=loha"], tmp_path_factory.mktemp("cli") / "run")


@pytest.fixture
def petl_command(capsys: pytest.CaptureFixture[str]):
    """Run a command: exit status, standard output, standard error."""

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main.main([str(word) for word in words])
        return status, *capsys.readouterr()

    return call


def cells(table: str, first: str) -> list[str]:
    """The row of a printed table that begins with `first`."""
    (line,) = [line for line in table.splitlines() if re.split(r"\s{2,}", line)[0] == first]
    return re.split(r"\s{2,}", line)


# methods, show


def test_methods_lists_each_method_with_its_capabilities(petl_command):
    status, out, _ = petl_command("methods")
    assert status == 0
    for name in petl.list_methods():
        entry = petl.method(name)
        assert cells(out, name)[2] == entry.need
        assert cells(out, name)[-1] == short_paper(entry.paper)
    assert cells(out, "mola")[3:6] == ["no", "no", "petl"]
    # r (in + out) for the six linear layers of each of six blocks
    assert cells(out, "lora")[1] == f"{6 * 8 * (4 * 768 + 2 * 1920):,}"
    for name in petl.list_losses():
        entry = loss(name)
        use = f"+method=NAME +loss={name}"
        assert cells(out, name)[1:] == [use, entry.summary, short_paper(entry.paper)]
    paper = short_paper(loss("density").paper)
    assert cells(out, "deft")[1:] == ["+method=deft", "method lora with loss density", paper]


def test_show_lists_every_field_with_its_meaning(petl_command):
    status, out, _ = petl_command("show", "mola")
    assert status == 0
    assert petl.method("mola").paper in out
    assert cells(out, "top_k") == [
        "top_k",
        "int",
        "2",
        "experts per token, at most the experts of any layer",
    ]
    assert cells(out, "num_experts")[1:3] == ["int | list[int] | str", "inverted_triangle"]


def test_show_of_a_wrapping_method_refers_to_the_inner_fields(petl_command):
    _, out, _ = petl_command("show", "binary")
    assert cells(out, "inner")[2] == "adapter"
    assert "petl show INNER" in out
    assert "+method.FIELD=VALUE" in out
    assert 'With inner=adapter the defaults are: r=32, locations=["ffn"]' in out
    status, _, err = petl_command("show", "binary", "r")
    assert status == 2
    assert "petl show adapter r" in err


def test_show_of_a_recipe_has_the_same_call_in_python(petl_command):
    _, out, _ = petl_command("show", "deft")
    assert loss("density").paper in out
    assert "petl train +method=deft" in out
    assert cells(out, "method.lora_alpha")[2:4] == ["8", "16"]
    assert cells(out, "loss.weight")[2] == "1.0"
    (call,) = re.findall(r"petl\.wrap\(model, 'density', (.*)\)$", out, re.MULTILINE)
    fields = eval(f"dict({call})")
    cfg = compose(["+method=deft"])
    assert petl.losses.build_loss("density", **fields) == dataclasses.replace(
        petl.losses.read(plain(cfg.loss)),
        method="lora",
        method_config=fields["method_config"],
    )
    given = petl.build_config("lora", **fields["method_config"])
    assert given.to_dict() == petl.build_config(**plain(cfg.method)).to_dict()
    _, out, _ = petl_command("show", "deft", "method.lora_alpha")
    assert "configs/method/deft.yaml sets 16" in out


def test_a_new_recipe_is_found_by_its_file(petl_command, tmp_path, monkeypatch):
    (tmp_path / "configs" / "method").mkdir(parents=True)
    (tmp_path / "configs" / "method" / "lean.yaml").write_text(
        "# @package _global_\n# MoLA with one expert. It learns fast.\n"
        "defaults:\n  - mola@method\n  - _self_\nmethod:\n  num_experts: 1\n  top_k: 1\n"
        "train:\n  lr: 0.003\n"
    )
    monkeypatch.chdir(tmp_path)
    assert {"deft", "lean"} <= set(list_recipes())
    _, out, _ = petl_command("show", "lean")
    assert out.startswith(f"lean: MoLA with one expert\npaper: {petl.method('mola').paper}\n")
    assert "It learns fast." in out
    assert "also sets: train.lr=0.003" in out
    assert "petl.wrap(model, 'mola', num_experts=1, top_k=1)" in out
    assert cells(out, "method.top_k")[2:4] == ["2", "1"]


def test_a_new_loss_is_found_by_its_registration(petl_command):
    @dataclasses.dataclass
    class QuietConfig(LossConfig):
        loudness: float = config_field("how much is too much, in decibels", 3.0)

    def register(name):
        return register_loss(name, summary="less noise", paper="Nobody 2026, Quiet")(
            type("Quiet", (), {"config_cls": QuietConfig})
        )

    for taken in ("density", "lora"):  # also by a method
        with pytest.raises(ValueError, match=f"'{taken}'"):
            register(taken)
    try:
        register("quiet")
        _, out, _ = petl_command("show", "quiet")
        assert out.startswith("quiet: less noise\npaper: Nobody 2026, Quiet\n")
        assert cells(out, "loudness")[2:] == ["3.0", "how much is too much, in decibels"]
        with pytest.raises(ValueError, match="'quiet'"):
            petl.adopt("quiet", petl.get("lora"), summary="", paper="")
    finally:
        del LOSSES["quiet"]


@pytest.mark.parametrize("name", [*petl.list_methods(), *petl.list_losses()])
def test_every_field_of_every_method_and_loss_has_a_meaning(name):
    for field in fields_of(name, preset_of(name)):
        assert field.meaning != UNDOCUMENTED, f"{name}.{field.name}"
        assert len(field.gist) < 400


def test_similar_names_are_suggested(petl_command):
    for given, wanted in (("mlao", "mola"), ("densty", "density"), ("detf", "deft")):
        status, _, err = petl_command("show", given)
        assert status == 2
        assert err.startswith(
            f"error: no method, loss or recipe {given!r}; did you mean {wanted!r}"
        )
    for name, given, wanted in (("mola", "topk", "top_k"), ("deft", "loss.epss", "loss.eps")):
        status, _, err = petl_command("show", name, given)
        assert status == 2
        assert f"{name!r} has no field {given!r}; did you mean {wanted!r}" in err


# plan


@pytest.mark.thorough
def test_plan_prints_counts_sizes_and_capabilities(petl_command, tiny):
    status, out, _ = petl_command("plan", "+method=mola", *tiny.steady)
    assert status == 0
    assert cells(out, "all-linear: attention.self.query")[1:3] == ["2", "32 x 32"]
    assert re.search(r"adapter file: [\d,]+ values, [\d,]+ bytes", out)
    assert cells(out, "one pass")[1].endswith(("kB", "MB"))
    assert cells(out, "petl merge")[1].startswith("no: MoLA adapters depend on the input")
    assert "run: 4 steps" in out


@pytest.mark.cells(3)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+method=mloa"], "no method 'mloa'; did you mean 'mola'"),
        (["+method=lora", "model=minilmm"], "no model 'minilmm'; did you mean 'minilm'"),
        (["+method=lora", "method.rr=2"], "no setting method.rr; did you mean 'r'"),
        (["+method=mola", "method.top_k=0"], "top_k=0 is not at least 1"),
        ([], "add +method=NAME"),
        (["+method=density"], "no method 'density'; did you mean +loss=density?"),
        (["+method=lora", "+loss=deft"], "no loss 'deft'; did you mean +method=deft?"),
        (["+method=lora", "+loss=densty"], "no loss 'densty'; did you mean 'density'"),
    ],
)
def test_bad_input_is_one_message_and_status_2(petl_command, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without configurations, of which there would be a line
    status, out, err = petl_command("plan", *words)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


# eval, merge, export


def test_eval_prints_the_scores_of_the_run(petl_command, run):
    status, out, _ = petl_command("eval", run.path)
    assert status == 0
    names = [line.split()[0] for line in out.splitlines()[1:6]]
    assert names == ["accuracy", "macro_f1", "matthews", "loss", "rows"]  # the metric first
    for name, value in run.scores["after"].items():
        text = "20" if name == "rows" else f"{value:.6f}"
        assert cells(out, name)[1:] == [text, text]
    assert "different from scores.json" not in out


def test_eval_reports_scores_that_differ_from_those_of_the_run(petl_command, run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    (copy / "scores.json").write_text('{"after": {"accuracy": 2.0}}')
    _, out, _ = petl_command("eval", copy)
    assert "different from scores.json: accuracy" in out


def copied(run, folder):
    """A copy of a run."""
    return Finished(shutil.copytree(run.path, folder))


def test_eval_fails_on_outputs_that_are_not_finite_and_names_the_first(petl_command, run, tmp_path):
    copy = copied(run, tmp_path / "run")
    # finite, but products of them are not
    huge = {n: torch.full_like(t, 1e30) if "hada" in n else t for n, t in run.adapter.items()}
    save_file(huge, copy.path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    (copy.path / "adapter" / "base_fingerprint.json").unlink()  # of the file as it was
    status, out, err = petl_command("eval", copy.path)
    assert status == 1
    assert "the outputs on the test examples are not finite (loss is nan): all weights are " in err
    assert "the first output that is not is that of base_model.model.bert.encoder.layer.0" in err
    assert "device" not in out + err


def test_eval_on_other_test_examples_says_so(petl_command, run, tmp_path):
    copy = copied(run, tmp_path / "run")
    config = OmegaConf.load(copy.path / "config.yaml")
    config.data.test_rows = 10
    OmegaConf.save(config, copy.path / "config.yaml")
    _, out, _ = petl_command("eval", copy.path)
    assert "the run was scored on other test examples (their number differs)" in out
    assert "device" not in out


def test_eval_refuses_a_truncated_adapter(petl_command, run, tmp_path):
    copy = tmp_path / "run"
    (copy / "adapter").mkdir(parents=True)
    (copy / "config.yaml").write_text((run.path / "config.yaml").read_text())
    for file in (run.path / "adapter").iterdir():
        content = file.read_bytes()
        cut = len(content) - 100 if file.suffix == ".safetensors" else len(content)
        (copy / "adapter" / file.name).write_bytes(content[:cut])
    status, _, err = petl_command("eval", copy)
    assert status == 2
    assert "cannot be read" in err


def test_merge_and_export_print_how_outputs_compare(petl_command, run, tmp_path):
    for words, what in ((["merge"], "merged model"), (["export", "--lora"], "plain LoRA")):
        out_folder = tmp_path / words[0]
        status, out, _ = petl_command(*words, run.path, out_folder)
        assert status == 0
        assert f"{what} in {out_folder}" in out
        assert re.search(r"outputs differ by \d\.\de-\d\d of their norm", out)
        assert out_folder.is_dir()


def test_another_base_has_to_be_asked_for(petl_command, run, tmp_path, monkeypatch):
    chosen: list[bool] = []

    def write(saved: SavedAdapter, *arguments: object) -> None:
        chosen.append(saved.other_base)
        raise RunStopped("enough")

    monkeypatch.setattr("petl.adapters.export.merge.merge", write)
    formats = ("lora", "gguf", "onnx")
    for name in formats:
        monkeypatch.setattr(f"petl.adapters.export.{name}.export_{name}", write)
    for words in (["merge"], *(["export", f"--{name}"] for name in formats)):
        for option in ([], ["--other-base"]):
            petl_command(*words, *option, run.path, tmp_path / "out")
    assert chosen == [False, True] * 4


def test_export_writes_one_format_and_says_how_it_is_used(petl_command, run, tmp_path, monkeypatch):
    for given in ([], ["--lora", "--gguf"]):
        with pytest.raises(SystemExit):
            petl_command("export", *given, run.path, tmp_path / "out")
    written = OutputFolder(tmp_path / "out", Difference(1e-7, 1e-6, 1.0, 0.5))
    monkeypatch.setattr("petl.adapters.export.gguf.export_gguf", lambda *_, **__: written)
    status, out, _ = petl_command("export", "--gguf", run.path, tmp_path / "out")
    assert status == 0
    assert f"GGUF adapter in {tmp_path / 'out'}," in out
    assert f"llama-cli -m BASE.gguf --lora {tmp_path / 'out'}/adapter.gguf" in out


def test_a_missing_run_is_refused(petl_command, tmp_path, capsys):
    for words in (["eval"], ["merge"], ["export", "--lora"]):
        rest = [] if words == ["eval"] else [tmp_path / "out"]
        with pytest.raises(SystemExit) as stopped:
            petl_command(*words, tmp_path / "none", *rest)
        assert stopped.value.code == 2
        assert "none is not a directory" in capsys.readouterr().err


def test_a_difference_above_the_tolerance_has_status_1(petl_command, run, tmp_path, monkeypatch):
    def differ(*arguments: object) -> None:
        raise RunStopped("the outputs differ")

    monkeypatch.setattr("petl.adapters.export.merge.check", differ)
    status, _, err = petl_command("merge", run.path, tmp_path / "out")
    assert (status, err.splitlines()[-1]) == (1, "the outputs differ")
    assert not (tmp_path / "out").exists()


# The command itself


def test_help_imports_nothing_heavy():
    line = "import sys; from petl.cli import parser; parser.parser(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    heavy = {"torch", "peft", "hydra", "omegaconf", "rich", "matplotlib", "petl.cli.commands"}
    assert not heavy & set(done.stdout.split())


@pytest.mark.parametrize("command", sorted({*COMMANDS} - {"train"}))
def test_each_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main.main([command, "--help"])
    assert stopped.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 6


@pytest.mark.parametrize("words", [[], ["nonsense"], ["export", "--foo"], ["merge"], ["show"]])
def test_wrong_arguments_have_status_2(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main.main(words)
    assert stopped.value.code == 2
    assert "usage: petl" in capsys.readouterr().err


def test_an_interrupt_is_one_word_and_status_130(petl_command, monkeypatch):
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "methods", interrupted)
    assert petl_command("methods") == (130, "", "interrupted\n")


def test_help_of_train_lists_groups_as_they_are_written_and_settings_with_their_comments(capsys):
    assert main.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for group in groups():
        assert f"  {plus(group)}{group}=NAME" in text
    assert "sweep=NAME" not in text  # configurations of W&B
    listed = OmegaConf.load(config_dir() / "train.yaml").train
    shown = OmegaConf.create(text[text.index("train:\n") : text.index("\n\nBefore a run:")]).train
    assert shown == listed
    assert "# steps between checkpoints" in text
