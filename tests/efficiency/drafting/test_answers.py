"""Answers that a model writes itself, and what of them is refused."""

import pytest
import torch
from draft_fixtures import DECODERS, PAD, prompt
from kept_processes import in_processes

import petl
from petl import testing
from petl.efficiency.drafting import answers
from petl.errors import InputError

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


def written_by_a_process(settings):
    """Return the rows of this process's model, and a number drawn afterwards."""
    torch.manual_seed(3 + torch.distributed.get_rank() if torch.distributed.is_initialized() else 3)
    found = answers(testing.tiny_llama(), PROMPTS, **SIZES, **settings)
    return found.ids, found.states, found.lengths, found.starts


SIZES = {"tokens": 6, "batch_size": 2, "pad_token_id": PAD}  # four batches


def rows_answered_by_a_process():
    """Return the number of prompts that this process's model has seen."""
    model, seen = testing.tiny_llama(), []
    generate = model.generate
    model.generate = lambda **inputs: (seen.append(len(inputs["input_ids"])), generate(**inputs))[1]
    found = answers(model, PROMPTS, **SIZES)
    return torch.distributed.get_world_size(), sum(seen), len(found)


def refused_by_a_process():
    """Return the message about prompts that generate refuses in one process only."""
    model = testing.tiny_llama()
    if torch.distributed.get_rank() == 1:
        model.generate = fail
    with pytest.raises(InputError) as caught:
        answers(model, PROMPTS, **SIZES)
    return str(caught.value)


def fail(**inputs):
    raise InputError("refused here")


def all_by_a_process():
    written = [written_by_a_process(settings) for settings in WAYS]
    return written, rows_answered_by_a_process(), refused_by_a_process()


WAYS = [{"eos_token_id": [5, 9, 23]}, {"do_sample": True, "temperature": 1.5}]


@pytest.fixture(scope="module")
def both():
    """What each of two processes has written, answered and refused."""
    return in_processes(2, all_by_a_process)


@pytest.mark.parametrize("way", range(len(WAYS)))
def test_two_processes_write_the_rows_of_one(both, way):
    ids, states, *numbers = written_by_a_process(WAYS[way])
    for written, *_ in both:
        own_ids, own_states, *own = written[way]
        assert torch.equal(own_ids, ids)
        assert torch.equal(own_states, states)
        assert own == numbers


def test_each_process_answers_its_share(both):
    # batches of 2, 2, 2, 1 prompts, by turns
    assert [answered for _, answered, _ in both] == [(2, 4, 7), (2, 3, 7)]


def test_an_error_of_one_process_is_raised_in_all(both):
    assert [said for *_, said in both] == ["refused here"] * 2


def test_sampled_answers_draw_one_number_and_no_more():
    torch.manual_seed(1)
    torch.randint(2**31, ())
    expected = torch.rand(3)
    torch.manual_seed(1)
    answers(testing.tiny_llama(), PROMPTS, **SIZES, do_sample=True)
    assert torch.equal(torch.rand(3), expected)
