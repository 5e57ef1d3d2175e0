"""Every method of the registry is decoded with drafts as without; what cannot be, is refused."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from contract_cases import OWN, adaptable, adopted, own
from draft_fixtures import PAD, Oracle, Random, prompt, tiny_qwen
from kept_processes import in_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

import petl
from petl import testing
from petl.efficiency.drafting import (
    Stats,
    answers,
    check_answer,
    decode,
    drafter,
    rounding,
    shortfalls,
    verify,
    why_plain,
)
from petl.efficiency.drafting.cache import refusal
from petl.efficiency.drafting.passes import takes_trees
from petl.errors import InputError, UnsupportedError

PLAIN = {"max_new_tokens": 16, "pad_token_id": PAD, "use_cache": True}
METHODS = [name for name in adaptable("llama") if name != "dkvb"]
# in the default run: plain, routed, with pools, at its sub-layers, of states, in a side network
FEW = ("lora", "mola", "mos", "adapter", "icv", "sherl")
OWN_AND_OTHERS = [
    pytest.param(name, marks=[] if name in FEW else pytest.mark.thorough) for name in METHODS
]
# methods that no decoder has, and the words by which petl.wrap refuses one
REFUSED = ("dkvb", "pyra", "scedit", "vl_pet")  # for a decoder that generates


def generated(model, seed, **settings):
    torch.manual_seed(3)
    return model.generate(input_ids=prompt(seed), **{**PLAIN, **settings})


def assert_lossless(model, seed=1, *, decoys=True):
    """Drafts leave greedy and sampled answers as they are, with packed weights, too."""
    for sampling in ({"do_sample": False}, {"do_sample": True}):
        plain = generated(model, seed, **sampling)
        right = Stats()
        free = drafter("free", model=model, min_ngram=1)
        # heads read the states of the adapted model
        other = Random() if sampling["do_sample"] else drafter("hydra", model=model, heads=2)
        for guess in (Oracle(plain, 3, decoys=decoys), other, free):
            more = {"custom_generate": decode, "drafter": guess, "pack": True, "stats": right}
            assert torch.equal(generated(model, seed, **sampling, **more), plain)
        assert right.accepted > 0
    return generated(model, seed, do_sample=False)


def drafted(model, name="free", seed=1):
    """The greedy answer with drafts and packed weights."""
    more = {"custom_generate": decode, "drafter": drafter(name, model=model), "pack": True}
    return generated(model, seed, do_sample=False, **more)


TWO_BLOCKS = replace(testing.TINY_MODELS["llama"], build=partial(testing.tiny_llama, 2))


def of_two_blocks(name):
    """The contract's case of a method, on a Llama of two blocks."""
    case = own(name, "llama") if name in OWN else adopted(name, "llama")
    return replace(case, model=TWO_BLOCKS)


@pytest.mark.cells(1)
@pytest.mark.parametrize("name", OWN_AND_OTHERS)
def test_every_method_is_decoded_as_without_drafts(name):
    case = of_two_blocks(name)
    model = case.wrap_stirred()
    assert verify(model) < 1e-3
    adapted = assert_lossless(model)
    if case.promises.merges:
        # packed copies of the weights before merging must not be used
        for change in (model.merge_adapter, model.unmerge_adapter):
            change()
            assert torch.equal(drafted(model), adapted)


def test_the_others_are_refused_for_decoders_by_name():
    # a new method is in one of the two lists
    assert sorted([*METHODS, *REFUSED]) == sorted(petl.list_methods())
    for name in REFUSED:
        with pytest.raises(InputError):
            petl.wrap(testing.tiny_llama(), name, task_type="CAUSAL_LM")


def _of_sharded_weights():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = testing.tiny_llama()
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = [why_plain(model)]
    for refused in (
        lambda: drafter("hydra", model=model),
        lambda: answers(model, [[5, 6]], tokens=2),
    ):
        with pytest.raises(UnsupportedError) as error:
            refused()
        found.append(str(error.value))
    return found


@pytest.mark.thorough
def test_sharded_weights_are_refused():
    for plain, heads, training in in_processes(2, _of_sharded_weights):
        assert "LlamaForCausalLM is sharded over processes" in plain
        assert training == plain
        assert "LlamaForCausalLM are sharded over processes, and a drafter reads" in heads


