"""Stored states in place of blocks, over all families of models."""

from dataclasses import replace

import pytest
import torch
from tiny_families import FAMILIES

import petl
from petl.core.layers.class_swap import original_class
from petl.efficiency.frozen.prefix import find_prefix
from petl.errors import UnsupportedError

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", *("encoder_layers",))
K = 2  # of 4 blocks
# what such a model does in training, or what its blocks hand on
REFUSED = {
    "t5": "hidden states",
    "wav2vec2": "layerdrop=0.1",
    "wav2vec2_stable": "layerdrop=0.1",
}


def deep(name):
    """Return a family with four blocks, its model with the upper two trained, and a batch."""
    family = FAMILIES[name]
    depth = {key: 4 for key in DEPTHS if key in family.settings}
    family = replace(family, settings={**family.settings, **depth})
    model = family.build().requires_grad_(False)
    for block in find_prefix(model).blocks[K:]:
        block.requires_grad_(True)
    return family, model, family.batch(rows=3, tokens=7)


def rows_in(batch):
    count = len(next(iter(batch.values())))
    return [{name: value[i] for name, value in batch.items()} for i in range(count)]


def stack(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSED])
def test_outputs_equal_those_of_the_blocks_to_the_bit(name, tmp_path):
    family, model, batch = deep(name)
    names, blocks = list(model.state_dict()), find_prefix(model).blocks
    with torch.no_grad():
        expected = family.outputs(model, **batch)
    ran = []
    with petl.cache_frozen(model, tmp_path, without_dropout=True) as cache:
        assert cache.k == K
        assert not cache.fill(rows_in(batch), stack)
        for number, block in enumerate(blocks):
            inner = next(block.children())
            inner.register_forward_pre_hook(lambda *_, n=number: ran.append(n))
        with torch.no_grad():
            assert torch.equal(family.outputs(model, **batch), expected)
        assert (cache.hits, cache.misses) == (1, 0)
        assert set(ran) <= {2, 3}
        assert list(model.state_dict()) == names
    assert all(type(block) is original_class(block) for block in blocks)


@pytest.mark.parametrize("name", REFUSED)
def test_models_whose_prefix_is_no_fixed_function_are_refused(name, tmp_path):
    _, model, batch = deep(name)
    with (
        petl.cache_frozen(model, tmp_path, without_dropout=True) as cache,
        pytest.raises(UnsupportedError, match=REFUSED[name]),
    ):
        cache.fill(rows_in(batch), stack)
    assert not any(tmp_path.iterdir())
