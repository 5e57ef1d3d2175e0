"""Vectors and scores over HTTP: in the forms of OpenAI, Jina and Cohere; hostile requests."""

import asyncio
import base64
import copy
import itertools
import json
import threading

import httpx
import numpy as np
import openai
import pytest
import torch
from fastapi.testclient import TestClient
from server_fixtures import connected, started
from training_fixtures import train

import petl
from petl.adapters.export.merge import merge
from petl.adapters.export.saved_adapter import find
from petl.cli.main import main
from petl.generation.serving.app import build_app
from petl.generation.serving.scoring import ScoringEngine, ScoringService, load_scoring, scoring_of

pytest_plugins = ["task_runs"]

TEXTS = ["a green cat", "the red dog and the bird", "cat", "red " * 60]
PAIRS = [{"query": "the cat", "document": text} for text in TEXTS]


@pytest.fixture(scope="module")
def folders(families, tmp_path_factory):
    place = tmp_path_factory.mktemp("served")
    short = ("+method=lora", "train.steps=2", "train.test=false")
    train(families("retrieval", *short, "data.query_prefix=red "), place / "embedder")
    train(families("reranking", *short), place / "reranker")
    for name in ("embedder", "reranker"):
        merge(find(place / name), place / f"merged-{name}", None)
    return place


@pytest.fixture(scope="module")
def service(folders):
    names = ("embedder", "reranker", "merged-embedder", "merged-reranker")
    served = load_scoring({name: str(folders / name) for name in names})
    return ScoringService(served, ScoringEngine(max_batch=3, max_waiting=4))


@pytest.fixture(scope="module")
def api(service):
    with TestClient(build_app(service), raise_server_exceptions=False) as client:
        yield client


def embedded(api, **fields):
    reply = api.post("/v1/embeddings", json={"model": "embedder", **fields})
    assert reply.status_code == 200, reply.text
    assert [each["index"] for each in reply.json()["data"]] == list(
        range(len(reply.json()["data"]))
    )
    return np.array([each["embedding"] for each in reply.json()["data"]], np.float32)


def test_vectors_are_those_of_embed(api, folders, service):
    for role in ("query", "document"):
        expected = petl.embed(folders / "embedder", TEXTS, as_=role)
        found = embedded(api, input=TEXTS, input_type=role)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(embedded(api, input=TEXTS[0]), expected[:1], atol=1e-5)
    np.testing.assert_allclose(
        embedded(api, model="merged-embedder", input=TEXTS), expected, atol=1e-5
    )
    predictor = service.served["embedder"]
    tokens = predictor.task.tokens(predictor.processor, TEXTS)
    np.testing.assert_allclose(embedded(api, input=tokens), expected, atol=1e-5)
    np.testing.assert_allclose(embedded(api, input=tokens[1]), expected[1:2], atol=1e-5)
    cut = expected[:, :5] / np.linalg.norm(expected[:, :5], axis=1, keepdims=True)
    np.testing.assert_allclose(embedded(api, input=TEXTS, dimensions=5), cut, atol=1e-5)


def test_the_clients_form_of_base64_and_usage(api, service):
    fields = {"model": "embedder", "input": TEXTS, "encoding_format": "base64", "user": "me"}
    body = api.post("/v1/embeddings", json=fields).json()
    found = [np.frombuffer(base64.b64decode(e["embedding"]), "<f4") for e in body["data"]]
    np.testing.assert_array_equal(np.stack(found), embedded(api, input=TEXTS))
    predictor = service.served["embedder"]
    count = sum(map(len, predictor.task.tokens(predictor.processor, TEXTS)))
    assert body["usage"] == {"prompt_tokens": count, "total_tokens": count}
    assert (body["object"], body["model"], body["data"][0]["object"]) == (
        "list",
        "embedder",
        "embedding",
    )


