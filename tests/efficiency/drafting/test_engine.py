"""Decoding with drafts gives what plain decoding gives; which passes it makes; what it refuses."""

import math
from itertools import cycle

import pytest
import torch
from draft_fixtures import (
    DECODERS,
    PAD,
    SETTINGS,
    VOCABULARY,
    Fixed,
    Oracle,
    Random,
    Wrong,
    chain,
    prompt,
)
from tiny_tokenizers import byte_tokenizer
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from petl import testing
from petl.efficiency.drafting import (
    Costs,
    Drafter,
    Needs,
    Stats,
    decode,
    drafter,
    shortfalls,
    verify,
)
from petl.efficiency.drafting.checks import rounding
from petl.errors import InputError, UnsupportedError

PLAIN = {"max_new_tokens": 24, "pad_token_id": PAD, "use_cache": True}
DRAFTERS = {
    "none": lambda model, text: None,
    "oracle": lambda model, text: Oracle(text, 3),
    "decoys": lambda model, text: Oracle(text, 3, decoys=True),
    "wrong": lambda model, text: Wrong(text, 3),
    "random": lambda model, text: Random(),
    "duplicates": lambda model, text: Fixed([5, 5, 6, 6, 2], [0, 0, 1, 2, 1]),
    "lookup": lambda model, text: drafter("lookup", min_ngram=1),
    "recycling": lambda model, text: drafter("recycling", model=model),
    "recycling-3": lambda model, text: drafter("recycling", model=model, order=3, nodes=5),
    "free": lambda model, text: drafter("free", model=model, min_ngram=1),
    # heads without training repeat the model's own guess
    "hydra": lambda model, text: drafter("hydra", model=model, draft_vocab=50),
}


def generated(model, ids, **settings):
    """What generate returns, and a number that the random generator gives afterwards."""
    torch.manual_seed(3)
    found = model.generate(ids, **{**PLAIN, **settings})
    return found, float(torch.rand(()))


@pytest.mark.cells(2)
@pytest.mark.parametrize(
    ("family", "settings"),
    [*zip(cycle(DECODERS), SETTINGS), *((family, "top-k-p") for family in [*DECODERS][:2])],
)
def test_the_answer_is_that_of_plain_decoding(family, settings):
    model, own = DECODERS[family](), SETTINGS[settings]
    ids = prompt(1)
    plain = generated(model, ids, **own)
    for name, make in DRAFTERS.items():
        guess = make(model, plain[0])
        found = generated(model, ids, **own, custom_generate=decode, drafter=guess)
        assert torch.equal(found[0], plain[0]), name
        assert found[1] == plain[1], f"{name} changes the random state"


@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_packed_weights_and_padded_passes_change_no_token(family):
    model, ids = DECODERS[family](), prompt(2)
    plain, _ = generated(model, ids, do_sample=True)
    # 2, 3, 5, 6 and 7 tokens cost more than 4 and 8
    costs = Costs({1: 1.0, 2: 3.0, 3: 3.0, 4: 1.1, 5: 3.0, 7: 3.0, 8: 1.2})
    for guess in (Oracle(plain, 2), Oracle(plain, 2, decoys=True), Random()):
        more = {"drafter": guess, "pack": True, "costs": costs}
        found, _ = generated(model, ids, do_sample=True, custom_generate=decode, **more)
        assert torch.equal(found, plain)


@pytest.mark.parametrize("position", range(7, 14))
def test_an_end_token_in_the_middle_of_accepted_drafts_ends_the_answer(position):
    model, ids = testing.tiny_gpt2(), prompt(4)
    # sampled, so that the tokens differ
    whole, _ = generated(model, ids, do_sample=True, temperature=3.0)
    end = int(whole[0, position])
    settings = {"do_sample": True, "temperature": 3.0, "eos_token_id": end}
    plain, _ = generated(model, ids, **settings)
    assert plain[0, -1] == end
    guess = Oracle(whole, 7)
    found, _ = generated(model, ids, **settings, custom_generate=decode, drafter=guess)
    assert torch.equal(found, plain)


class EndsAfter(StoppingCriteria):
    """Ends once a token has occurred twice; counts its calls."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        is_end = len(set(input_ids[0, 6:].tolist())) < input_ids.shape[1] - 6
        return torch.full((len(input_ids),), is_end)


class Odd(LogitsProcessor):
    """Forbids even tokens after an odd number of tokens; keeps what it was called with."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids[0].tolist())
        if input_ids.shape[1] % 2:
            scores[:, ::2] = -torch.inf
        return scores


