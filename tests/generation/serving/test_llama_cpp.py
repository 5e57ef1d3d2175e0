"""`petl serve --engine llama.cpp`: greedy answers of petl's own engine, and what is refused."""

import json
import stat
import threading

import gguf_bases
import openai
import pytest
import torch
from server_fixtures import MAX_TOKENS, started
from starlette.testclient import TestClient
from tiny_tokenizers import CHATML, byte_tokenizer
from transformers import LlamaForCausalLM
from writer_fixtures import PROMPTS, adapt

from petl.adapters.export.gguf import DECODERS
from petl.cli.main import main
from petl.errors import InputError, UnsupportedError
from petl.generation.inference.loading import DEFAULT
from petl.generation.inference.sampling import Sampling
from petl.generation.serving import llama_cpp
from petl.generation.serving.app import build_app
from petl.generation.serving.engine import Engine
from petl.generation.serving.engine_model import load_engine_model
from petl.generation.serving.models import load_served
from petl.generation.serving.service import AnswerService

pytest.importorskip("xllamacpp", reason="not installed: pip install 'petl-peft[llama]'")
pytest.importorskip("gguf", reason="not installed: pip install 'petl-peft[llama]'")
pytest_plugins = ["writer_fixtures"]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]
LIMITS = {"max_batch": 4, "max_waiting": 20}


def client_of(served, engine) -> TestClient:
    return TestClient(build_app(AnswerService(served, engine, MAX_TOKENS)))


@pytest.fixture(scope="module")
def runs(writers):
    """Two LoRAs of `llama`, and a merged model's folder."""
    return {name: str(writers.folder / name) for name in ("lora", "other")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("llama-cpp")


@pytest.fixture(scope="module")
def llama(runs, folder):
    """A client of llama.cpp."""
    served, engine = llama_cpp.load_llama(runs, folder, **LIMITS)
    engine.start()
    with client_of(served, engine) as client:
        yield client
    engine.close()
    engine.join(10)


@pytest.fixture(scope="module")
def own(runs):
    """A client of petl's engine."""
    engine = Engine(**LIMITS)
    engine.start()
    with client_of(load_served(runs), engine) as client:
        yield client
    engine.close()
    engine.join(10)


def same(reply: dict) -> dict:
    """What two engines have in common."""
    return {key: value for key, value in reply.items() if key not in ("id", "created")}


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["llama", "lora", "other"])
def test_greedy_answers_of_each_adapter_are_those_of_petl(llama, own, name):
    for body in (
        {"messages": HI, "max_tokens": 40},
        {"messages": [{"role": "user", "content": "a b a b a"}], "max_tokens": 20, "n": 2},
        {"messages": HI, "max_tokens": 30, "stop": ["e", "z"]},
        {"messages": HI, "max_tokens": 10, "logit_bias": {"40": 50, "3": -100}},
        {"messages": HI, "max_tokens": 20, "repetition_penalty": 1.3},
    ):
        asked = {"model": name, "temperature": 0, **body}
        expected = own.post(CHAT, json=asked).json()
        assert same(llama.post(CHAT, json=asked).json()) == same(expected)
    assert llama.get("/v1/models").json()["data"][1]["id"] == "lora"


def test_streams_texts_and_probabilities_are_those_of_petl(llama, own):
    asked = {"model": "other", "prompt": ["Hi", "a b a"], "max_tokens": 12, "logprobs": 2}
    found, expected = (client.post(COMPLETIONS, json=asked).json() for client in (llama, own))
    for one, other in zip(found["choices"], expected["choices"], strict=True):
        assert one["text"] == other["text"]
        assert one["logprobs"]["token_logprobs"] == pytest.approx(
            other["logprobs"]["token_logprobs"], abs=1e-3
        )
        assert [{*each} for each in one["logprobs"]["top_logprobs"]] == [
            {*each} for each in other["logprobs"]["top_logprobs"]
        ]
    stream = llama.post(COMPLETIONS, json={**asked, "prompt": "Hi", "stream": True}).text
    *events, end = (line.removeprefix("data: ") for line in stream.split("\n\n")[:-1])
    pieces = [json.loads(event)["choices"][0]["text"] for event in events]
    assert "".join(pieces) == found["choices"][0]["text"]
    assert (end, sum(map(bool, pieces)) > 3) == ("[DONE]", True)