@pytest.mark.parametrize("name", ["reranker", "merged-reranker"])
def test_documents_are_ranked_by_their_scores(api, folders, name):
    expected = [row["prediction"] for row in petl.predict(folders / "reranker", PAIRS)]
    documents = [TEXTS[0], {"text": TEXTS[1]}, *TEXTS[2:]]
    body = {"model": name, "query": "the cat", "documents": documents}
    found = api.post("/rerank", json=body).json()["results"]
    assert [each["index"] for each in found] == sorted(range(4), key=lambda i: -expected[i])
    scores = [each["relevance_score"] for each in found]
    assert scores == pytest.approx(sorted(expected, reverse=True), abs=1e-5)
    assert "document" not in found[0]
    more = {**body, "top_n": 2, "return_documents": True}
    shown = api.post("/v1/rerank", json=more).json()
    assert [each["document"]["text"] for each in shown["results"]] == [
        TEXTS[e["index"]] for e in found[:2]
    ]
    assert shown["usage"]["total_tokens"] > 0


@pytest.mark.thorough
@pytest.mark.parametrize("activation", [None, "torch.nn.modules.linear.Identity"])
def test_rerankers_of_older_versions_have_a_configuration_alone(families, tmp_path, activation):
    st = pytest.importorskip("sentence_transformers")
    torch.manual_seed(0)
    model = st.CrossEncoder(str(families.folder / "bert"), num_labels=1, device="cpu")
    model.model.config.problem_type = None
    model.model.save_pretrained(tmp_path / "old")
    model.tokenizer.save_pretrained(tmp_path / "old")
    config = json.loads((tmp_path / "old/config.json").read_text())
    config.pop("sentence_transformers", None)
    more = {} if activation is None else {"sbert_ce_default_activation_function": activation}
    (tmp_path / "old/config.json").write_text(json.dumps({**config, **more}))
    assert scoring_of(str(tmp_path / "old")) == "reranking"
    service = ScoringService(
        load_scoring({"old": str(tmp_path / "old")}), ScoringEngine(max_batch=3, max_waiting=4)
    )
    with TestClient(build_app(service)) as client:
        asked = {"model": "old", "query": "the cat", "documents": TEXTS}
        results = client.post("/rerank", json=asked).json()["results"]
    expected = st.CrossEncoder(str(tmp_path / "old"), device="cpu").predict(
        [("the cat", text) for text in TEXTS]
    )
    assert [each["index"] for each in results] == np.argsort(-expected).tolist()
    found = [each["relevance_score"] for each in results]
    np.testing.assert_allclose(found, np.sort(expected)[::-1], atol=1e-5)


def test_equal_documents_have_one_score_and_their_order(api, monkeypatch):
    scores = itertools.count()  # as rounding of batches may tell equal pairs apart

    def scores_of(predictor, rows):
        return [float(next(scores)) for _ in rows], len(rows)

    monkeypatch.setattr("petl.generation.serving.scoring.scores_of", scores_of)
    documents = ["cat", "the red dog", "cat", "a", "old bird", "cat"]
    body = {"model": "reranker", "query": "the cat", "documents": documents}
    found = api.post("/rerank", json=body).json()["results"]
    assert sorted(each["index"] for each in found) == list(range(6))
    same = [each for each in found if documents[each["index"]] == "cat"]
    assert [each["index"] for each in same] == [0, 2, 5]
    assert len({each["relevance_score"] for each in same}) == 1


def test_documents_of_equal_probabilities_are_ranked_by_their_logits(api, service):
    body = {"model": "reranker", "query": "the cat", "documents": TEXTS}
    head = service.served["reranker"].model.get_base_model().classifier.modules_to_save["default"]
    saved = copy.deepcopy(head.state_dict())
    with torch.no_grad():
        head.weight *= 1000
        before = api.post("/rerank", json=body).json()
        head.bias += 1000
        after = api.post("/rerank", json=body).json()
        head.load_state_dict(saved)
    order = [each["index"] for each in before["results"]]
    assert order != sorted(order)
    assert {each["relevance_score"] for each in after["results"]} == {1.0}
    assert [each["index"] for each in after["results"]] == order
    assert after["usage"] == before["usage"]


