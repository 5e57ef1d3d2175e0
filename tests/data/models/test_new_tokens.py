"""Tokens that a user adds: numbers, initial rows, and training of those rows alone."""

import copy

import pytest
import torch
from tiny_tokenizers import byte_tokenizer
from torch import nn

import petl
from petl import testing
from petl.data.models.new_tokens import added_rows, weights_of
from petl.testing import logits, stir, tiny_gpt2, tiny_llama, tiny_t5

ROWS = 260  # tokens of the tokenizer


def llama(rows: int = ROWS):
    return tiny_llama(2, rows)


def batch_with(*tokens: int):
    ids = torch.tensor([[4, *tokens, 7, *tokens], [9, 5, *tokens, *tokens]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.mark.parametrize(
    "tokens", [[], [""], ["a", " "], ["word", "word"], "word", ["word", 3], None]
)
def test_what_is_no_token_is_refused(tokens):
    with pytest.raises(petl.InputError):
        petl.add_tokens(llama(), byte_tokenizer(), tokens)


def test_rows_start_at_the_mean_of_what_each_token_was_divided_into():
    base, tokenizer = llama(), byte_tokenizer()
    before = {name: weight.clone() for name, weight in weights_of(base).items()}
    pieces = tokenizer("New York", add_special_tokens=False)["input_ids"]
    rows = petl.add_tokens(base, tokenizer, ["New York", "<|im_start|>"])
    # the head is not tied, so its rows train, too; the second token is known
    assert rows == {"model.embed_tokens": [260, 2], "lm_head": [260, 2]}
    assert tokenizer("in New York!")["input_ids"].count(260) == 1
    for name, weight in weights_of(base).items():
        torch.testing.assert_close(weight[260], before[name][pieces].mean(0))
        assert torch.equal(weight[:260], before[name])
    assert added_rows(base) == [260]


def test_spare_rows_of_a_base_come_first():
    base, tokenizer = llama(264), byte_tokenizer()
    petl.add_tokens(base, tokenizer, ["one", "two"])
    assert len(base.get_input_embeddings().weight) == 264
    petl.add_tokens(base, tokenizer, ["three", "four", "five"])
    assert len(base.get_input_embeddings().weight) == base.config.vocab_size == 265
    assert added_rows(base) == [260, 261, 262, 263, 264]


def test_a_thousand_tokens():
    base, tokenizer = llama(), byte_tokenizer()
    rows = petl.add_tokens(base, tokenizer, [f"<|item{i}|>" for i in range(1000)])
    assert rows["lm_head"] == [*range(260, 1260)]
    assert tokenizer("<|item999|>")["input_ids"] == [1259]
    assert tokenizer.decode([1259, 70], skip_special_tokens=True) == tokenizer.decode([70])


def tied_llama():
    base = llama()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    return base


@pytest.mark.parametrize("build", [llama, tied_llama, tiny_t5, tiny_gpt2])
@pytest.mark.parametrize("method", ["mola", "lora"])
def test_a_loop_that_trains_those_rows_alone_computes_the_same(build, method):
    """Tables that train as a whole, of which all other rows are put back after each step."""
    base, fields = build().eval(), {"task_type": None}
    size = len(next(iter(weights_of(base).values())))
    tokens = [size - 3, size - 1]
    tied = len({id(weight) for weight in weights_of(base).values()}) == 1
    rows = tokens if tied else dict.fromkeys(weights_of(base), tokens)
    torch.manual_seed(4)
    model = petl.wrap(copy.deepcopy(base), method, trainable_token_indices=rows, **fields)
    torch.manual_seed(4)
    whole = petl.wrap(base, method, **fields)
    tables = {id(w): w for w in weights_of(whole.get_base_model()).values()}.values()
    for table in tables:
        table.requires_grad_(True)
    batch, kept = batch_with(*tokens), [table.detach().clone() for table in tables]
    losses = []
    for one in (model, whole):
        optimizer = torch.optim.Adam([p for p in one.parameters() if p.requires_grad], 0.01)
        for _ in range(3):
            loss = one(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if one is whole:
                with torch.no_grad():
                    for table, before in zip(tables, kept, strict=True):
                        own = table[tokens].clone()
                        table.copy_(before)
                        table[tokens] = own
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-5)
    assert losses[2] < losses[0]


def test_two_adapters_have_rows_of_their_own():
    base, tokenizer = llama(), byte_tokenizer()
    rows = petl.add_tokens(base, tokenizer, ["one", "two"])
    model = petl.wrap(base, "mola", trainable_token_indices=rows)
    other = {name: [numbers[1]] for name, numbers in rows.items()}
    model.add_adapter("other", petl.build_config("mola", trainable_token_indices=other))
    batch = batch_with(260, 261)
    expected = []
    for seed, name in enumerate(("default", "other")):
        model.set_adapter(name)
        expected.append(logits(stir(model, name, seed=seed), batch))
    assert not torch.allclose(*expected)
    mixed = logits(model, batch, adapter_names=["other", "default"])
    torch.testing.assert_close(mixed[0], expected[1][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(mixed[1], expected[0][1], atol=1e-5, rtol=0)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), logits(base, batch))


def test_rows_train_in_half_precision_and_under_checkpointing():
    torch.manual_seed(0)
    base, tokenizer = llama().to(torch.bfloat16), byte_tokenizer()
    rows = petl.add_tokens(base, tokenizer, ["one"])
    model = petl.wrap(base, "mola", trainable_token_indices=rows)
    model.gradient_checkpointing_enable()
    model.train()
    model(**batch_with(260)).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if "trainable_tokens_delta" in n}
    assert len(trained) == 2
    for parameter in trained.values():
        assert parameter.dtype == torch.float32
        assert parameter.grad.abs().sum() > 0


def test_a_head_with_a_bias_is_refused():
    """PEFT would compute it without its bias."""
    base = llama()
    base.lm_head = nn.Linear(base.config.hidden_size, ROWS)
    with pytest.raises(petl.InputError):
        petl.wrap(base, "mola", trainable_token_indices={"lm_head": [3]})
    petl.wrap(base, "mola", trainable_token_indices=[3])  # it stays as it is


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["mola", "lora"])
@pytest.mark.parametrize("check", ["two_processes_equal_one", "sharded_processes_equal_one"])
def test_two_processes_train_the_rows_of_one(method, check):
    rows = {"model.embed_tokens": [3, 9, 20], "lm_head": [3, 9, 20]}
    fields = {"target_modules": ["q_proj", "v_proj"], "trainable_token_indices": rows}
    testing.run(check, testing.Case(method, "llama", fields))
