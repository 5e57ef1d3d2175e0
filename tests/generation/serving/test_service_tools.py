"""Functions in requests to `petl serve`: prompts, required calls, streams, and what is refused."""

import asyncio
import json

import openai
import pytest
from starlette.testclient import TestClient
from tool_templates import HERMES, LLAMA, MISTRAL, tool_tokenizer
from transformers import LlamaForCausalLM
from writer_fixtures import Writers, llama_config

from petl.generation.serving import wire
from petl.generation.serving.app import build_app
from petl.generation.serving.engine import Engine
from petl.generation.serving.models import load_served
from petl.generation.serving.service import AnswerService

pytest_plugins = ["writer_fixtures"]

MAX_TOKENS = 400
CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": DIGIT, "b": DIGIT},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [ADD, NOW]
ASKED = {"messages": HI, "tools": TOOLS, "tool_choice": "required", "temperature": 1.0, "seed": 4}


@pytest.fixture(scope="module")
def server(writers: Writers, tmp_path_factory):
    """The application with the same model under three templates, and one without functions."""
    engine, served = Engine(max_batch=8, max_waiting=20), {}
    config = llama_config()
    config.update({"vocab_size": 261, "max_position_embeddings": 2048})
    for name, template in {"hermes": HERMES, "mistral": MISTRAL, "llama": LLAMA}.items():
        folder = tmp_path_factory.mktemp(name) / name
        LlamaForCausalLM(config).save_pretrained(folder)
        tool_tokenizer(template).save_pretrained(folder)
        served |= load_served({name: str(folder)})
    served |= load_served({"chatml": str(writers.folder / "llama")})
    served |= load_served({"plain": str(writers.folder / "plain")})
    engine.start()
    with TestClient(build_app(AnswerService(served, engine, MAX_TOKENS))) as client:
        yield client
    engine.close()
    engine.join(10)


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=server)


def check(calls, *names: str) -> None:
    """Check that calls are of these functions, with their arguments."""
    for call in calls:
        assert (call.type, call.function.name in names) == ("function", True)
        assert len(call.id) == 9
        arguments = json.loads(call.function.arguments)
        assert {*arguments} == ({"a", "b"} if call.function.name == "add" else set())
        assert all(0 <= value <= 9 for value in arguments.values())


@pytest.mark.parametrize("name", ["hermes", "llama"])
def test_required_calls_follow_the_schema_of_their_function(client, name):
    for choice in ("required", {"type": "function", "function": {"name": "add"}}):
        reply = client.chat.completions.create(
            model=name, **{**ASKED, "tool_choice": choice}, parallel_tool_calls=False
        )
        (answer,) = reply.choices
        assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
        assert len(answer.message.tool_calls) == 1
        check(answer.message.tool_calls, *(["add"] if choice != "required" else ["add", "now"]))


def test_an_answer_that_is_cut_inside_of_a_call_is_a_text(client):
    cut = client.chat.completions.create(model="hermes", **{**ASKED, "max_tokens": 30}).choices[0]
    assert (cut.finish_reason, cut.message.tool_calls) == ("length", None)
    assert cut.message.content.startswith("<tool_call>\n{")


def test_a_stream_gives_calls_in_deltas(client):
    asked = {"model": "hermes", **ASKED, "parallel_tool_calls": False}
    whole = client.chat.completions.create(**asked).choices[0].message
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    assert not any(chunk.delta.content for chunk in chunks)
    (calls,) = (chunk.delta.tool_calls for chunk in chunks if chunk.delta.tool_calls)
    check(calls, "add", "now")
    assert calls[0].function.arguments == whole.tool_calls[0].function.arguments
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["tool_calls"]


def test_an_answer_without_calls_is_that_of_the_prompt_with_functions(client, server):
    """`auto` changes the prompt alone; with `none` the functions are left out of it."""
    asked = {"model": "hermes", "messages": HI, "max_tokens": 20}
    plain = client.chat.completions.create(**asked)
    none = client.chat.completions.create(**asked, tools=TOOLS, tool_choice="none")
    assert none.choices[0].message.content == plain.choices[0].message.content
    assert none.usage.prompt_tokens == plain.usage.prompt_tokens
    auto = client.chat.completions.create(**asked, tools=TOOLS)
    tokenizer = tool_tokenizer(HERMES)
    text = tokenizer.apply_chat_template(
        HI, tools=TOOLS, add_generation_prompt=True, tokenize=False
    )
    prompt = tokenizer(text)["input_ids"]
    assert auto.usage.prompt_tokens == len(prompt)
    expected = client.completions.create(model="hermes", prompt=prompt, max_tokens=20)
    assert auto.choices[0].message.content == expected.choices[0].text
    parts = client.chat.completions.create(**asked, tools=TOOLS, stream=True)
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == expected.choices[0].text


