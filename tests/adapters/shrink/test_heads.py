"""Heads leave in groups that share a key and a value, by the scores of the output projection."""

import pytest
import torch
from shrink_fixtures import batches, dense, own_mlp, silenced

import petl
from petl import testing
from petl.errors import InputError, UnsupportedError


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma", "gemma2"])
@pytest.mark.parametrize("widths", ["even", "by_block"])
def test_the_small_model_is_the_dense_one_with_silent_heads(name, widths):
    model = dense(name)
    given = batches(model)
    found = petl.shrink(model, given, sparsity=0.5, heads=True, widths=widths)
    config, before = found.model.config, model.config
    groups = before.num_key_value_heads // 2  # 1 of 2, and 1 of 3: rounded down
    shared = before.num_attention_heads // before.num_key_value_heads
    assert (config.num_key_value_heads, config.num_attention_heads) == (groups, groups * shared)
    assert config.head_dim == before.head_dim
    layers = {own_mlp(model, path)[1]: kept["channels"] for path, kept in found.kept.items()}
    for path, kept in found.kept.items():
        width, heads = before.head_dim, kept["heads"].tolist()
        assert heads == sorted(heads)
        assert len({head // shared for head in heads}) * shared == len(heads) == groups * shared
        attention = model.get_submodule(path).self_attn
        layers[attention.o_proj] = [head * width + i for head in heads for i in range(width)]
    with silenced(layers):
        expected = testing.logits(model, given[0])
    torch.testing.assert_close(
        testing.logits(found.model, given[0]), expected, atol=1e-5, rtol=1e-5
    )


def test_groups_with_the_largest_sums_of_scores_stay():
    model = dense("qwen3")
    given = batches(model)
    found = petl.shrink(model, given, sparsity=0.3, heads=True)
    for path, kept in found.kept.items():
        o = model.get_submodule(path).self_attn.o_proj
        seen = []
        handle = o.register_forward_pre_hook(lambda module, args, s=seen: s.append(args[0]))
        with torch.no_grad():
            for batch in given:
                model(**batch)
        handle.remove()
        rows = torch.cat([x[b["attention_mask"] == 1] for x, b in zip(seen, given, strict=True)])
        n = rows.double().square().sum(0).sqrt()
        V = o.weight.double().abs() * n
        scores = (V / V.sum(0) * n).mean(0)
        sums = [scores[16 * g : 16 * g + 16].sum().item() for g in range(3)]  # two heads of width 8
        best = sorted(sorted(range(3), key=lambda g: -sums[g])[:2])
        assert kept["heads"].tolist() == [2 * g + i for g in best for i in range(2)]


@pytest.mark.parametrize(("c", "best"), [(1.0, 1), (9.0, 0)])
def test_a_high_power_of_the_norms_prefers_groups_with_a_single_large_one(c, best):
    model = dense("qwen3")
    with torch.no_grad():
        for layer in model.model.layers:
            for values in (layer.self_attn.v_proj.weight, layer.self_attn.v_proj.bias):
                values[0] *= 12  # 19 in sum over the 8 of its group, and of the next one 32
                values[8:16] *= 4
    found = petl.shrink(model, batches(model), sparsity=0.6, heads=True, b=0.0, c=c)
    kept = [kept["heads"].tolist() for kept in found.kept.values()]
    assert kept == [[2 * best, 2 * best + 1]] * 3


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("bert", UnsupportedError, "head_dim"),
        ("t5", UnsupportedError, "head_dim"),
        ("phi3", UnsupportedError, "head_dim"),
        ("llama", InputError, "sparsity=0.001"),
    ],
)
def test_what_has_no_heads_to_remove_is_refused(name, kind, words):
    model = dense(name)
    sparsity = 0.001 if name == "llama" else 0.5
    with pytest.raises(kind, match=words):
        petl.shrink(model, batches(model), sparsity=sparsity, heads=True, multiple=1)
