"""A request that is alone in its batch is decoded with drafts; its answer is that without."""

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from petl.efficiency.drafting import Costs
from petl.efficiency.drafting.policy import REST, WINDOW
from petl.generation.inference.language_model import BASE, LanguageModel
from petl.generation.inference.sampling import AnswerText, Sampling
from petl.generation.serving.batch import BatchPasses
from petl.generation.serving.choice import Chooser, TokenChooser
from petl.generation.serving.engine import Slot
from petl.generation.serving.models import load_served
from petl.generation.serving.request import Request

pytest_plugins = ["writer_fixtures"]
TEXTS = ["a b a b a b", "the cat and the dog and the cat and", "Hi"]
TOKENS = 24
CHOICES = {
    "greedy": (Sampling(max_new_tokens=TOKENS), TokenChooser()),
    "sampled": (Sampling(max_new_tokens=TOKENS, temperature=0.8, top_p=0.9), TokenChooser(seed=5)),
    "penalty": (
        Sampling(max_new_tokens=TOKENS, repetition_penalty=1.3),
        TokenChooser(frequency_penalty=0.4, logit_bias={7: 2.0}, top_logprobs=2),
    ),
}


def request(model, text, adapter, choice="greedy", *, stop=()) -> Request:
    """A request whose pieces are kept in `request.emit.__self__`."""
    sampling, choosing = CHOICES[choice]
    prompt = model.encode(text)
    chooser = Chooser(sampling, choosing, model.base, prompt)
    text_of = AnswerText(model.tokenizer, stop)
    return Request(prompt, adapter, chooser, text_of, model.ends, [].append, TOKENS)


def written(lane, requests):
    """The pieces of requests that follow one another."""
    for each in requests:
        lane.advance([each])
        while lane.batches:
            lane.advance([])
    return [[(p.text, p.tokens, p.finish) for p in each.emit.__self__] for each in requests]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("method", "adapter", "choice"),
    [
        ("lora", "default", "greedy"),
        ("lora", BASE, "sampled"),
        ("mola", "default", "penalty"),
    ],
)
def test_single_requests_get_the_pieces_that_they_get_without_drafts(
    writers, method, adapter, choice
):
    model = writers.load(method)
    stops = [(), (), ("e", "a")]
    for shared in (None, adapter):  # each row its own adapter, or one for all
        lanes = [Slot(BatchPasses(model, shared, drafter=name)) for name in (None, "free")]
        # of random weights drafts are rarely right, and would rest
        rounds = lanes[1].passes.drafts.rounds
        rounds.switch.enabled = False
        rounds.costs = Costs({1: 1.0, 8: 1.0})
        plain, drafted = (
            written(
                lane,
                [
                    request(model, t, adapter, choice, stop=s)
                    for t, s in zip(TEXTS, stops, strict=True)
                ],
            )
            for lane in lanes
        )
        assert drafted == plain
        assert lanes[1].passes.count < lanes[0].passes.count


@pytest.mark.parametrize("choice", ["greedy", "sampled"])
@pytest.mark.parametrize("rests", [True, False])
def test_requests_that_join_and_leave_change_no_answer(writers, rests, choice):
    model = writers.load("lora")

    def staggered(drafter):
        lane = Slot(BatchPasses(model, None, drafter=drafter))
        if drafter is not None:
            # a rest would begin the drafter's text again
            lane.passes.drafts.rounds.switch.enabled = rests
        requests = [
            request(model, t, a, choice)
            for t, a in zip(TEXTS, ["default", BASE, BASE], strict=True)
        ]
        requests[1].max_tokens = 4  # so that the first is alone twice
        joins = {0: requests[:1], 3: requests[1:2], 9: requests[2:]}
        turn = 0
        while turn < 10 or lane.batches:
            lane.advance(joins.get(turn, []))
            turn += 1
        return [[(p.text, p.finish) for p in each.emit.__self__] for each in requests]

    assert staggered("free") == staggered(None)


def test_a_cancelled_request_leaves_after_its_next_token(writers):
    model = writers.load("llama")
    lane = Slot(BatchPasses(model, BASE, drafter="free"))
    alone = request(model, TEXTS[0], BASE)
    lane.advance([alone])
    alone.cancelled.set()
    lane.advance([])
    assert not lane.batches
    assert len(alone.emit.__self__) == 2


def test_drafts_that_are_too_slow_rest(writers):
    model = writers.load("llama")
    lane = Slot(BatchPasses(model, BASE, drafter="free"))
    switch = lane.passes.drafts.rounds.switch
    switch.rounds, switch.seconds = WINDOW - 1, 1e6
    expected = written(Slot(BatchPasses(model, BASE)), [request(model, TEXTS[0], BASE)])
    assert written(lane, [request(model, TEXTS[0], BASE)]) == expected
    assert not switch.is_on
    assert 0 < switch.left < REST


def test_models_that_cannot_be_verified_are_decoded_without_drafts(writers):
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=260, hidden_size=32, state_size=4, num_hidden_layers=2, eos_token_id=3
    )
    tokenizer = writers.load("plain").tokenizer
    mamba = LanguageModel(MambaForCausalLM(config).eval(), tokenizer, "tiny", is_chat=False)
    assert BatchPasses(mamba, BASE, drafter="free").drafts is None
    assert BatchPasses(writers.load("llama"), BASE).drafts is None


def test_a_server_drafts_unless_it_is_told_not_to(writers):
    runs = {"lora": str(writers.folder / "lora")}
    for drafter, has_drafts in (("free", True), (None, False)):
        served = load_served(runs, drafter=drafter)
        assert {(each.lane.passes.drafts is not None) for each in served.values()} == {has_drafts}