def test_sampled_answers_repeat_with_a_seed(llama):
    def texts(**more):
        asked = {"model": "lora", "messages": HI, "max_tokens": 20, "temperature": 1.2, "n": 2}
        reply = llama.post(CHAT, json={**asked, "top_k": 50, "top_p": 0.9, **more}).json()
        return [choice["message"]["content"] for choice in reply["choices"]]

    first = texts(seed=1)
    assert first == texts(seed=1) != texts(seed=2)
    assert first[0] != first[1]
    assert texts() != texts()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"presence_penalty": 1.0}, "presence_penalty and frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, "answers that follow a schema"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "positions"),
        ({"max_tokens": 1000}, "max_tokens=1000"),
        ({"model": "mola"}, "no model 'mola'"),
    ],
)
def test_what_llama_cpp_has_not_is_refused_and_bounds_hold(llama, fields, message):
    reply = llama.post(CHAT, json={"model": "lora", "messages": HI, **fields})
    assert reply.status_code in (400, 404)
    assert message in reply.json()["error"]["message"]


def test_a_model_of_16_bits_computes_in_float32_for_a_while(writers):
    folder = writers.folder / "llama"
    narrow = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = LlamaForCausalLM.from_pretrained(folder)
    model.load_state_dict(narrow.state_dict())
    with torch.no_grad():
        ids = torch.arange(40, 50)[None]
        before, wanted = narrow(input_ids=ids).logits, model(input_ids=ids).logits
        with llama_cpp.in_float32(narrow):
            found = narrow(input_ids=ids).logits
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        assert torch.equal(narrow(input_ids=ids).logits, before)  # as it was
    assert {each.dtype for each in narrow.parameters()} == {torch.bfloat16}


