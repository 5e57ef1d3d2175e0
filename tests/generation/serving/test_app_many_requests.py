"""Many requests of all kinds at once, over six adapters: each answer is the one it gets alone."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from server_fixtures import application
from transformers import LlamaForCausalLM
from writer_fixtures import adapt

pytest_plugins = ["writer_fixtures"]

ADAPTERS = {
    **{name: ("lora", {}) for name in ("lora", "other")},
    "mola": ("mola", {}),
    "mos": ("mos", {"equivalent_rank": 2, "r": 2}),
    "sparse": ("sparse", {"density": 0.05}),
    "packed": ("binary", {"inner": "lora"}),
}
TEXTS = ["Hi", "a b a b a", "the cat and the dog and the cat and", "x" * 60, "Ω, ß and 😀"]
BAD = [{"max_tokens": -1}, {"temperature": 9}, {"model": "nobody"}, {"messages": []}, {"n": 0}]


@pytest.fixture(scope="module")
def client(writers):
    base, words = writers.folder / "llama", [f"{name}={name}" for name in ADAPTERS]
    for seed, (name, (method, fields)) in enumerate(ADAPTERS.items()):
        folder = writers.folder / name
        if not folder.exists():
            adapt(LlamaForCausalLM, base, method, "CAUSAL_LM", folder, seed, **fields)
    client, engine = application(writers, *words, max_waiting=200)
    engine.start()
    with client:
        yield client
    engine.close()
    engine.join(10)


def request(draw):
    """A request of one of the kinds that clients send; some are wrong."""
    body = {
        "model": draw.choice(["llama", *ADAPTERS]),
        "messages": [{"role": "user", "content": draw.choice(TEXTS)}],
        "max_tokens": draw.choice([1, 3, 8, 20]),
        "stream": draw.random() < 0.3,
    }
    kind = draw.choice(["greedy", "greedy", "sampled", "several", "stop", "bad"])
    if kind in ("sampled", "several"):
        body |= {"temperature": draw.choice([0.5, 1.5]), "seed": draw.randrange(3)}
    if kind == "several":
        body["n"] = 3
    if kind == "stop":
        body["stop"] = [draw.choice("aeiou"), "th"]
    return {**body, "stream": False, **draw.choice(BAD)} if kind == "bad" else body


def answer(client, body):
    """The status, and the texts and ends of the choices."""
    reply = client.post("/v1/chat/completions", json=body)
    if not body["stream"] or reply.status_code != 200:
        choices = reply.json().get("choices", [])
        return reply.status_code, [(c["message"]["content"], c["finish_reason"]) for c in choices]
    texts, ends = {}, {}
    for line in reply.text.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                index = choice["index"]
                texts[index] = texts.get(index, "") + (choice["delta"].get("content") or "")
                ends[index] = choice["finish_reason"] or ends.get(index)
    return reply.status_code, [(texts[index], ends[index]) for index in sorted(texts)]


@pytest.mark.thorough
@pytest.mark.parametrize(
    "count", [30, pytest.param(2000, marks=[pytest.mark.thorough, pytest.mark.timeout(900)])]
)
def test_each_answer_of_many_is_the_one_it_gets_alone(client, count):
    draw = random.Random(count)
    bodies = [request(draw) for _ in range(count)]
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda body: answer(client, body), bodies))
    alone = {}
    for body, (status, choices) in zip(bodies, found, strict=True):
        key = json.dumps({**body, "stream": False}, sort_keys=True)
        if key not in alone:
            alone[key] = answer(client, {**body, "stream": False})
        assert (status, choices) == alone[key], body
    assert {status for status, _ in found} >= {200, 400}
