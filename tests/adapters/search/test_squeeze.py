"""`petl squeeze`: what is written, within the bytes, resumed and refused."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from training_fixtures import train

import petl
from petl.adapters import deltas
from petl.adapters.export.saved_adapter import find
from petl.adapters.search import squeeze as module
from petl.cli import main
from petl.methods.binary import quantizer_of
from petl.ops.quantize import quantize
from petl.ops.ternary import FILE

pytest_plugins = ["training_fixtures"]

WEIGHTS = "adapter_model.safetensors"
SHARE = "0.178"  # names and shapes take most of a tiny file: from 0.150 to 0.191 of it
QUICK = ("--generations", "2", "--offspring", "4", "--rows", "20")


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Runs of lora with validation rows, of mola, and of binary lora in 4 bits."""
    root = tmp_path_factory.mktemp("runs")
    quick = [*tiny.steady, "train.steps=3", "train.lr=0.05"]
    held = ["train.eval_steps=3", "train.validation_share=0.2"]
    train([*quick, "+method=lora", *held], root / "lora")
    train([*quick, "+method=corda", "method.r=4"], root / "corda")
    bits = ["+method=binary", "method.inner=lora", "method.bits=4"]
    train([*quick, *bits], root / "binary")
    return root


@pytest.fixture
def command(capsys):
    def call(*words):
        capsys.readouterr()
        try:
            status = main.main([str(word) for word in words])
        except SystemExit as ended:
            status = ended.code
        return status, *capsys.readouterr()

    return call


def record_of(folder):
    return json.loads((folder / "squeeze.json").read_text())


def outputs(folder):
    model = petl.load(find(folder).base(), folder).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(4, 10)[None]).logits


def test_densities_within_a_share_of_the_bytes(command, runs, tmp_path):
    status, out, err = command(
        "squeeze", runs / "lora", "--share", SHARE, "--out", tmp_path / "s", *QUICK
    )
    assert status == 0, err
    record = record_of(tmp_path / "s")
    budget = int(float(SHARE) * (runs / "lora/adapter" / WEIGHTS).stat().st_size)
    assert record["settings"]["bytes"] == budget
    size = (tmp_path / "s" / FILE).stat().st_size
    assert 0.98 * budget <= size <= budget
    search = record["search"]
    assert [each["generation"] for each in search["history"]] == [1, 2]
    assert search["history"][-1]["fitness"] <= record["even_fitness"]
    # the file has the densities of the state
    found = deltas.Ternary.load(tmp_path / "s" / FILE)
    assert found.settings["scope"] == "module"
    for name, values, level in zip(record["units"], record["values"], search["state"], strict=True):
        own = [key for key in found.kept if key.startswith(f"base_model.model.{name}.")]
        entries = sum(found.shapes[key][1].numel() for key in own)
        kept = min(entries, max(1, int(values[level] * entries + 0.5)))
        assert sum(found.kept[key] for key in own) == kept
    assert "10 positions of 10 validation rows" in out
    better = search["history"][-1]["fitness"] < record["even_fitness"]
    assert ("beats the even levels" in out) == better
    assert ("found nothing better" in out) != better
    assert (tmp_path / "s/squeeze.png").read_bytes().startswith(b"\x89PNG")
    assert not torch.equal(outputs(tmp_path / "s"), outputs(runs / "lora/adapter"))
    status, _, err = command("merge", tmp_path / "s", tmp_path / "merged")
    assert status == 0, err


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["lora", pytest.param("corda", marks=pytest.mark.thorough)])
def test_ranks_become_a_lora_with_a_rank_for_each_layer(command, runs, tmp_path, name):
    whole = tmp_path / "whole"
    words = ("squeeze", runs / name, "--what", "rank", *QUICK)
    status, out, err = command(*words, "--bytes", "10MB", "--out", whole)
    assert status == 0, err
    assert "there was nothing to search" in out
    # at full ranks the outputs are those of the adapter
    torch.testing.assert_close(
        outputs(whole), outputs(runs / name / "adapter"), atol=1e-4, rtol=1e-3
    )
    budget = int(0.7 * (whole / WEIGHTS).stat().st_size)
    status, _, err = command(*words, "--bytes", budget, "--out", tmp_path / "s")
    assert status == 0, err
    record, size = record_of(tmp_path / "s"), (tmp_path / "s" / WEIGHTS).stat().st_size
    assert 0.9 * budget <= size <= budget
    tensors = load_file(tmp_path / "s" / WEIGHTS)
    for unit, values, level in zip(
        record["units"], record["values"], record["search"]["state"], strict=True
    ):
        assert len(tensors[f"base_model.model.{unit}.lora_A.weight"]) == values[level]
    assert outputs(tmp_path / "s").isfinite().all()


@pytest.mark.thorough
def test_the_reference_has_the_precision_of_the_candidates(command, tiny, tmp_path):
    words = [*tiny.steady, "train.steps=3", "train.lr=0.05", "train.precision=bf16"]
    train([*words, "+method=lora"], tmp_path / "run")
    words = ("squeeze", tmp_path / "run", "--what", "rank", *QUICK)
    status, _, err = command(*words, "--bytes", "10MB", "--out", tmp_path / "s")
    assert status == 0, err
    # at full ranks the tensors are those of the adapter
    assert record_of(tmp_path / "s")["even_fitness"] == 0


