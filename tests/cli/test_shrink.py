"""petl shrink: from a run or a model to a smaller plain model, with a recovery that resumes."""

import json
import shutil
import subprocess

import pytest
import torch
import warm_python
from training_fixtures import train
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import petl
from petl.adapters.export.saved_adapter import find
from petl.adapters.shrink.source import ShrinkSource
from petl.cli import main
from petl.cli import shrink as command
from petl.data.models.loading import load_base
from petl.errors import RunStopped
from petl.training.evaluate import Evaluator
from petl.training.program import WrappedError

pytest_plugins = ["export_fixtures", "training_fixtures"]
CLASSIFIER = AutoModelForSequenceClassification
IDS = torch.tensor([[2, 5, 9, 12, 7, 3], [2, 8, 13, 4, 15, 3]])


def run(*words):
    return main.main([*map(str, ("shrink", *words))])


def record(folder):
    return json.loads((folder / "shrink.json").read_text())


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def dense_of(path):
    saved = find(path)
    return saved.model().merge_and_unload().eval()


def silenced(dense, blocks):
    """The dense model with the down columns of dropped channels set to 0."""
    for block in blocks:
        down = dense.get_submodule(block["path"]).output.dense
        dropped = [j for j in range(block["width"]) if j not in block["channels"]]
        down.weight.data[:, dropped] = 0
    return dense


@pytest.mark.thorough
def test_a_run_becomes_a_plain_model_that_stock_classes_load(lora_run, tmp_path, capsys):
    out = tmp_path / "small"
    assert run(lora_run.path, out, "--sparsity", 0.5, "--recover", 0) == 0
    found = record(out)
    assert [len(block["channels"]) for block in found["blocks"]] == [24, 24]
    small = CLASSIFIER.from_pretrained(out)
    assert small.config.intermediate_size == 24
    assert small.config.id2label == {0: "beast", 1: "color", 2: "tool"}
    assert AutoTokenizer.from_pretrained(out)("the cat")["input_ids"][0] == 2
    expected = logits(silenced(dense_of(lora_run.path), found["blocks"]))
    torch.testing.assert_close(logits(small), expected, atol=1e-5, rtol=1e-5)
    assert found["parameters"][1] == sum(p.numel() for p in small.parameters())
    assert found["scores"]["dense"]["accuracy"] == pytest.approx(
        lora_run.scores["after"]["accuracy"]
    )
    assert json.loads((out / "task.json").read_text())["classes"] == ["beast", "color", "tool"]
    printed = capsys.readouterr().out
    for text in (printed, (out / "README.md").read_text(), (out / "shrink.html").read_text()):
        assert f"{found['parameters'][0]:,}" in text
        assert f"{100 * found['scores']['shrunk']['accuracy']:.1f} %" in text
    assert not out.with_name("small.train").exists()


@pytest.mark.thorough
def test_the_recovery_is_a_run_with_the_ranks_of_the_dense_blocks(lora_run, tmp_path):
    out = tmp_path / "small"
    words = ("--sparsity", 0.4, "--widths", "by_block", "--multiple", 4)
    assert run(lora_run.path, out, *words, "--recover", 6, "--rank", 4) == 0
    found = record(out)
    recovery = out.with_name("small.train") / "run"
    scores = json.loads((recovery / "scores.json").read_text())
    assert scores["steps"] == 6
    assert found["scores"]["recovered"] == scores["after"]
    importance = {block["path"]: block["importance"] for block in found["blocks"]}
    expected = petl.ranks.allocate(importance, 4)
    ranks = json.loads((recovery / "adapter" / "adapter_config.json").read_text())["rank_pattern"]
    assert sorted(ranks.values()) == sorted(expected.values())
    counts = [len(block["channels"]) for block in found["blocks"]]
    loaded = petl.load_shrunk(out)
    assert [layer.intermediate.dense.out_features for layer in loaded.bert.encoder.layer] == counts
    # the small model before, with its adapter, is the one that was written
    torch.testing.assert_close(logits(loaded), logits(dense_of(recovery)), atol=1e-5, rtol=1e-5)
    again = load_base(find(recovery).model_at(out), find(recovery).task)
    assert type(again).__name__ == "BertForSequenceClassification"
    assert torch.equal(logits(again), logits(loaded))


