"""`--weights int8|int4`: adapters beside packed weights, the same answers everywhere, refusals."""

import logging

import pytest
import torch
from server_fixtures import MAX_TOKENS
from starlette.testclient import TestClient
from transformers import LlamaConfig, LlamaForCausalLM
from writer_fixtures import CHATML, PROMPTS, adapt, llama_config, write

from petl.core.types import base_of
from petl.errors import UnsupportedError
from petl.generation.inference.loading import load_language_model
from petl.generation.inference.sampling import Sampling
from petl.generation.serving.app import build_app
from petl.generation.serving.engine import Engine
from petl.generation.serving.models import load_served
from petl.generation.serving.service import AnswerService
from petl.ops.small_weights import KINDS, SmallLinear, matrix_of, pack, product, why_unsupported

pytest_plugins = ["writer_fixtures"]
pytestmark = pytest.mark.skipif(
    any(map(why_unsupported, KINDS)), reason="no kernels for this processor"
)
IDS = torch.tensor([[5, 9, 40, 7, 99, 30, 5]])
ROUNDED = 0.03  # of logits, by inputs and outputs of layers in bfloat16


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of a model of widths that 4 bits take, and of adapters on it."""
    folder = tmp_path_factory.mktemp("small")
    values = llama_config().to_dict() | {"hidden_size": 64, "intermediate_size": 96}
    values |= {"vocab_size": 272, "head_dim": 32}
    write(folder / "llama", LlamaForCausalLM, LlamaConfig(**values), chat_template=CHATML)
    for seed, name in enumerate(["lora", "mola", "adapter", "ia3", "dora", "shira", "sparse"]):
        fields = {"r": 8} if name == "shira" else {}
        adapt(LlamaForCausalLM, folder / "llama", name, "CAUSAL_LM", folder / name, seed, **fields)
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def rounded(model, kind: str) -> None:
    """Give the base's linear layers the values that their codes stand for."""
    head = model.get_output_embeddings()
    for layer in [m for m in model.modules() if type(m) is torch.nn.Linear]:
        codes = pack(matrix_of(layer), "int8" if layer is head else kind)
        units = torch.eye(matrix_of(layer).shape[1]).bfloat16()
        layer.weight.data = product(units, codes).float().t().contiguous()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "adapter", "ia3", "sparse"])
def test_adapters_compute_in_full_beside_the_values_of_the_codes(small, tmp_path, method, kind):
    packed = load_language_model(small / method, weights=kind, plain=True)
    plain = load_language_model(small / method, plain=True)
    base = LlamaForCausalLM.from_pretrained(small / "llama")
    rounded(base, kind)
    base.save_pretrained(tmp_path / "rounded")
    # the same adapter on a base that has these values in float32
    expected = base_with_adapter(base, plain.model)
    found = logits(packed.model)
    gaps = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert gaps.median() < ROUNDED
    layers = [m for m in base_of(packed.model).modules() if isinstance(m, SmallLinear)]
    assert len(layers) == 2 * 7 + 1
    assert all(p.dtype == torch.float32 for p in packed.model.parameters())


def base_with_adapter(base, model) -> torch.Tensor:
    """The logits of a model with adapters, on the weights of another base."""
    for name, layer in base.named_modules():
        if type(layer) is torch.nn.Linear:
            own = base_of(model).get_submodule(name)
            getattr(own, "base_layer", own).weight.data = layer.weight.data
    return logits(model)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_generate_chat_and_serve_answer_alike(small, kind):
    model = load_language_model(small / "mola", weights=kind, drafting="none")
    sampling = Sampling(max_new_tokens=MAX_TOKENS, temperature=0)
    engine = Engine(max_batch=1, max_waiting=20)
    engine.start()
    served = load_served(
        {name: str(small / name) for name in ("mola", "lora")}, drafter=None, weights=kind
    )
    with TestClient(build_app(AnswerService(served, engine, MAX_TOKENS))) as client:
        for prompt in PROMPTS:
            asked = {"messages": [{"role": "user", "content": prompt}], "temperature": 0}
            body = {"model": "mola", **asked, "max_tokens": MAX_TOKENS}
            reply = client.post("/v1/chat/completions", json=body).json()
            with model.using("default"):
                (answer,) = model.answer([model.encode(prompt)], sampling)
            assert reply["choices"][0]["message"]["content"] == answer.text
    engine.close()
    engine.join(10)
    # the weights of both methods and of the base are packed, once
    codes = {}
    for each in served.values():
        layers = [m for m in each.language.base.modules() if isinstance(m, SmallLinear)]
        assert len(layers) == 2 * 7 + 1
        codes |= {layer.codes.data_ptr(): layer for layer in layers}
    assert len(codes) == 2 * 7 + 1


def test_drafts_change_no_token_but_in_near_ties(small):
    model = load_language_model(small / "lora", weights="int8", drafting="free")
    with model.using("default"):
        (answer,) = model.answer([model.encode("Hi")], Sampling(max_new_tokens=9, temperature=0))
    assert answer.tokens == 9


def test_the_loss_of_quality_is_told(small, caplog):
    with caplog.at_level(logging.INFO, "petl.generation.inference.small_weights"):
        load_language_model(small / "lora", weights="int4")
    text = " ".join(record.getMessage() for record in caplog.records)
    assert "same next token" in text
    assert "MB of weights in" in text


def test_what_cannot_be_packed_is_refused(small, monkeypatch):
    with pytest.raises(UnsupportedError):
        load_language_model(small / "dora", weights="int8")
    with pytest.raises(UnsupportedError):
        load_language_model(small / "shira", weights="int8")
    with pytest.raises(UnsupportedError):
        load_served({"shira": str(small / "shira")}, weights="int4")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(UnsupportedError):
        load_language_model(small / "lora", weights="int8")
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    why_unsupported.cache_clear()
    with pytest.raises(UnsupportedError):
        load_language_model(small / "lora", weights="int4")
    monkeypatch.undo()
    why_unsupported.cache_clear()
