"""Trained tensors without a gradient are named once, in any loop."""

import peft
import pytest
import torch
from decoder_fixtures import bart
from transformers import ReformerConfig, ReformerModelWithLMHead

import petl
from petl import testing


def train(model, steps, *, lr=1e-2, unused=()):
    """Take optimizer steps, without the gradients of tensors whose name has one of `unused`."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    tokens = torch.randint(1, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        for name, parameter in model.named_parameters():
            if any(part in name for part in unused):
                parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()


def test_tensors_without_a_gradient_are_named_after_the_first_step_and_once(caplog):
    model = peft.get_peft_model(bart(), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    petl.lifecycle(model)
    caplog.clear()
    train(model, 1)
    assert "8 of 16 trained tensors got no gradient in the first step" in caplog.text
    assert "model.decoder.layers.*.encoder_attn.q_proj.lora_A.default.weight (2)" in caplog.text
    caplog.clear()
    petl.lifecycle(model)
    train(model, 3)
    assert not caplog.text


def test_a_model_that_petl_wraps_needs_no_lifecycle(caplog):
    model = petl.wrap(bart(), "lora", target_modules=["encoder_attn.q_proj", "fc1"])
    caplog.clear()
    train(model, 1)
    assert "4 of 8 trained tensors got no gradient" in caplog.text


def test_a_gradient_of_zero_is_named_after_the_second_step(caplog):
    model = petl.wrap(testing.tiny_llama(), "lora", target_modules=["q_proj"])
    for name, parameter in model.named_parameters():
        if "layers.1" in name and "lora_" in name:
            parameter.data.zero_()  # then neither A nor B ever trains
    caplog.clear()
    train(model, 1)
    assert not caplog.text
    train(model, 1)
    assert "2 of 6 trained tensors got no gradient in 2 steps" in caplog.text


def test_steps_without_a_learning_rate_do_not_count(caplog):
    model = petl.wrap(testing.tiny_llama(), "lora", target_modules=["q_proj"])
    caplog.clear()
    train(model, 3, lr=0.0)
    train(model, 3)
    assert not caplog.text


@pytest.mark.parametrize("place", ["experts", "mlp"])
def test_experts_have_ten_steps(place, caplog):
    model = petl.wrap(testing.tiny_llama(), "lora", target_modules=["up_proj"])
    for layer in model.get_base_model().model.layers:
        layer._modules = {place if k == "mlp" else k: m for k, m in layer._modules.items()}
        vars(layer)["mlp"] = layer._modules[place]
    caplog.clear()
    train(model, 9, unused=["up_proj"])
    assert not caplog.text  # an optimizer that shows no gradient at all says nothing
    train(model, 9, unused=["layers.0"])
    assert ("got no gradient" in caplog.text) == (place == "mlp")
    train(model, 1, unused=["layers.0"])
    assert "2 of 6 trained tensors got no gradient" in caplog.text


@pytest.mark.cells(3)
@pytest.mark.parametrize(
    "method",
    ["lora", "dora", "vera", "mola", "pst", "sparse", "increlora", "dsee", "pela", "adapter"],
)
def test_no_method_is_accused(method, caplog):
    model = petl.wrap(testing.tiny_llama(), method)
    caplog.clear()
    train(model, 12)
    assert "got no gradient" not in caplog.text


@pytest.mark.parametrize("name", ["lora", "mola"])
def test_the_reversible_blocks_of_reformer_pass_gradients(name, tmp_path):
    def base():
        torch.manual_seed(0)
        return ReformerModelWithLMHead(ReformerConfig(
            attn_layers=["local", "lsh"], axial_pos_shape=[4, 8], axial_pos_embds_dim=[16, 16],
            hidden_size=32, num_attention_heads=2, attention_head_size=16, feed_forward_size=32,
            vocab_size=50, is_decoder=True, local_attn_chunk_length=4, lsh_attn_chunk_length=4,
            num_buckets=2, max_position_embeddings=32, hash_seed=0,
        ))  # fmt: skip

    def trained(model):
        ids = torch.arange(32)[None]
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    model = petl.wrap(base(), name, r=2)
    grads = trained(model)
    assert grads
    assert all(grad is not None for grad in grads.values())
    model.save_pretrained(tmp_path)
    again = petl.load(base(), tmp_path, is_trainable=True)
    assert all(grad is not None for grad in trained(again).values())


def test_rows_of_tokens_have_ten_steps_until_they_are_named(caplog):
    config = {"target_modules": ["q_proj"], "trainable_token_indices": [0]}  # none of the batch
    model = petl.wrap(testing.tiny_llama(), "lora", **config)
    caplog.clear()
    train(model, 9)
    assert not caplog.text
    train(model, 1)
    assert "1 of 7 trained tensors" in caplog.text
    assert "exclude_modules" not in caplog.text


@pytest.mark.parametrize(
    ("name", "fields"),
    [("ln_tuning", {}), ("lora", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]})],
)
def test_copies_of_half_precision_that_a_step_leaves_as_they_are_are_named(name, fields, caplog):
    ids = torch.arange(1, 9)[None]

    def moved(dtype, *, casts=False):
        caplog.clear()
        model = petl.wrap(testing.tiny_llama(2).to(dtype), name, **fields)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        for parameter in trained.values():
            parameter.data = parameter.data.float() if casts else parameter.data
        optimizer = torch.optim.AdamW([*trained.values()], lr=1e-3, weight_decay=0)
        start = {n: p.detach().clone() for n, p in trained.items() if "norm" in n}
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=casts):
                model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return max((trained[n] - value).abs().max().item() for n, value in start.items())

    assert moved(torch.bfloat16) == 0
    (line,) = caplog.messages
    assert "half precision" in line
    assert "norm" in line
    # what the line says to do
    assert moved(torch.bfloat16, casts=True) == pytest.approx(3e-3, rel=0.1)
    assert not caplog.messages
    assert moved(torch.float32) == pytest.approx(3e-3, rel=0.1)
    assert not caplog.messages
