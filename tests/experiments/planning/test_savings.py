"""Settings that a plan proposes, and what they would save."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training_fixtures import Tiny

from petl.experiments.planning import savings as of
from petl.experiments.planning.cost import Time
from petl.experiments.planning.dry_run import PassMemory
from petl.experiments.planning.frozen import FrozenPlan
from petl.experiments.planning.memory import Memory, megabytes
from petl.experiments.planning.plan import RunPlan, plan_run
from petl.experiments.planning.savings import RunCost, savings
from petl.training.compose import compose
from petl.training.runs.settings import TrainConfig

pytest_plugins = ["training_fixtures"]
CPU = torch.device("cpu")
MEMORY = Memory(
    weights=100,
    optimizer=10,
    gradients=0,
    unfolded=0,
    pass_=PassMemory(800, 1000, operations=600),
    rows=4,
    tokens=5,
    scoring=PassMemory(0, 300, operations=80),
    scoring_rows=8,
    scoring_tokens=1,
)


class Texts:
    """Rows of given lengths, in steps of two."""

    test, mixture, order = range(3), None, None

    def __init__(self, lengths):
        self.known = lengths
        self.task = SimpleNamespace(
            reads_text=True,
            new_head=True,
            tensors_by_row=True,
            generate=None,
            scores_by_task=False,
            packs=False,
            lengths=lambda rows: rows,
        )

    def sampler(self, settings):
        return self

    def global_batches(self):
        half = len(self.known) // 2
        return [[i, i + half] for i in range(half)]


def counted(lengths=(10,) * 40, **changes) -> RunCost:
    train = {"batch_size": 2, "epochs": 1, "buckets": None}
    settings = TrainConfig(**{**train, **changes.pop("train", {})})
    run = SimpleNamespace(train=settings, precision=settings.precision)
    given = {"positions": 400.0, "scored": 6.0, "passes": 1.0, "device": CPU, "processes": 1}
    splits = Texts(np.array(lengths))
    return RunCost(run, splits, **{"memory": MEMORY, "frozen": None, **given, **changes})


def by_setting(found) -> dict[str, of.Saving]:
    return {saving.setting: saving for saving in found}


def plan(tiny: Tiny, *words: str) -> RunPlan:
    return plan_run(compose(["+method=lora", *tiny.steady, *words]))


def test_buckets_are_proposed_where_much_is_padding():
    padded = by_setting(savings(counted([10] * 20 + [100] * 20), []))
    saves = padded["train.buckets=auto"].saves
    assert "instead of 45.0 %" in saves  # 110 tokens in 2 x 100 positions
    fewer, after = (float(number) for number in re.findall(r"([\d.]+) %", saves)[:2])
    # the same tokens: positions are tokens / (1 - padding)
    assert fewer == round(100 * (1 - (1 - 0.45) / (1 - after / 100)))
    assert "train.buckets=auto" not in by_setting(savings(counted(), []))
    by_class = counted([10] * 20 + [100] * 20)
    by_class.splits.order = SimpleNamespace()  # the order of the rows is that of their classes
    assert "train.buckets=auto" not in by_setting(savings(by_class, []))


@pytest.mark.parametrize(
    ("units", "speed", "chosen", "said"),
    [
        ("AMX", 20.0, "no", "train.precision=auto"),
        ("", 20.0, "no", "train.precision=bf16"),  # for which auto would be float32
        ("AMX", 20.0, "bf16", None),
        ("AMX", 10.5, "no", None),
        ("AMX", None, "no", "train.precision=auto"),
        ("", None, "no", None),
    ],
)
def test_bfloat16_is_proposed_where_its_products_are_faster(
    monkeypatch, units, speed, chosen, said
):
    monkeypatch.setattr(of, "bf16_units", lambda _: units)
    seconds = speed and Time(steps=100.0, scoring=1.0, speed=10.0, speed_bf16=speed)
    found = by_setting(savings(counted(seconds=seconds, train={"precision": chosen}), []))
    proposed = [name for name in found if name.startswith("train.precision")]
    assert proposed == ([said] if said else [])
    if said:
        told = "50 % of the time of matrix products" if speed else "their time was not measured"
        assert told in found[said].saves
        assert found[said].result == "not exact"


def test_passes_before_training_are_proposed_to_be_left_out_with_their_operations():
    # 30 operations a position of a step, 10 of a forward pass: (400 + 6) x 10 of 400 x 30
    both = "train.linear_probe=false train.score_before=false"
    found = by_setting(savings(counted(), []))
    assert "40 train and 3 test rows before training: 34 % of" in found[both].saves
    probe = by_setting(savings(counted(train={"score_before": False}), []))
    assert "34 % of" in probe["train.linear_probe=false"].saves
    few = by_setting(savings(counted(train={"linear_probe": False}), []))
    assert "train.score_before=false" not in few  # 6 x 10 of 12,000
    many = by_setting(savings(counted(scored=600.0, train={"linear_probe": False}), []))
    assert "3 test rows before training: 50 % of" in many["train.score_before=false"].saves
    assert "takes 50 % of" in many["data.test_rows=N"].saves
    without = savings(counted(scored=600.0, train={"test": False, "eval_steps": 1}), [])
    assert "data.test_rows=N" not in by_setting(without)


def test_what_takes_longer_than_all_steps_is_no_percentage():
    # 10 operations of a forward pass, 30 of a step
    found = by_setting(savings(counted(positions=2.0, scored=6.0), []))
    both = "train.linear_probe=false train.score_before=false"
    assert "before training: 68 times the operations of all steps" in found[both].saves
    assert "takes 100 % of the operations of all steps" in found["data.test_rows=N"].saves
    found = by_setting(savings(counted(positions=2.0, scored=9.0), []))
    assert "takes 1.5 times the operations of all steps" in found["data.test_rows=N"].saves


def test_passes_that_read_a_store_are_those_of_the_upper_blocks():
    frozen = FrozenPlan(1, 2, 100, 0, 0, saved=0.2, reason="", remedy=False)
    stored = counted(frozen=frozen)
    # 24 operations a position of a step, 4 of a forward pass
    found = by_setting(savings(stored, []))
    share = 100 * 406 * 4 / (400 * 24)
    both = "train.linear_probe=false train.score_before=false"
    assert f"before training: {share:.0f} % of" in found[both].saves
    for unused in (
        counted(frozen=replace(frozen, reason="they have dropout")),
        counted(frozen=frozen, train={"cache_frozen": False}),
    ):
        assert "before training: 34 % of" in by_setting(savings(unused, []))[both].saves


def test_what_is_below_a_megabyte_is_not_said_to_be_none():
    assert [megabytes(count) for count in (2_400_000, 243_000)] == ["2 MB", "243 kB"]


@pytest.mark.thorough
def test_a_plan_says_what_a_setting_leaves_and_the_plan_with_it_has_that(tiny: Tiny):
    words = ["train.steps=14"]
    now = plan(tiny, *words)
    found = by_setting(now.cheaper)
    less = plan(tiny, *words, "train.recompute_mlp=true")
    said = f"{megabytes(less.memory.pass_.peak)} for a pass"
    assert said in found["train.recompute_mlp=true"].saves
    assert "train.recompute_mlp=true" not in by_setting(less.cheaper)
    upper = plan(tiny, *words, "method.layers_to_transform=top:0.33")
    left = upper.memory.pass_.operations * (1 - upper.frozen.saved)
    fewer = 100 * (1 - left / now.memory.pass_.operations)
    proposed = found["method.layers_to_transform=top:0.33"]  # no dropout: auto keeps a store
    assert proposed.saves.startswith(f"{fewer:.0f} % of the operations of a step after the first")
    assert "train.gradient_checkpointing=true" in found
    assert not [s for s in by_setting(upper.cheaper) if "layers_to_transform" in s]


@pytest.mark.thorough
def test_positions_that_nothing_reads_are_proposed_to_be_left_out(tiny: Tiny):
    now, all_read = plan(tiny), plan(tiny, "train.skip_unread=false")
    fewer = 100 * (1 - now.memory.pass_.operations / all_read.memory.pass_.operations)
    proposed = by_setting(all_read.cheaper)["train.skip_unread=true"]
    assert proposed.saves == f"{fewer:.0f} % of the operations of a step"
    assert "train.skip_unread=true" not in by_setting(now.cheaper)


@pytest.mark.thorough
def test_frozen_blocks_are_proposed_to_be_kept_where_that_pays(tiny: Tiny):
    words = ["method.layers_to_transform=top:1", "train.steps=14"]
    kept = plan(tiny, *words)
    assert not [s for s in by_setting(kept.cheaper) if "cache_frozen" in s]
    off = plan(tiny, *words, "train.cache_frozen=false")
    assert off.frozen is None
    proposed = by_setting(off.cheaper)["train.cache_frozen=auto"]
    assert proposed.saves.startswith(f"{100 * kept.frozen.saved:.0f} % of the operations")
    once = plan(tiny, *words[:1], "train.steps=7", "train.cache_frozen=false")
    assert not [s for s in by_setting(once.cheaper) if "cache_frozen" in s]
    dropping = plan_run(compose([*tiny.classify, "+method=lora", *words]))
    proposed = by_setting(dropping.cheaper)["train.cache_frozen=true"]
    assert proposed.result == "no dropout below block 1"


@pytest.mark.thorough
def test_runs_with_small_steps_are_proposed_to_train_together_in_a_sweep(tiny: Tiny):
    small = plan(tiny, "train.batch_size=2", "train.buckets=null")
    together = [s for s in small.cheaper if s.setting.startswith("train.together=")]
    tokens = small.length.amount / (1 - small.length.padding) / small.length.steps
    assert [s.setting for s in together] == [f"train.together={int(512 // tokens)}"]
    cannot = plan_run(compose([*tiny.steady, "+method=sparse", "train.batch_size=2"]))
    assert not [s for s in cannot.cheaper if s.setting.startswith("train.together=")]
