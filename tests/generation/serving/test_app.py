"""`petl serve` as its clients see it: the official client, and a process that the test starts."""

import asyncio
import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from server_fixtures import application, started

from petl.cli.main import main
from petl.generation.inference.sampling import Sampling
from petl.generation.serving.replies import ChatReply

pytest_plugins = ["writer_fixtures", "server_fixtures"]

HI = [{"role": "user", "content": "Hi"}]
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server(writers, tmp_path_factory):
    """A running server of a LoRA, another one and a MoLA."""
    words = [f"{name}={writers.folder / name}" for name in ("lora", "other", "mola")]
    with started(tmp_path_factory.mktemp("server") / "log", *words, "--max-tokens", "200") as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def alone(writers):
    """Answers of `LanguageModel.answer`, by adapter and prompt."""
    models = {name: writers.load(name) for name in ("lora", "other", "mola", "llama")}

    def answer(name: str, prompt, tokens: int, *stop: str):
        model = models[name]
        sampling = Sampling(max_new_tokens=tokens, stop=stop)
        with model.using(model.names[0]):
            return model.answer([model.encode(prompt)], sampling)[0]

    return answer


# With the official client, against a process


def test_the_base_model_and_all_adapters_are_listed(client):
    assert [model.id for model in client.models.list()] == ["llama", "lora", "other", "mola"]
    assert client.models.retrieve("mola").owned_by == "petl"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("mole")


@pytest.mark.cells(2)
@pytest.mark.parametrize("name", ["llama", "lora", "other", "mola"])
def test_a_chat_is_answered_by_the_adapter_called_model(client, alone, name):
    reply = client.chat.completions.create(model=name, messages=HI, max_tokens=12)
    expected = alone(name, "Hi", 12)
    choice = reply.choices[0]
    assert (choice.message.content, choice.finish_reason) == (expected.text, expected.finish)
    assert choice.message.role == "assistant"
    assert reply.usage.completion_tokens == expected.tokens
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + expected.tokens
    assert reply.model == name


def test_a_stream_has_the_same_text_in_pieces(client, alone):
    options = {"model": "lora", "messages": HI, "max_completion_tokens": 20}
    stream = client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    expected = alone("lora", "Hi", 20)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == expected.text
    assert sum(map(bool, pieces)) > 3
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["length"]
    assert (last.choices, last.usage.completion_tokens) == ([], 20)


@pytest.mark.thorough
def test_requests_of_several_adapters_at_the_same_time_answer_as_alone(client, alone):
    jobs = [
        (name, text, 10 + 3 * i)
        for i, text in enumerate(["Hi", "the cat and the dog", "a b a b"])
        for name in ("llama", "lora", "other", "mola")
    ]

    def ask(job):
        name, text, tokens = job
        messages = [{"role": "user", "content": text}]
        reply = client.chat.completions.create(model=name, messages=messages, max_tokens=tokens)
        return reply.choices[0].message.content

    with ThreadPoolExecutor(len(jobs)) as pool:
        found = list(pool.map(ask, jobs))
    assert found == [alone(*job).text for job in jobs]


def test_several_texts_are_completed_without_the_template(client, writers):
    reply = client.completions.create(model="other", prompt=["Hi", "a b"], max_tokens=9, logprobs=2)
    model = writers.load("other")
    ids = [model.tokenizer(text)["input_ids"] for text in ("Hi", "a b")]
    with model.using("default"):
        expected = [model.answer([each], Sampling(max_new_tokens=9))[0].text for each in ids]
    assert [choice.text for choice in reply.choices] == expected
    logprobs = reply.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 9
    assert all(len(each) <= 2 for each in logprobs.top_logprobs)
    by_ids = client.completions.create(model="other", prompt=ids, max_tokens=9)
    assert [choice.text for choice in by_ids.choices] == expected
    parts = client.completions.create(model="other", prompt="Hi", max_tokens=9, stream=True)
    assert "".join(part.choices[0].text for part in parts) == expected[0]


@pytest.mark.thorough
def test_sampling_repeats_with_a_seed_and_n_answers_differ(client):
    options = {"model": "mola", "messages": HI, "max_tokens": 15, "n": 3, "temperature": 1.5}

    def texts(**more):
        reply = client.chat.completions.create(**options, **more)
        return [choice.message.content for choice in reply.choices]

    first = texts(seed=1)
    assert len({*first}) == 3
    assert first == texts(seed=1) != texts(seed=2)
    assert texts() != texts()
    assert len({*texts(top_p=0.0)}) == 1  # of the most likely tokens alone


POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}, "on": {"type": "boolean"}},
    "required": ["x", "on"],
    "additionalProperties": False,
}
AS_POINT = {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT}}


