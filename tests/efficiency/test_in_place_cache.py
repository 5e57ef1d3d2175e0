"""A cache that is written in place gives what one that concatenates gives, to the bit."""

import copy
import logging

import pytest
import torch
from draft_fixtures import tiny_pair
from image_text_fixtures import llava
from peft import PrefixTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer

from petl.efficiency.in_place_cache import (
    InPlaceLayer,
    cache_argument,
    cache_arguments,
    write_in_place,
)

SIZES = {
    "vocab_size": 96, "hidden_size": 128, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 1024, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 9}
HYBRID = {
    "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4,
    "num_experts": 1, "num_experts_per_tok": 1, "use_mamba_kernels": False,
}  # fmt: skip
# family: settings of its config, and how many of its layers are written in place
DECODERS = {
    "llama": ({}, 4),
    "gpt2": ({}, 4),
    "gpt_neox": ({}, 4),
    "bloom": ({}, 4),  # attention goes by places in the cache
    "falcon": ({"multi_query": True}, 4),
    "qwen3": ({"head_dim": 32}, 4),
    "deepseek_v3": (
        {"q_lora_rank": 8, "kv_lora_rank": 48, "qk_rope_head_dim": 4, "qk_nope_head_dim": 28,
         "v_head_dim": 24, "first_k_dense_replace": 4, "num_key_value_heads": 4},
        4,  # keys and values have different widths
    ),
    "gemma3_text": ({**WINDOWS, "head_dim": 32}, 2),
    "jamba": (HYBRID, 2),
    "mamba": ({"state_size": 4}, 0),
}  # fmt: skip


def decoder(family: str, attention: str = "sdpa"):
    """A tiny model with random weights."""
    config = AutoConfig.for_model(family, **{**SIZES, **DECODERS[family][0]})
    attention = "eager" if family in ("bloom", "mamba") else attention  # all that they take
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def padded(rows: int = 16, length: int = 7) -> dict[str, torch.Tensor]:
    """Prompts with padding on the left of all but the last."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 96, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows - 1):
        mask[row, : 2 + row % 4] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def generated(model, inputs, cache, tokens=150, **settings):
    more = {"return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0, **settings}
    torch.manual_seed(0)
    return model.generate(**inputs, **cache, max_new_tokens=tokens, min_new_tokens=tokens, **more)


def in_place(cache) -> int:
    return sum(isinstance(layer, InPlaceLayer) for layer in cache.layers)


def check(model, inputs, count: int, **settings):
    """Hold the logits of decoding in place to those of transformers' own cache."""
    expected = generated(model, inputs, {}, **settings)
    found = generated(model, inputs, cache_arguments(model), **settings)
    assert torch.equal(found.sequences, expected.sequences)
    for own, other in zip(found.logits, expected.logits, strict=True):
        assert torch.equal(own, other)
    cache = found[cache_argument(model)] if count else DynamicCache()
    cache = getattr(cache, "self_attention_cache", cache)
    assert in_place(cache) == count
    if "num_beams" not in settings:  # each token reorders theirs
        own = [layer.keys for layer in cache.layers if isinstance(layer, InPlaceLayer)]
        assert all(keys.untyped_storage().nbytes() > keys.nbytes for keys in own)


@pytest.mark.cells(2)
@pytest.mark.every_cell
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", DECODERS)
def test_logits_of_a_padded_batch_are_those_of_the_usual_cache(family, attention):
    check(decoder(family, attention), padded(), DECODERS[family][1])


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_of_an_encoder_decoder_self_attention_is_written_in_place(family):
    check(tiny_pair(family, max_position_embeddings=200), padded(), 2)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_return_sequences": 2, "do_sample": True, "temperature": 2.0},
        {"num_beams": 2, "do_sample": True},
    ],
    ids=["beams", "several answers", "sampled beams"],
)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_beams_and_several_answers_are_those_of_the_usual_cache(family, settings):
    check(decoder(family), padded(6), DECODERS[family][1], tokens=90, **settings)


@pytest.mark.thorough
def test_prompt_lookup_crops_the_cache_and_writes_the_same():
    ids = torch.tensor([[5, 6, 7, 8] * 150])
    check(decoder("llama"), {"input_ids": ids}, 4, prompt_lookup_num_tokens=4)


@pytest.mark.thorough
def test_of_a_model_for_images_the_language_model_is_written_in_place():
    torch.manual_seed(0)
    model = llava()[0].eval()
    inputs = padded(32, 12)
    inputs["input_ids"][:, 5:9] = model.config.image_token_index
    check(model, {**inputs, "pixel_values": torch.rand(32, 3, 16, 16)}, 2, tokens=90)


OPERATIONS = {
    "append": lambda layer, n: layer.update(*states(len(layer.keys), n)),
    "crop": lambda layer, n: layer.crop(-min(n, layer.get_seq_length() - 1)),
    "reorder": lambda layer, n: layer.reorder_cache(torch.arange(len(layer.keys)).flip(0)),
    "repeat": lambda layer, n: layer.batch_repeat_interleave(2),
    "select": lambda layer, n: layer.batch_select_indices(torch.tensor([len(layer.keys) - 1])),
}