@pytest.mark.thorough
def test_bits_are_those_of_the_pattern_in_the_config(command, runs, tmp_path):
    own = (runs / "binary/adapter" / WEIGHTS).stat().st_size
    status, _, err = command(
        "squeeze", runs / "binary", "--what", "bits", "--bytes", own - 200, *QUICK,
        "--out", tmp_path / "s",
    )  # fmt: skip
    assert status == 0, err
    assert own - 400 <= (tmp_path / "s" / WEIGHTS).stat().st_size <= own - 200
    config = json.loads((tmp_path / "s/adapter_config.json").read_text())
    record = record_of(tmp_path / "s")
    levels = zip(record["values"], record["search"]["state"], strict=True)
    bits = [values[level] for values, level in levels]
    assert sorted(config["bits_pattern"].values()) == sorted(b for b in bits if b != 4)
    assert outputs(tmp_path / "s").isfinite().all()
    # the loaded weights have the bits of the state, and the values that the search has compared
    models = [petl.load(find(f).base(), f) for f in (tmp_path / "s", runs / "binary/adapter")]
    found, own = (quantizer_of(model).quantized_weights["default"] for model in models)
    assert sorted(w.bits for w in found) == sorted(bits)
    for weight, stored in zip(found, own, strict=True):
        expected = stored.weight if weight.bits == 4 else quantize(stored.weight, weight.bits)
        torch.testing.assert_close(weight.weight, expected, rtol=0, atol=0)


def course(folder):
    history = record_of(folder)["search"]["history"]
    return [(each["state"], each["fitness"]) for each in history]


@pytest.mark.thorough
def test_a_search_is_resumed_after_an_interrupt_and_equals_an_unbroken_one(
    command, runs, tmp_path, monkeypatch
):
    words = ("squeeze", runs / "lora", "--share", SHARE, "--offspring", "4", "--rows", "20")
    status, _, err = command(*words, "--out", tmp_path / "one", "--generations", "4")
    assert status == 0, err
    search, calls = module.evolve, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return search(*args, **kwargs)

    monkeypatch.setattr(module, "evolve", interrupted)
    status, _, err = command(*words, "--out", tmp_path / "two", "--generations", "9")
    assert status == 0, err
    assert "writing the best of 2 generations" in err
    assert course(tmp_path / "two") == course(tmp_path / "one")[:2]
    assert (tmp_path / "two" / FILE).is_file()
    monkeypatch.setattr(module, "evolve", search)
    status, _, err = command(*words, "--out", tmp_path / "two", "--generations", "2")
    assert status == 0, err
    assert course(tmp_path / "two") == course(tmp_path / "one")
    one, two = (deltas.Ternary.load(tmp_path / name / FILE) for name in ("one", "two"))
    assert one.positions.tolist() == two.positions.tolist()
    assert one.scale == two.scale
    # other settings, another adapter, a damaged record
    for changes, message in (
        (("--seed", "1"), "a search with seed=0, not 1"),
        (("--rows", "10"), "a search with rows=20, not 10"),
    ):
        status, _, err = command(*words, *changes, "--out", tmp_path / "two")
        assert status == 2
        assert message in err
    (tmp_path / "two/squeeze.json").write_text('{"adapter": 3}')
    status, _, err = command(*words, "--out", tmp_path / "two")
    assert status == 2
    assert "squeeze.json cannot be used" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--bytes", "2KB"), "2,000 bytes are too few"),
        (("--bytes", "many"), "'many' is no number of bytes"),
        (("--bytes", "0"), "is no number of bytes"),
        ((), "one of the arguments --bytes --share is required"),
        (("--share", "1.5"), "is not a number above 0 to 1"),
        (("--share", "0.5", "--what", "skip"), "invalid choice: 'skip'"),
        (("--share", "0.5", "--what", "bits"), "LORA has no bits to distribute"),
        (("--share", "0.5", "--out", "TAKEN"), "already exists"),
    ],
)
def test_bad_words_end_with_status_2_and_write_nothing(command, runs, tmp_path, words, message):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/note").write_text("mine")
    words = [tmp_path / "taken" if word == "TAKEN" else word for word in words]
    out = () if "--out" in words else ("--out", tmp_path / "out")
    status, _, err = command("squeeze", runs / "lora", *words, *out, *QUICK)
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    assert [file.name for file in (tmp_path / "taken").iterdir()] == ["note"]


def test_an_adapter_without_a_run_has_no_rows_to_compare_on(command, runs, tmp_path):
    shutil.copytree(runs / "lora/adapter", tmp_path / "alone")
    status, _, err = command("squeeze", tmp_path / "alone", "--share", "0.5", *QUICK)
    assert status == 2
    assert "an adapter without a run" in err
    assert [file.name for file in tmp_path.iterdir()] == ["alone"]


def test_without_out_the_folder_is_beside_that_of_the_adapter(monkeypatch, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "weights").write_bytes(b"0123456789")
    (tmp_path / "mine" / "adapter_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "mine")
    files = SimpleNamespace(weights=Path("weights"))
    saved, outs = SimpleNamespace(run=None, adapter=Path(), folder=files), []
    monkeypatch.setattr("petl.adapters.export.saved_adapter.find", lambda *_, **__: saved)
    monkeypatch.setattr("petl.cli.squeeze.search", lambda *words, **_: outs.append(words[3]))
    monkeypatch.setattr("petl.cli.squeeze.print_squeezed", lambda *_: None)
    assert main.main(["squeeze", ".", "--bytes", "5"]) == 0
    assert outs == [tmp_path / "mine-density-5"]