@pytest.mark.thorough
def test_answers_follow_a_schema_beside_others_of_any_adapter(client, alone):
    def ask(job):
        name, more = job
        asked = {"model": name, "messages": HI, "max_tokens": 200, **more}
        return client.chat.completions.create(**asked).choices

    form = {"response_format": AS_POINT, "n": 2, "temperature": 1.0}
    jobs = [("llama", form), ("lora", form), ("mola", form), ("lora", {})]
    with ThreadPoolExecutor(len(jobs)) as pool:
        *found, plain = pool.map(ask, jobs)
    for choice in (choice for choices in found for choice in choices):
        assert choice.finish_reason == "stop"
        point = json.loads(choice.message.content)
        assert (type(point["x"]), type(point["on"]), len(point)) == (int, bool, 2)
    # a request without one answers as alone
    assert plain[0].message.content == alone("lora", "Hi", 200).text


@pytest.mark.thorough
def test_a_stream_follows_a_schema_until_its_limit(client):
    asked = {"model": "lora", "prompt": "a b a b a", "extra_body": {"response_format": AS_POINT}}
    (whole,) = client.completions.create(**asked, max_tokens=200).choices
    assert {*json.loads(whole.text)} == {"x", "on"}
    assert whole.finish_reason == "stop"
    chunks = [
        chunk.choices[0] for chunk in client.completions.create(**asked, max_tokens=7, stream=True)
    ]
    text = "".join(chunk.text for chunk in chunks)
    assert whole.text.startswith(text)
    assert chunks[-1].finish_reason == "length"
    cut = client.completions.create(**asked, max_tokens=200, stop=":").choices[0]
    assert (cut.text, cut.finish_reason) == (whole.text.partition(":")[0], "stop")


def test_any_json_object_is_an_answer(client):
    reply = client.chat.completions.create(
        model="other",
        messages=HI,
        max_tokens=150,
        response_format={"type": "json_object"},
        logit_bias={str(token): -30 for token in range(200, 260)},
        stop="}",
    )
    assert reply.choices[0].message.content.startswith("{")


def test_an_answer_ends_before_a_stop_text(client, alone):
    whole = alone("lora", "Hi", 20).text
    stop = whole[6:8]
    reply = client.chat.completions.create(model="lora", messages=HI, max_tokens=20, stop=stop)
    choice = reply.choices[0]
    assert (choice.message.content, choice.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_probabilities_of_the_likeliest_tokens_are_reported(client):
    reply = client.chat.completions.create(
        model="lora", messages=HI, max_tokens=4, logprobs=True, top_logprobs=3
    )
    tokens = reply.choices[0].logprobs.content
    assert len(tokens) == 4
    for each in tokens:  # greedy: the likeliest is the token
        assert each.logprob == each.top_logprobs[0].logprob < 0
        assert len(each.top_logprobs) == 3


def test_errors_are_those_of_the_client(client, server):
    with pytest.raises(openai.NotFoundError, match="'lora'"):
        client.chat.completions.create(model="lor", messages=HI)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="lora", messages=HI, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="lora", prompt="x" * 300)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="max_tokens=201"):
        client.chat.completions.create(model="lora", messages=HI, max_tokens=201)
    assert httpx.get(server.url.replace("/v1", "/health")).json()["status"] == "ok"


def test_a_client_that_goes_frees_its_place(client, server):
    def running() -> int:
        health = httpx.get(server.url.replace("/v1", "/health")).json()
        return health["running"] + health["waiting"]

    stream = client.chat.completions.create(
        model="lora", messages=HI, max_tokens=200, stream=True, logit_bias={"3": -100}
    )
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 20
    while running():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.thorough)]
)
def test_a_signal_ends_answers_and_the_server(writers, tmp_path, sent):
    with started(tmp_path / "log", f"m={writers.folder / 'lora'}", "--api-key", "secret") as server:
        with pytest.raises(openai.AuthenticationError), server.client() as client:
            client.models.list()
        with server.client(api_key="secret") as client:
            stream = client.chat.completions.create(
                model="m", messages=HI, max_tokens=200, stream=True, logit_bias={"3": -100}
            )
            next(iter(stream))
            interrupting = threading.Thread(target=server.interrupt, args=(sent,))
            interrupting.start()
            with pytest.raises(openai.APIError):
                for _ in stream:
                    pass
            interrupting.join()
        assert server.process.returncode == 0
    log = (tmp_path / "log").read_text()
    assert "the server has ended" in log
    assert "Traceback" not in log
    assert "secret" not in log


# In this process


def test_a_full_server_answers_429(writers):
    client, _ = application(writers, "lora=lora", max_waiting=2)  # its engine does not run
    body = {"model": "lora", "messages": HI, "n": 3}
    reply = client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 429
    assert reply.json()["error"]["type"] == "rate_limit_error"


def test_more_probabilities_than_a_reply_may_have_are_refused(api, monkeypatch):
    monkeypatch.setattr("petl.generation.serving.service.MAX_ENTRIES", 100)
    body = {"model": "lora", "messages": HI, "max_tokens": 5, "logprobs": True}
    reply = api.post("/v1/chat/completions", json={**body, "n": 2, "top_logprobs": 10})
    assert reply.status_code == 400
    assert "110 logprobs; allowed are 100" in reply.json()["error"]["message"]
    assert api.post("/v1/chat/completions", json={**body, "top_logprobs": 10}).status_code == 200