def test_processors_and_criteria_see_each_token_once_in_order():
    model, ids = testing.tiny_llama(), prompt(5)
    seen = []
    for guess in (None, Random(), "oracle"):
        odd, ends = Odd(), EndsAfter()
        own = {"logits_processor": LogitsProcessorList([odd]), "stopping_criteria": [ends]}
        if guess is not None:
            text = seen[0][2]
            own |= {"custom_generate": decode}
            own |= {"drafter": Oracle(text, 5) if guess == "oracle" else guess}
        text, _ = generated(model, ids, do_sample=True, **own)
        seen.append((odd.seen, ends.lengths, text.tolist()))
        seen[-1] = (*seen[-1][:2], text)
    for processed, lengths, text in seen[1:]:
        assert processed == seen[0][0]
        assert lengths == seen[0][1]
        assert torch.equal(text, seen[0][2])


class Streamer:
    """Keeps what it gets."""

    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.has_ended = False

    def put(self, value):
        assert not self.has_ended
        self.parts.append(value.flatten().tolist())

    def end(self):
        self.has_ended = True


def test_a_stream_gets_the_prompt_each_token_and_the_end():
    model, ids = testing.tiny_llama(), prompt(6)
    plain, drafted = Streamer(), Streamer()
    text, _ = generated(model, ids, do_sample=False, streamer=plain)
    more = {"custom_generate": decode, "drafter": Oracle(text, 4), "stream": drafted}
    generated(model, ids, do_sample=False, **more)
    assert drafted.parts == plain.parts
    assert drafted.has_ended


def test_left_padding_stays_masked_in_chains_and_trees():
    model, ids = testing.tiny_llama(), prompt(7)
    padded = torch.cat([torch.full((1, 3), PAD), ids], 1)
    mask = (torch.arange(9) >= 3).long()[None]
    plain, _ = generated(model, padded, attention_mask=mask)
    assert torch.equal(plain[:, 3:], generated(model, ids)[0])
    for guess in (Oracle(plain, 3), Oracle(plain, 3, decoys=True), Random()):
        more = {"attention_mask": mask, "custom_generate": decode, "drafter": guess}
        assert torch.equal(generated(model, padded, **more)[0], plain)


# Passes, and what a drafter sees


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_passes_are_as_few_as_right_drafts_allow(count):
    model, ids, stats = testing.tiny_llama(), prompt(8), Stats()
    plain, _ = generated(model, ids)
    more = {"custom_generate": decode, "drafter": Oracle(plain, count), "stats": stats}
    generated(model, ids, **more)
    assert stats.tokens == 24
    assert stats.passes == math.ceil(23 / (count + 1))
    assert stats.drafted == stats.accepted
    assert stats.tokens_per_pass == pytest.approx(23 / stats.passes)


def test_wrong_drafts_take_a_pass_for_each_token():
    model, ids, stats = testing.tiny_llama(), prompt(9), Stats()
    plain, _ = generated(model, ids)
    more = {"custom_generate": decode, "drafter": Wrong(plain, 3), "stats": stats}
    generated(model, ids, **more)
    assert (stats.passes, stats.accepted) == (23, 0)


@torch.no_grad()
@pytest.mark.parametrize("decoys", [False, True])
def test_a_drafter_sees_the_states_and_logits_of_its_nodes(decoys):
    model, ids = testing.tiny_llama(), prompt(10)
    plain, _ = generated(model, ids)
    oracle = Oracle(plain, 2, decoys=decoys)
    costs = Costs({1: 1.0, 2: 2.0, 3: 2.0, 5: 2.0, 8: 1.0})  # all passes are padded
    more = {"custom_generate": decode, "drafter": oracle, "costs": costs, "switch": False}
    generated(model, ids, **more)
    for (text, state), seen in zip(oracle.roots, oracle.seen, strict=True):
        # the state that chose the root belongs to the token before it
        alone = model.model(torch.tensor([text[:-1]])).last_hidden_state[0, -1]
        assert torch.allclose(state, alone, atol=1e-5)
        assert len(seen.tokens) == len(seen.parents) + 1 == len(seen.logits) == len(seen.states)
        for node in range(len(seen.tokens)):
            path, above = [], node
            while above:
                path.insert(0, int(seen.tokens[above]))
                above = int(seen.parents[above - 1])
            whole = model(torch.tensor([[*text, *path]]), output_hidden_states=True)
            assert torch.allclose(seen.logits[node], whole.logits[0, -1], atol=1e-5)
            assert torch.allclose(seen.states[node], whole.hidden_states[-1][0, -1], atol=1e-5)


