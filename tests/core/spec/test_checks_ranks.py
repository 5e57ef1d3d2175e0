"""Ranks above the widths of the layers: a warning; absurd ones are rows of messages.yaml."""

import pytest

import petl
from petl.testing import tiny_llama
from petl.testing.models import tiny_gpt2

# method, fields, a rank above the widths, and what names it
RANKS = [
    ("lora", {}, "r"),
    ("lora", {"target_modules": "all-linear"}, "r"),
    ("dora", {}, "r"),
    ("adalora", {"target_r": 1, "total_step": 1000}, "init_r"),
    ("loha", {}, "r"),
    ("hra", {}, "r"),
    ("delora", {}, "r"),
    ("mola", {}, "r"),
    ("increlora", {"total_step": 1000}, "target_r"),
    ("binary", {"inner": "lora"}, "r"),
    ("binary", {"inner": "mola"}, "r"),
]


@pytest.mark.parametrize(("method", "fields", "rank"), RANKS)
def test_a_rank_above_the_width_is_warned_about(method, fields, rank, caplog):
    petl.wrap(tiny_llama(2), method, **{**fields, rank: 66})
    assert f"{rank}=66 is above 32, the smaller width of model.layers.0.self_attn." in caplog.text
    assert caplog.text.count("WARNING") == 1


def test_patterns_count_and_conv1d_does(caplog):
    petl.wrap(tiny_gpt2(), "lora", rank_pattern={"c_attn": 99})
    assert "r=99 is above 64, the smaller width of transformer.h.0.attn.c_attn" in caplog.text


def test_bottlenecks_may_be_wide_and_usual_ranks_say_nothing(caplog):
    caplog.set_level("WARNING")
    petl.wrap(tiny_llama(2), "adapter", r=100)
    petl.wrap(tiny_llama(2), "lora", r=32)
    assert not caplog.text
