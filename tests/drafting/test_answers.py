"""Answers that a model writes itself, and what of them is refused."""

import pytest
import torch
from draft_fixtures import DECODERS, PAD, prompt

import petl
from petl import testing
from petl.drafting import answers
from petl.errors import InputError, UnsupportedError

PROMPTS = [prompt(i, 3 + i % 4)[0].tolist() for i in range(7)]


@pytest.mark.parametrize("family", DECODERS)
def test_answers_are_those_of_generate_with_the_states_of_their_tokens(family):
    model = DECODERS[family]()
    found = answers(model, PROMPTS, tokens=9, batch_size=3, pad_token_id=PAD)
    assert len(found) == len(PROMPTS)
    for i, ids in enumerate(PROMPTS):
        settings = {"max_new_tokens": 9, "pad_token_id": PAD, "use_cache": True}
        plain = model.generate(torch.tensor([ids]), do_sample=False, **settings)[0]
        assert torch.equal(found.ids[found.row(i)], plain)
        assert torch.equal(found.answer(i), plain[len(ids) :])
        with torch.no_grad():
            states = model(plain[None], output_hidden_states=True).hidden_states[-1][0]
        assert found.states.dtype == torch.bfloat16
        assert torch.allclose(found.states[found.row(i)].float(), states, rtol=1e-2, atol=1e-2)


def test_an_answer_ends_with_its_end_token():
    model = testing.tiny_llama()
    whole = answers(model, PROMPTS, tokens=9, pad_token_id=PAD)
    end = int(whole.answer(0)[3])
    found = answers(model, PROMPTS, tokens=9, pad_token_id=PAD, eos_token_id=[end])
    for i in range(len(PROMPTS)):
        tokens = whole.answer(i).tolist()
        length = tokens.index(end) + 1 if end in tokens else 9
        assert found.answer(i).tolist() == tokens[:length]


def test_positions_are_where_a_token_was_chosen_that_another_follows():
    model = testing.tiny_llama()
    found = answers(model, PROMPTS, tokens=5, pad_token_id=PAD)
    expected, first = [], 0
    for ids in PROMPTS:
        length = len(ids) + 5
        # t chose t + 1, an answer's token, and t + 2 is there
        expected += [first + t for t in range(length) if t + 1 >= len(ids) and t + 2 < length]
        first += length
    assert found.positions.tolist() == expected
    assert sum(found.counts) == len(expected)
    some = found.rows([2, 0])
    assert torch.equal(some.answer(0), found.answer(2))
    assert torch.equal(some.states[some.row(1)], found.states[found.row(0)])


def test_an_adapter_writes_other_answers_and_nothing_is_changed():
    model = petl.wrap(testing.tiny_llama(), "lora", task_type="CAUSAL_LM")
    plain = answers(model, PROMPTS, tokens=9, pad_token_id=PAD)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = answers(model, PROMPTS, tokens=9, pad_token_id=PAD)
    assert not torch.equal(found.states, plain.states)
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "there are no prompts"),
        ([[3], []], {"tokens": 9}, "prompt 1 is empty"),
        ([[3]], {"tokens": 0}, "tokens=0 is not 1 or more"),
        ([[3]], {"batch_size": 0}, "batch_size=0 is not 1 or more"),
        ([[3] * 60], {"tokens": 9}, "prompt 0 has 60 tokens and its answer up to 9, but the model"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused(prompts, settings, message):
    with pytest.raises(InputError, match=message):
        answers(testing.tiny_llama(), prompts, **settings)


def test_models_that_cannot_be_decoded_with_drafts_are_refused():
    with pytest.raises(UnsupportedError, match="T5ForConditionalGeneration is an encoder-decoder"):
        answers(testing.tiny_t5(), PROMPTS)
