"""`--check`: what counts as worse than an earlier result."""

from dataclasses import replace

import pytest
from bench.clocks import Spread
from bench.records import Record, Result, regressions

import petl

OLD = Record(
    "step",
    "llama",
    "mola",
    ratios={"time / floor": Spread(1.30, 1.28, 1.32)},
    counts={"kernels": 40},
)


def compared(new, margin=0.10):
    return regressions(Result({}, [OLD]), Result({}, [new]), margin)


def with_time(*spread):
    return replace(OLD, ratios={"time / floor": Spread(*spread)})


def test_an_equal_result_has_no_regression():
    assert compared(OLD) == []


def test_a_ratio_beyond_the_margin_is_reported_with_both_values():
    (sentence,) = compared(with_time(1.50, 1.48, 1.52))
    assert sentence == "step, llama, mola: time / floor 1.30 (1.28 to 1.32) -> 1.50 (1.48 to 1.52)"


def test_quartiles_that_overlap_the_margin_are_noise():
    assert compared(with_time(1.50, 1.44, 1.90)) == []  # 1.32 and 10 % are 1.452
    assert compared(with_time(1.50, 1.46, 1.90))


def test_counts_are_compared_as_they_are():
    assert compared(replace(OLD, counts={"kernels": 44})) == []
    assert compared(replace(OLD, counts={"kernels": 45})) == ["step, llama, mola: kernels 40 -> 45"]


def test_a_row_that_fails_now_is_worse():
    wrong = replace(OLD, failed="the loss is off by 1e-02", ratios={}, counts={})
    assert compared(wrong) == ["step, llama, mola: fails now: the loss is off by 1e-02"]
    assert regressions(Result({}, [wrong]), Result({}, [wrong])) == []


def test_results_without_a_common_row_cannot_be_compared():
    with pytest.raises(petl.InputError):
        compared(replace(OLD, shape="minilm"))


def test_a_result_is_read_as_it_was_written(tmp_path):
    found = Result({"threads": 1}, [OLD, replace(OLD, row="mos", failed="no", is_own=False)])
    found.write(tmp_path / "new" / "bench.json")
    assert Result.read(tmp_path / "new" / "bench.json") == found


@pytest.mark.parametrize("text", ["", "[]", '{"format": 0}'])
def test_another_file_is_refused(tmp_path, text):
    file = tmp_path / "old.json"
    file.write_text(text)
    with pytest.raises(petl.InputError):
        Result.read(file)
