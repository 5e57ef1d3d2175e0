import pytest

from petl.data.tasks.metrics import best_of, rouge, squad_exact, squad_f1


def test_squad_metrics_ignore_articles_case_and_punctuation():
    assert squad_exact("The cat's hat.", "cats hat") == 1
    assert squad_exact("a dog", "dogs") == 0
    # {in, big, old, house} and {old, house, garden}: two common words
    assert squad_f1("in the big old house", "Old house, garden") == pytest.approx(2 * 2 / 7)
    # a word counts as often as both have it
    assert squad_f1("no no no", "no, no way") == pytest.approx(2 * 2 / 6)


@pytest.mark.parametrize(
    ("prediction", "label", "score"), [("", "", 1), ("the", "", 1), ("x", "", 0), ("", "x", 0)]
)
def test_an_empty_answer_is_right_only_for_unanswerable_questions(prediction, label, score):
    assert squad_f1(prediction, label) == squad_exact(prediction, label) == score


def test_the_maximum_over_the_right_answers_counts():
    assert best_of(squad_exact, "Paris", ["in Paris", "Paris"]) == 1
    assert best_of(squad_exact, "", []) == 1


def test_rouge_equals_the_package_rouge_score():
    """Values of rouge-score 0.1.2 with use_stemmer=False."""
    prediction = "The quick brown fox, it's said, jumped over 2 lazy dogs"
    label = "A quick fox jumped over the two lazy dogs; it is said"
    expected = {"rouge1": 0.75, "rouge2": 0.18181818181818182, "rougeL": 0.5}
    assert rouge(prediction, label) == pytest.approx(expected)
    assert rouge("", "word") == {"rouge1": 0, "rouge2": 0, "rougeL": 0}
    assert rouge("the the the", "the cat") == pytest.approx(
        {"rouge1": 2 * 1 / 5, "rouge2": 0, "rougeL": 2 * 1 / 5}
    )
