"""What is tried, and what constraints exclude."""

import logging

import pytest

from petl.cli.table import NEEDS
from petl.errors import InputError
from petl.experiments.advice.candidates import (
    Constraint,
    at,
    needs,
    neighbor,
    order,
    shortlist,
    within,
)


def meets(words, *pairs):
    """A constraint that only some methods of a rank meet."""
    return Constraint(words, lambda method, rank: "" if (method, rank) in pairs else "it is not")


def test_the_plain_run_is_tried_first_then_its_rates_and_others():
    found = shortlist([]).allowed
    rates = [setting.rate for setting in found[:3]]
    assert {setting[:2] for setting in found[:3]} == {("lora", 8)}
    assert rates[1] == pytest.approx(3 * rates[0])
    assert rates[2] == pytest.approx(rates[0] / 3, rel=1e-2)
    assert {s.rank for s in found if s.method == "lora"} == {2, 8, 32}
    assert {s.method for s in found} == {"lora", "mola", "adapter", "mos", "compacter"}
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (["lora"], {"lora", "mos"}),
        (["merge"], {"lora", "mos"}),
        (["mixed"], {"lora", "mola", "adapter", "mos", "compacter"}),
        (["gguf", "4bit"], {"lora", "mos"}),
    ],
)
def test_capabilities_are_those_of_the_table(names, kept):
    found = shortlist(needs(names, "CAUSAL_LM"))
    assert {setting.method for setting in found.allowed} == kept


def test_each_word_of_need_is_a_capability_or_a_format():
    """The command's table repeats the words, since it imports no torch."""
    assert len(needs(NEEDS, "CAUSAL_LM")) == len(NEEDS)
    with pytest.raises(ValueError, match="flies"):
        needs(["flies"], "CAUSAL_LM")


def test_a_smaller_rank_takes_the_place_of_one_that_is_excluded():
    found = shortlist([meets("--bytes 9", ("lora", 2), ("lora", 4), ("mos", 16))])
    assert found.allowed[0] == at("lora", 4)
    assert {setting[:2] for setting in found.allowed} == {("lora", 4), ("mos", 16)}
    # the first that it excludes is worth a trial, to see what it costs
    assert found.excluded["--bytes 9"] == [at("lora", 8)]
    without = shortlist([meets("--bytes 9", ("mos", 16))]).allowed
    assert {setting[:2] for setting in without} == {("mos", 16)}
    assert len(without) == 3


def test_constraints_that_nothing_meets_name_the_one_that_excludes_most():
    several = [("lora", r) for r in (2, 4, 8, 16, 32)]
    few, many = meets("--need a", *several), meets("--bytes 9", ("mos", 16))
    with pytest.raises(InputError, match="8 of 9"):
        shortlist([few, many])


def test_of_files_that_are_all_too_large_the_smallest_is_named(monkeypatch):
    sizes = {"method.r=2": 900, "method.r=4": 1800}
    monkeypatch.setattr(FILE_BYTES, lambda words, splits: sizes.get(words[1], 5000))
    with pytest.raises(InputError, match="900 bytes"):
        shortlist([within(100, [], None)])


FILE_BYTES = "petl.experiments.advice.candidates.file_bytes"


def test_what_is_said_of_all_candidates_is_said_once(monkeypatch, caplog):
    def said(words, splits):
        logging.getLogger("petl.core").warning("the head is frozen")
        return 100

    monkeypatch.setattr(FILE_BYTES, said)
    shortlist([within(100, [], None)])
    assert caplog.messages == ["the head is frozen"]
    logging.getLogger("petl.core").warning("later")
    assert caplog.messages[1:] == ["later"]


def test_a_setting_that_fits_no_method_is_the_error(monkeypatch):
    def refused(words, splits):
        raise InputError("data.max_length=256 is too long")

    monkeypatch.setattr(FILE_BYTES, refused)
    with pytest.raises(InputError, match=r"^data\.max_length=256"):
        shortlist([within(100, [], None)])


def test_what_another_constraint_excludes_too_is_not_the_cost_of_one():
    one = meets("--need a", *((m, r) for m, r in PAIRS if m != "mola"))
    other = meets("--bytes 9", *((m, r) for m, r in PAIRS if m not in ("mola", "mos")))
    found = shortlist([one, other]).excluded
    assert "--need a" not in found
    assert [setting.method for setting in found["--bytes 9"]] == ["mos"]


PAIRS = [(setting.method, setting.rank) for setting in order((2, 8, 32), ("mola", "mos"))]
PAIRS += [("lora", 4), ("lora", 16), ("adapter", 16), ("compacter", 16)]


def test_short_trials_are_followed_by_lower_rates_and_long_ones_outward():
    low, middle, high = (at("lora", 8, power) for power in (-1, 0, 1))
    tried, other = [low, middle, high], at("lora", 32, 2)
    assert neighbor(high, tried, 2).rate == pytest.approx(3 * high.rate, rel=1e-2)
    assert neighbor(low, tried, 2).rate == pytest.approx(low.rate / 3, rel=1e-2)
    assert neighbor(middle, tried, 2) is None
    assert neighbor(other, [low, other], 2) is None
    # a training that is 20 times as long wants a rate of 20^-0.32 = 0.38
    assert neighbor(high, tried, 20) == middle
    assert neighbor(low, tried, 20).rate == pytest.approx(low.rate / 3, rel=1e-2)