def run_until_recovery(*words):
    """Run the command until a signal stops it where its recovery begins."""

    def interrupted(cfg):
        raise WrappedError(RunStopped("stopped by a signal", status=143))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "train", interrupted)
        assert run(*words) == 143


@pytest.mark.thorough
def test_what_was_to_recover_is_written_without_a_recovery(lora_run, tmp_path):
    out, words = tmp_path / "small", ("--sparsity", 0.4, "--widths", "by_block", "--multiple", 4)
    run_until_recovery(lora_run.path, out, *words)
    assert run(lora_run.path, out, *words, "--recover", 0) == 0
    other = tmp_path / "other"
    assert run(lora_run.path, other, *words, "--recover", 0) == 0
    assert {file.name for file in out.iterdir()} == {file.name for file in other.iterdir()}
    assert record(out)["scores"] == record(other)["scores"]
    assert torch.equal(logits(petl.load_shrunk(out)), logits(petl.load_shrunk(other)))


@pytest.mark.thorough
def test_another_run_of_the_same_name_does_not_take_what_an_earlier_one_left(
    lora_run, tiny, tmp_path, capfd
):
    out, place = tmp_path / "small", tmp_path / "run"
    shutil.copytree(lora_run.path, place)
    run_until_recovery(place, out)
    left = record(tmp_path / "small.train" / "model")
    shutil.rmtree(place)
    train([*tiny.steady, "+method=lora", "train.lr=0.02"], place)
    for recover in (0, 3):
        assert run(place, out, "--recover", recover) == 2
        assert "digest of the weights" in capfd.readouterr().err
    assert record(tmp_path / "small.train" / "model") == left
    shutil.rmtree(place)
    shutil.copytree(lora_run.path, tmp_path / "moved" / "run")
    assert run(tmp_path / "moved" / "run", out, "--recover", 0) == 0


@pytest.mark.thorough
def test_a_model_with_other_rows_or_settings_is_shrunk_anew(tiny, tmp_path, capfd):
    rows, held_out = tmp_path / "rows.csv", tmp_path / "test.csv"
    shutil.copy(tiny.folder / "train.csv", rows)
    shutil.copy(tiny.folder / "test.csv", held_out)
    model, out = tiny.folder / "llama", tmp_path / "small"
    settings = ["data.task=causal_lm", "data.max_length=16", f"data.test={held_out}"]
    words = ("--data", rows, "--sparsity", 0.3)
    run_until_recovery(model, out, *settings, *words)

    def refused(*changed):
        assert run(model, out, *changed, *words) == 2
        return capfd.readouterr().err

    assert "data.max_length=16, not 12" in refused(*settings, "data.max_length=12")
    assert "train.seed=" in refused(*settings, "train.seed=7")
    for file, name in ((rows, "training"), (held_out, "test")):
        before = file.read_text()
        file.write_text(before.replace("cat", "dog"))
        assert f"digest of the {name} rows" in refused(*settings)
        file.write_text(before)
    assert run(model, out, *settings, *words, "--recover", 0) == 0


@pytest.mark.thorough
def test_an_interrupted_recovery_goes_on_with_the_same_command(lora_run, tmp_path):
    out, words = tmp_path / "small", ("--sparsity", 0.5, "--recover", 4)
    run_until_recovery(lora_run.path, out, *words)
    assert not out.exists()
    base = out.with_name("small.train") / "model"
    before = record(base)
    assert run(lora_run.path, out, "--sparsity", 0.3, "--recover", 4) == 2  # another model
    assert run(lora_run.path, out, *words) == 0
    after = record(out)
    assert after["blocks"] == before["blocks"]
    assert after["seconds"] == before["seconds"]  # nothing was measured again
    whole = tmp_path / "whole"
    assert run(lora_run.path, whole, *words) == 0
    small, other = (CLASSIFIER.from_pretrained(path).state_dict() for path in (out, whole))
    assert all(torch.equal(tensor, other[name]) for name, tensor in small.items())