def test_passes_of_a_processor_are_not_taken_for_ours():
    model, ids = testing.tiny_llama(), prompt(10)
    own = {"do_sample": False, "guidance_scale": 1.5}  # its processor calls the model
    plain, _ = generated(model, ids, **own)
    oracle = Oracle(plain, 3)
    found, _ = generated(model, ids, **own, custom_generate=decode, drafter=oracle, switch=False)
    assert torch.equal(found, plain)
    for text, state in oracle.roots:
        with torch.no_grad():
            alone = model.model(torch.tensor([text[:-1]])).last_hidden_state[0, -1]
        assert torch.allclose(state, alone, atol=1e-5)


def test_a_drafter_gets_the_states_of_the_prompt_if_it_asks():
    class Reads(Drafter):
        needs = Needs(last=True, prompt=True)

        def start(self, ids, states):
            self.began = (ids, states.clone())

        def draft(self, root, budget):
            self.state = root.state.clone()
            return chain([])

    model, ids, guess = testing.tiny_llama(), prompt(11), Reads()
    generated(model, ids, custom_generate=decode, drafter=guess, max_new_tokens=2)
    with torch.no_grad():
        states = model.model(ids).last_hidden_state[0]
    assert guess.began[0] == ids[0].tolist()
    assert torch.allclose(guess.began[1], states, atol=1e-6)
    assert torch.allclose(guess.state, states[-1], atol=1e-6)


def test_nodes_bounds_the_drafts_of_a_pass():
    model, ids, stats = testing.tiny_llama(), prompt(12), Stats()
    plain, _ = generated(model, ids)
    more = {"custom_generate": decode, "drafter": Oracle(plain, 9), "stats": stats, "nodes": 2}
    found, _ = generated(model, ids, **more)
    assert torch.equal(found, plain)
    assert stats.passes == math.ceil(23 / 3)


# What generate returns besides ids


def test_scores_logits_and_cache_are_those_of_plain_decoding():
    model, ids = testing.tiny_llama(), prompt(13)
    wants = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    plain, _ = generated(model, ids, do_sample=True, **wants)
    for guess in (Oracle(plain.sequences, 3), Oracle(plain.sequences, 3, decoys=True), Random()):
        more = {"custom_generate": decode, "drafter": guess}
        found, _ = generated(model, ids, do_sample=True, **wants, **more)
        assert torch.equal(found.sequences, plain.sequences)
        for name in ("scores", "logits"):
            ours, theirs = (torch.stack(each[name]) for each in (found, plain))
            assert torch.allclose(ours, theirs, atol=1e-4), name
        # of all tokens but the last
        fresh = model(plain.sequences[:, :-1], use_cache=True).cache
        for ours, theirs in zip(found.cache.layers, fresh.layers, strict=True):
            assert torch.allclose(ours.keys, theirs.keys, atol=1e-4)
            assert torch.allclose(ours.values, theirs.values, atol=1e-4)


# Several rows, and what is decoded plainly


def test_rows_are_decoded_plainly():
    model = testing.tiny_llama()
    ids = torch.cat([prompt(14), prompt(15)])
    own = {"eos_token_id": [*range(3, 9)], "do_sample": False}
    plain, _ = generated(model, ids, **own)
    with pytest.warns(UserWarning, match="2 rows"):
        found, _ = generated(model, ids, **own, custom_generate=decode, drafter=Random())
    assert torch.equal(found, plain)


def falcon_alibi():
    """A decoder whose attention has a bias by the place of a token in the cache."""
    return FalconForCausalLM(FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        alibi=True, multi_query=False, initializer_range=0.3, bos_token_id=1, eos_token_id=None,
    ))  # fmt: skip


def gpt_neo():
    """A decoder with a layer that attends to the last four places of the cache."""
    return GPTNeoForCausalLM(GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, window_size=4,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=64,
        initializer_range=0.3, bos_token_id=1, eos_token_id=None,
    ))  # fmt: skip


