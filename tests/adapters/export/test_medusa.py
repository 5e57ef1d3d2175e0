"""Draft heads for vLLM: its Medusa block, recomputed in plain torch, has the same logits."""

import json

import pytest
import torch
from draft_fixtures import PAD, VOCABULARY, prompt
from safetensors.torch import load_file
from torch import nn

from petl import testing
from petl.adapters.export.medusa import export_medusa
from petl.efficiency.drafting import answers, drafter, fit
from petl.errors import UnsupportedError


@pytest.fixture(scope="module")
def model():
    return testing.tiny_llama()


@pytest.fixture(scope="module")
def written(model):
    prompts = [prompt(i)[0].tolist() for i in range(3)]
    return answers(model, prompts, tokens=10, pad_token_id=PAD)


def medusa(folder, h, head):
    """Logits of all tokens, [N, V], as vLLM's Medusa model computes them."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    assert config["architectures"] == ["MedusaModel"]
    y = h
    for j in range(config["num_hidden_layers"]):
        name = f"blocks.{head}.layers.{j}"
        layer = nn.Linear(config["hidden_size"], config["hidden_size"])
        layer.load_state_dict({p: tensors[f"{name}.{p}"] for p in ("weight", "bias")})
        y = y + nn.SiLU()(layer(y))
    shared = config["original_lm_head"]
    weight = tensors["lm_heads.0.weight" if shared else f"lm_heads.{head}.weight"]
    assert len(weight) == config["truncated_vocab_size"]
    logits = y @ weight.T
    # the map is used if the vocabulary is truncated
    if config["truncated_vocab_size"] == config["vocab_size"]:
        return logits
    whole = torch.full((len(h), config["vocab_size"]), -torch.inf)
    whole[:, tensors["token_map"]] = logits
    return whole


@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [{"draft_vocab": 40}, {"layers": 2, "heads": 4}, {"own_head": True, "draft_vocab": 40}],
)
def test_the_medusa_block_has_the_logits_of_the_heads(model, written, tmp_path, fields):
    guess = drafter("hydra", model=model, kind="parallel", **fields)
    fit(guess, written, epochs=5, lr=1e-2)
    export_medusa(guess, tmp_path / "out")
    h = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for head in range(guess.heads):
        after = torch.zeros(5, head + 1, dtype=torch.long)
        expected = torch.full((5, VOCABULARY), -torch.inf)
        expected[:, guess.vocab.long()] = guess.head_logits(h, after)
        assert torch.allclose(medusa(tmp_path / "out", h, head), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: drafter("hydra", model=model), "recurrent"),
        (lambda model: drafter("hydra", model=model, kind="sequential"), "sequential"),
        (lambda model: drafter("hydra", model=model, kind="parallel", prefix=True), "prefix"),
        (lambda model: drafter("lookup"), "lookup"),
    ],
)
def test_what_vllm_cannot_compute_is_refused(model, tmp_path, make, message):
    with pytest.raises(UnsupportedError, match=message):
        export_medusa(make(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()
