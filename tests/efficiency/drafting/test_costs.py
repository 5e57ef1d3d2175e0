"""Costs of a pass: from measured seconds, and measured."""

import pytest
import torch
from draft_fixtures import DECODERS, PAD, Oracle, prompt
from transformers import LogitsProcessor

from petl import testing
from petl.efficiency.drafting import Costs, Stats, decode
from petl.efficiency.drafting.costs import TYPICAL, LearnedCosts
from petl.efficiency.drafting.policy import REST, WINDOW, Switch


def test_the_cost_of_more_tokens_is_that_of_the_cheapest_pass_that_holds_them():
    costs = Costs({1: 2.0, 2: 4.0, 4: 3.0, 8: 6.0})
    assert costs.seconds == {1: 2.0, 2: 4.0, 4: 3.0, 8: 6.0}
    assert [costs.ratio(n) for n in (1, 2, 3, 4, 6, 8, 16)] == [1.0, 1.5, 1.5, 1.5, 2.25, 3.0, 6.0]
    assert [costs.padded(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [1, 4, 4, 4, 5, 8, 9]


@pytest.mark.parametrize("family", DECODERS)
def test_costs_are_measured_once_and_leave_the_model_and_random_state_alone(family):
    model = DECODERS[family]().train()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    costs = Costs.measure(model, 20, rounds=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    # no pass may be longer than half of the 64 positions
    assert [*costs.seconds] == [1, 2, 3, 4, 6, 8, 12, 16, 32]
    assert Costs.measure(model, 20, rounds=1) is costs
    assert Costs.measure(model.double(), 20, rounds=1) is not costs


def test_costs_are_learned_as_medians_of_the_latest_passes():
    costs = LearnedCosts(TYPICAL)
    assert costs.plain is None
    for seconds in (7.0, 9.0, 8.0):
        costs.add(4, seconds)
    # nothing to compare with yet
    assert [costs.ratio(n) for n in (2, 4, 8)] == [TYPICAL.ratio(n) for n in (2, 4, 8)]
    costs.add(1, 4.0)
    assert costs.plain == 4.0
    assert costs.seconds[4] == 8.0
    # too few passes over 8 tokens: slower than typical ones as those over 4 are
    costs.add(8, 400.0)
    assert costs.seconds[8] / TYPICAL.ratio(8) == pytest.approx(8.0 / TYPICAL.ratio(4))
    for seconds in (1.0, 2.0):
        costs.add(1, seconds)
    assert costs.plain == 2.0
    assert costs.seconds[4] == 8.0
    for _ in range(9):  # the machine has become faster
        costs.add(4, 3.0)
    assert costs.seconds[4] == 3.0


def test_decoding_learns_the_costs_of_its_own_passes():
    model, ids, clock = testing.tiny_llama(), prompt(), Clock()
    settings = {"max_new_tokens": 40, "pad_token_id": PAD, "use_cache": True, "do_sample": False}
    plain = model.generate(ids, **settings)

    def tick(module, args, kwargs, output):
        clock.now += 2.0 if kwargs["input_ids"].shape[1] == 1 else 3.0

    handle = model.register_forward_hook(tick, with_kwargs=True)
    # three drafts that are right, or wrong ones, after which plain rounds come
    for guess in (Oracle(plain, 3), Oracle((plain + 1) % model.config.vocab_size, 3)):
        more = {"drafter": guess, "clock": clock, "custom_generate": decode}
        assert torch.equal(model.generate(ids, **settings, **more), plain)
    handle.remove()
    assert guess.costs.plain == 2.0
    assert guess.costs.ratio(4) == 1.5  # whatever number of tokens the passes had


def test_a_pass_takes_until_its_tokens_are_chosen():
    # an accelerator returns from a call before it has computed
    model, ids, clock = testing.tiny_llama(), prompt(), Clock()

    class Waits(LogitsProcessor):
        def __call__(self, input_ids, scores):
            clock.now += 2.0
            return scores

    guess = Oracle(torch.full((1, 40), PAD), 0)
    settings = {"max_new_tokens": 8, "pad_token_id": PAD, "use_cache": True, "do_sample": False}
    more = {"drafter": guess, "clock": clock, "logits_processor": [Waits()]}
    model.generate(ids, **settings, **more, custom_generate=decode)
    assert guess.costs.plain == 2.0


# The switch


def test_the_switch_goes_off_after_a_slow_window_and_on_again_after_a_rest():
    switch = Switch()
    for _ in range(WINDOW - 1):
        switch.add(2, 2.1, 1)
        assert not switch.is_due
    switch.add(2, 2.1, 1)
    assert switch.is_due
    switch.judge(1.0)
    assert not switch.is_on
    switch.rest(REST - 1)
    assert not switch.is_on
    switch.rest(1)
    assert switch.is_on
    assert not switch.is_due
    for _ in range(WINDOW):
        switch.add(2, 1.9, 1)
    switch.judge(1.0)
    assert switch.is_on
    assert not switch.is_due


@pytest.mark.parametrize("enabled", [True, False])
def test_one_pass_is_lost_to_wrong_drafts_then_half_of_that_after_rests_that_double(enabled):
    switch, rounds = Switch(enabled=enabled), []  # True: with drafts
    for _ in range(400):
        rounds.append(switch.is_on)
        # the seconds are those of a drafter that is fast: the clock has no part in it
        switch.add(1, 0.0, 0.125) if switch.is_on else switch.rest(1)
    # 8, 4, 2, 1 rounds lose a whole, a half, a quarter, an eighth of a pass; then one round tries
    lengths = [(8, 8), (4, 16), (2, 32), (1, 64), (1, 128), (1, 128), (1, 6)]
    expected = [kind for on, off in lengths for kind in (True,) * on + (False,) * off]
    assert rounds == (expected if enabled else [True] * 400)


def test_rounds_that_cost_nothing_lose_nothing_and_a_right_draft_begins_anew():
    switch = Switch()
    for _ in range(60):  # the drafter has no guess
        switch.add(1, 0.0, 0.0)
    for _ in range(2):
        for _ in range(7):
            switch.add(1, 0.0, 0.125)
        assert switch.is_on
        switch.add(2, 0.0, 1.0)  # right, and saves nothing
    for _ in range(8):
        switch.add(1, 0.0, 0.125)
    assert not switch.is_on
    switch.rest(8)
    assert switch.is_on
    switch.add(2, 0.0, 1.0)  # so a pass and 8 tokens again, not a half and 16
    for _ in range(8):
        assert switch.is_on
        switch.add(1, 0.0, 0.125)
    switch.rest(7)
    assert not switch.is_on
    switch.rest(1)
    assert switch.is_on


@pytest.mark.parametrize(
    ("tokens", "cost", "losses"),
    [(2, 0.5, 6), (2, 1.0, 4), (3, 4.0, 4), (3, 0.75, 8), (9, 2.0, 8)],  # of 0.25 each
)
def test_what_a_right_draft_saved_may_be_lost_too_up_to_a_pass(tokens, cost, losses):
    switch = Switch()
    switch.add(tokens, 0.0, cost)
    for _ in range(losses):
        assert switch.is_on
        switch.add(1, 0.0, 0.25)
    assert not switch.is_on


@pytest.mark.parametrize("seconds", [{1: 1.0, 4: 1.0}, {1: 1.0, 4: 1.125}])
def test_wrong_drafts_rest_by_the_costs_of_their_passes(seconds):
    model, ids, stats = testing.tiny_llama(), prompt(), Stats()
    settings = {"max_new_tokens": 51, "pad_token_id": PAD, "use_cache": True, "do_sample": False}
    plain = model.generate(ids, **settings)
    wrong = Oracle((plain + 1) % model.config.vocab_size, 3)
    more = {"drafter": wrong, "clock": Clock(), "costs": Costs(seconds)}
    found = model.generate(ids, **settings, custom_generate=decode, stats=stats, **more)
    assert torch.equal(found, plain)
    assert stats.passes == 50
    # of 50 rounds after the first token: 8 drafted, 8 plain, 4 drafted, 16 plain, 2 drafted, 12
    assert len(wrong.roots) == (50 if seconds[4] == 1.0 else 14)


class Clock:
    """Seconds that only drafting takes."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow(Oracle):
    """An oracle of one token, of which each draft takes a time."""

    def __init__(self, text, clock, seconds):
        super().__init__(text, 1)
        self.clock, self.seconds = clock, seconds

    def draft(self, root, budget):
        self.clock.now += self.seconds
        return super().draft(root, budget)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("seconds", "switch", "rounds"),
    [
        # of 399 tokens after the first: 128 with drafts, 128 plain ones, 128 with drafts, 15
        (2.1, True, 64 + 64),
        (1.9, True, 200),
    ],
)
def test_decoding_stops_to_draft_while_it_is_slower(seconds, switch, rounds):
    model, ids, clock, stats = testing.tiny_llama(), prompt(), Clock(), Stats()
    settings = {"max_new_tokens": 400, "pad_token_id": PAD, "use_cache": True, "do_sample": False}
    plain = model.generate(ids, **settings)
    guess = Slow(plain, clock, seconds)
    more = {"drafter": guess, "clock": clock, "costs": Costs({1: 1.0}), "switch": switch}
    found = model.generate(ids, **settings, custom_generate=decode, stats=stats, **more)
    assert torch.equal(found, plain)
    assert len(guess.roots) == rounds
    assert len(guess.seen) == rounds
    assert stats.seconds == pytest.approx(seconds * rounds)


def test_windows_go_on_over_short_answers():
    model, ids, clock = testing.tiny_llama(), prompt(), Clock()
    settings = {"max_new_tokens": 41, "pad_token_id": PAD, "use_cache": True, "do_sample": False}
    plain = model.generate(ids, **settings)
    guess = Slow(plain, clock, 2.1)
    more = {"drafter": guess, "clock": clock, "costs": Costs({1: 1.0})}
    for _ in range(5):  # 20 rounds each, until 64 were too slow
        assert torch.equal(model.generate(ids, **settings, custom_generate=decode, **more), plain)
    assert len(guess.roots) == 64