@pytest.mark.parametrize(
    ("path", "fields", "status", "message"),
    [
        ("/v1/embeddings", {}, 400, "input is missing"),
        ("/v1/embeddings", {"input": []}, 400, "input="),
        ("/v1/embeddings", {"input": [5] * (2**20 + 1)}, 400, "input has 1,048,577 items"),
        ("/v1/embeddings", {"input": ["a"] * 2049}, 400, "input has 2,049 items"),
        ("/v1/embeddings", {"input": [1, "a"]}, 400, "input"),
        ("/v1/embeddings", {"input": ""}, 400, "input has '' at place 0"),
        ("/v1/embeddings", {"input": ["a", " "]}, 400, "input has ' ' at place 1"),
        ("/v1/embeddings", {"input": [-1]}, 400, "input"),
        ("/v1/embeddings", {"input": [10**6]}, 400, "token 1000000"),
        ("/v1/embeddings", {"input": [5] * 40}, 400, "40 tokens; the model reads 32"),
        (
            "/v1/embeddings",
            {"input": "a", "dimensions": 33},
            400,
            "dimensions=33 is more than the 32",
        ),
        ("/v1/embeddings", {"input": "a", "dimensions": 0}, 400, "dimensions=0"),
        ("/v1/embeddings", {"input": "a", "dimensions": 10**4000}, 400, "(4001 characters) is"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, 400, "encoding_format='hex'"),
        ("/v1/embeddings", {"input": "a", "truncate": True}, 400, "truncate"),
        ("/v1/embeddings", {"input": "a", "model": "embeder"}, 404, "'embeder'; did you mean"),
        ("/v1/embeddings", {"input": "a", "model": "reranker"}, 400, "ask it at /rerank"),
        ("/rerank", {"query": "a", "documents": ["b"]}, 400, "ask it at /v1/embeddings"),
        ("/rerank", {"model": "reranker", "query": "a", "documents": []}, 400, "documents="),
        ("/rerank", {"model": "reranker", "query": "a", "documents": [{"t": 1}]}, 400, "documents"),
        ("/rerank", {"model": "reranker", "query": 1, "documents": ["b"]}, 400, "query=1"),
        ("/rerank", {"model": "reranker", "query": " ", "documents": ["b"]}, 400, "query=' '"),
        ("/rerank", {"query": "a", "documents": [{"text": "b"}] * 2049}, 400, "has 2,049 items"),
        ("/v1/chat/completions", {"messages": []}, 404, "available: /health, /v1/models"),
    ],
)
def test_wrong_requests_are_refused(api, path, fields, status, message):
    reply = api.post(path, json={"model": "embedder", **fields})
    assert reply.status_code == status, reply.text
    assert message in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("documents", "param", "message"),
    [
        (["b", 1], "documents.1", "documents.1=1: Input should be a text, or an object"),
        (["b", ["c"]], "documents.1", "documents.1=['c']: Input should be a text, or an object"),
        (["\ud800"], "documents.0.text", r"documents.0.text='\ud800': Input should be a valid"),
    ],
)
def test_wrong_documents_are_named_without_classes(api, documents, param, message):
    fields = {"model": "reranker", "query": "a", "documents": documents}
    raw = json.dumps(fields).encode()
    reply = api.post("/rerank", content=raw, headers={"content-type": "application/json"})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param)
    assert error["message"].startswith(message)
    assert "TextDocument" not in error["message"]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/embeddings", {"input": [[1], *[None] * 5000]}),
        ("/v1/embeddings", {"input": ["a", *[None] * 5000]}),
        ("/rerank", {"query": "a", "documents": ["a", *[None] * 5000]}),
    ],
)
def test_lists_that_are_too_long_are_refused_before_their_items_are_read(api, path, fields):
    reply = api.post(path, json={"model": "embedder", **fields})
    assert "has 5,001 items; allowed are 2,048" in reply.json()["error"]["message"]


def test_empty_documents_have_scores(api):
    body = {"model": "reranker", "query": "the cat", "documents": ["", "cat", " "]}
    found = api.post("/rerank", json=body).json()["results"]
    assert sorted(each["index"] for each in found) == [0, 1, 2]


@pytest.mark.parametrize("given", [np.nan, np.inf])
@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_vectors_that_are_not_finite_are_an_error_that_names_the_input(
    api, monkeypatch, given, encoding
):
    def vectors_of_tokens(predictor, rows):  # of the longest text of all
        return np.array([[given if len(row) == 9 else 1.0] * 32 for row in rows], np.float32)

    monkeypatch.setattr("petl.generation.serving.scoring.vectors_of_tokens", vectors_of_tokens)
    rows = [[5] * number for number in (3, 9, 1, 2, 4)]
    fields = {"model": "embedder", "input": rows, "encoding_format": encoding}
    reply = api.post("/v1/embeddings", json=fields)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"], error["param"]) == (500, "server_error", "input")
    assert "input.1 is not finite" in error["message"]


