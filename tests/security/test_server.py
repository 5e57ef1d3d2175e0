"""Requests to `petl serve` are hostile: bodies of any size and content are answered or refused."""

import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petl.generation.serving.gate import BODY_BYTES
from petl.training import program as app

pytest_plugins = ["writer_fixtures", "server_fixtures"]

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
HI = [{"role": "user", "content": "Hi"}]
GOOD = {"model": "lora", "messages": HI, "max_tokens": 1}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a"}}
TOOL = {"type": "function", "function": {"name": "now"}}
# fields by which a value comes deeper into a request
NESTED = {
    "response_format": lambda value: {"response_format": value},
    "json_schema": lambda value: {"response_format": {**SCHEMA, "json_schema": value}},
    "schema": lambda value: with_schema({"properties": {"a": value}}),
    "tool_choice": lambda value: {"tools": [TOOL], "tool_choice": value},
    "tools": lambda value: {"tools": value},
    "function": lambda value: {"tools": [{**TOOL, "function": value}]},
    "tool_calls": lambda value: {"messages": [{"role": "assistant", "tool_calls": value}]},
}

FIELDS = [*GOOD, "stop", "n", "seed", "logit_bias", "new", *NESTED]


def with_schema(schema: object) -> dict[str, object]:
    named = {**SCHEMA, "json_schema": {"name": "a", "schema": schema}}
    return {"response_format": named}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


def refused(reply, *statuses: int) -> str:
    """The message of a reply that is an error of OpenAI's form with one of these statuses."""
    assert reply.status_code in (statuses or (400,)), reply.text
    error = reply.json()["error"]
    assert {*error} == {"message", "type", "param", "code"}
    return error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"lora"',
        b"\xff\xfe",
        b'{"model": "lora", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": "lora", "max_tokens": ' + b"9" * 10_000 + b', "messages": []}',
        b'{"model": "lora", "temperature": NaN, "messages": []}',
        b'{"model": "lora", "temperature": 1e999, "messages": []}',
        b'{"model": "\\ud800", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "lora", "messages": [{"role": "user", "content": "\\ud800"}]}',
        json.dumps({**GOOD, "messages": HI * 3000}).encode(),
        json.dumps({**GOOD, "stop": ["x" * 2000]}).encode(),
    ],
)
def test_bodies_that_are_no_request_are_refused(api, body):
    refused(api.post(CHAT, content=body, headers=JSON), 400, 404)
    assert api.post(CHAT, json=GOOD).status_code == 200


def test_large_bodies_are_not_read(api):
    refused(api.post(CHAT, content=b"x" * (BODY_BYTES + 1), headers=JSON), 413)

    def chunks():  # without a length, and without an end
        while True:
            yield b"x" * 2**20

    stream = iter(chunks())
    refused(api.post(CHAT, content=(next(stream) for _ in range(6)), headers=JSON), 413)
    for length in ("-1", "1e3", "9" * 50, "\u00b2"):
        headers = {**JSON, "content-length": length.encode()}
        refused(api.post(CHAT, content=b"{}", headers=headers), 413)


def test_only_json_is_read(api):
    """A web page may send other types to any address without being asked."""
    body = json.dumps(GOOD).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        refused(api.post(CHAT, content=body, headers={"content-type": kind}))


@settings(max_examples=60)
@given(field=st.sampled_from(FIELDS), value=VALUES)
def test_any_value_of_a_field_is_answered_or_refused(api, field, value):
    given = NESTED[field](value) if field in NESTED else {field: value}
    body = json.dumps({**GOOD, **given}).encode()
    reply = api.post(CHAT, content=body, headers=JSON)
    if reply.status_code != 200:
        refused(reply, 400, 404)


@pytest.mark.thorough
def test_hostile_schemas_end_in_errors_and_hold_up_nobody(writers, api):
    """Other clients are answered meanwhile; what a schema refers to is not fetched."""
    many = [{f"p{i} {j}": {} for i in range(1000)} for j in range(3)]
    schemas = [
        {"anyOf": [{"type": "object", "properties": each} for each in many]},
        {"$ref": "#"},
        {"$ref": "file:///etc/passwd"},
        {"type": "string", "pattern": "(((a{1,1000}){1,1000}){1,1000}b?){1000}"},
        {"type": "integer", "multipleOf": 987654321},
        {"allOf": [{"anyOf": [{"pattern": f"^.*{i}.*{j}"} for j in range(30)]} for i in range(30)]},
    ]
    begun = time.monotonic()
    with ThreadPoolExecutor(len(schemas)) as pool:
        asked = [
            pool.submit(api.post, CHAT, json={**GOOD, "max_tokens": 5, **with_schema(schema)})
            for schema in schemas
        ]
        while not all(each.done() for each in asked):
            assert api.get("/health").status_code == 200
            assert api.post(CHAT, json=GOOD).status_code == 200
    assert time.monotonic() - begun < 30
    for each in asked:
        if each.result().status_code != 200:  # not too many ways to go on
            assert "schema" in refused(each.result())
    assert api.post(CHAT, json=GOOD).status_code == 200


def test_what_a_request_says_is_shown_and_not_obeyed(api, capsys):
    before = logging.getLogger("petl").handlers
    app.log_to_stderr()
    try:
        message = refused(api.post(CHAT, json={**GOOD, "model": "\x1b]52;c;x\x07"}), 404)
        refused(api.post(CHAT, json={**GOOD, "\x1b[2J": 1}))
        assert api.post(CHAT, json={**GOOD, "user": "\x1b[2J"}).status_code == 200
    finally:
        logging.getLogger("petl").handlers = before
    assert "\x1b" not in message
    assert "lora: " in (log := capsys.readouterr().err)
    assert "\x1b" not in log


@pytest.mark.thorough
def test_a_prompt_of_special_tokens_cannot_break_the_server(api):
    reply = api.post("/v1/completions", json={"model": "lora", "prompt": [3, 0, 259]})
    assert reply.status_code == 200