def states(rows: int, tokens: int):
    return torch.rand(rows, 8, tokens, 64), torch.rand(rows, 8, tokens, 48)


@pytest.mark.cells(1)
@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_any_order_of_operations_leaves_what_the_usual_layer_has(seed):
    own, other = InPlaceLayer(), DynamicLayer()
    generator = torch.Generator().manual_seed(seed)
    first = states(2, 30)  # fewer are concatenated
    own.update(*first)
    other.update(*first)
    for number in range(120):
        draw = int(torch.randint(24, (), generator=generator))
        name = [*OPERATIONS][max(draw - 19, 0)]  # mostly "append"
        n = [1, 1, 1, 5, 40][draw % 5]
        for layer in (own, other):
            torch.manual_seed(number)
            OPERATIONS[name](layer, n)
        assert torch.equal(own.keys, other.keys)
        assert torch.equal(own.values, other.values)
        assert own.get_seq_length() == other.get_seq_length()
        if len(own.keys) > 8:
            for layer in (own, other):
                layer.batch_select_indices(torch.tensor([3, 0]))
    own.reset()
    assert own.get_seq_length() == 0
    own.update(*first)
    assert torch.equal(own.values, first[1])


@torch.no_grad()
def test_tokens_stay_where_they_are_while_others_come():
    layer = InPlaceLayer()
    addresses = {layer.update(*states(2, 300))[0].data_ptr()}
    for _ in range(400):
        addresses.add(layer.update(*states(2, 1))[0].data_ptr())
    # a quarter more room each time: 375 and 470, ...
    assert len(addresses) <= 5
    assert layer.keys.untyped_storage().nbytes() <= 1.26 * layer.keys.nbytes


@torch.no_grad()
def test_a_copy_of_a_cache_has_tokens_of_its_own():
    layer = InPlaceLayer()
    layer.update(*states(1, 70))
    layer.update(*states(1, 1))  # has room now
    copied = copy.deepcopy(layer)
    mine, others = states(1, 1), states(1, 1)
    layer.update(*mine)
    copied.update(*others)
    assert torch.equal(layer.keys[:, :, 71:], mine[0])
    assert torch.equal(copied.keys[:, :, 71:], others[0])
    assert torch.equal(copied.keys[:, :, :71], layer.keys[:, :, :71])


def test_a_cache_of_inference_mode_goes_on_outside_of_it():
    layer, other = InPlaceLayer(), DynamicLayer()
    for each in (layer, other):
        torch.manual_seed(0)
        with torch.inference_mode():
            each.update(*states(1, 70))
            each.update(*states(1, 1))
        with torch.no_grad():
            each.update(*states(1, 2))
    assert torch.equal(layer.values, other.values)


@torch.no_grad()
def test_states_of_another_type_are_promoted_as_by_the_usual_layer():
    layer, other = InPlaceLayer(), DynamicLayer()
    for each in (layer, other):
        torch.manual_seed(0)
        each.update(*(part.bfloat16() for part in states(1, 70)))
        each.update(*states(1, 2))
    assert layer.keys.dtype == torch.float32
    assert torch.equal(layer.keys, other.keys)
    with pytest.raises(RuntimeError):
        layer.update(*states(3, 1))  # of another batch


def test_gradients_through_a_cache_are_those_of_the_usual_one():
    ids = padded(8, 80)["input_ids"]
    gradients = []
    for kind in (write_in_place, lambda cache: cache):
        model = decoder("llama")
        cache = kind(DynamicCache(config=model.config))
        with torch.no_grad():
            model(ids[:, :70], **{cache_argument(model): cache}, use_cache=True)
        losses = [
            model(part, **{cache_argument(model): cache}, use_cache=True).logits.square().mean()
            for part in ids[:, 70:].split(3, 1)
        ]
        sum(losses).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_caches_that_hold_something_else_are_left_as_they_are(caplog):
    model = decoder("llama")
    filled, offloaded = DynamicCache(), DynamicCache(offloading=True)
    with torch.no_grad():
        filled.update(*states(1, 70), 0)
    for cache in (filled, offloaded, None):
        write_in_place(cache)
    assert in_place(filled) == 0
    assert offloaded.layer_class_to_replicate is DynamicLayer
    caplog.set_level(logging.INFO, "petl")
    uncached = decoder("bloom")
    uncached.generation_config.use_cache = False
    assert cache_arguments(uncached) == {}
    assert cache_arguments(uncached, use_cache=True) != {}
    assert cache_arguments(model, cache_implementation="offloaded") == {}
    model.generation_config.cache_implementation = "static"
    prefixed = get_peft_model(
        decoder("qwen3"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    for _ in range(2):
        assert cache_arguments(model) == {}
        assert cache_arguments(prefixed) == {}
    messages = [record.getMessage() for record in caplog.records]
    assert sum("cache_implementation='static'" in text for text in messages) == 1
    assert sum("virtual tokens" in text for text in messages) == 1