def test_scores_that_are_not_finite_are_an_error_that_names_the_document(api, monkeypatch):
    def scores_of(predictor, rows):
        return [np.nan if row["document"] == "cat" else 1.0 for row in rows], len(rows)

    monkeypatch.setattr("petl.generation.serving.scoring.scores_of", scores_of)
    body = {"model": "reranker", "query": "the cat", "documents": ["a", "the red dog", "cat", "b"]}
    reply = api.post("/rerank", json=body)
    assert reply.status_code == 500
    assert "documents.2 is not finite" in reply.json()["error"]["message"]


def test_numbers_of_a_reply_are_bounded(api, monkeypatch):
    monkeypatch.setattr("petl.generation.serving.scoring.MAX_NUMBERS", 40)
    reply = api.post("/v1/embeddings", json={"model": "embedder", "input": ["a", "b"]})
    assert (reply.status_code, "2 vectors of 32 numbers" in reply.text) == (400, True)
    assert len(embedded(api, input=["a", "b"], dimensions=20)) == 2


@pytest.mark.parametrize("side", ["right", "left"])
def test_long_texts_are_tokenized_as_far_as_the_model_reads(
    api, folders, service, monkeypatch, side
):
    long, rest = "the cat and the bird " * 60, "a dog " * 60
    texts = [f"{word} cat {long}{rest}{word} dog" for word in ("red", "green")] * 8
    for name in ("embedder", "reranker"):
        monkeypatch.setattr(service.served[name].processor, "truncation_side", side)
    expected = service.served["reranker"].predict(
        [{"query": long, "document": text} for text in texts[:2]]
    )
    vectors = service.served["embedder"]
    tokens = vectors.task.tokens(vectors.processor, [texts[1]])
    kind, lengths = type(vectors.processor), []
    original = kind.__call__

    def counted(self, *given, **options):
        flat = [each if isinstance(each, list) else [each] for each in given]
        lengths.extend(len(text) for each in flat for text in each)
        return original(self, *given, **options)

    monkeypatch.setattr(kind, "__call__", counted)
    body = {"model": "reranker", "query": long, "documents": texts}
    found = api.post("/rerank", json=body).json()["results"]
    scores = {each["index"]: each["relevance_score"] for each in found}
    np.testing.assert_allclose(
        [scores[0], scores[1]], [row["prediction"] for row in expected], atol=1e-5
    )
    found = embedded(api, input=texts[1]), embedded(api, input=tokens)
    np.testing.assert_allclose(*found, atol=1e-5)
    # at most twice what fills the model
    assert 0 < max(lengths) <= 512


def test_a_query_of_blanks_is_refused(api):
    body = {"model": "reranker", "query": " " * 10_000 + "cat", "documents": ["a"]}
    reply = api.post("/rerank", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "query")


@pytest.mark.parametrize("held", ["forward", "tokens"])
def test_requests_beyond_those_that_may_wait_are_refused(api, service, monkeypatch, held):
    entered, go_on = threading.Event(), threading.Event()
    predictor = service.served["embedder"]
    place = predictor.model if held == "forward" else predictor.task
    original = getattr(place, held)

    def slow(*args, **kwargs):
        entered.set()
        assert go_on.wait(60)
        return original(*args, **kwargs)

    monkeypatch.setattr(place, held, slow)
    statuses = []

    def ask():
        fields = {"model": "embedder", "input": "a cat"}
        statuses.append(api.post("/v1/embeddings", json=fields).status_code)

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    assert entered.wait(60)
    while service.engine.waiting < 5:
        threading.Event().wait(0.01)
    state = {"status": "ok", "running": int(held == "forward"), "waiting": 5}
    assert api.get("/health").json() == state
    ask()
    assert statuses == [429]
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert sorted(statuses) == [200] * 5 + [429]
    assert service.engine.waiting == 0


