"""Encoder-decoders: answers with drafts are those of plain decoding; what cannot be is refused."""

import copy
from itertools import cycle

import pytest
import torch
from draft_fixtures import (
    PAD,
    PAIRS,
    SETTINGS,
    Oracle,
    Random,
    Wrong,
    prompt,
    tiny_pair,
    tiny_qwen,
)

import petl
from petl import testing
from petl.efficiency.drafting import (
    Costs,
    Needs,
    Stats,
    check_answer,
    decode,
    drafter,
    verify,
    why_plain,
)
from petl.efficiency.drafting.cache import compact
from petl.efficiency.drafting.pairs import VERIFIED
from petl.errors import UnsupportedError

MORE = {**SETTINGS, "forced-begin": {"do_sample": False, "forced_bos_token_id": 7}}
NAMES = ("aggressive", "lookup", "recycling", "free")
LATER = ("top-k-p", "min-p", "bad-words", "min-length", "bias")


def inputs_of(family, seed=1):
    """What an encoder reads; text with padding, of which sound has none."""
    if family == "whisper":
        sound = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(seed))
        return {"input_features": sound}
    padded = torch.cat([prompt(seed, 9), torch.full((1, 2), PAD)], 1)
    return {"input_ids": padded, "attention_mask": (padded != PAD).long()}


def generated(model, inputs, **settings):
    """What generate returns, and a number that the random generator gives afterwards."""
    torch.manual_seed(3)
    given = {"max_new_tokens": 18, "use_cache": True, "repetition_penalty": 1.2, **settings}
    found = model.generate(**inputs, **given)
    return found, float(torch.rand(()))


def edited(text):
    """A text as a model has written it, with one token replaced, one left out and one put in."""
    ids = text[0].tolist()
    return torch.tensor([[*ids[:4], 90, *ids[5:9], *ids[10:14], 91, *ids[14:]]])


def known(text, count, kind=Oracle, **more):
    """A drafter of a known text that reads tokens only: T5 has no body whose states it could."""
    guess = kind(text, count, **more)
    guess.needs = Needs()
    return guess


def assert_lossless(model, family, seed=1, **settings):
    """Each drafter leaves the answer and the random state as they are; return what was right."""
    inputs, stats = inputs_of(family, seed), Stats()
    plain, state = generated(model, inputs, **settings)
    right = [known(plain, 3), known(plain, 2, decoys=True), known(plain, 2, Wrong), Random()]
    for guess in [*right, *NAMES]:
        # input that resembles the answer, so that there is something to copy
        more = {"encoder_input_ids": edited(plain), "stats": stats, "drafter": guess}
        found, after = generated(model, inputs, **settings, **more, custom_generate=decode)
        assert torch.equal(found, plain), guess
        assert after == state, f"{guess} changes the random state"
    return stats.accepted


@pytest.mark.cells(1)
@pytest.mark.parametrize(
    ("settings", "family"),
    [
        # in test_engine.py without an encoder, which these settings do not read
        pytest.param(*cell, marks=pytest.mark.thorough if cell[0] in LATER else [])
        for cell in zip(MORE, cycle(["t5", "bart"]))
    ],
)
def test_the_answer_is_that_of_plain_decoding(family, settings):
    assert_lossless(tiny_pair(family), family, **MORE[settings])


@pytest.mark.cells(1)
@pytest.mark.parametrize("family", PAIRS)
def test_each_verified_kind_computes_chains_as_single_passes(family):
    model = tiny_pair(family)
    assert family in VERIFIED
    assert why_plain(model) == ""
    assert verify(model) < 1e-3
    assert assert_lossless(model, family, do_sample=True, min_new_tokens=18) > 9


def test_all_verified_kinds_are_tested():
    assert {*VERIFIED} == {*PAIRS}


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_packed_weights_padded_passes_and_long_drafts_change_no_token(family):
    model, inputs = tiny_pair(family), inputs_of(family)
    plain, _ = generated(model, inputs)
    costs = Costs({1: 1.0, 2: 3.0, 3: 3.0, 4: 1.1, 5: 3.0, 7: 3.0, 8: 1.2})
    for guess in (known(plain, 2), "aggressive", drafter("aggressive", model=model, most=63)):
        more = {"drafter": guess, "pack": True, "costs": costs, "custom_generate": decode}
        found, _ = generated(model, inputs, **more, encoder_input_ids=edited(plain))
        assert torch.equal(found, plain)


@pytest.mark.parametrize("family", ["bart", "whisper"])
def test_an_answer_as_long_as_the_table_of_positions(family):
    model, inputs = tiny_pair(family), inputs_of(family)
    own = {"do_sample": True, "max_new_tokens": 79}
    plain, _ = generated(model, inputs, **own)
    for guess in (known(plain, 9), drafter("aggressive", model=model, most=30)):
        more = {"drafter": guess, "custom_generate": decode, "encoder_input_ids": plain}
        costs = Costs({1: 1.0, 16: 1.0})  # passes are filled up where there is room
        assert torch.equal(generated(model, inputs, **own, **more, costs=costs)[0], plain)


def test_the_ids_that_the_decoder_begins_with_may_be_padded():
    model, inputs = tiny_pair("bart"), inputs_of("bart")
    inputs["decoder_input_ids"] = torch.tensor([[PAD, PAD, 0, 5, 6]])
    inputs["decoder_attention_mask"] = torch.tensor([[0, 0, 1, 1, 1]])
    plain, _ = generated(model, inputs, do_sample=True)
    for guess in (known(plain, 3), "aggressive"):
        more = {"drafter": guess, "custom_generate": decode, "encoder_input_ids": edited(plain)}
        assert torch.equal(generated(model, inputs, do_sample=True, **more)[0], plain)


