"""Blocks of pages between marks."""

import pytest
from page_marks import filled

import petl

PAGE = "Before.\n<!-- one -->\nold\n<!-- end -->\n<!-- one-more -->\nkept\n<!-- end -->\nAfter.\n"


def test_a_block_replaces_what_is_between_the_marks_of_its_name():
    once = filled(PAGE, "one", r"a\1b")  # no group of a pattern
    assert once == PAGE.replace("old", "\na\\1b\n")
    assert filled(once, "one", r"a\1b") == once


def test_a_page_without_the_marks_is_refused():
    with pytest.raises(petl.InputError, match="no '<!-- two -->' with '<!-- end -->' after it"):
        filled(PAGE, "two", "")
