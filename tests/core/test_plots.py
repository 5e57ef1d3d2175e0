"""Plots by layer and module."""

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import nn

from petl.core.plots import ELSEWHERE, by_layer, draw_by_layer
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


def blocks(count: int) -> nn.ModuleDict:
    stack = (
        nn.ModuleDict({"first": nn.Linear(2, 2), "last": nn.Linear(2, 2)}) for _ in range(count)
    )
    return nn.ModuleDict({"blocks": nn.ModuleList(stack)})


def test_a_plot_is_written(tmp_path):
    values, file = {f"blocks.{i}.first": i for i in range(3)}, tmp_path / "map.png"
    assert draw_by_layer(blocks(3), values, file, title="map", unit="count") == [file]
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("layers", [1, 3, 30, 80])
def test_labels_of_a_plot_do_not_overlap_or_leave_it(layers, tmp_path, monkeypatch):
    """Compares the boxes of all texts; a page in landscape is 10 inches wide."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    values = {f"blocks.{i}.{name}": i % 17 for i in range(layers) for name in ("first", "last")}
    model, values["head"] = blocks(layers), 1
    model["head"] = nn.Linear(2, 2)
    draw_by_layer(model, values, tmp_path / "map.png", title="a long title " * 3, unit="count")
    canvas = drawn[0]
    canvas.draw_without_rendering()
    words = [t for t in canvas.findobj(Text) if t.get_visible() and t.get_text()]
    boxes = [t.get_window_extent() for t in words]
    assert canvas.get_figwidth() <= 10
    for i, box in enumerate(boxes):
        assert canvas.bbox.x0 <= box.x0 < box.x1 <= canvas.bbox.x1, words[i]
        assert canvas.bbox.y0 <= box.y0 < box.y1 <= canvas.bbox.y1, words[i]
        assert not [w for w, other in zip(words[:i], boxes, strict=False) if box.overlaps(other)]
    numbers = [w for w in words if w.get_text() in {str(v) for v in values.values()}]
    assert min(w.get_fontsize() for w in numbers) >= 5
