"""The section of adapters that train together; no time is asserted."""

from dataclasses import replace

import pytest
import torch
from bench import together
from bench.contenders import CONTENDERS
from bench.records import Result
from bench.report import tables
from bench.shapes import Bench
from bench.together import alone, grouped, measure, passes_of, peak_over_parts
from tiny_shapes import TINY_LLAMA, TINY_MINILM

import petl
from petl.core.model.copies import share_weights
from petl.efficiency.together.group import Member

LORA = next(row for row in CONTENDERS if row.name == "lora")
ADAPTER = next(row for row in CONTENDERS if row.name == "adapter 48")


def members_of(shape, count):
    bench = Bench(shape)
    models = [LORA.put(bench, share_weights(bench.base)) for _ in range(count)]
    for model in models:
        petl.fuse_lora(model)
    return [Member(model.train()) for model in models]


@pytest.mark.thorough
@pytest.mark.parametrize("shape", [TINY_LLAMA, TINY_MINILM], ids=lambda shape: shape.name)
def test_each_size_has_a_row_with_its_goals(shape):
    found = measure([LORA, ADAPTER], shape, 1)
    sizes = ["1 x 16", "1 x 64", "4 x 64", "1 x 16"]
    assert [r.shape for r in found] == [f"{shape.name}, {n} tokens an adapter" for n in sizes]
    assert [r.row for r in found] == ["lora"] * 3 + ["adapter 48"]
    for record in found:
        large = "4 x 64" in record.shape  # two adapters a pass
        assert set(record.ratios) == {f"{n} adapters" for n in ((2, 8) if large else (2, 4, 8))}
    goals = {"llama": [0.48, 0.78, 1.0], "minilm": [0.42, 0.68, 0.9]}[shape.name]
    assert [r.facts["goal 8 adapters"] for r in found[:3]] == goals
    assert not found[3].facts  # the goals are LoRA's
    table = tables(Result({}, found))[
        "training several adapters in one pass, relative to a pass for each of them: "
        f"{shape.name}, 1 x 16 tokens an adapter"
    ]
    assert table.columns[3:5] == ["8 adapters", "goal: 8 adapters"]


@pytest.mark.thorough
def test_large_batches_take_several_passes(monkeypatch):
    rooms = []
    monkeypatch.setattr(
        together, "grouped", lambda members, room: rooms.append(room) or grouped(members, room)
    )
    measure([LORA], TINY_LLAMA, 1)
    # 512 tokens a pass
    assert set(rooms) == {512 // 16, 512 // 64, 512 // 256}
    groups = grouped(members_of(TINY_LLAMA, 5), 2)
    assert [len(group.members) for group in groups] == [2, 2, 1]


def test_the_passes_of_groups_give_each_member_the_gradients_of_its_own():
    members = members_of(TINY_LLAMA, 3)
    batches = [TINY_LLAMA.batch(seed) for seed in range(3)]
    trained = [member.trained[0] for member in members]
    seen = []
    handles = [p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad)) for p in trained]
    alone(members, batches)()
    for handle in handles:
        handle.remove()
    assert all(p.grad is None for p in trained)
    kept = []
    clear = together.clear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            together, "clear", lambda own: kept.extend(m.trained[0].grad for m in own) or clear(own)
        )
        passes_of(grouped(members, 2), batches)()
    assert len(kept) == 3
    for one, own in zip(kept, seen, strict=True):
        torch.testing.assert_close(one, own)


def test_memory_of_a_pass_is_that_of_its_parts():
    shape = replace(TINY_LLAMA, rows=1, length=16)
    ratio = peak_over_parts(members_of(shape, 4), [shape.batch(seed) for seed in range(4)])
    assert ratio == peak_over_parts(members_of(shape, 4), [shape.batch(seed) for seed in range(4)])
    assert 0.5 < ratio < together.GOAL_PEAK
