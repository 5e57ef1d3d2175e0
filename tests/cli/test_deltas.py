"""`petl compress`, `prune`, `combine` and `narrow`: what is written, printed and refused."""

import json
import shlex
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from training_fixtures import train
from transformers import LlamaForCausalLM

from petl.adapters import deltas
from petl.cli import main
from petl.core.adapter_folder import Folder
from petl.experiments.reports import differences
from petl.ops.ternary import FILE

pytest_plugins = ["training_fixtures"]

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Runs of lora with validation rows, of lora with another seed, and of mola."""
    root = tmp_path_factory.mktemp("runs")
    quick = [*tiny.steady, "train.steps=3"]
    train(
        [*quick, "+method=lora", "train.eval_steps=3", "train.validation_share=0.2"], root / "lora"
    )
    train([*quick, "+method=lora", "train.seed=1"], root / "other")
    train([*quick, "+method=mola"], root / "mola")
    return root


@pytest.mark.thorough
def test_compress_writes_an_adapter_that_commands_read(command, runs, tmp_path):
    status, out, err = command("compress", runs / "lora", tmp_path / "small", "--density", "0.2")
    assert status == 0, err
    found = deltas.Ternary.load(tmp_path / "small" / FILE)
    assert f"kept {sum(found.kept.values()):,} of {found.numel:,} values" in out
    assert "times smaller" in out
    assert "the adapter itself changes them by" in out
    assert [name for name in found.others if "classifier" in name]  # the trained head
    status, out, _ = command("merge", tmp_path / "small", tmp_path / "merged")
    assert status == 0, out
    status, out, _ = command("export", tmp_path / "small", tmp_path / "plain", "--lora")
    assert status == 0, out
    expected = found.dense()
    for name, tensor in load_file(tmp_path / "plain" / WEIGHTS).items():
        torch.testing.assert_close(tensor, expected[name])


@pytest.mark.thorough
@pytest.mark.parametrize("run", ["lora", "other"])  # with validation rows, and with test rows only
def test_what_loses_more_than_two_points_is_said_before_it_is_written(command, runs, tmp_path, run):
    seen, words = [], ("--drop", "0.99", "--q", "dare")

    def echo(*parts, **_):
        seen.append((" ".join(map(str, parts)), (tmp_path / "thin").exists()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(differences, "echo", echo)
        patch.setattr(differences, "POINTS", -1)
        status, _, err = command("prune", runs / run, tmp_path / "thin", *words)
    assert status == 0, err
    said = {line: written for line, written in seen if "held-out rows" in line or "loses" in line}
    assert len(said) == 2
    assert not any(said.values())
    assert (tmp_path / "thin").is_dir()


@pytest.mark.thorough
def test_a_changed_adapter_has_no_scores_of_the_adapter_before(command, runs, tmp_path):
    before = (runs / "lora/adapter/README.md").read_text()
    assert "model-index" in before
    tensors = ("--level", "tensors")
    for words in (
        ("compress", runs / "lora", tmp_path / "small"),
        ("prune", runs / "lora", tmp_path / "thin", "--drop", "0.5", "--q", "dare"),
        ("combine", *(runs / "lora", runs / "other"), "--out", tmp_path / "sum", *tensors),
        ("prune", tmp_path / "thin", tmp_path / "thinner", "--drop", "0.5", "--q", "dare"),
    ):
        status, _, err = command(*words)
        assert status == 0, err
    deltas.expand(tmp_path / "small", tmp_path / "plain")
    for name in ("small", "thin", "sum", "thinner", "plain"):
        card = (tmp_path / name / "README.md").read_text()
        head = yaml.safe_load(card.split("---\n")[1])
        assert not {"metrics", "model-index"} & set(head)
        assert head["library_name"] == "peft"
        words = " ".join(card.split())
        assert words.count("scores and sizes in this card are those of the adapter before") == 1
        assert ("## Compressed" in card) == (name == "small")


@pytest.mark.parametrize("head", ["[", "- a list", "a: &x 1\nb: *x"])
def test_a_card_with_damaged_metadata_is_refused(command, runs, tmp_path, head):
    shutil.copytree(runs / "other/adapter", tmp_path / "adapter")
    (tmp_path / "adapter/README.md").write_text(f"---\n{head}\n---\n# it\n")
    words = ("--drop", "0.5", "--q", "dare")
    status, _, err = command("prune", tmp_path / "adapter", tmp_path / "thin", *words)
    assert status == 2
    assert "README.md has metadata that cannot be used" in err
    assert not (tmp_path / "thin").exists()


@pytest.mark.thorough
def test_of_several_settings_the_best_on_validation_rows_is_written(command, runs, tmp_path):
    status, out, _ = command(
        "compress", runs / "lora", tmp_path / "best", "--density", "0.1,1", "--alpha", "1,fit"
    )
    assert status == 0
    tried = [line for line in out.splitlines() if "validation accuracy" in line]
    assert len(tried) == 4
    scores = [float(line.split()[-1]) for line in tried]
    used = deltas.Ternary.load(tmp_path / "best" / FILE).settings
    assert any(
        f"density {used['density']:g}, alpha {used['alpha']}" in line and score == max(scores)
        for line, score in zip(tried, scores, strict=True)
    )
    status, _, err = command("compress", runs / "other", tmp_path / "x", "--density", "0.1,1")
    assert status == 2
    assert "without validation rows" in err
    assert not (tmp_path / "x").exists()


@pytest.mark.cells(1)
@pytest.mark.parametrize(
    "q", ["auto", "dare", pytest.param("searched", marks=pytest.mark.thorough), "0.7"]
)
def test_prune_writes_and_says_by_what_it_divides(command, runs, tmp_path, q):
    status, out, err = command("prune", runs / "lora", tmp_path / "thin", "--drop", "0.5", "--q", q)
    assert status == 0, err
    before, after = (load_file(f / WEIGHTS) for f in (runs / "lora/adapter", tmp_path / "thin"))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    assert all("lora_B" in name for name in changed)
    for name in changed:
        ratio = (before[name] / after[name])[after[name] != 0]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
        assert 0.5 - 1e-5 <= ratio[0] <= 1 + 1e-5
        if q == "dare":
            assert ratio[0] == pytest.approx(0.5, rel=1e-4)
    assert "values of" in out
    assert "divided by" in out


@pytest.mark.thorough
def test_narrow_prints_the_command_that_scores_what_it_wrote(command, runs, tiny, tmp_path):
    status, out, err = command("narrow", runs / "lora", "3", "--out", tmp_path / "a b")
    assert status == 0, err
    line = next(line for line in out.splitlines() if line.startswith("  petl "))
    words = [str(tiny.folder / "test.csv") if w == "FILE" else w for w in shlex.split(line)[1:]]
    status, out, err = command(*words)
    assert status == 0, err
    assert "accuracy" in out


def test_combine_tensors_and_updates(command, runs, tmp_path):
    pair = runs / "lora", runs / "other"
    words = ("--out", tmp_path / "sum", "--weights", "1,-1", "--level", "tensors")
    status, out, err = command("combine", *pair, *words)
    assert status == 0, err
    assert "cross terms" in out
    one, two = (load_file(run / "adapter" / WEIGHTS) for run in pair)
    for name, tensor in load_file(tmp_path / "sum" / WEIGHTS).items():
        right = one[name] if "classifier" in name else one[name] - two[name]
        torch.testing.assert_close(tensor, right)
    status, _, err = command("combine", runs / "lora", runs / "mola", "--out", tmp_path / "both")
    assert status == 2
    assert "level update" in err
    assert "peft_type='LORA'" in err
    ties = ("--level", "update", "--method", "ties", "--density", "0.5", "--rank", "2")
    status, out, err = command(
        "combine", runs / "lora", runs / "other", "--out", tmp_path / "both", *ties
    )
    assert status == 0, err
    assert "% of the norm" in out
    assert json.loads((tmp_path / "both/adapter_config.json").read_text())["r"] == 2
    # the head is that of the first adapter, and so are its labels and its task
    for name in ("labels.json", "task.json", "tokenizer.json"):
        assert (tmp_path / "both" / name).read_bytes() == (
            runs / "lora/adapter" / name
        ).read_bytes()
    assert Folder(tmp_path / "both").base == Folder(runs / "lora/adapter").base != {}
    (tmp_path / "texts.csv").write_text("text\nthe old cat\n")
    status, _, err = command(
        "predict", tmp_path / "both", tmp_path / "texts.csv", "--out", tmp_path / "predicted.csv"
    )
    assert status == 0, err
    assert "text,prediction" in (tmp_path / "predicted.csv").read_text()


def test_a_fully_tuned_model_is_pruned_against_its_base(command, tiny, tmp_path):
    base = tiny.folder / "llama"
    model = LlamaForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "tuned")
    words = ("prune", tmp_path / "tuned", tmp_path / "out", "--drop", "0.75", "--base", base)
    status, out, err = command(*words, "--q", "dare")
    assert status == 0, err
    assert "divided by 0.25" in out
    start, tuned = (load_file(f / "model.safetensors") for f in (base, tmp_path / "tuned"))
    expected = deltas.apply(start, deltas.prune(deltas.extract(tuned, start), 0.75))
    pruned = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(pruned[name], tensor)
    status, _, err = command(*words[:2], tmp_path / "again", *words[3:])
    assert status == 2
    assert "needs the data of a run" in err
    save_file({"x": torch.ones(1)}, tmp_path / "tuned" / "more.safetensors")
    status, _, err = command(*words[:2], tmp_path / "again", *words[3:], "--q", "dare")
    assert status == 2
    assert "has no tensor x" in err
    # codes of quantized weights have no difference
    config = tmp_path / "tuned" / "config.json"
    quantized = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    config.write_text(json.dumps(json.loads(config.read_text()) | quantized))
    status, _, err = command(*words[:2], tmp_path / "again", *words[3:], "--q", "dare")
    assert status == 2
    assert "holds a quantized model" in err


@pytest.mark.parametrize(
    "words",
    [
        ("compress", "RUN", "OUT", "--density", "5"),
        ("compress", "RUN", "OUT", "--density", "x"),
        ("compress", "RUN", "OUT", "--alpha", "best"),
        ("compress", "RUN", "OUT", "--exclude", "("),
        ("compress", "nowhere", "OUT"),
        ("prune", "RUN", "OUT"),
        ("prune", "RUN", "OUT", "--drop", "1"),
        ("prune", "RUN", "OUT", "--drop", "0.5", "--q", "0.2"),
        ("combine", "RUN", "--out", "OUT"),
        ("combine", "RUN", "RUN", "--out", "OUT", "--weights", "1,x"),
        ("combine", "RUN", "RUN", "--out", "OUT", "--weights", "1,1,1"),
        ("combine", "RUN", "RUN", "--out", "OUT", "--rank", "2", "--level", "tensors"),
        ("combine", "RUN", "nowhere", "--out", "OUT"),
    ],
)
def test_bad_words_end_with_status_2_and_write_nothing(capsys, runs, tmp_path, words):
    places = {"RUN": runs / "lora", "OUT": tmp_path / "out"}
    try:
        status = main.main([str(places.get(word, word)) for word in words])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
