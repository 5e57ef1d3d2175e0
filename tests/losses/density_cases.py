"""Tiny models with adapters for the tests of the density term, and the term written out."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from petl import testing
from petl.losses.density import ActivationDensity, ActivationDensityConfig

EPS = 1e-2  # large enough for tiny random models to feel it


def llama(act="relu", layers=2, **fields):
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_act=act,
        pad_token_id=0,
        use_cache=False,
        **fields,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


MODELS = {
    "llama-relu": (llama, "llama"),
    "llama-silu": (lambda: llama("silu"), "llama"),
    "bert-gelu": (testing.tiny_bert, "bert"),
    "t5": (testing.tiny_t5, "t5"),
}
LEAVES = ("act_fn", "intermediate_act_fn", "act")


def lora(base, task=None):
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", task_type=task)
    return testing.stir(get_peft_model(base, config))


def written_out(model, batch, weight=1.0, eps=EPS, scale=1.0):
    """Task loss plus term, from activations that plain hooks collect, with its gradients and D."""
    seen = {}
    handles = [
        module.register_forward_hook(lambda m, a, out, name=name: seen.setdefault(name, out))
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in LEAVES
    ]
    model.train().zero_grad()
    task = model(**batch).loss
    for handle in handles:
        handle.remove()
    stacks = {}
    for name, a in seen.items():
        h = a.float() ** 2 / (a.float() ** 2 + eps)
        stacks.setdefault("decoder" if "decoder" in name else "", []).append(h.mean())
    term = sum(sum(layers) / len(layers) for layers in stacks.values())
    total = task + weight * term
    (total * scale).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return total.detach(), gradients, term.detach(), task.detach()


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(found, expected):
    assert set(found) == set(expected)
    largest = max(g.abs().max() for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=float(largest) * 1e-5)


def dense(model, **fields):
    return ActivationDensity(model, ActivationDensityConfig(**({"eps": EPS} | fields)))


def batch_of(name, rows=4, seed=0):
    return testing.TINY_MODELS[MODELS[name][1]].batch(rows, seed)


def mixtral():
    config = MixtralConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        hidden_act="relu",
        pad_token_id=0,
        use_cache=False,
        experts_implementation="eager",
    )
    return MixtralForCausalLM(config).eval()


def lora_on_attention(base):
    torch.manual_seed(1)
    return testing.stir(get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])))