def test_other_clients_are_answered_while_a_large_reply_is_made(writers, monkeypatch):
    client, engine = application(writers, "lora=lora")
    begun, ended, whole = threading.Event(), threading.Event(), ChatReply.whole

    def slowly(*given):
        begun.set()
        assert ended.wait(20)  # in the loop, nobody could set it
        return whole(*given)

    monkeypatch.setattr(ChatReply, "whole", slowly)

    async def ask():
        transport = httpx.ASGITransport(client.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as asking:
            body = {"model": "lora", "messages": HI, "max_tokens": 1}
            chat = asyncio.create_task(asking.post("/v1/chat/completions", json=body))
            while not begun.is_set():
                await asyncio.sleep(0.01)
            assert (await asking.get("/health")).status_code == 200
            ended.set()
            return (await chat).status_code

    engine.start()
    try:
        assert asyncio.run(ask()) == 200
    finally:
        engine.close()
        engine.join(10)


def formatted(response_format=None, **json_schema):
    named = {"type": "json_schema", "json_schema": {"name": "a", **json_schema}}
    return {"model": "lora", "messages": HI, "response_format": response_format or named}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": HI}, "model is missing"),
        ({"model": "lora"}, "messages is missing"),
        ({"model": "lora", "messages": []}, "messages=[]"),
        ({"model": "lora", "messages": "Hi"}, "messages='Hi'"),
        ({"model": ["lora"], "messages": HI}, "model=['lora']"),
        ({"model": "lora", "messages": HI, "max_tokens": 0}, "max_tokens=0"),
        ({"model": "lora", "messages": HI, "max_tokens": "5"}, "max_tokens='5'"),
        ({"model": "lora", "messages": HI, "n": 10**9}, "n=1000000000"),
        ({"model": "lora", "messages": HI, "top_p": 1.5}, "top_p=1.5"),
        ({"model": "lora", "messages": HI, "stop": ""}, "stop="),
        ({"model": "lora", "messages": HI, "stop": ["x"] * 17}, "stop="),
        ({"model": "lora", "messages": HI, "seed": 2**70}, "seed="),
        ({"model": "lora", "messages": HI, "audio": {}}, "audio={}: this server has no such"),
        ({"model": "lora", "messages": HI, "top_logprobs": 21}, "top_logprobs=21"),
        (formatted({"type": "json"}), "type='json'"),
        (formatted({"type": "json_schema"}), "json_schema has the field json_schema"),
        (formatted({"type": "text", "json_schema": {"name": "a", "schema": {}}}), "no other has"),
        (formatted(schema={}, name="a b"), "json_schema.name='a b'"),
        (formatted(schema=[]), "json_schema.schema=[]: Input should be a valid dictionary"),
        (formatted(schema={"const": "x" * 2**16}), "allowed are 65,536"),
        (formatted(schema={"type": "foo"}), "response_format: the schema cannot be followed: Inv"),
        ({"model": "lora", "messages": HI, "logit_bias": {"x": 1.0}}, "logit_bias has 'x'"),
        ({"model": "lora", "messages": HI, "logit_bias": {"260": 1.0}}, "no token below 260"),
        ({"model": "lora", "messages": HI, "logit_bias": {"²": 1.0}}, "logit_bias has"),
        ({"model": "lora", "messages": [{"role": "critic", "content": ""}]}, "messages.0.role"),
        ({"model": "lora", "messages": [{"role": "user", "content": "x" * 300}]}, "positions"),
    ],
)
def test_bad_values_are_refused_with_their_name(api, body, message):
    reply = api.post("/v1/chat/completions", json=body)
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("", "empty"), ([], "prompt"), ([[]], "prompt"), ([260], "260"), (["x"] * 65, "prompt")],
)
def test_prompts_that_cannot_be_read_are_refused(api, prompt, message):
    reply = api.post("/v1/completions", json={"model": "lora", "prompt": prompt})
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]


def test_fields_that_are_null_or_only_labels_are_accepted(api):
    body = {"model": "lora", "messages": HI, "max_tokens": 2, "stop": None, "tools": None}
    body |= {"user": "me", "metadata": {"a": "b"}, "response_format": {"type": "text"}}
    assert api.post("/v1/chat/completions", json=body).status_code == 200


def test_other_paths_and_methods_have_errors_of_the_same_form(api):
    assert api.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert api.get("/v1/completions").status_code == 405
    assert "error" in api.get("/v1/completions").json()


# The command


def test_a_port_in_use_is_named_before_a_model_is_loaded(server, writers, capsys):
    port = server.url.rpartition(":")[2].removesuffix("/v1")
    assert main(["serve", str(writers.folder / "lora"), "--port", port]) == 2
    assert f"--port={port}: Address already in use" in capsys.readouterr().err