@pytest.mark.parametrize("name", ["lora", "mos"])
def test_adapters_that_are_switched_between_calls(name):
    case = of_two_blocks(name)
    model = case.wrap()
    # its targets are resolved: PEFT's tuner does not know petl's names of groups
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    for seed, adapter in enumerate(("default", "other")):
        model.set_adapter(adapter)
        testing.stir(model.eval(), adapter, seed=seed)
    recycling = drafter("recycling", model=model)
    texts = {}
    for adapter in ("default", "other", "default"):
        model.set_adapter(adapter)
        texts[adapter] = generated(model, 1, do_sample=False)
        assert torch.equal(drafted(model), texts[adapter])
        more = {"custom_generate": decode, "drafter": recycling}
        assert torch.equal(generated(model, 1, do_sample=False, **more), texts[adapter])
    assert not torch.equal(texts["default"], texts["other"])
    with model.disable_adapter():
        assert torch.equal(drafted(model), generated(case.base(), 1))


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_router_that_reads_the_token_before_takes_no_trees(lookahead):
    fields = {"router_type": "pregated", "router_lookahead": lookahead}
    model = petl.wrap(testing.tiny_llama(2), "mola", **fields)
    assert takes_trees(model.get_base_model()) == (lookahead == 0)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "fields",
    [
        {"router_type": "recurrent"},
        {"router_type": "pregated"},
        {"router_type": "pregated", "router_lookahead": 1},  # which takes chains only
    ],
)
def test_routers_of_mola_that_keep_states(fields):
    torch.manual_seed(0)
    model = petl.wrap(testing.tiny_llama(2), "mola", task_type="CAUSAL_LM", **fields)
    # in a chain, the first child of the root would be a decoy
    assert_lossless(testing.stir(model.eval()), decoys="router_lookahead" not in fields)


def test_state_dict_and_outputs_are_what_they_were():
    model = petl.wrap(testing.tiny_llama(), "lora", task_type="CAUSAL_LM").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    types = [type(module) for module in model.modules()]
    with torch.no_grad():
        logits = model(prompt(2)).logits
    for guess in (drafter("free", model=model), Random()):
        generated(model, 1, custom_generate=decode, drafter=guess, pack=True)
    assert [type(module) for module in model.modules()] == types
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    with torch.no_grad():
        assert torch.equal(model(prompt(2)).logits, logits)


# Refusals


class LooksAhead(nn.Module):
    """A linear layer that adds the input of the next token."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x + torch.cat([x[:, 1:], 0 * x[:, :1]], 1))


def test_a_model_that_looks_along_the_tokens_is_refused_with_the_difference():
    model = tiny_qwen()
    assert verify(model) < 1e-3
    mlp = model.model.layers[0].mlp
    mlp.up_proj = LooksAhead(mlp.up_proj)
    with pytest.raises(UnsupportedError, match="Qwen2ForCausalLM"):
        verify(model)


class ForgetsTheMask(nn.Module):
    """A decoder layer that lets each token attend to all before it, whatever the mask."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        if attention_mask is not None:
            count, total = attention_mask.shape[-2:]
            seen = torch.ones(count, total, dtype=torch.bool).tril(total - count)
            attention_mask = torch.zeros(seen.shape).masked_fill(~seen, -1e9)[None, None]
        return self.layer(hidden_states, attention_mask=attention_mask, **kwargs)


def test_a_model_that_computes_chains_only_is_refused_for_its_trees():
    model = tiny_qwen()
    model.model.layers[1] = ForgetsTheMask(model.model.layers[1])
    with pytest.raises(UnsupportedError, match="tree of 32 tokens"):
        verify(model)


def sliding():
    config = MistralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, sliding_window=8,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def test_a_sliding_window_is_refused_by_name_and_decoded_plainly():
    model = sliding()
    with pytest.raises(UnsupportedError):
        verify(model)
    plain = generated(model, 3, do_sample=True)
    with pytest.warns(UserWarning, match="DynamicSlidingWindow"):
        found = generated(model, 3, do_sample=True, custom_generate=decode, drafter=Random())
    assert torch.equal(found, plain)


# Logits of an answer


def test_shortfalls_are_zero_for_greedy_answers_and_larger_for_others():
    model = testing.tiny_llama()
    found = generated(model, 4, do_sample=False)
    allowed = 2 * rounding(model, positions=40)
    assert shortfalls(model, found, 6).shape == (16,)
    assert float(shortfalls(model, found, 6).max()) <= allowed < 1e-3
    found[0, 12] = (found[0, 12] + 1) % 96
    assert float(shortfalls(model, found, 6)[6]) > 1e-3
    with pytest.raises(InputError, match="start=22"):
        shortfalls(model, found, 22)


@pytest.mark.cells(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_answer_is_checked_by_what_is_promised(dtype):
    model = testing.tiny_llama().to(dtype)
    ids = prompt(5)[0].tolist()
    for name in ("free", "lookup"):
        assert check_answer(model, ids, name, tokens=24) <= 2 * rounding(model)
    generate = model.generate

    def forged(ids, drafter=None, **settings):
        found = generate(ids, **settings)
        # as of an engine that takes tokens which the model has not chosen
        return found if drafter is None else torch.cat([ids, 3 + found[:, len(ids[0]) :] % 7], 1)

    model.generate = forged
    with pytest.raises(UnsupportedError):
        check_answer(model, ids, tokens=24)


def test_caches_of_older_transformers_are_not_drafted_on():
    cache = DynamicCache()
    cache.layers = [object()]  # as before 5.24: it does not say whether it can be cropped
    assert "are not cropped by a number of tokens" in refusal(cache)
