"""Scores of queries with documents: of a run, of its merged folder in sentence-transformers."""

import json

import numpy as np
import pytest
from training_fixtures import train

import petl
from petl.adapters.export.merge import merge
from petl.adapters.export.onnx import export_onnx
from petl.adapters.export.saved_adapter import find
from petl.cli.main import main

pytest_plugins = ["task_runs"]

PAIRS = [
    ("a green cat", "the red dog and the bird"),
    ("cat", "cat"),
    ("red", "red " * 60),
    ("red cat " * 30, "a bird"),
]


@pytest.fixture(scope="module", params=["bert", pytest.param("llama", marks=pytest.mark.thorough)])
def run(request, families, tmp_path_factory):
    words = [word for word in families("reranking") if not word.startswith("model.path")]
    base = f"model.path={families.folder}/{request.param}"
    loss = {"bert": "binary", "llama": "listwise"}[request.param]
    more = ["+method=lora", base, "train.steps=2", f"data.loss={loss}"]
    return train([*words, *more], tmp_path_factory.mktemp("run") / "run")


def rows() -> list[dict[str, str]]:
    return [{"query": query, "document": document} for query, document in PAIRS]


def test_the_merged_folder_has_equal_scores_in_sentence_transformers(run, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    merge(find(run.path), tmp_path / "merged", None)
    model = st.CrossEncoder(str(tmp_path / "merged"), device="cpu")
    found = [row["prediction"] for row in petl.predict(run.path, rows(), batch_size=2)]
    np.testing.assert_allclose(found, model.predict(PAIRS), atol=1e-5)
    assert len({*found}) == len(PAIRS)


def test_rows_of_a_file_are_predicted_and_scored(run, tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    named = [{"q": row["query"], "d": row["document"]} for row in rows()]
    file.write_text("\n".join(map(json.dumps, named)))
    out = tmp_path / "scored.jsonl"
    words = ["predict", str(run.path), str(file), "data.query=q", "data.positive=d"]
    assert main([*words, "--out", str(out)]) == 0
    written = [json.loads(line)["prediction"] for line in out.read_text().splitlines()]
    assert written == [row["prediction"] for row in petl.predict(run.path, rows())]
    test = run.path.parent / "test.jsonl"
    lines = [{"text": f"q{i}", "part": "cat", "more": "dog"} for i in range(5)]
    test.write_text("\n".join(map(json.dumps, lines)))
    scores = petl.evaluate(run.path, test)
    assert scores["queries"] == 5
    assert scores["accuracy_at_1"] == (scores["mrr_at_10"] == 1)


@pytest.mark.thorough
def test_the_graph_has_the_scores(run, tmp_path):
    pytest.importorskip("onnxruntime")
    written = export_onnx(find(run.path), tmp_path / "onnx", None)
    assert written.difference.relative < 1e-4