# The cache


def test_rejected_drafts_leave_cross_attention_as_it_is():
    model, ids = tiny_pair("t5"), prompt(3)
    with torch.no_grad():
        first = model(input_ids=ids, decoder_input_ids=prompt(4, 8), use_cache=True)
        cache, encoded = first.cache, {"encoder_outputs": (first.encoder_last_hidden_state,)}
        cross = [layer.keys for layer in cache.cross_attention_cache.layers]
        kept = [keys.clone() for keys in cross]
        compact(cache, [0, 2], 4)
        more = model(**encoded, decoder_input_ids=prompt(5, 2), cache=cache, use_cache=True)
        whole = torch.cat([prompt(4, 8)[:, [0, 1, 2, 3, 4, 6]], prompt(5, 2)], 1)
    assert more.cache.get_seq_length() == whole.shape[1]
    for layer, keys, before in zip(cache.cross_attention_cache.layers, cross, kept, strict=True):
        assert layer.keys.data_ptr() == keys.data_ptr()
        assert torch.equal(layer.keys, before)


def test_accepted_drafts_that_are_in_order_are_not_moved():
    with torch.no_grad():
        cache = tiny_qwen()(prompt(3), use_cache=True).cache
    before = [layer.keys._version for layer in cache.layers]  # grows with each write
    compact(cache, [0, 1, 2], 5)
    assert [layer.keys._version for layer in cache.layers] == before


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_scores_and_both_caches_are_those_of_plain_decoding(family):
    model, inputs = tiny_pair(family), inputs_of(family)
    wants = {"return_dict_in_generate": True, "output_scores": True, "do_sample": True}
    plain, _ = generated(model, inputs, **wants)
    for guess in (known(plain.sequences, 3), Random(), "aggressive"):
        own = {"custom_generate": decode, "encoder_input_ids": edited(plain.sequences)}
        found, _ = generated(model, inputs, **wants, drafter=guess, **own)
        assert type(found) is type(plain)
        ours, theirs = (torch.stack(each.scores) for each in (found, plain))
        assert torch.allclose(ours, theirs, atol=1e-3)
        with torch.no_grad():  # of all tokens but the last
            ids = {"decoder_input_ids": plain.sequences[:, :-1]}
            fresh = model(**inputs, **ids, use_cache=True).cache
        for name in ("self_attention_cache", "cross_attention_cache"):
            pairs = zip(getattr(found.cache, name).layers, getattr(fresh, name).layers, strict=True)
            for ours, theirs in pairs:
                assert torch.allclose(ours.keys, theirs.keys, atol=1e-4)
                assert torch.allclose(ours.values, theirs.values, atol=1e-4)


# Adapters


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["lora", "adapter", "compacter"])
def test_adapters_on_both_stacks_and_a_switch_between_them(method):
    torch.manual_seed(0)
    model = petl.wrap(tiny_pair("t5"), method, task_type="SEQ_2_SEQ_LM")
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    for seed, name in enumerate(("default", "other")):
        model.set_adapter(name)
        testing.stir(model.eval(), name, seed=seed)
    free, texts = drafter("free", model=model), []
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        assert verify(model) < 1e-3
        own = {"do_sample": True, "temperature": 3.0}
        plain, _ = generated(model, inputs_of("t5"), **own)
        own |= {"custom_generate": decode, "drafter": free, "encoder_input_ids": edited(plain)}
        assert torch.equal(generated(model, inputs_of("t5"), **own)[0], plain)
        texts.append(plain.tolist())
    assert texts[0] == texts[2] != texts[1]
    assert assert_lossless(model, "t5", 2) > 0


# Plain decoding, and refusals


def test_rows_and_beams_are_decoded_plainly():
    model = tiny_pair("t5")
    two = {name: each.repeat(2, 1) for name, each in inputs_of("t5").items()}
    for inputs, settings, reason in (
        (two, {}, "2 rows"),
        (inputs_of("t5"), {"num_beams": 2}, "beam_search"),
    ):
        plain, _ = generated(model, inputs, **settings)
        more = {"custom_generate": decode, "drafter": "aggressive"}
        with pytest.warns(UserWarning, match=reason):
            found, _ = generated(model, inputs, **settings, **more)
        assert torch.equal(found, plain)


def test_a_kind_that_is_not_verified_is_decoded_plainly_and_named():
    model, ids = tiny_pair("plbart"), {"input_ids": prompt(3)}
    plain, _ = generated(model, ids)
    with pytest.warns(UserWarning, match="PLBartForConditionalGeneration"):
        found, _ = generated(model, ids, custom_generate=decode, drafter="aggressive")
    assert torch.equal(found, plain)
    with pytest.raises(UnsupportedError):
        verify(model)


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_is_checked_by_what_is_promised(name):
    model, ids = tiny_pair("t5"), prompt(5)[0].tolist()
    assert check_answer(model, ids, name, tokens=24) < 1e-3


def test_costs_are_those_of_the_decoder_behind_as_many_tokens_of_the_encoder():
    model, seen = tiny_pair("bart"), []
    handle = model.model.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            (kwargs["input_ids"].shape[1], kwargs["encoder_hidden_states"].shape[1])
        ),
        with_kwargs=True,
    )
    costs = Costs.measure(model, 20, counts=(1, 3), rounds=1)
    handle.remove()
    assert [*costs.seconds] == [1, 3]
    assert seen == [(20, 20), (1, 20), (3, 20), (1, 20), (3, 20)]