@pytest.mark.thorough
def test_the_command_serves_until_ctrl_c_and_leaves_no_files(writers, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    words = [f"m={writers.folder / 'lora'}", "--engine", "llama.cpp", "--api-key", "secret"]
    with started(tmp_path / "log", *words) as server:
        with pytest.raises(openai.AuthenticationError), server.client() as client:
            client.models.list()
        with server.client(api_key="secret") as client:
            asked = {"model": "m", "messages": HI, "stream": True, "logit_bias": {"3": -100}}
            # as many answers as take longer than the signal
            stream = client.chat.completions.create(**asked, max_tokens=200, n=16)
            next(iter(stream))
            interrupting = threading.Thread(target=server.interrupt)
            interrupting.start()
            with pytest.raises(openai.APIError):
                for _ in stream:
                    pass
            interrupting.join()
        assert server.process.returncode == 0
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert not list((tmp_path / "temporary").glob("petl-serve-*"))


def test_its_own_server_is_reached_by_this_user_alone(llama, folder):
    """It has no port, and its socket is in a folder of this user."""
    (socket,) = folder.glob("*.sock")
    assert socket.is_socket()
    assert stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0


@pytest.mark.cells(3)
@pytest.mark.parametrize("family", DECODERS)
def test_each_architecture_is_written_as_llama_cpp_reads_it(family, tmp_path):
    base = gguf_bases.build(family)
    base.generation_config.eos_token_id = 3
    base.save_pretrained(tmp_path / "base")
    byte_tokenizer(chat_template=CHATML).save_pretrained(tmp_path / "base")
    words = {"base": str(tmp_path / "base")}
    (tmp_path / "files").mkdir()
    served, engine = llama_cpp.load_llama(words, tmp_path / "files", **LIMITS)
    # ten tokens: later ones may be nearly equally likely in a random model
    asked = {"model": "base", "prompt": [5, 9, 200, 17, 64, 31], "max_tokens": 10, "logprobs": 1}
    found = []
    for models, each in ((served, engine), (load_served(words), Engine(**LIMITS))):
        each.start()
        with client_of(models, each) as client:
            found.append(client.post(COMPLETIONS, json=asked).json()["choices"][0])
        each.close()
        each.join(10)
    assert found[0]["text"] == found[1]["text"]
    values = [each["logprobs"]["token_logprobs"] for each in found]
    assert values[0] == pytest.approx(values[1], abs=1e-3)
    assert len(values[0]) == 10


def test_what_cannot_be_served_is_refused_before_weights_are_loaded(writers, tmp_path, monkeypatch):
    monkeypatch.setattr("petl.generation.serving.models.load_writer", None)

    def refused(path, message):
        with pytest.raises(InputError, match=message):
            llama_cpp.load_llama({"a": str(path)}, tmp_path, **LIMITS)

    refused(writers.folder / "mola", "--engine llama.cpp.*MoLA")
    llama, dora = writers.folder / "llama", tmp_path / "dora"
    adapt(LlamaForCausalLM, llama, "dora", "CAUSAL_LM", dora, 0)
    refused(dora, "DoRA")
    refused(writers.folder / "t5", "t5")
    config = gguf_bases.build("llama").config
    config.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    config.save_pretrained(tmp_path / "scaled")
    refused(tmp_path / "scaled", "linear")


def test_a_model_that_is_written_wrong_is_not_served(writers, tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "next_token", lambda model, ids: torch.zeros(260) - 1.0)
    with pytest.raises(UnsupportedError):
        llama_cpp.load_llama({"a": str(writers.folder / "llama")}, tmp_path, **LIMITS)


@pytest.mark.parametrize(
    ("weights", "gap"), [("float16", 0.02), ("q8_0", 0.3), ("int8", 0.3), ("int4", 2.0)]
)
def test_weights_of_fewer_bits_change_probabilities_a_little(writers, own, tmp_path, weights, gap):
    served, engine = llama_cpp.load_llama(
        {"llama": str(writers.folder / "llama")}, tmp_path, weights=weights, **LIMITS
    )
    asked = {"model": "llama", "prompt": "Hi", "max_tokens": 1, "logprobs": 1}
    engine.start()
    with client_of(served, engine) as client:
        replies = [each.post(COMPLETIONS, json=asked).json() for each in (client, own)]
    engine.close()
    engine.join(10)
    values = [each["choices"][0]["logprobs"]["token_logprobs"][0] for each in replies]
    assert 1e-6 < abs(values[0] - values[1]) < gap


def test_methods_that_are_matrices_are_served_as_loras(writers, tmp_path):
    adapt(LlamaForCausalLM, writers.folder / "llama", "loha", "CAUSAL_LM", tmp_path / "loha", 0)
    (tmp_path / "files").mkdir()
    served, engine = llama_cpp.load_llama(
        {"loha": str(tmp_path / "loha")}, tmp_path / "files", **LIMITS
    )
    assert [*served] == ["llama", "loha"]
    assert engine.waiting == engine.running == 0


def test_generate_writes_the_answers_of_petl(writers, tmp_path):
    folder = writers.folder
    words = ["generate", str(folder / "lora"), "--adapter", f"b={folder / 'other'}", "--base"]
    words += ["--file", str(tmp_path / "rows.jsonl"), "--max-new-tokens", "12"]
    rows = [{"prompt": text} for text in PROMPTS]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    written = []
    for engine in ("petl", "llama.cpp"):
        out = tmp_path / f"{engine}.jsonl"
        assert main([*words, "--out", str(out), "--engine", engine]) == 0
        written.append(out.read_text())
    assert written[0] == written[1]
    assert len(written[0].splitlines()) == len(rows)


def test_an_answer_ends_early_when_it_is_stopped(writers, tmp_path):
    model = load_engine_model({DEFAULT: str(writers.folder / "lora")}, tmp_path)
    stop, pieces = threading.Event(), []

    def write(text):
        pieces.append(text)
        stop.set()

    with model.using(DEFAULT):
        prompt = model.encode("Hi")
        (answer,) = model.answer([prompt], Sampling(max_new_tokens=200), write=write, stop=stop)
        (whole,) = model.answer([prompt], Sampling(max_new_tokens=3))
        with pytest.raises(InputError):
            model.answer([prompt], Sampling(prompt_lookup=3))
    assert (answer.finish, answer.text) == ("interrupted", "".join(pieces))
    assert (whole.finish, whole.tokens) == ("length", 3)
    model.engine.close()
    model.engine.join(10)
