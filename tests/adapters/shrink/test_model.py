"""`petl.shrink`: what it keeps, that nothing else changes, and what it refuses."""

import copy

import pytest
import torch
from kept_processes import in_processes
from shrink_fixtures import FAMILIES, OTHERS, Toy, batches, by_hand, dense, own_mlp, silenced
from torch import nn
from transformers import AlbertConfig, AlbertForSequenceClassification

import petl
from petl import testing
from petl.errors import InputError, UnsupportedError
from petl.system.collectives import number

SETTINGS = {"sparsity": 0.4, "multiple": 4}


def mask_of(model, path):
    """Which tokens of a batch a block sees."""
    if model.main_input_name == "pixel_values":
        return lambda batch: None
    if ".decoder." in f".{path}" and model.config.is_encoder_decoder:
        return lambda batch: batch["labels"] != -100
    return lambda batch: batch["attention_mask"]


def config_fields(config):
    names = ("intermediate_size", "n_inner", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim")
    return {name: getattr(config, name) for name in names if name in config.to_dict()}


@pytest.mark.parametrize("widths", ["even", "by_block"])
@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_the_small_model_is_the_dense_one_with_silent_channels(name, widths):
    model = dense(name)
    given = batches(model)
    if name in OTHERS and widths == "even":
        with pytest.raises(UnsupportedError, match="widths=by_block"):
            petl.shrink(model, given, widths=widths, **SETTINGS)
        return
    found = petl.shrink(model, given, widths=widths, **SETTINGS)
    layers = {own_mlp(model, path)[1]: kept["channels"] for path, kept in found.kept.items()}
    with silenced(layers):
        expected = testing.logits(model, given[0])
    torch.testing.assert_close(
        testing.logits(found.model, given[0]), expected, atol=1e-5, rtol=1e-5
    )
    assert type(found.model) is type(model)
    assert found.parameters == tuple(
        sum(p.numel() for p in each.parameters()) for each in (model, found.model)
    )
    removed = 0
    for path, kept in found.kept.items():
        inputs, down = own_mlp(model, path)
        small_inputs, small_down = own_mlp(found.model, path)
        assert len(kept["channels"]) % 4 == 0
        removed += sum(p.numel() for layer in (*inputs, down) for p in layer.parameters())
        removed -= sum(p.numel() for m in (*small_inputs, small_down) for p in m.parameters())
    assert found.parameters[0] - found.parameters[1] == removed > 0


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", {"intermediate_size": 56}),
        ("gpt2", {"n_inner": 76}),
        ("t5", {"d_ff": 56}),
        ("bart", {"encoder_ffn_dim": 44, "decoder_ffn_dim": 28}),
        ("roberta", {"intermediate_size": 44}),
    ],
)
def test_the_config_has_the_nearest_multiples(name, fields):
    model = dense(name)
    before = config_fields(model.config)
    found = petl.shrink(model, batches(model), **SETTINGS)
    assert config_fields(found.model.config) == fields
    assert config_fields(model.config) == before


@pytest.mark.cells(5)
@pytest.mark.parametrize("name", FAMILIES)
def test_channels_with_the_largest_scores_stay_in_their_order(name):
    model = dense(name)
    given = batches(model, count=3)
    found = petl.shrink(model, given, **SETTINGS)
    for path, kept in found.kept.items():
        scores = by_hand(model, path, given, mask_of(model, path))
        best = scores.argsort(descending=True)[: len(kept["channels"])]
        assert kept["channels"].tolist() == sorted(best.tolist())


def test_batching_and_padding_change_nothing():
    model = dense("llama")
    rows = batches(model, count=1, rows=6)[0]
    whole = petl.shrink(model, [rows], **SETTINGS)
    single = [{k: v[i : i + 1] for k, v in rows.items()} for i in range(6)]
    wide = [{k: nn.functional.pad(v, (0, 3)) for k, v in row.items()} for row in single]
    for other in (single, wide):
        found = petl.shrink(model, other, **SETTINGS)
        assert {k: v["channels"].tolist() for k, v in found.kept.items()} == {
            k: v["channels"].tolist() for k, v in whole.kept.items()
        }
        assert found.importance == pytest.approx(whole.importance, rel=1e-5)


def test_equal_scores_keep_the_smaller_index():
    model = dense("llama")
    for path in ("model.layers.0", "model.layers.1", "model.layers.2"):
        inputs, down = own_mlp(model, path)
        with torch.no_grad():  # all channels alike
            for layer in inputs:
                layer.weight[:] = layer.weight[0]
            down.weight[:] = down.weight[:, :1]
    found = petl.shrink(model, batches(model), **SETTINGS)
    assert all(kept["channels"].tolist() == [*range(56)] for kept in found.kept.values())