@pytest.mark.thorough
def test_a_model_takes_its_rows_from_a_file(tiny, tmp_path):
    out, rows = tmp_path / "small", tiny.folder / "train.csv"
    words = ("data.task=causal_lm", "data.max_length=16", "train.batch_size=8")
    model = tiny.folder / "llama"
    more = ("--sparsity", 0.3, "--recover", 3)
    assert run(model, out, *words, "--data", rows, *more) == 0
    small = AutoModelForCausalLM.from_pretrained(out)
    assert small.config.intermediate_size == 32
    assert {*record(out)["scores"]} == {"dense", "shrunk", "recovered"}
    longer = train(
        [*tiny.complete, "+method=lora", f"model.path={out}"], tmp_path / "run"
    )  # a base for further runs
    assert longer.scores["after"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{model}", "{out}"), "--data FILE"),
        (("{run}", "{out}", "--data", "{rows}"), "leave out --data"),
        (("{run}", "{out}", "data.label=other"), "leave out data.label=other"),
        (("{adapter}", "{out}"), "is an adapter without a run"),
        (("{run}", "{out}", "--sparsity", "0.01"), "nothing to prune"),
        (("{run}", "{out}", "--heads"), "head_dim"),
        (("{run}", "{out}", "--widths", "by_block", "--multiple", "64"), "lower it"),
        (("{run}", "{model}"), "already exists"),
        (("{run}", "{out}", "--multiple", "1000"), "lower multiple"),
        (("{run}", "{out}", "--sparsity", "0"), "(0, 1)"),
        (("{run}", "{out}", "--sparsity", "1"), "(0, 1)"),
    ],
)
def test_what_cannot_be_shrunk_is_refused(
    words, message, lora_run, tiny, tmp_path, capfd, monkeypatch
):
    # before any weights are read, or rows scored
    monkeypatch.setattr(ShrinkSource, "dense", lambda self: pytest.fail("weights are read"))
    monkeypatch.setattr(Evaluator, "test", lambda *args, **kwargs: pytest.fail("rows are scored"))
    shutil.copytree(lora_run.path / "adapter", tmp_path / "adapter")
    places = {
        "model": tiny.folder / "bert",
        "rows": tiny.folder / "train.csv",
        "run": lora_run.path,
        "out": tmp_path / "out",
        "adapter": tmp_path / "adapter",
    }
    try:
        status = run(*(word.format(**places) for word in words))
    except SystemExit as error:  # of argparse
        status = error.code
    assert status == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.train").exists()


STOCK = """
import sys
import torch
{code}
assert "petl" not in sys.modules
ids = torch.tensor([[2, 5, 9, 12, 7, 3], [2, 8, 13, 4, 15, 3]])
torch.save(model(input_ids=ids).logits.detach(), "logits.pt")
"""


@pytest.mark.thorough
@pytest.mark.parametrize("shards", ["1KB", "1GB"])
def test_the_lines_of_the_readme_load_unequal_widths_without_petl(shards, lora_run, tmp_path):
    out = tmp_path / "small"
    words = ("--sparsity", 0.4, "--multiple", 4, "--recover", 0)
    assert run(lora_run.path, out, *words, "--widths", "by_block") == 0
    code = (out / "README.md").read_text().split("```python\n")[1].partition("```")[0]
    (out / "stock.py").write_text(STOCK.format(code=code))
    small = petl.load_shrunk(out)
    (out / "model.safetensors").unlink()
    small.save_pretrained(out, max_shard_size=shards)
    assert (out / "model.safetensors").exists() == (shards == "1GB")
    line = [warm_python.python(), "stock.py"]
    subprocess.run(line, cwd=out, check=True, capture_output=True)
    assert torch.equal(torch.load(out / "logits.pt"), logits(petl.load_shrunk(out)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_recovery_raises_the_score_of_the_shrunk_model(seed, tmp_path):
    rows = ("data.train_rows=1000", "data.test_rows=1000", "train.linear_probe=false")
    words = ["+method=lora", *rows, "train.epochs=3", f"train.seed={seed}"]
    dense = train(words, tmp_path / "dense")
    assert run(dense.path, tmp_path / "small", "--sparsity", 0.5) == 0
    scores = record(tmp_path / "small")["scores"]
    assert scores["recovered"]["accuracy"] > scores["shrunk"]["accuracy"] + 0.01
