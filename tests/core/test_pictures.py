"""Pictures by layer and module."""

import sys

import pytest
from torch import nn

from petl.core.pictures import ELSEWHERE, by_layer, draw_by_layer
from petl.testing import tiny_llama, tiny_t5


def test_values_stand_by_block_and_name():
    values = {"model.layers.1.mlp.up_proj": 3, "model.layers.0.mlp.up_proj": 2, "lm_head": 7}
    assert by_layer(tiny_llama(2), values) == {
        ("mlp.up_proj", 1): 3,
        ("mlp.up_proj", 0): 2,
        ("lm_head", ELSEWHERE): 7,
    }


def test_blocks_of_several_stacks_are_told_apart():
    names = [f"{part}.block.0.layer.0.SelfAttention.q" for part in ("encoder", "decoder")]
    cells = by_layer(tiny_t5(), dict.fromkeys(names, 1))
    assert set(cells) == {
        ("encoder.block: layer.0.SelfAttention.q", 0),
        ("decoder.block: layer.0.SelfAttention.q", 0),
    }


def test_a_picture_is_written_or_its_lack_is_said(tmp_path, monkeypatch, caplog):
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(2, 2) for _ in range(3))})
    values = {f"blocks.{i}": i for i in range(3)}
    file = tmp_path / "map.png"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw_by_layer(model, values, file, title="map") == []
    assert "map.png is not drawn: pip install matplotlib" in caplog.text
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert draw_by_layer(model, values, file, title="map") == [file]
    assert file.read_bytes().startswith(b"\x89PNG")
