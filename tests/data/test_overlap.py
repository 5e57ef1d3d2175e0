"""The normal form in which texts are the same: what a reader takes for one text, and no more."""

import hashlib
import unicodedata

import pytest

from petl.data.overlap import Overlap, TrainingInputs
from petl.data.tasks.causal_lm import CausalLM
from petl.training.retain.texts import halves, texts_for


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("12 + 7", "12 - 7"),
        ("12 * 7", "12 / 7"),
        ("12 - 7", "12, 7"),
        ("x - 5 = 3", "x * 5 = 3"),
        ("what is -5?", "what is 5?"),
        ("a < b", "a > b"),
        ("written in C++", "written in C"),
        ("$5", "€5"),
        # vowel signs are marks: Hindi ki and ku
        ("\u0915\u093f", "\u0915\u0941"),
        ("resume", "re\u0301sume\u0301"),
    ],
)
def test_marks_and_signs_make_another_text(one, other):
    assert TrainingInputs([one]).compare([other]).found == 0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("A caf\u00e9, open.", "a cafe\u0301 open"),
        ("STRASSE 5", "stra\u00dfe  5!"),
        ("12+7=19", "12 + 7 = 19"),
        ("12 \u2212 7", "12 - 7"),
        ("\u0399\u0308\u0301", "\u0390"),  # iota with two marks, in capitals and composed
    ],
)
def test_case_space_punctuation_and_composition_make_none(one, other):
    found = TrainingInputs([one]).compare([other])
    assert (found.exact, found.alike) == (0, 1)


def test_texts_that_are_alike_are_replayed_or_measured_together():
    texts = [f"Le caf\u00e9 n\u00b0 {i}, d\u00e9j\u00e0 vu - {i % 5} fois" for i in range(40)]
    sides = halves([*texts, *(unicodedata.normalize("NFD", text) for text in texts)])
    one, other = ({unicodedata.normalize("NFC", text) for text in side} for side in sides)
    assert not one & other
    assert one
    assert other


def test_the_half_that_finished_runs_have_replayed_stays():
    """The digest is of the bundled texts' first half, as runs of petl 0.2.0 divided them."""
    one, other = halves(texts_for(["bundled"], CausalLM(), {}))
    assert (len(one), len(other)) == (50, 70)
    digest = hashlib.sha256("\0".join(one).encode()).hexdigest()
    assert digest == "0eb43fb6563a515009b3d56914e7c9c2e03196cef005c4e8139c402cd07bb93d"


@pytest.mark.parametrize(
    ("counts", "is_most"),
    [((10, 6, 0), True), ((10, 5, 0), False), ((10, 2, 4), True), ((10, 1, 1, 4), True)],
)
def test_test_rows_that_are_training_rows_in_any_way_are_counted_together(counts, is_most):
    assert Overlap(*counts).is_most == is_most
