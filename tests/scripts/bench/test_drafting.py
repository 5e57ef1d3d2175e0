"""The section of drafts, on a tiny model with random weights; no time is asserted."""

import sys
from argparse import Namespace
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from bench.drafting import (
    FREE,
    HEADS,
    NONE,
    PARTS,
    QUICK,
    RANDOM_TEXT,
    THEIRS,
    Plan,
    measure,
)  # fmt: skip
from bench.records import Result, regressions
from bench.report import tables

from petl.errors import InputError

TINY = replace(QUICK, dtypes=("float32",), tokens=8)
SCRIPT = Path(__file__).parents[3] / "scripts" / "bench.py"


@pytest.mark.thorough
def test_rows_have_times_passes_memory_and_equal_answers(tmp_path):
    found = measure(replace(TINY, folder=tmp_path))
    shapes = {record.shape for record in found}
    assert shapes == {"tiny, base, float32", "tiny, lora, float32"}
    base = {record.row: record for record in found if "base" in record.shape}
    assert [*base] == [NONE, *PARTS, FREE, HEADS, THEIRS, RANDOM_TEXT]
    for record in found:
        assert not record.failed
        # float32: each answer is that of plain decoding
        assert record.counts["unequal answers"] == 0
        assert record.facts["speed"] > 0
    assert base[NONE].counts["passes / token"] == 1
    assert base[FREE].counts["passes / token"] <= 1
    assert {"c(4)", "c(8)", "c(16)", "heads' training s"} <= base[NONE].facts.keys()
    assert base[NONE].facts["memory MB"] == base[THEIRS].facts["memory MB"] == 0
    # packed weights, and the heads
    assert base[HEADS].facts["memory MB"] > base["lookup"].facts["memory MB"] >= 0
    adapted = next(r for r in found if "lora" in r.shape and r.row == FREE)
    assert adapted.facts["speed / plain base"] > 0
    assert len(tables(Result({}, found))) == 2
    # more passes than before are a regression
    worse = [replace(r, counts={**r.counts, "passes / token": 2.0}) for r in found]
    assert "passes / token" in " ".join(regressions(Result({}, found), Result({}, worse)))


def arguments(words, *, quick=False, finished=False):
    return Namespace(drafting=words, quick=quick, finished=finished)


def test_words_of_the_plan(bench):
    words = "prompts=2 tokens=9 dtypes=bfloat16 states=base,merged lora=runs/x model=qwen heads=0 "
    plan = bench.plan_of(arguments(words + "folder=here"))
    assert plan == Plan(
        model="qwen", prompts=2, tokens=9, dtypes=["bfloat16"], states=["base", "merged"],
        runs={"lora": "runs/x"}, heads=0, folder=Path("here"),
    )  # fmt: skip
    assert bench.plan_of(arguments("", quick=True)) == QUICK
    assert bench.plan_of(arguments("", finished=True)).report
    for wrong in ("prompts=many", "speed=2", "tokens=0", "states=vera"):
        with pytest.raises(InputError, match=f"'({wrong}|vera)'"):
            bench.plan_of(arguments(wrong))


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = spec_from_file_location("bench_script", SCRIPT)
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_script", module)
    spec.loader.exec_module(module)
    return module
