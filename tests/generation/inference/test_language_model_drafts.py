"""Answers of single prompts are decoded with drafts, and stay what they are."""

import pytest
import torch
from writer_fixtures import PROMPTS

from petl.efficiency.drafting import Costs, Stats, drafter
from petl.errors import InputError
from petl.generation.inference.loading import load_language_model
from petl.generation.inference.sampling import Sampling
from petl.system.files.disk import remove

pytest_plugins = ["writer_fixtures"]
SETTINGS = [
    Sampling(max_new_tokens=25),
    Sampling(max_new_tokens=25, temperature=1.0, top_p=0.9, repetition_penalty=1.2),
    Sampling(max_new_tokens=30, stop=("a", "e")),
]


def answers(model, sampling, stats=None):
    torch.manual_seed(0)
    with model.using("default"):
        return [model.answer([model.encode(p)], sampling, stats=stats)[0] for p in PROMPTS]


@pytest.mark.thorough
def test_drafts_change_no_answer(writers):
    plain = load_language_model(writers.folder / "mola", drafting="none")
    assert plain.drafter is None
    model, stats = writers.load("mola"), Stats()
    assert model.drafter.name == "free"
    assert model.drafter is model.drafter
    model.drafter.costs = Costs({1: 1.0, 8: 1.0})  # it drafts, though it is rarely right
    for sampling in SETTINGS:
        assert answers(model, sampling, stats) == answers(plain, sampling)
    assert stats.answers == 3 * len(PROMPTS)
    assert stats.accepted > 0


def test_a_stream_with_drafts_is_the_answer(writers):
    streams = []
    for drafting in ("auto", "none"):
        model = load_language_model(writers.folder / "lora", drafting=drafting)
        pieces: list[str] = []
        with model.using("default"):
            (answer,) = model.answer([model.encode("Hi")], SETTINGS[2], write=pieces.append)
        assert "".join(pieces) == answer.text
        streams.append(pieces)
    assert streams[0] == streams[1] != []


def test_batches_and_prompt_lookup_are_decoded_without_drafts(writers):
    model, stats = writers.load("lora"), Stats()
    with model.using("default"):
        model.answer([model.encode(text) for text in PROMPTS], SETTINGS[0], stats=stats)
        looking = Sampling(max_new_tokens=9, prompt_lookup=3)
        model.answer([model.encode("Hi")], looking, stats=stats)
    assert stats.passes == 0


def test_a_drafter_that_cannot_be_used_is_refused(writers, tmp_path):
    for drafting, words in (
        ("aggressive", "LlamaForCausalLM .*lookup"),
        (str(tmp_path), str(tmp_path)),
        ("fre", "'fre' .*'free'"),
    ):
        with pytest.raises(InputError, match=words):
            _ = load_language_model(writers.folder / "lora", drafting=drafting).drafter


def test_a_saved_drafter_is_taken_from_its_folder_and_from_that_of_the_run(writers, tmp_path):
    base = writers.load("lora").base
    drafter("recycling", model=base, nodes=3).save(tmp_path)
    given = load_language_model(writers.folder / "lora", drafting=str(tmp_path))
    assert (given.drafter.name, given.drafter.nodes) == ("recycling", 3)
    assert load_language_model(writers.folder / "lora", drafting="lookup").drafter.name == "lookup"
    own = writers.folder / "lora" / "drafter"
    drafter("recycling", model=base, nodes=5).save(own)
    try:
        model = writers.load("lora", second="other")
        with model.using("default"):
            assert model.drafter.drafter.nodes == 5  # behind lookup
            assert model.drafter is model.drafter
        # it was trained for the first adapter
        for name in ("second", "base"):
            with model.using(name):
                assert model.drafter.name == "free"
        assert load_language_model(writers.folder / "lora", drafting="free").drafter.name == "free"
    finally:
        remove(own)


def test_a_plain_model_has_a_drafter_of_its_own(writers):
    own = writers.folder / "llama" / "drafter"
    drafter("recycling", model=writers.load("llama").base, nodes=5).save(own)
    try:
        assert writers.load("llama").drafter.drafter.nodes == 5
        assert writers.load("lora").drafter.name == "free"
    finally:
        remove(own)
