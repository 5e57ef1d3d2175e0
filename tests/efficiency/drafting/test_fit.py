"""Training of drafters: the schedule, the batches, and what is refused."""

import math

import pytest
import torch
from draft_fixtures import PAD, prompt

from petl import testing
from petl.efficiency.drafting import answers, drafter, fit
from petl.efficiency.drafting.fit import factor
from petl.errors import InputError, UnsupportedError


@pytest.fixture(scope="module")
def model():
    return testing.tiny_llama()


@pytest.fixture(scope="module")
def written(model):
    prompts = [prompt(i)[0].tolist() for i in range(4)]
    return answers(model, prompts, tokens=9, pad_token_id=PAD)


def test_the_learning_rate_rises_for_30_steps_and_falls_as_a_cosine():
    rates = [factor(step, 130) for step in range(130)]
    assert rates[:30] == pytest.approx([(step + 1) / 30 for step in range(30)])
    expected = [0.5 * (1 + math.cos(math.pi * step / 100)) for step in range(100)]
    assert rates[30:] == pytest.approx(expected)
    # of short trainings the first half
    assert max(factor(step, 4) for step in range(4)) == 1


@pytest.mark.parametrize("prefix", [False, True])
def test_each_position_is_in_one_batch_of_an_epoch(model, written, prefix):
    guess = drafter("hydra", model=model, prefix=prefix)
    generator = torch.Generator().manual_seed(0)
    found = list(guess.batches(written, 10, generator))
    assert sorted(torch.cat(found).tolist()) == written.positions.tolist()
    sizes = [len(batch) for batch in found]
    # each answer has 8 positions; with a prefix layer answers are not divided
    assert sizes == ([16, 16] if prefix else [10, 10, 10, 2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": -1}, "epochs=-1"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"batch": 0}, "batch=0"),
        ({"target": "firm"}, "target='firm' .*hard, soft"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(model, written, settings, message):
    with pytest.raises(InputError, match=message):
        fit(drafter("hydra", model=model), written, **settings)


def test_what_cannot_be_trained_is_refused(model, written):
    with pytest.raises(UnsupportedError):
        fit(drafter("lookup"), written)
    short = answers(model, [[3, 4]], tokens=1, pad_token_id=PAD)
    with pytest.raises(InputError, match="two tokens"):
        fit(drafter("hydra", model=model), short)
