"""The text of an answer, token by token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import byte_tokenizer

from petl.generation.serving.choice import Chooser, TokenChooser
from petl.generation.serving.request import AnswerPart, AnswerText, Request

TOKENIZER = byte_tokenizer()
END = 3


def written(text: str, *stop: str) -> list[str]:
    """The pieces of a text, up to a stop text."""
    answer, pieces = AnswerText(TOKENIZER, stop), []
    for token in TOKENIZER(text)["input_ids"]:
        piece, is_stopped = answer.add(token)
        pieces.append(piece)
        if is_stopped:
            return pieces
    return [*pieces, answer.rest()]


def test_each_token_gives_its_text():
    assert written("abc") == ["a", "b", "c", ""]


def test_a_character_of_several_bytes_comes_whole():
    assert written("aé€") == ["a", "", "é", "", "", "€", ""]
    answer = AnswerText(TOKENIZER, ())
    first, *_ = TOKENIZER("€")["input_ids"]
    assert answer.add(first) == ("", False)
    assert answer.rest() == "\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("aaab", ["aab"], "a"),
        ("one tw", ["two"], "one tw"),
        ("x€y", ["€"], "x"),
        ("two", ["two"], ""),
    ],
)
def test_an_answer_ends_before_a_stop_text(text, stop, expected):
    assert "".join(written(text, *stop)) == expected


def test_the_beginning_of_a_stop_text_is_held_until_it_is_certain():
    assert written("abax", "abc") == ["", "", "ab", "ax", ""]


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_pieces_are_the_text_up_to_the_first_stop_text(text, stop):
    ends = [text.index(word) for word in stop if word in text]
    # of two stop texts that overlap, the one that is complete first ends the answer
    found = "".join(written(text, *stop))
    assert text.startswith(found)
    assert found == text if not ends else len(found) >= min(ends)
    assert not any(word in found for word in stop)


def taken(tokens: list[int], limit: int = 10, *stop: str) -> list[AnswerPart]:
    """The pieces of a request whose tokens are these."""
    pieces: list[AnswerPart] = []
    chooser = Chooser.__new__(Chooser)
    text = AnswerText(TOKENIZER, stop)
    request = Request([5], "base", chooser, text, [END], pieces.append, limit)
    for i, token in enumerate(tokens):
        goes_on = request.take(token, [])
        assert goes_on == (i + 1 < len(tokens))
    return pieces


def test_the_end_token_the_limit_and_a_stop_text_end_an_answer():
    a, b = TOKENIZER("ab")["input_ids"]
    assert taken([a, b, END])[-1] == AnswerPart("", 3, finish="stop")
    assert taken([a, b], 2)[-1] == AnswerPart("b", 2, finish="length")
    assert taken([a, b], 9, "b")[-1] == AnswerPart("", 2, finish="stop")
    assert taken([a, a, END], 9, "ab") == [
        AnswerPart("", 1),
        AnswerPart("a", 2),
        AnswerPart("a", 3, finish="stop"),
    ]
    assert TokenChooser().seed is None