@pytest.mark.parametrize("make", [falcon_alibi, gpt_neo])
def test_attention_by_places_in_the_cache_gets_chains(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
    ids = prompt(18)
    plain, _ = generated(model, ids, do_sample=True)
    for guess in (Oracle(plain, 3), Oracle(plain, 2, decoys=True), Random()):
        more = {"drafter": guess, "switch": False, "custom_generate": decode}
        found, _ = generated(model, ids, do_sample=True, **more)
        assert torch.equal(found, plain)
    assert verify(model) < 1e-3


def test_no_draft_is_at_a_position_that_the_model_has_not():
    model = testing.tiny_gpt2()
    length = model.config.n_positions - 4
    ids = prompt(17, length)
    own = {"max_new_tokens": 4, "do_sample": False}
    plain, _ = generated(model, ids, **own)
    guess = Fixed([5, 6, 7, 8, 9, 10], [0, 1, 2, 3, 4, 5])
    # another limit than that of the positions
    more = {"max_new_tokens": 20, "eos_token_id": plain[0, -1].item()}
    found, _ = generated(model, ids, **{**own, **more}, custom_generate=decode, drafter=guess)
    assert torch.equal(found, plain[:, : found.shape[1]])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_beams": 2}, "beam_search"),
        ({"use_cache": False}, "use_cache=False"),
        ({"cache_implementation": "static"}, "StaticLayer"),
        (
            {"return_dict_in_generate": True, "output_hidden_states": True},
            "hidden states",
        ),
    ],
)
def test_what_cannot_be_verified_is_decoded_plainly_with_one_warning(settings, reason):
    model, ids = testing.tiny_llama(), prompt(16)
    plain, _ = generated(model, ids, **settings)
    with pytest.warns(UserWarning, match=reason) as caught:
        found, _ = generated(model, ids, **settings, custom_generate=decode, drafter=Random())
    assert len([w for w in caught if "without drafts" in str(w.message)]) == 1
    ours, theirs = (x if isinstance(x, torch.Tensor) else x.sequences for x in (found, plain))
    assert torch.equal(ours, theirs)


def test_stop_strings_are_a_criterion():
    """transformers hands no tokenizer to a function; what it would make of one is passed."""
    model, tokenizer = testing.tiny_llama(vocabulary=260), byte_tokenizer()
    (plain,) = generated(model, prompt(), max_new_tokens=40)[:1]
    text = tokenizer.decode(plain[0, 6:])
    stops = [text[9:11], text[20:22]]
    expected, _ = generated(model, prompt(), stop_strings=stops, tokenizer=tokenizer)
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, stops)])
    guess = Oracle(plain, 3)
    found, _ = generated(
        model, prompt(), stopping_criteria=criteria, custom_generate=decode, drafter=guess
    )
    assert torch.equal(found, expected)
    assert found.shape[1] < plain.shape[1]


# Refusals


@pytest.mark.parametrize(
    ("tokens", "parents", "message"),
    [
        ([VOCABULARY], [0], "96, .* 95"),
        ([-1], [0], "token -1"),
        ([5, 6], [0, 2], "parent 2"),
        ([5, 6], [0, -1], "parent -1"),
        ([5, 6], [0], "2 tokens"),
        ([5.0], [0], r"torch.float32 \[1\]"),
        ([[5]], [0], r"torch.int64 \[1, 1\]"),
        ([5], 0, r"parents .*torch.int64 \[\]"),
    ],
)
def test_drafts_that_are_no_tree_are_refused(tokens, parents, message):
    model, guess = testing.tiny_llama(), Fixed(tokens, parents)
    with pytest.raises(InputError, match=message):
        generated(model, prompt(), custom_generate=decode, drafter=guess)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nodes": -1}, "nodes=-1"),
        ({"pack": "yes"}, "pack='yes'"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3"),
        ({"drafter": "lokup"}, "'lokup'"),
        ({"drafter": 5}, "drafter=5"),
        ({"costs": {1: 1.0}}, r"costs=\{1: 1.0\}"),
        ({"stats": 3}, "stats=3"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        generated(testing.tiny_llama(), prompt(), custom_generate=decode, **settings)


@pytest.mark.parametrize("name", ["recycling", "free", "hydra"])
@pytest.mark.parametrize("size", [90, 100])
def test_a_drafter_of_another_vocabulary_is_refused(name, size):
    guess = drafter(name, model=testing.tiny_llama(vocabulary=size))
    with pytest.raises(InputError, match=f"{name} .*{size} .*96"):
        generated(testing.tiny_llama(), prompt(), custom_generate=decode, drafter=guess)


def test_packing_is_refused_where_nothing_can_be_packed():
    model = testing.tiny_llama().bfloat16()
    with pytest.raises(UnsupportedError, match="pack=True"):
        generated(model, prompt(), custom_generate=decode, drafter=Random(), pack=True)


# 16 bits


def bf16(guess):
    model, ids = testing.tiny_llama().bfloat16(), prompt(18)
    found, _ = generated(model, ids, custom_generate=decode, drafter=guess, max_new_tokens=40)
    return float(shortfalls(model, found, 6).max()), 2 * rounding(model)


@pytest.mark.thorough
def test_in_16_bits_each_token_is_the_models_own_up_to_rounding():
    for guess in (Random(), drafter("lookup", min_ngram=1)):
        shortfall, allowed = bf16(guess)
        assert shortfall <= allowed
