"""Pictures of heat maps."""

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
