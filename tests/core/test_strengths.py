"""The strength of an adapter: outputs are base plus s times the update, in memory and in files."""

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import petl
from petl import testing
from petl.core.adapter_file import WEIGHTS
from petl.core.adapter_folder import Folder
from petl.core.fingerprint import seal
from petl.core.strengths import (
    at_strength,
    at_strength_in_file,
    choose_strength,
    scores_by_strength,
)
from petl.errors import UnsupportedError

FIELDS = {
    "lora": {"r": 4, "rank_pattern": {"q_proj": 2}},
    "rslora": {"r": 4},
    "mola": {"r": 2, "num_experts": 3},
    "mos": {"r": 2, "equivalent_rank": 2, "shards_per_vector": 2},
    "increlora": {},
    "sparse": {},
    "adapter": {},
    "adapter ln_after": {"ln_after": True},
}


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, **heads)).eval()


def wrapped(case):
    name = case.split()[0]
    model = petl.wrap(llama(), name, task_type="CAUSAL_LM", **FIELDS[case])
    return testing.stir(model).eval()


def outputs(model):
    """The outputs of two layers, of which the first that is adapted has the base's input."""
    found = {}
    hooks = [
        module.register_forward_hook(lambda own, given, out, name=name: found.update({name: out}))
        for name, module in model.named_modules()
        if name.endswith(("q_proj", "o_proj"))
    ]
    with torch.no_grad():
        model(input_ids=torch.arange(1, 9)[None])
    for hook in hooks:
        hook.remove()
    return found


def first_adapted(model):
    """The base's output in the first adapted layer, and a function that returns the model's."""
    plain, adapted = outputs(llama()), outputs(model.base_model.model)
    name = next(name for name in plain if not torch.equal(plain[name], adapted[name]))
    return plain[name], lambda: outputs(model.base_model.model)[name]


@pytest.mark.cells(3)
@pytest.mark.parametrize("case", FIELDS)
def test_the_output_of_a_layer_is_base_plus_strength_times_update(case, tmp_path):
    model = wrapped(case)
    base, output = first_adapted(model)
    update = output() - base
    assert float(update.abs().max()) > 1e-3
    for strength in (0.0, 0.5, 1.25):
        with at_strength(model, strength):
            assert torch.allclose(output(), base + strength * update, atol=1e-4)
    assert torch.equal(output() - base, update)  # exactly as before
    with at_strength(model, 0.5):
        expected = outputs(model.base_model.model)
    model.save_pretrained(tmp_path)
    saved = Folder(tmp_path)
    tensors, fields = at_strength_in_file(saved.config, saved.tensors, 0.5)
    assert not fields
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / WEIGHTS)
    seal(tmp_path)
    again = outputs(petl.load(llama(), tmp_path).eval().base_model.model)
    assert all(torch.allclose(again[name], expected[name], atol=1e-5) for name in again)


def test_the_best_strength_stays():
    model = wrapped("lora")
    base, output = first_adapted(model)
    update = output() - base

    def distance():
        return float((output() - base - 0.7 * update).abs().max())

    found = scores_by_strength(model, distance)
    assert [*found] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
    assert choose_strength(model, distance) == found
    assert torch.allclose(output(), base + 0.75 * update, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "fields", "reason"),
    [
        ("dora", {}, "norm"),
        ("ia3", {}, "no tensor"),
        ("lora", {"bias": "all"}, "biases"),
        ("binary", {"inner": "lora"}, "no tensor"),
        ("pst", {}, "no tensor"),
        ("ln_tuning", {}, "no tensor"),
        # more than a multiplied update
        ("lora", {"target_modules": ["embed_tokens", "q_proj"]}, "embedding"),
        ("lora", {"modules_to_save": ["embed_tokens"]}, "embed_tokens"),
        ("lora", {"modules_to_save": ["norm"]}, "norm"),
        ("adapter", {"gate": "large", "placement": "sequential"}, "no tensor"),
        ("adapter", {"residual": False}, "no tensor"),
        ("adapter", {"train_layer_norms": True}, "input_layernorm"),
    ],
)
def test_what_has_no_strength_is_refused_with_the_reason(method, fields, reason):
    model = petl.wrap(llama(), method, task_type="CAUSAL_LM", **fields)
    with pytest.raises(UnsupportedError, match=reason), at_strength(model, 0.5):
        pass


def test_virtual_tokens_have_no_strength():
    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UnsupportedError, match="no update"), at_strength(model, 0.5):
        pass
