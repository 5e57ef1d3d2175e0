"""Heat maps by layer and module."""

import math

import pytest

from petl.core.model.heat_map import (
    ELSEWHERE,
    HeatMap,
    by_layer,
    layers_of,
    means,
    of_layers,
    role_of,
    without_common_parts,
)
from petl.testing import tiny_llama, tiny_t5


def test_values_are_ordered_by_block_and_name():
    values = {"model.layers.1.mlp.up_proj": 3, "model.layers.0.mlp.up_proj": 2, "lm_head": 7}
    assert by_layer(tiny_llama(2), values) == {
        ("mlp.up_proj", 1): 3,
        ("mlp.up_proj", 0): 2,
        ("lm_head", ELSEWHERE): 7,
    }


def test_blocks_of_several_stacks_have_different_rows():
    names = [f"{part}.block.0.layer.0.SelfAttention.q" for part in ("encoder", "decoder")]
    cells = by_layer(tiny_t5(), dict.fromkeys(names, 1))
    assert set(cells) == {
        ("encoder.block: layer.0.SelfAttention.q", 0),
        ("decoder.block: layer.0.SelfAttention.q", 0),
    }


def test_a_map_has_a_column_per_layer_and_gaps_where_nothing_is():
    values = {"model.layers.0.mlp.up_proj": 2.0, "model.layers.1.mlp.down_proj": math.nan}
    (found,) = of_layers(tiny_llama(2), {**values, "lm_head": 4}, "name", "title", "unit")
    assert found.rows == ["mlp.up_proj", "mlp.down_proj", "lm_head"]
    assert found.columns == ["0", "1", ELSEWHERE]
    # what is not finite is a gap: JSON has no word for it
    assert found.cells == [[2.0, None, None], [None, None, None], [None, None, 4]]
    assert (found.top, found.share(2.0)) == (4, 0.5)
    assert of_layers(tiny_llama(2), {}, "name", "title", "unit") == []


def test_a_map_of_zeros_has_shares():
    assert HeatMap("", "", "", ["a"], ["b"], [[0.0]]).share(0.0) == 0


def test_modules_are_grouped_by_role_and_by_layer():
    model = tiny_llama(2)
    key = "model.layers.1.mlp.up_proj"
    assert role_of(model, key) == "mlp.up_proj"
    assert layers_of(model, [key, "lm_head"]) == {key: "1", "lm_head": ELSEWHERE}
    names = [f"{part}.block.0.layer.0.SelfAttention.q" for part in ("encoder", "decoder")]
    assert list(layers_of(tiny_t5(), names).values()) == ["encoder.block 0", "decoder.block 0"]
    assert means([("a", [1, 2]), ("b", [5.0]), ("a", [3, 4])]) == {"a": [2, 3], "b": [5]}


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["a.b.c A", "a.b.c B", "a.b.d.e A"], ["c A", "c B", "d.e A"]),
        (["a.b", "a.b.c"], ["b", "b.c"]),
        (["x.y", "z.y"], ["x.y", "z.y"]),
        (["a.b"], ["b"]),
        ([], []),
    ],
)
def test_paths_lose_the_parts_that_all_of_them_begin_with(paths, expected):
    assert without_common_parts(paths) == expected
