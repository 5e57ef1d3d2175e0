"""Types of command line arguments: a wrong value ends a command before any work."""

import argparse

import pytest

from petl.cli.arguments import (
    COUNT,
    DRAFTERS,
    POSITIVE,
    SEED,
    each,
    file_to_read,
    file_to_write,
    folder_to_write,
    number,
    some_of,
)
from petl.efficiency.drafting.registry import untrained
from petl.generation.inference.language_model import NO_DRAFTS


def test_numbers_within_their_bounds_are_converted():
    assert SEED("0") == 0
    assert COUNT("7") == 7
    assert POSITIVE("1e-3") == 1e-3
    assert number(float, 0)("0") == 0
    assert each(SEED)("2,0,1") == [2, 0, 1]


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (each(SEED), "a", "'a' is not an integer from 0 to 4,294,967,295"),
        (each(SEED), "", "'' is not an integer"),
        (each(SEED), "1,1", "'1,1' has a value twice"),
        (each(SEED), str(2**32), "is not an integer from 0"),
        (each(POSITIVE), "fast", "'fast' is not a number above 0"),
        (POSITIVE, "nan", "is not a number"),
        (POSITIVE, "inf", "is not a number"),
        (POSITIVE, "0", "is not a number above 0"),
        (COUNT, "0", "'0' is not an integer from 1"),
        (COUNT, "1" * 5000, "is not an integer"),
        (some_of(["one", "two"]), "one,tow", "no 'tow'; did you mean 'two'"),
        (some_of(["one", "two"]), "", "available: one, two"),
    ],
)
def test_other_values_are_refused_with_what_is_allowed(parse, text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        parse(text)


def test_outputs_that_can_be_written_are_left_as_they_are(tmp_path):
    (tmp_path / "old.yaml").write_text("content")
    assert file_to_write(str(tmp_path / "old.yaml")) == tmp_path / "old.yaml"
    assert file_to_write(str(tmp_path / "new.yaml")) == tmp_path / "new.yaml"
    assert folder_to_write(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert [path.name for path in tmp_path.iterdir()] == ["old.yaml"]
    assert (tmp_path / "old.yaml").read_text() == "content"


@pytest.mark.parametrize(
    ("parse", "place", "message"),
    [
        (file_to_write, "", "is no file that can be written"),
        (file_to_write, "missing/x", "no such file or directory"),
        (file_to_write, "a" * 5000, "file name too long"),
        (file_to_read, "missing", "does not exist"),
        (folder_to_write, "file", "not a directory"),
        (folder_to_write, "file/inside", "not a directory"),
    ],
)
def test_outputs_that_cannot_be_written_are_refused(tmp_path, parse, place, message):
    (tmp_path / "file").touch()
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        parse(str(tmp_path / place))


def test_the_drafters_that_need_no_training_are_those_that_are_known():
    """The command line has their names, since their modules import torch."""
    assert {*DRAFTERS} == {"auto", NO_DRAFTS, *untrained()}
