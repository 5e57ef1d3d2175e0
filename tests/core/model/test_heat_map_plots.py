"""Pictures of heat maps."""

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import nn

from petl.core.model.heat_map import cell_text, draw, of_layers


def blocks(count: int) -> nn.ModuleDict:
    stack = (
        nn.ModuleDict({"first": nn.Linear(2, 2), "last": nn.Linear(2, 2)}) for _ in range(count)
    )
    return nn.ModuleDict({"blocks": nn.ModuleList(stack)})


def test_a_plot_is_written(tmp_path):
    values, file = {f"blocks.{i}.first": i for i in range(3)}, tmp_path / "map.png"
    (heat_map,) = of_layers(blocks(3), values, "map", "map", "count")
    draw(heat_map, file)
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("layers", [1, 3, 30, 80])
def test_labels_of_a_plot_do_not_overlap_or_leave_it(layers, tmp_path, monkeypatch):
    """Compares the boxes of all texts; a page in landscape is 10 inches wide."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    values = {f"blocks.{i}.{name}": i % 17 for i in range(layers) for name in ("first", "last")}
    model, values["head"] = blocks(layers), 1
    model["head"] = nn.Linear(2, 2)
    (heat_map,) = of_layers(model, values, "map", "a long title " * 3, "count")
    draw(heat_map, tmp_path / "map.png")
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


def test_numbers_of_a_map_are_short():
    assert [cell_text(v) for v in (None, 7, 0.0123, 1.5, 12.34, 100.0)] == [
        *("", "7", "0.012", "1.5", "12", "100"),
    ]
    assert [cell_text(v) for v in (0.00034, 0.00096, 2.5e-12)] == [
        *("3.4e-4", "9.6e-4", "2.5e-12"),
    ]
    large = [cell_text(v) for v in (3155, 9999.4, 12621, 999_600, 2e6, 3.2e9)]
    assert large == ["3155", "9999", "12.6k", "1M", "2M", "3.2G"]


def test_a_map_without_any_value_is_drawn(tmp_path):
    values, file = {f"blocks.{i}.first": float("nan") for i in range(3)}, tmp_path / "map.png"
    (heat_map,) = of_layers(blocks(3), values, "map", "map", "norm")
    draw(heat_map, file)
    assert file.read_bytes().startswith(b"\x89PNG")
