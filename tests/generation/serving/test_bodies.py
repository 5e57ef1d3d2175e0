"""Bodies of requests: what is wrong has its name, and costs no more than what is right."""

import json
import time

import pytest

from petl.generation.serving.bodies import read_body
from petl.generation.serving.replies import ApiError
from petl.generation.serving.wire import ChatRequest, CompletionRequest

HI = [{"role": "user", "content": "Hi"}]
TEXT = {"type": "text", "text": "Hi"}


def message_of(kind, body) -> tuple[str, str | None]:
    with pytest.raises(ApiError) as caught:
        read_body(kind, json.dumps({"model": "m", **body}).encode(), "application/json")
    error = caught.value.body["error"]
    return error["message"], error["param"]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "string or a"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages.0.content.0", "be an object"),
        (
            {"messages": [{"role": "user", "content": [TEXT, {"type": "text", "text": 5}]}]},
            "messages.0.content.1.text",
            "=5: Input should be a valid string",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0",
            "a part of type image_url has the field image_url",
        ),
        ({"messages": HI, "stop": ["a", 5]}, "stop.1", "=5: Input should be a valid string"),
        ({"messages": HI, "stop": ["a", "x" * 2000]}, "stop.1", "at most 1000 characters"),
        ({"messages": HI, "stop": 5}, "stop", "a valid string or a valid list"),
        ({"messages": HI, "temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"messages": HI, "max_tokens": 10**4000}, "max_tokens", "(4001 characters): Input should"),
        ({"messages": HI, "stream_options": {"x": 1}, "n": 0}, "n", "n=0"),
    ],
)
def test_the_member_of_a_union_that_is_meant_is_named_in_a_chat(body, param, message):
    found = message_of(ChatRequest, body)
    assert found[1] == param
    assert message in found[0]


@pytest.mark.parametrize(
    ("prompt", "param", "message"),
    [
        ([1, "a"], "prompt.1", "='a': Input should be a valid integer"),
        (["a", 1], "prompt.1", "=1: Input should be a valid string"),
        ([[1], [2, "a"]], "prompt.1.1", "='a': Input should be a valid integer"),
        ([[1], "a"], "prompt.1", "='a': Input should be a valid list"),
        ([1, -5], "prompt.1", "=-5: Input should be greater than or equal to 0"),
        ([], "prompt", "at least 1 item"),
        ({}, "prompt", "a valid string or a valid list"),
        ([[1], []], "prompt.1", "at least 1 item"),
    ],
)
def test_the_member_of_a_union_that_is_meant_is_named_in_a_completion(prompt, param, message):
    found = message_of(CompletionRequest, {"prompt": prompt})
    assert found[1] == param
    assert message in found[0]


@pytest.mark.cells(3)
@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [None] * 600_000},
        {"prompt": [[]] * 900_000},
        {"prompt": ["", 1] * 400_000},
        {"prompt": [[-1] * 10] * 90_000},
        {"messages": [{}] * 900_000},
        {"messages": HI, "stop": [5] * 1_000_000},
        {"messages": HI * 1999 + [{"role": "user", "content": [{}] * 900_000}]},
        {"messages": HI, **{f"x{i}": i for i in range(300_000)}},
        {"messages": HI, "logit_bias": {str(i): "x" for i in range(250_000)}},
    ],
)
def test_a_body_full_of_wrong_items_is_refused_at_once(body):
    kind = ChatRequest if "messages" in body else CompletionRequest
    raw = json.dumps({"model": "m", **body}).encode()
    assert len(raw) > 2_000_000
    start = time.thread_time()
    with pytest.raises(ApiError):
        read_body(kind, raw, "application/json")
    assert time.thread_time() - start < 3  # 27 s, one error for each item