def shrunk_on(part):
    """In a process: shrink on some of three batches."""
    model = dense("llama")
    found = petl.shrink(model, batches(model, count=3)[part], **SETTINGS)
    return {k: v["channels"].tolist() for k, v in found.kept.items()}, found.importance


def shrunk_on_own_part():
    return shrunk_on((slice(1), slice(1, 3))[number()])


@pytest.mark.thorough
def test_several_processes_add_their_sums():
    kept, importance = shrunk_on(slice(3))
    for own_kept, own_importance in in_processes(2, shrunk_on_own_part):
        assert own_kept == kept
        assert own_importance == pytest.approx(importance, rel=1e-6)


def test_the_given_model_stays_as_it_was():
    model = dense("llama").train()
    model.model.layers[0].eval()
    calls = []
    model.model.layers[1].register_forward_hook(lambda *given: calls.append(1))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    config = copy.deepcopy(model.config.to_dict())
    found = petl.shrink(model, batches(model), heads=True, sparsity=0.5)
    assert len(calls) == 2  # one pass over two batches
    testing.logits(found.model, batches(model)[0])
    assert len(calls) == 2
    assert [module.training for module in model.modules()] == modes
    assert model.config.to_dict() == config
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    assert not any(hooks)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_tied_weights_stay_tied_and_bfloat16_stays():
    model = dense("gemma").to(torch.bfloat16)
    found = petl.shrink(model, batches(model), heads=True, sparsity=0.5)
    assert found.model.lm_head.weight is found.model.get_input_embeddings().weight
    assert {p.dtype for p in found.model.parameters()} == {torch.bfloat16}
    layers = {own_mlp(model, path)[1]: kept["channels"] for path, kept in found.kept.items()}
    for path, kept in found.kept.items():
        columns = [8 * head + i for head in kept["heads"].tolist() for i in range(8)]
        layers[model.get_submodule(path).self_attn.o_proj] = columns
    given = batches(model)[0]
    with silenced(layers):
        expected = testing.logits(model, given).float()
    difference = testing.logits(found.model, given).float() - expected
    assert float(difference.norm() / expected.norm()) < 0.03


def test_the_correction_of_biases_is_the_mean_of_what_is_removed():
    model = dense("bert")
    given = batches(model)
    plain = petl.shrink(model, given, **SETTINGS)
    found = petl.shrink(model, given, bias_correction=True, **SETTINGS)
    path = "bert.encoder.layer.1"
    _, down = own_mlp(model, path)
    seen = []
    handle = down.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    for batch in given:
        model(**batch)
    handle.remove()
    mask = torch.cat([batch["attention_mask"].flatten() for batch in given]) == 1
    h = torch.cat([each.flatten(0, 1) for each in seen])[mask]
    dropped = [j for j in range(96) if j not in found.kept[path]["channels"].tolist()]
    expected = down.bias + down.weight[:, dropped] @ h.mean(0)[dropped]
    torch.testing.assert_close(own_mlp(found.model, path)[1].bias, expected)
    assert torch.equal(own_mlp(plain.model, path)[1].bias, down.bias)


def test_the_correction_leaves_layers_without_a_bias_alone():
    model = dense("llama")
    found = petl.shrink(model, batches(model), bias_correction=True, **SETTINGS)
    assert all(own_mlp(found.model, path)[1].bias is None for path in found.kept)


# What cannot be shrunk


def shared_model():
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 72, "embedding_size": 16}
    return AlbertForSequenceClassification(
        AlbertConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)
    )


def two_in_a_block():
    model = dense("llama")
    model.model.layers[1].other = nn.ModuleList([nn.Linear(64, 96), nn.Linear(96, 64)])
    return model


def quantized():
    model = dense("llama")
    model.is_loaded_in_8bit = True
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (testing.models.tiny_qwen3_moe, "mixture of experts"),
        (shared_model, "more than once"),
        (two_in_a_block, "model.layers.1 of LlamaForCausalLM has no MLPs"),
        (quantized, "8bit"),
        (lambda: petl.wrap(dense("llama"), "lora"), "merge it first"),
        (Toy, "petl.shrink needs a model of transformers"),
    ],
)
def test_models_that_cannot_be_shrunk_are_refused(make, words):
    model = make().eval()
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]  # an adapter's stay
    given = [{"input_ids": torch.randint(5, 50, (2, 6))}]
    with pytest.raises(InputError, match=words):
        petl.shrink(model, given, sparsity=0.5)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
