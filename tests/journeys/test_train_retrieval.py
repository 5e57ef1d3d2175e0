"""An embedder trains alike with less memory or time, or the setting is refused with its reason."""

import math

import pytest
import torch
from task_fixtures import families  # noqa: F401
from training_fixtures import train

import petl
from petl.adapters.export.saved_adapter import find
from petl.errors import InputError

SHORTER = ["train.eval_steps=null", "train.validation_share=null", "train.steps=3"]
SHORTER += ["train.score_before=false", "train.buckets=null"]


@pytest.fixture(scope="module")
def words(families):  # noqa: F811
    target = "method.target_modules=all-linear"
    return families("retrieval", "+method=lora", target, *SHORTER)


@pytest.fixture(scope="module")
def plain(words, tmp_path_factory):
    return train(words, tmp_path_factory.mktemp("retrieval") / "plain")


def losses(run):
    return [line["loss"] for line in run.metrics if "loss" in line]


@pytest.mark.parametrize(
    "setting",
    [
        "train.gradient_checkpointing=true",
        "train.micro_batch_size=3",
        pytest.param("train.recompute_mlp=true", marks=pytest.mark.thorough),
        pytest.param("train.fuse_lora=false", marks=pytest.mark.thorough),
    ],
)
def test_settings_of_memory_change_nothing(setting, plain, words, tmp_path):
    other = train([*words, setting], tmp_path / "run")
    assert losses(other) == pytest.approx(losses(plain), rel=1e-5)
    for name, tensor in plain.adapter.items():
        torch.testing.assert_close(other.adapter[name], tensor, atol=1e-5, rtol=1e-4)


def test_a_method_whose_passes_change_its_state_is_not_computed_twice(families, tmp_path):  # noqa: F811
    """Batch norm would count each row twice, with the statistics of a part of the step."""
    words = families("retrieval", "+method=adapter", "method.block=conformer", *SHORTER)
    with pytest.raises(InputError):
        train([*words, "train.micro_batch_size=3"], tmp_path / "run")
    assert train(words, tmp_path / "whole").scores["steps"] == 3


def test_half_precision_is_close(plain, words, tmp_path):
    other = train([*words, "train.precision=bf16"], tmp_path / "run")
    assert losses(other) == pytest.approx(losses(plain), rel=0.03)
    assert losses(other) != losses(plain)


@pytest.mark.thorough
def test_buckets_have_whole_steps_of_every_row(families, tmp_path):  # noqa: F811
    # of adapters that may read other positions, texts have rows of their own, with padding
    words = families("retrieval", "+method=adapter", "method.block=conformer", *SHORTER)
    epoch = ["train.steps=null", "train.epochs=1"]
    runs = [
        train([*words, *epoch, setting], tmp_path / name)
        for name, setting in (("plain", "train.buckets=null"), ("sorted", "train.buckets=3"))
    ]
    rows = 60
    for run in runs:
        assert run.scores["steps"] == math.ceil(rows / 8)
    one, other = (run.scores for run in runs)
    # all texts once; similar ones together need less padding
    assert other["tokens"] == one["tokens"]
    assert other["padding"] < one["padding"]
    packed = train([*families("retrieval", "+method=lora", *SHORTER), *epoch], tmp_path / "packed")
    assert packed.scores["tokens"] == one["tokens"]
    assert packed.scores["padding"] < one["padding"]


def test_a_store_of_frozen_blocks_is_refused_with_the_reason(words, tmp_path):
    upper = [*words, "method.target_modules=[query,value]", "method.layers_to_transform=[1]"]
    with pytest.raises(InputError):
        train([*upper, "train.cache_frozen=true"], tmp_path / "run")
    train([*upper, "train.cache_frozen=auto"], tmp_path / "auto")


def test_what_keeps_a_model_near_itself_goes_on_top(plain, words, tmp_path):
    other = train([*words, "+loss=distill", "loss.feature_weight=50"], tmp_path / "run")
    assert losses(other)[0] == pytest.approx(losses(plain)[0], rel=1e-5)  # of the task alone
    pairs = zip(other.adapter.values(), plain.adapter.values(), strict=True)
    assert not all(map(torch.equal, *zip(*pairs, strict=True)))


@pytest.mark.thorough
def test_a_trained_embedder_has_equal_vectors_in_onnx(plain, tmp_path):
    pytest.importorskip("onnxruntime", reason="pip install 'petl-peft[onnx]'")
    pytest.importorskip("onnxscript", reason="pip install 'petl-peft[onnx]'")
    from petl.adapters.export.onnx import FILE, Session, export_onnx

    saved = find(plain.path)
    export_onnx(saved, tmp_path / "onnx", None)
    texts = ["a green cat", "the red dog and the old cat"]
    inputs = saved.processor(texts, padding=True, return_tensors="pt")
    found = Session(tmp_path / "onnx" / FILE)(
        **{name: inputs[name] for name in ("input_ids", "attention_mask")}
    )["sentence_embedding"]
    expected = torch.from_numpy(petl.embed(plain.path, texts))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
