"""Images in requests: answers as alone, whoever shares the passes, and what is refused."""

import base64
import io
import json

import pytest
from fastapi.testclient import TestClient
from image_text_fixtures import COLORS, SOME_KINDS, save_picture
from PIL import Image

from petl.errors import InputError
from petl.generation.inference.language_model import message
from petl.generation.inference.sampling import AnswerText, Sampling
from petl.generation.serving.app import build_app
from petl.generation.serving.choice import Chooser, TokenChooser
from petl.generation.serving.engine import Engine
from petl.generation.serving.models import load_served
from petl.generation.serving.request import Request
from petl.generation.serving.service import AnswerService, pictured

pytest_plugins = ["image_text_fixtures", "writer_fixtures"]


def data_url(color, size=(20, 14)):
    packed = io.BytesIO()
    Image.new("RGB", size, COLORS[color]).save(packed, "PNG")
    return f"data:image/png;base64,{base64.b64encode(packed.getvalue()).decode()}"


@pytest.fixture(scope="module")
def served(adapters):
    loaded = {}

    def load(kind):
        if kind not in loaded:
            loaded[kind] = load_served({n: str(adapters[kind] / n) for n in ("one", "two")})
        return loaded[kind]

    return load


def request(each, prompt, tokens):
    chooser = Chooser(Sampling(max_new_tokens=tokens), TokenChooser(), each.language.base, prompt)
    pieces: list = []
    text = AnswerText(each.language.tokenizer, ())
    made = Request(prompt, each.adapter, chooser, text, each.language.ends, pieces.append, tokens)
    return made, pieces


@pytest.mark.thorough
@pytest.mark.parametrize("kind", SOME_KINDS)
def test_requests_share_passes_and_answer_as_alone(served, kind):
    """Of images of other sizes, of several, and of text alone; each joins after another one."""
    models = served(kind)
    one, two = models["one"], models["two"]
    urls = [data_url("red"), data_url("blue", (40, 12)), data_url("green", (9, 30))]
    turns = [message("user", "Which color?", 1)]
    requests = [
        request(one, pictured(one.language, turns, urls[:1]), 9),
        request(two, pictured(two.language, [message("user", "Both?", 2)], urls[1:]), 6),
        request(one, one.language.encode([message("user", "Hello")]), 8),
        request(two, pictured(two.language, turns, urls[2:]), 7),
        request(one, pictured(one.language, turns, urls[1:2]), 5),
    ]
    left = [made for made, _ in requests]
    while left or one.lane.batches:
        now, left = left[:2], left[2:]
        one.lane.advance(now)
    found = ["".join(piece.text for piece in pieces) for _, pieces in requests]
    expected = []
    for made, _ in requests:
        language = one.language
        with language.using(made.adapter):
            sampling = Sampling(max_new_tokens=made.max_tokens)
            expected.append(language.answer([made.prompt], sampling)[0].text)
    assert found == expected
    assert len({*found}) > 3


@pytest.fixture(scope="module")
def client(served):
    engine = Engine(max_batch=4, max_waiting=10)
    app = build_app(AnswerService(served("llava"), engine, 20))
    engine.start()
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client
    engine.close()
    engine.join(10)


def ask(client, *urls, **more):
    """The reply to a question about images."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*parts, {"type": "text", "text": "Which color?"}]
    body = {"model": "one", "max_tokens": 6, "messages": [{"role": "user", "content": content}]}
    return client.post("/v1/chat/completions", json={**body, **more})


def test_the_api_answers_about_images_of_a_request(client, served):
    url = data_url("red")
    reply = ask(client, url)
    assert reply.status_code == 200, reply.text
    language = served("llava")["one"].language
    prompt = pictured(language, [message("user", "Which color?", 1)], [url])
    with language.using(served("llava")["one"].adapter):
        expected = language.answer([prompt], Sampling(max_new_tokens=6))[0]
    assert reply.json()["choices"][0]["message"]["content"] == expected.text
    assert reply.json()["usage"]["prompt_tokens"] == len(prompt)
    assert ask(client, url, stream=True).text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("urls", "words"),
    [
        (["http://127.0.0.1/a.png"], "fetches nothing"),
        (["file:///etc/passwd"], "fetches nothing"),
        (["/etc/passwd"], "fetches nothing"),
        (["data:image/png;base64,AAAA"], "cannot be read as an image"),
        (["data:image/png,abc"], "base64"),
        (["data:image/png;base64,%"], "base64"),
        ([data_url("red")] * 17, "17 images"),
        ([data_url("red", (5000, 3400))], "pixels"),
        ([data_url("red", (4000, 4000)), data_url("red", (1000, 1000))], "image 2"),
    ],
    ids=["http", "file", "path", "damaged", "plain", "letters", "many", "large", "together"],
)
def test_images_that_cannot_be_are_refused_before_anything_is_computed(client, urls, words):
    reply = ask(client, *urls)
    assert reply.status_code == 400
    assert words in reply.json()["error"]["message"]
    assert client.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}


def test_a_text_with_the_mark_of_an_image_is_refused(client):
    messages = [{"role": "user", "content": "an <image> of mine"}]
    reply = client.post("/v1/chat/completions", json={"model": "one", "messages": messages})
    assert reply.status_code == 400
    assert "<image>" in reply.json()["error"]["message"]
    # the server goes on
    assert ask(client, data_url("red")).status_code == 200


@pytest.mark.thorough
def test_a_request_is_bounded_in_bytes(client):
    part = {"type": "image_url", "image_url": {"url": "data:," + "A" * 2**25}}
    messages = [{"role": "user", "content": [part] * 3}]
    body = json.dumps({"model": "one", "messages": messages})
    headers = {"content-type": "application/json"}
    reply = client.post("/v1/chat/completions", content=body, headers=headers)
    assert reply.status_code == 413
    messages = [{"role": "user", "content": [part]}]
    assert client.post(
        "/v1/chat/completions", json={"model": "one", "messages": messages}
    ).status_code in (400, 413)


def test_a_model_of_texts_refuses_images(writers, tmp_path):
    served = load_served({"lora": str(writers.folder / "lora")})
    app = build_app(AnswerService(served, Engine(max_batch=2, max_waiting=2), 20))
    with TestClient(app, raise_server_exceptions=False) as client:
        reply = ask(client, data_url("red"), model="lora")
        assert reply.status_code == 400
        assert "texts alone" in reply.json()["error"]["message"]
    save_picture(tmp_path / "a.png", "red")
    with pytest.raises(InputError):
        pictured(served["lora"].language, [message("user", "?", 1)], [data_url("red")])