@pytest.mark.parametrize("name", ["hermes", "mistral"])
def test_results_of_calls_are_part_of_the_conversation(client, name):
    call = {"id": "abcdefghi", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    turns = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [{**call, "type": "function"}]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "3"},
    ]
    reply = client.chat.completions.create(model=name, messages=turns, tools=[NOW], max_tokens=1)
    inner = {**call["function"], "arguments": {"a": 1, "b": 2}}
    turns[1] = {**turns[1], "content": "", "tool_calls": [{**call, "function": inner}]}
    template = {"hermes": HERMES, "mistral": MISTRAL}[name]
    text = tool_tokenizer(template).apply_chat_template(
        turns, tools=[NOW], add_generation_prompt=True, tokenize=False
    )
    assert reply.usage.prompt_tokens == len(tool_tokenizer(template)(text)["input_ids"])


def named(name: str) -> dict:
    return {"type": "function", "function": {"name": name}}


TURN = {"role": "assistant", "tool_calls": [{"id": "a", "type": "function"}]}


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        ("chatml", {"tools": TOOLS}, "leaves out tools"),
        ("plain", {"tools": TOOLS}, "need a chat template"),
        ("hermes", {"tools": []}, "tools=[]"),
        ("hermes", {"tools": [NOW] * 129}, "at most 128"),
        ("hermes", {"tools": [NOW, NOW]}, "two functions with the name 'now'"),
        ("hermes", {"tools": [named("a b")]}, "tools.0.function.name='a b'"),
        ("hermes", {"tools": [{"type": "code"}]}, "tools.0.type='code'"),
        ("hermes", {"tool_choice": "required"}, "tool_choice='required' needs tools"),
        ("hermes", {"tools": TOOLS, "tool_choice": "any"}, "tool_choice.type='any'"),
        ("hermes", {"tools": TOOLS, "tool_choice": named("sub")}, "'sub', which is none of the"),
        ("hermes", {"tools": TOOLS, "response_format": {"type": "json_object"}}, "exclude each"),
        ("hermes", {"messages": [*HI, TURN]}, "tool_calls.0.function is missing"),
        ("hermes", {"messages": [{"role": "tool", "tool_call_id": "a"}]}, "content is missing"),
        ("hermes", {"messages": [{**HI[0], "tool_call_id": "a"}]}, "user has no tool_call_id"),
        ("hermes", {"messages": [{**TURN, "role": "user"}]}, "messages.0"),
    ],
)
def test_what_cannot_be_called_is_refused_with_its_name(server, model, fields, message):
    reply = server.post(CHAT, json={"model": model, "messages": HI, **fields})
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]


def with_parameters(schema: object, count: int = 1, choice: str = "required") -> dict:
    tools = [
        {"type": "function", "function": {"name": f"f{i}", "parameters": schema}}
        for i in range(count)
    ]
    return {"model": "hermes", "messages": HI, "tools": tools, "tool_choice": choice}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (with_parameters({"type": "foo"}), "Invalid type: foo"),
        (with_parameters({"const": "x" * 2**16}), "allowed are 65,536"),
        (with_parameters({"const": "x" * 2**15}, 20), "allowed are 262,144"),
        (with_parameters({"$ref": "file:///etc/passwd"}), "does not fetch resources"),
        (with_parameters([]), "parameters=[]"),
    ],
)
def test_schemas_of_functions_are_bounded(server, body, message):
    reply = server.post(CHAT, json=body)
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]


def test_arguments_of_earlier_calls_are_json_objects(server):
    for text in ("[1]", "{", "1" * 10_000, '{"a":' * 1000 + "1" + "}" * 1000):
        call = {"id": "a", "type": "function", "function": {"name": "now", "arguments": text}}
        turns = [*HI, {"role": "assistant", "tool_calls": [call]}]
        reply = server.post(CHAT, json={"model": "hermes", "messages": turns, "tools": [NOW]})
        assert reply.status_code == 400
        assert "arguments" in reply.json()["error"]["message"]


def test_turns_are_made_outside_of_the_loop(server, monkeypatch):
    def parsed(*given):
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        threads.append(1)
        return original(*given)

    threads, original = [], wire.parsed_turn
    monkeypatch.setattr(wire, "parsed_turn", parsed)
    body = {"model": "hermes", "messages": HI * 3, "max_tokens": 1}
    assert server.post(CHAT, json=body).status_code == 200
    assert len(threads) == 3
