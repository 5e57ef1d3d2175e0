import logging
import math

import pytest
import torch
from datasets import Dataset
from tiny_tokenizers import CHATML
from transformers import LlamaConfig, LlamaForCausalLM

from petl.data.tasks import base
from petl.data.tasks.base import IGNORED
from petl.data.tasks.causal_lm import CausalLM, has_targets
from petl.errors import InputError


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=3,
    )
    return LlamaForCausalLM(config).eval()


def batches(task, tokenizer, texts, size):
    encoded = task.encode(tokenizer, Dataset.from_dict({"text": texts}))
    rows = [encoded[i] for i in range(len(encoded))]
    return [task.collate(tokenizer)(rows[i : i + size]) for i in range(0, len(rows), size)]


TEXTS = ["To be, or not to be", "that is", "the question: whether 'tis nobler", "x", "in the mind"]


@pytest.mark.parametrize("chunk", [3, 1024])
@torch.no_grad()
def test_loss_is_that_of_the_model_and_adds_over_uneven_batches(
    model, tokenizer, monkeypatch, chunk
):
    monkeypatch.setattr(base, "CHUNK", chunk)
    task = CausalLM(max_length=24)
    (whole,) = batches(task, tokenizer, TEXTS, size=5)
    total = sum(
        task.score(model(**batch), batch) for batch in batches(task, tokenizer, TEXTS, size=2)
    )
    scores = task.summarize(total)
    loss = model(**whole).loss.item()
    assert scores["loss"] == pytest.approx(loss, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert scores["tokens"] == task.items(whole) == sum(min(len(t), 23) for t in TEXTS)


@torch.no_grad()
def test_logits_of_virtual_tokens_are_skipped(model, tokenizer):
    task = CausalLM(max_length=24)
    (batch,) = batches(task, tokenizer, TEXTS, size=5)
    outputs = model(**batch)
    plain = task.score(outputs, batch)
    outputs.logits = torch.cat([torch.randn(5, 4, 260), outputs.logits], 1)
    torch.testing.assert_close(task.score(outputs, batch), plain)


def test_the_end_token_has_a_label_although_it_is_also_padding(tokenizer):
    task = CausalLM(max_length=24)
    (batch,) = batches(task, tokenizer, ["abc", "a"], size=2)
    end = tokenizer.eos_token_id
    assert end == tokenizer.pad_token_id
    assert batch["labels"][1].tolist()[1:] == [end, IGNORED, IGNORED]
    assert batch["attention_mask"][1].tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("space", ["", "\n", "  \n"])
def test_a_text_that_has_its_end_token_gets_no_second_one(tokenizer, space):
    rows = {"text": [f"ab<|im_end|>{space}", f"ab{space}"]}
    ended, open_ = CausalLM().encode_rows(tokenizer, rows)["input_ids"]
    assert tokenizer.decode(ended) == "ab<|im_end|>"
    assert tokenizer.decode(open_) == f"ab{space}<|im_end|>"


def test_packed_blocks_hold_every_token_once_in_order(tokenizer):
    task = CausalLM(max_length=10, pack=True)
    texts = ["To be, or not to be", "", "that is the question!"]
    encoded = task.encode(tokenizer, Dataset.from_dict({"text": texts}))
    tokens = [token for row in encoded for token in row["input_ids"]]
    assert (
        tokenizer.decode(tokens) == "To be, or not to be<|im_end|>that is the question!<|im_end|>"
    )
    assert [len(row["input_ids"]) for row in encoded] == [10, 10, 10, 10, 2]
    assert all(row["labels"] == row["input_ids"] for row in encoded)


def chat(*contents):
    roles = ["user", "assistant"] * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


def test_chat_rows_truncated_before_any_answer_are_dropped_and_counted(tokenizer, caplog):
    tokenizer.chat_template = CHATML
    task = CausalLM(max_length=30, chat=True)
    rows = [chat("hi", "hello there"), chat("a question " * 5, "no"), chat("alone")]
    with caplog.at_level(logging.WARNING, "petl"):
        encoded = task.encode(tokenizer, Dataset.from_dict({"messages": rows}))
    assert len(encoded) == 1
    assert len(encoded[0]["input_ids"]) == 30
    learned = [t for t in encoded[0]["labels"] if t != IGNORED]
    assert "hello there".startswith(tokenizer.decode(learned))
    assert "dropped 2 of 3 rows: no assistant turn within the first max_length=30" in caplog.text


def test_chat_without_any_answer_is_refused(tokenizer):
    tokenizer.chat_template = CHATML
    task = CausalLM(max_length=8, chat=True)
    with pytest.raises(
        InputError,
        match="max_length=8",
    ):
        task.encode(tokenizer, Dataset.from_dict({"messages": [chat("question", "answer")]}))


def test_a_row_with_a_label_at_its_first_token_alone_has_nothing_to_predict():
    assert not has_targets([5, IGNORED, IGNORED])
    assert has_targets([IGNORED, IGNORED, 5])
