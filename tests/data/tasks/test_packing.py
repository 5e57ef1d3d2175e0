"""Packed texts are independent of each other in attention, positions and loss."""

import random
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import petl
from petl.data.tasks.base import IGNORED, Pad
from petl.data.tasks.causal_lm import CausalLM
from petl.data.tasks.packing import (
    batch_of_blocks,
    by_positions,
    check_packed_texts_isolated,
    isolate_packed_texts,
    pack,
)
from petl.errors import InputError

FIRST, OTHER, SECOND = [5, 9, 2, 7, 4], [8, 8, 1, 3, 6], [11, 3, 10, 6]


def llama(attn: str = "sdpa"):
    torch.manual_seed(0)
    small = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**small, intermediate_size=32, initializer_range=0.2, pad_token_id=0)
    return LlamaForCausalLM._from_config(config, attn_implementation=attn).eval()


def gpt2(attn: str = "sdpa"):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, initializer_range=0.2)
    return GPT2LMHeadModel._from_config(config, attn_implementation=attn).eval()


def row(*texts):
    (block,) = pack(texts, 99)
    names = {"input_ids": block.ids, "labels": block.labels, "position_ids": block.positions}
    return {**names, "attention_mask": [1] * len(block.ids)}


def batch(*rows):
    return batch_of_blocks(Pad(0), rows)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [llama, gpt2])
@torch.no_grad()
def test_a_text_does_not_attend_to_the_text_before_it(build, attn):
    model = build(attn)
    CausalLM(pack=True).adjust(model)
    logits = model(**batch(row(FIRST, SECOND), row(OTHER, SECOND), row(SECOND))).logits
    assert not torch.equal(logits[0, :5], logits[1, :5])
    assert torch.equal(logits[0, 5:], logits[1, 5:])
    alone = model(torch.tensor([SECOND])).logits[0]
    torch.testing.assert_close(logits[0, 5:], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[2, :4], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_transformers_alone_attends_across_texts():
    # the reason for `isolate_packed_texts`: with a mask or a cache the positions are ignored
    packed = batch(row(FIRST, SECOND), row(OTHER, SECOND))
    for call in (packed, {**packed, "attention_mask": None, "use_cache": True}):
        logits = llama()(**call).logits
        assert not torch.allclose(logits[0, 5:], logits[1, 5:], atol=1e-3)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_loss_and_gradient_are_those_of_separate_rows(build):
    model = petl.wrap(build(), "lora", target_modules="block-linear", task_type="CAUSAL_LM")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    isolate_packed_texts(model.get_base_model())
    found = []
    for rows in ([row(FIRST, SECOND), row(OTHER)], [row(FIRST), row(SECOND), row(OTHER)]):
        model.zero_grad()
        loss = model(**batch(*rows)).loss
        loss.backward()
        found.append((loss, [p.grad.clone() for p in model.parameters() if p.requires_grad]))
    (packed, gradients), (separate, expected) = found
    torch.testing.assert_close(packed, separate)
    torch.testing.assert_close(gradients, expected, atol=1e-6, rtol=1e-4)


def test_positions_and_labels_restart_with_each_text():
    first, second, third = pack([[1, 2, 3], [4, 5, 6, 7], [8, 9], [10]], 4)
    assert (first.ids, first.positions) == ([1, 2, 3, 10], [0, 1, 2, 0])
    assert first.labels == [1, 2, 3, IGNORED]  # nothing tells how the next text begins
    assert (second.ids, second.positions) == ([4, 5, 6, 7], [0, 1, 2, 3])
    assert (third.ids, third.positions) == ([8, 9], [0, 1])


@pytest.mark.parametrize(("longest", "waste"), [(4, 0.02), (16, 0.1), (50, 0.1)])
def test_only_texts_longer_than_a_block_are_cut_and_blocks_are_full(longest, waste):
    pick, length, texts = random.Random(longest), 16, []
    for _ in range(300):  # tokens that occur once: each tells its text and place
        start = 100 * len(texts)
        texts.append(list(range(start, start + pick.randint(1, longest))))
    found, blocks = [], pack(texts, length)
    for block in blocks:
        for token, label, position in zip(block.ids, block.labels, block.positions, strict=True):
            if position == 0:
                found.append([])
            found[-1].append(token)
            assert label == (token if position or token == block.ids[0] else IGNORED)
        # by the number of the first text
        assert block.ids[0] == min(block.ids)
    whole = [text for text in texts if len(text) <= length]
    assert [text for text in whole if text not in found] == []
    pieces = [text[at : at + length] for text in texts for at in range(0, len(text), length)]
    assert sorted(found) == sorted(pieces)
    sizes = sorted(len(block.ids) for block in blocks)
    assert sizes[0] + sizes[1] > length >= sizes[-1]  # no two of them would fit into one
    assert sum(sizes) >= (1 - waste) * length * len(blocks)


def test_one_long_text_is_split_and_needs_no_positions():
    blocks = pack([list(range(1, 11))], 4)
    assert [block.ids for block in blocks] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    assert all(block.labels == block.ids for block in blocks)
    assert set(batch(row(FIRST), row(SECOND))) == {"input_ids", "attention_mask", "labels"}


def test_padding_of_packed_rows_is_counted(tokenizer):
    task = CausalLM(max_length=14, pack=True)
    texts = ["to be", "or not", "a question"]
    encoded = task.encode(tokenizer, Dataset.from_dict({"text": texts}))
    made = task.collate(tokenizer)(list(encoded))
    assert made["position_ids"].shape == (2, 13)  # the first two texts, and the third
    assert task.positions(made) == 26
    assert task.count(made) == sum(len(text) + 1 for text in texts)
    assert task.items(made) == task.count(made) - 3  # the first token of each


def test_flash_attention_gets_the_boundaries_of_texts():
    body = torch.nn.Module()
    body.config = SimpleNamespace(_attn_implementation="flash_attention_2")
    packed = batch(row(FIRST, SECOND), row(OTHER))  # the second row has four of padding
    _, given = by_positions(body, (), packed)
    assert given["cu_seq_lens_q"].tolist() == [0, 5, 9, 14, 15, 16, 17, 18]
    assert given["cu_seq_lens_k"].dtype == torch.int32
    assert given["max_length_q"] == 9
    assert given["attention_mask"] is None


def test_models_are_checked_before_training():
    fine, mixing, without = llama(), llama(), bloom()
    isolate_packed_texts(fine)
    check_packed_texts_isolated(fine, fine)
    with pytest.raises(InputError):
        check_packed_texts_isolated(mixing, mixing)
    isolate_packed_texts(without)
    with pytest.raises(InputError):
        check_packed_texts_isolated(without, without)


def bloom():
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=20, hidden_size=16, n_layer=1, n_head=2, initializer_range=0.2)
    return BloomForCausalLM(config).eval()


@torch.no_grad()
def test_generation_is_not_changed():
    plain, packing = llama(), llama()
    isolate_packed_texts(packing)
    prompt = {
        "input_ids": torch.tensor([[0, 0, 5, 9], [3, 7, 4, 2]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
    }
    settings = {"max_new_tokens": 4, "do_sample": False}
    made = [model.generate(**prompt, **settings) for model in (plain, packing)]
    assert torch.equal(*made)
