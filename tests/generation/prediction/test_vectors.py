"""Vectors of texts: of a run, of its merged folder in sentence-transformers, in fewer bits."""

import numpy as np
import pytest
import torch
from training_fixtures import train

import petl
from petl.adapters.export.merge import merge
from petl.adapters.export.saved_adapter import find
from petl.errors import InputError
from petl.generation.prediction.predictor import Predictor
from petl.generation.prediction.vectors import quantized

pytest_plugins = ["task_runs"]

TEXTS = ["a green cat", "the red dog and the bird", "cat", "red " * 60]
PREFIXES = ["data.query_prefix=red", "data.document_prefix=the ", "data.normalize=true"]


@pytest.fixture(scope="module", params=["bert", "llama"])
def run(request, families, tmp_path_factory):
    words = [word for word in families("retrieval") if not word.startswith("model.path")]
    base = f"model.path={families.folder}/{request.param}"
    more = ["+method=lora", base, "train.steps=2", *PREFIXES]
    return train([*words, *more], tmp_path_factory.mktemp("run") / "run")


def test_the_merged_folder_has_equal_vectors_in_sentence_transformers(run, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    merge(find(run.path), tmp_path / "merged", None)
    model = st.SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    predictor = Predictor.load(run.path)
    for role in ("query", "document"):
        found = petl.embed(predictor, TEXTS, as_=role, batch_size=2)
        assert found.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(found, model.encode(TEXTS, prompt_name=role), atol=1e-5)
    np.testing.assert_allclose(petl.embed(predictor, TEXTS), found, atol=1e-6)
    assert np.abs(petl.embed(predictor, TEXTS, as_="query") - found).max() > 1e-3
    assert model.similarity_fn_name == "cosine"


def test_a_model_and_a_run_have_equal_vectors(run):
    predictor = Predictor.load(run.path)
    expected = petl.embed(predictor, TEXTS)
    found = petl.embed(predictor.model, TEXTS, tokenizer=predictor.processor)
    np.testing.assert_array_equal(found, expected)
    assert petl.embed(predictor, []).shape == (0, expected.shape[1])


def test_petls_adapter_loads_into_the_model_of_sentence_transformers(run, families):
    st = pytest.importorskip("sentence_transformers")
    predictor = Predictor.load(run.path)
    model = st.SentenceTransformer(predictor.model.get_base_model().name_or_path, device="cpu")
    adapted = petl.load(model[0].auto_model, run.path / "adapter")
    ids = predictor.processor(["the a green cat"], return_tensors="pt")
    inputs = {name: ids[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        theirs = adapted(**inputs).last_hidden_state
        ours = predictor.model(**inputs).last_hidden_state
    torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("words", "arguments", "settings"),
    [
        ("neither 'query'", (TEXTS,), {"as_": "text"}),
        ("give a list of texts", ("one",), {}),
        ("tokenizer=None", (TEXTS,), {}),
    ],
)
def test_what_cannot_be_embedded_is_refused(words, arguments, settings):
    with pytest.raises(InputError, match=words):
        petl.embed(torch.nn.Linear(1, 1), *arguments, **settings)


def test_fewer_bits_are_those_of_sentence_transformers():
    theirs = pytest.importorskip("sentence_transformers.util.quantization").quantize_embeddings
    values = np.random.RandomState(0).randn(50, 19).astype(np.float32)
    values[:, 3] = 0.5  # a constant
    others = np.random.RandomState(1).randn(9, 19).astype(np.float32)
    assert np.array_equal(quantized(values, "int8"), theirs(values, "int8"))
    given = theirs(values, "int8", calibration_embeddings=others)
    assert np.array_equal(quantized(values, "int8", others), given)
    assert np.array_equal(quantized(values, "binary"), theirs(values, "ubinary"))
    assert quantized(values, "float16").dtype == np.float16
