"""Vectors of texts: of a run, of its merged folder in sentence-transformers, in fewer bits."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from training_fixtures import train
from transformers import AutoTokenizer

import petl
from petl.adapters.export.merge import merge
from petl.adapters.export.saved_adapter import find
from petl.cli.main import main
from petl.errors import InputError
from petl.generation.prediction.predictor import Predictor
from petl.generation.prediction.vectors import (
    VectorFile,
    load_embedder,
    nearest,
    quantized,
    read_corpus,
    write_vectors,
)
from petl.system.files import disk

pytest_plugins = ["task_runs"]

TEXTS = ["a green cat", "the red dog and the bird", "cat", "red " * 60]
PREFIXES = ["data.query_prefix=red ", "data.document_prefix=the ", "data.normalize=true"]


@pytest.fixture(scope="module", params=["bert", pytest.param("llama", marks=pytest.mark.thorough)])
def run(request, families, tmp_path_factory):
    words = [word for word in families("retrieval") if not word.startswith("model.path")]
    base = f"model.path={families.folder}/{request.param}"
    more = ["+method=lora", base, "train.steps=2", *PREFIXES]
    return train([*words, *more], tmp_path_factory.mktemp("run") / "run")


@pytest.mark.thorough
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


@pytest.mark.thorough
def test_the_tokenizer_beside_an_onnx_graph_gives_the_vectors_of_the_run(run, tmp_path):
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason="pip install 'petl-peft[onnx]'")
    from petl.adapters.export.onnx import FILE, Session, export_onnx

    export_onnx(find(run.path), tmp_path / "onnx", None)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "onnx")
    texts = ["the " + text for text in [*TEXTS, "green " * 600]]  # the last one is too long
    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    found = Session(tmp_path / "onnx" / FILE)(**given)["sentence_embedding"]
    expected = petl.embed(run.path, [text.removeprefix("the ") for text in texts])
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("trains", [False, True])
def test_layers_behind_the_pooling_are_kept_or_trained(trains, families, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    modules = st.sentence_transformer.modules
    torch.manual_seed(0)
    transformer = modules.Transformer(str(families.folder / "bert"))
    width = transformer.get_embedding_dimension()
    wide = modules.Dense(width, 3 * width, activation_function=torch.nn.GELU())
    narrow = modules.Dense(3 * width, 6, bias=False, activation_function=None, use_residual=trains)
    parts = [transformer, modules.Pooling(width, "cls"), wide, narrow, modules.Normalize()]
    base = st.SentenceTransformer(modules=parts, device="cpu")
    base.save(str(tmp_path / "base"))
    words = [word for word in families("retrieval") if not word.startswith("model.path")]
    words += ["+method=lora", f"model.path={tmp_path / 'base'}", "train.steps=2", "train.lr=0.1"]
    own = train([*words, *(["method.modules_to_save=[petl_dense]"] * trains)], tmp_path / "run")
    merge(find(own.path), tmp_path / "merged", None)
    model = st.SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    found = petl.embed(Predictor.load(own.path), TEXTS)
    np.testing.assert_allclose(found, model.encode(TEXTS), atol=1e-5)
    assert found.shape == (len(TEXTS), 6)
    assert np.abs(found - base.encode(TEXTS)).max() > 1e-3
    assert torch.equal(model[2].linear.weight, wide.linear.weight) is not trains
    with pytest.raises(InputError):
        train([*words, "data.dims=[12]"], tmp_path / "wide")


def test_a_model_and_a_run_have_equal_vectors(run):
    predictor = Predictor.load(run.path)
    expected = petl.embed(predictor, TEXTS)
    found = petl.embed(predictor.model, TEXTS, tokenizer=predictor.processor)
    np.testing.assert_array_equal(found, expected)
    assert petl.embed(predictor, []).shape == (0, expected.shape[1])
    rows = petl.predict(predictor, [{"text": text} for text in TEXTS])
    np.testing.assert_allclose([row["vector"] for row in rows], expected, atol=1e-5)


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


@pytest.mark.thorough
def test_files_with_positives_are_scored(run, tmp_path):
    file = tmp_path / "test.jsonl"
    rows = [{"text": text, "part": text} for text in TEXTS[:3]]
    file.write_text("\n".join(map(json.dumps, rows)))
    scores = petl.evaluate(run.path, file)
    asked, documents = (petl.embed(run.path, TEXTS[:3], as_=role) for role in ("query", "document"))
    own = (asked @ documents.T).argmax(1) == np.arange(3)
    assert scores["accuracy_at_1"] == pytest.approx(own.mean())
    assert scores["queries"] == 3


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


@pytest.mark.thorough
def test_the_command_takes_texts_that_give_the_ranges(run, tmp_path):
    for name, texts in (("texts", TEXTS), ("ranges", ["old dog", "a", "the saw of one"])):
        lines = (json.dumps({"text": text}) for text in texts)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    words = ("predict", run.path, tmp_path / "texts.jsonl", "--out", tmp_path / "int8.npy")
    more = ("--dtype", "int8", "--as", "query", "--calibrate", tmp_path / "ranges.jsonl")
    assert main([str(word) for word in (*words, *more)]) == 0
    ranges = petl.embed(run.path, ["old dog", "a", "the saw of one"], as_="query")
    expected = quantized(petl.embed(run.path, TEXTS, as_="query"), "int8", ranges)
    assert np.abs(np.load(tmp_path / "int8.npy").astype(int) - expected).max() <= 1


def test_processes_divide_the_texts_of_a_file(run, tmp_path, monkeypatch):
    file, predictor = tmp_path / "texts.jsonl", Predictor.load(run.path)
    texts = [f"the {text}" for text in TEXTS] + TEXTS
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    write_vectors(find(run.path), [str(file)], VectorFile(tmp_path / "one.npy"))
    # the collectives of a single process run the parts of all three
    three = SimpleNamespace(num_processes=3, device=torch.device("cpu"), is_main_process=True)
    shares = []
    predictor.model.register_forward_pre_hook(
        lambda module, args, given: shares.append(len(given["input_ids"])), with_kwargs=True
    )
    divided = replace(predictor, accelerator=three)
    monkeypatch.setattr(Predictor, "of", lambda *given: divided)
    write_vectors(find(run.path), [str(file)], VectorFile(tmp_path / "three.npy"))
    assert shares == [3, 3, 2]
    found = [np.load(tmp_path / f"{name}.npy") for name in ("one", "three")]
    np.testing.assert_allclose(*found, atol=1e-6)


def test_settings_of_the_run_are_refused_where_they_change_nothing(run, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text(json.dumps({"text": "a", "part": "b"}))
    saved = find(run.path)
    for word in ("data.query_prefix=x", "data.corpus=x", "data.loss=cosent", "data.positive=part"):
        with pytest.raises(InputError, match=f"{word}.*data.text"):
            write_vectors(saved, [str(file)], VectorFile(tmp_path / "out.npy"), [word])
    for name in ("pooling", "document_prefix", "qrels"):
        with pytest.raises(InputError, match=f"data.{name}"):
            petl.evaluate(run.path, file, columns={name: "x"})
    assert petl.evaluate(run.path, file, columns={"positive": "part"})["queries"] == 1


def test_files_of_vectors_and_the_search_in_them(run, tmp_path, capsys):
    rows = [{"_id": f"d{i}", "text": text} for i, text in enumerate(TEXTS)]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(map(json.dumps, rows)))
    saved, file = find(run.path), tmp_path / "vectors.npy"
    predictor = Predictor.of(saved)
    write_vectors(saved, [str(corpus)], VectorFile(file))
    documents = np.load(file)
    np.testing.assert_allclose(documents, petl.embed(run.path, TEXTS), atol=1e-6)
    queries = ["green", "bird red"]
    asked = petl.embed(run.path, queries, as_="query")
    expected = np.argsort(-asked @ documents.T, axis=1)[:, :3]
    texts = read_corpus(str(corpus))
    for given in (None, file):
        found = nearest(predictor, texts, queries, 3, given)
        assert [[hit.id for hit in hits] for hits in found] == [
            [f"d{place}" for place in each] for each in expected
        ]
        assert found[0][0].similarity == pytest.approx((asked @ documents.T)[0].max(), abs=1e-5)
    words = ["retrieve", str(run.path), str(corpus), "--vectors", str(file)]
    assert main([*words, "--query", queries[0], "--k", "1"]) == 0
    shown = capsys.readouterr().out
    assert queries[0] in shown
    assert TEXTS[expected[0][0]].split()[0] in shown
    binary = tmp_path / "binary.npy"
    write_vectors(saved, [str(corpus)], VectorFile(binary, dtype="binary"))
    assert np.array_equal(np.load(binary), np.packbits(documents > 0, axis=1))
    with pytest.raises(InputError):
        nearest(predictor, texts, queries, 3, binary)
    with pytest.raises(InputError):
        write_vectors(saved, [str(corpus)], VectorFile(file, calibrate=str(corpus)))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_vectors_of_other_texts_or_another_model_are_refused(run, families, tmp_path, dtype):
    texts = [(str(i), f"{text} {word}") for i, text in enumerate(TEXTS) for word in ("cat", "dog")]
    (tmp_path / "corpus.csv").write_text("\n".join(["text", *(text for _, text in texts)]))
    saved, predictor, file = find(run.path), Predictor.load(run.path), tmp_path / "vectors.npy"
    write_vectors(saved, [str(tmp_path / "corpus.csv")], VectorFile(file, dtype=dtype))
    right = nearest(predictor, texts, ["green"], 2, file)
    assert [hit.id for hit in right[0]] == [
        hit.id for hit in nearest(predictor, texts, ["green"], 2)[0]
    ]
    changed = [*texts[:-1], ("7", "green bird green")]
    for others, row in (([*texts[1:], texts[0]], 0), (changed, 7)):
        with pytest.raises(InputError, match=rf"row {row} of .*{others[row][1][:20]}.*predict"):
            nearest(predictor, others, ["green"], 2, file)
    write_vectors(saved, [str(tmp_path / "corpus.csv")], VectorFile(file, "query", dtype))
    with pytest.raises(InputError):
        nearest(predictor, texts, ["green"], 2, file)


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', (", b"text"])
def test_damaged_files_of_vectors_are_named(run, tmp_path, damage):
    file = tmp_path / "vectors.npy"
    file.write_bytes(damage)
    with pytest.raises(InputError, match=str(file)):
        nearest(Predictor.load(run.path), [("0", "a cat")], ["green"], 1, file)


def test_texts_with_lone_surrogates_are_refused(run, capsys, tmp_path):
    (tmp_path / "corpus.csv").write_text("text\na cat\n")
    texts = ["a", "a \ud800 cat"]
    for read, given in ((petl.embed, texts), (petl.predict, [{"text": text} for text in texts])):
        with pytest.raises(InputError):
            read(run.path, given)
    words = ["retrieve", str(run.path), str(tmp_path / "corpus.csv"), "--query"]
    with pytest.raises(SystemExit, match="2"):
        main([*words, "a \udced cat"])
    assert "Unicode" in capsys.readouterr().err


@pytest.fixture
def plain(families, tmp_path):
    """A folder that sentence-transformers has written."""
    st = pytest.importorskip("sentence_transformers")
    modules = st.sentence_transformer.modules
    transformer = modules.Transformer(str(families.folder / "bert"))
    pooling = modules.Pooling(transformer.get_embedding_dimension(), "mean")
    model = st.SentenceTransformer(modules=[transformer, pooling], device="cpu")
    model.similarity_fn_name = "dot"
    model.save(str(tmp_path / "plain"))
    return model, tmp_path / "plain"


@pytest.mark.thorough
def test_a_strangers_folder_has_the_vectors_and_similarities_of_sentence_transformers(plain):
    model, folder = plain
    predictor = load_embedder(folder)
    found = petl.embed(predictor, TEXTS)
    np.testing.assert_allclose(found, model.encode(TEXTS), atol=1e-5)
    hits = nearest(predictor, [*zip("abcd", TEXTS, strict=True)], ["red"], 4)[0]
    similar = model.similarity(model.encode(["red"]), model.encode(TEXTS))[0]
    own = {hit.id: hit.similarity for hit in hits}
    np.testing.assert_allclose([own[name] for name in "abcd"], similar, rtol=1e-4)


@pytest.mark.thorough
def test_the_length_of_a_strangers_texts_is_that_of_its_folder(plain, caplog):
    model, folder = plain
    longest = model[0].auto_model.config.max_position_embeddings
    long = ["red green " * longest]
    tokenizer = folder / "tokenizer_config.json"
    given = json.loads(tokenizer.read_text())
    assert longest <= 512
    for length in (7, None):
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": length}))
        tokenizer.write_text(json.dumps({**given, "model_max_length": length or int(1e30)}))
        predictor = load_embedder(folder)
        assert predictor.task.max_length == (length or longest)
        assert petl.embed(predictor, long).shape == (1, 32)
    assert not [each for each in caplog.records if "texts are cut" in each.message]


@pytest.mark.thorough
def test_models_without_a_layer_and_vectors_that_are_not_finite_are_refused(plain):
    folder = plain[1]
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "modules.json").rename(folder / "not_modules.json")
    scorer = {**config, "architectures": ["BertForSequenceClassification"]}
    (folder / "config.json").write_text(json.dumps(scorer))
    with pytest.raises(InputError):
        load_embedder(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "not_modules.json").rename(folder / "modules.json")
    name = next(name for name in weights if name.endswith("layer.1.output.dense.weight"))
    broken = {**weights, name: torch.full_like(weights[name], torch.nan)}
    save_file(broken, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError):
        petl.embed(folder, TEXTS)
    save_file({n: w for n, w in weights.items() if n != name}, folder / "model.safetensors")
    with pytest.raises(InputError):
        load_embedder(folder)


@pytest.mark.cells(2)
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "binary"])
def test_a_table_has_the_vectors_beside_the_columns(run, tmp_path, dtype):
    rows = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(map(json.dumps, rows)))
    words = ["predict", str(run.path), str(corpus), "--as", "query", "--dtype", dtype]
    for name in ("vectors.npy", "vectors.parquet"):
        assert main([*words, "--out", str(tmp_path / name)]) == 0
    table = pq.read_table(tmp_path / "vectors.parquet")
    assert table.select(["id", "text"]).to_pylist() == rows
    expected = np.load(tmp_path / "vectors.npy")
    np.testing.assert_array_equal(table["vector"].to_pylist(), expected.tolist())
    kinds = {"float32": "float", "float16": "halffloat", "int8": "int8", "binary": "uint8"}
    assert str(table.schema.field("vector").type.value_type) == kinds[dtype]


def test_vectors_replace_no_input_and_a_full_disk_is_named(run, tmp_path, capsys, monkeypatch):
    corpus, ranges = tmp_path / "corpus.parquet", tmp_path / "ranges.parquet"
    for file in (corpus, ranges):
        pq.write_table(pa.Table.from_pylist([{"text": text} for text in TEXTS]), file)
    words = ["predict", str(run.path), str(corpus), "--dtype", "int8", "--calibrate", str(ranges)]
    for file in (corpus, ranges):
        before = file.read_bytes()
        assert main([*words, "--out", str(file)]) == 2
        assert f"--out={file} is the file that is read" in capsys.readouterr().err
        assert file.read_bytes() == before
    for given in (["--prefix", "my_"], ["--max-new-tokens", "3"]):
        for name in ("out.npy", "out.parquet"):
            assert main([*words, *given, "--out", str(tmp_path / name)]) == 2
            assert "=".join(given) in capsys.readouterr().err
            assert not (tmp_path / name).exists()
    monkeypatch.setattr(disk, "create", lambda _: Path("/dev/full").open("wb"))  # noqa: SIM115
    for name in ("out.npy", "out.parquet"):
        assert main([*words, "--out", str(tmp_path / name)]) == 1
        assert f"cannot write {tmp_path / name}: " in capsys.readouterr().err.splitlines()[-1]
