"""The choice of a token: sampling of transformers, penalties, seeds, probabilities."""

import math

import pytest
import torch
from transformers import GenerationConfig

from petl import testing
from petl.generation.inference.sampling import Sampling
from petl.generation.serving.choice import Chooser, TokenChooser

LOGITS = torch.tensor([0.0, 1.0, 2.0, 3.0, -1.0])
GREEDY = Sampling(max_new_tokens=9)


def chooser(sampling=GREEDY, defaults=None, prompt=(0,), **choosing) -> Chooser:
    model = testing.tiny_llama()
    model.generation_config = defaults or GenerationConfig()
    return Chooser(sampling, TokenChooser(**choosing), model, prompt)


def drawn(chooser: Chooser, count: int = 300) -> set[int]:
    """Tokens that are drawn again and again, without those before."""
    found = set()
    for _ in range(count):
        found.add(chooser.choose(LOGITS)[0])
    return found


def test_without_settings_the_most_likely_token_is_chosen():
    assert chooser().is_argmax
    assert chooser().choose(LOGITS) == (3, [])
    assert not chooser(Sampling(temperature=1.0)).is_argmax
    assert chooser(Sampling(temperature=0.0)).is_argmax


def test_settings_of_the_model_are_the_defaults():
    defaults = GenerationConfig(do_sample=True, top_k=2, max_new_tokens=7)
    assert drawn(chooser(Sampling(), defaults)) == {2, 3}
    assert chooser(Sampling(), defaults).max_tokens == 7
    assert drawn(chooser(Sampling(temperature=0.0), defaults)) == {3}


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({"no_repeat_ngram_size": 1}, [2, 1]),  # the prompt has 0 and 3
        ({"bad_words_ids": [[3]]}, [2, 2]),
        ({"suppress_tokens": [3, 2]}, [1, 1]),
        ({"begin_suppress_tokens": [3]}, [2, 3]),
        ({"min_new_tokens": 1, "eos_token_id": 3}, [2, 3]),
        ({"min_length": 3, "eos_token_id": [3]}, [2, 3]),  # with the two of the prompt
    ],
)
def test_tokens_that_the_model_forbids_are_not_chosen(settings, tokens):
    found = chooser(defaults=GenerationConfig(**settings), prompt=(0, 3))
    assert not found.is_argmax
    assert [found.choose(LOGITS)[0] for _ in tokens] == tokens


def test_cuts_that_only_the_model_sets_hold_if_tokens_are_drawn():
    chances = LOGITS.softmax(-1)
    likely = {i for i, chance in enumerate(chances) if chance >= 0.1 * chances.max()}
    sampled = Sampling(temperature=1.0)
    assert likely == {1, 2, 3}
    assert drawn(chooser(sampled, GenerationConfig(min_p=0.1), seed=1)) == likely
    # the token whose surprise is closest to the mean one
    mean = -(chances * chances.log()).sum()
    typical = int((-chances.log() - mean).abs().argmin())
    assert drawn(chooser(sampled, GenerationConfig(typical_p=0.01), seed=1)) == {typical}


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=2.0), {0, 1, 2, 3, 4}),
        (Sampling(temperature=0.01), {3}),
        (Sampling(temperature=1e-300), {3}),
        (Sampling(temperature=1.0, top_k=3), {1, 2, 3}),
        # softmax gives the last two 0.64 and 0.24
        (Sampling(top_p=0.8, top_k=0), {2, 3}),
        (Sampling(top_p=0.0, top_k=0), {3}),
    ],
)
def test_sampling_is_cut_as_asked_for(sampling, expected):
    assert drawn(chooser(sampling, seed=1)) == expected


def test_a_seed_repeats_the_draws_whatever_else_is_drawn():
    sampling = Sampling(temperature=1.0)
    first, second, other = (chooser(sampling, seed=seed) for seed in (5, 5, 6))
    found = []
    for _ in range(40):
        torch.rand(1)
        found.append([each.choose(LOGITS)[0] for each in (first, second, other)])
    ours, again, others = zip(*found, strict=True)
    assert ours == again != others


def test_penalties_lower_the_logits_of_tokens_of_the_answer():
    penalized = chooser(frequency_penalty=0.4, presence_penalty=0.5, prompt=(3, 3, 3))
    # after one 3: 3 - 0.5 - 0.4; then 2: 2 - 0.9; 3 again; ...
    expected, counts = [], [0] * 5
    for _ in range(6):
        scores = [value - 0.5 * (counts[i] > 0) - 0.4 * counts[i] for i, value in enumerate(LOGITS)]
        best = max(range(5), key=lambda i: float(scores[i]))
        counts[best] += 1
        expected.append(best)
    assert [penalized.choose(LOGITS)[0] for _ in range(6)] == expected
    assert expected[0] == 3
    assert len(set(expected)) > 1
    # transformers' penalty counts the prompt
    assert chooser(Sampling(repetition_penalty=4.0), prompt=(3,)).choose(LOGITS)[0] == 2


def test_a_bias_is_added_to_logits():
    assert chooser(logit_bias={4: 5.0}).choose(LOGITS)[0] == 4


def test_probabilities_are_those_of_the_model():
    scaled = chooser(Sampling(temperature=0.5), top_logprobs=2, logit_bias={0: 100.0})
    token, (chosen, *likely) = scaled.choose(LOGITS)
    total = math.log(sum(math.exp(x) for x in LOGITS.tolist()))
    assert (token, chosen.token) == (0, 0)
    assert chosen.value == pytest.approx(0 - total)
    assert [each.token for each in likely] == [3, 2]
    assert likely[0].value == pytest.approx(3 - total)
    assert chooser(top_logprobs=0).choose(LOGITS)[1] == [(3, pytest.approx(3 - total))]