@pytest.fixture
def wide(monkeypatch):
    """Vectors of 2,048 numbers each, for a request of 40 MB of them."""

    def vectors_of_tokens(predictor, rows):
        return np.random.default_rng(0).random((len(rows), 2048), np.float32)

    monkeypatch.setattr("petl.generation.serving.scoring.vectors_of_tokens", vectors_of_tokens)
    monkeypatch.setattr("petl.generation.serving.scoring.width_of", lambda predictor: 2048)
    return {"model": "embedder", "input": [[5]] * 1000}


def asked(app, body, took):
    """Send a request to the app; `took` gets each part of the reply, and may wait."""
    scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "query_string": b""}
    scope["headers"] = [(b"content-type", b"application/json")]
    messages = [{"type": "http.request", "body": json.dumps(body).encode()}]

    async def given():
        return messages.pop() if messages else await asyncio.Event().wait()

    async def send(message):
        if message["type"] == "http.response.body":
            await took(message)

    return app(scope, given, send)


def test_others_are_answered_between_the_parts_of_a_large_reply(api, wide, service):
    parts, states = [], []

    async def took(message):
        parts.append(message["body"])
        if message.get("more_body") and len(states) < 3:
            transport = httpx.ASGITransport(api.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as other:
                states.append((await other.get("/health")).json()["waiting"])

    body = {**wide, "input": wide["input"][:20]}
    asyncio.run(asked(api.app, body, took))
    assert states == [1] * 3
    assert max(map(len, parts)) < 2**18
    found = [each["embedding"] for each in json.loads(b"".join(parts))["data"]]
    assert np.asarray(found).shape == (20, 2048)
    assert service.engine.waiting == 0


def test_a_reply_keeps_its_place_until_its_client_has_read_it_or_is_gone(wide, service):
    async def clients(port, state):
        raw = json.dumps(wide).encode()
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: {len(raw)}\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**10)
        writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + raw)
        assert await reader.readexactly(1) == b"H"
        connection = next(iter(state.connections))
        while not connection.flow.write_paused:
            await asyncio.sleep(0.01)
        # of 40 MB no more is made than the client takes
        assert connection.transport.get_write_buffer_size() < 2**18
        assert service.engine.waiting == 1
        writer.transport.abort()
        while service.engine.waiting:
            await asyncio.sleep(0.01)

    connected(build_app(service), clients)


def test_a_reply_that_is_read_too_slowly_ends(api, wide, service, monkeypatch):
    monkeypatch.setattr("petl.generation.serving.connections.FLUSH_SECONDS", 0.05)
    parts = []

    async def took(message):
        parts.append(message)
        await asyncio.sleep(0.02)  # each part is read in time

    asyncio.run(asked(api.app, wide, took))
    assert len(parts) < 10
    assert all(each.get("more_body") for each in parts)
    assert service.engine.waiting == 0


@pytest.mark.thorough
def test_the_official_client_asks_a_server(folders, tmp_path):
    words = (str(folders / "embedder"), f"ranks={folders / 'reranker'}", "--api-key", "secret")
    with started(tmp_path / "log", *words) as server:
        client = server.client(api_key="secret")
        assert [model.id for model in client.models.list()] == ["embedder", "ranks"]
        # base64, unless another format is asked for
        reply = client.embeddings.create(model="embedder", input=TEXTS, dimensions=7)
        expected = petl.embed(folders / "embedder", TEXTS)[:, :7]
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose([e.embedding for e in reply.data], expected, atol=1e-5)
        with pytest.raises(openai.AuthenticationError):
            server.client(api_key="x").embeddings.create(model="embedder", input="a")
        assert server.interrupt() == 0


def test_models_that_write_have_a_server_of_their_own(folders, families, tmp_path, capsys):
    writer = train(families("causal_lm", "+method=lora", "train.steps=1"), tmp_path / "writer")
    assert main(["serve", str(folders / "embedder"), str(writer.path), "--port", "0"]) == 2
    assert "start a server for each" in capsys.readouterr().err
    assert main(["serve", str(folders / "embedder"), "--engine", "llama.cpp", "--port", "0"]) == 2
    assert "--engine" in capsys.readouterr().err
    more = ["--prefix-cache", "5", "--port", "0"]
    for words in ([str(folders / "embedder")], [str(writer.path), "--engine", "llama.cpp"]):
        assert main(["serve", *words, *more]) == 2
        assert "--prefix-cache=5" in capsys.readouterr().err
