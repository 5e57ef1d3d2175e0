"""Metrics of text answers: SQuAD's exact match and F1, and ROUGE.

SQuAD's metrics (Rajpurkar et al. 2016, arXiv:1606.05250) compare words without articles, case and
punctuation. ROUGE (Lin 2004) counts common words, word pairs, and the longest common subsequence of
words; as in rouge-score without its stemmer, words are runs of digits and letters a to z in lower
case, so that ROUGE is for text in Latin script. Tests compare with the published definitions; none
of the packages that have these metrics is a dependency.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

# as in the official evaluation script of SQuAD
ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
ROUGE_WORD = re.compile(r"[a-z0-9]+")


def normalized_words(text: str) -> list[str]:
    """The words that SQuAD's metrics compare."""
    # the order of the official script: lower case, punctuation, articles, white space
    return ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split()


def squad_exact(prediction: str, label: str) -> float:
    """1.0 if the words are the same, else 0.0."""
    return float(normalized_words(prediction) == normalized_words(label))


def squad_f1(prediction: str, label: str) -> float:
    """F1 of the words; if one has no words, 1.0 if both have none, else 0.0."""
    predicted, expected = normalized_words(prediction), normalized_words(label)
    if not predicted or not expected:
        return float(predicted == expected)
    return bag_f1(Counter(predicted), Counter(expected))


def best_of(score: Callable[[str, str], float], prediction: str, labels: Sequence[str]) -> float:
    """The maximum score over all right answers; without any, the right answer is ""."""
    return max(score(prediction, label) for label in labels or [""])


def bag_f1(predicted: Counter, expected: Counter) -> float:
    """F1 of two multisets."""
    common = (predicted & expected).total()  # multiset intersection
    return 2 * common / (predicted.total() + expected.total()) if common else 0.0


def rouge(prediction: str, label: str) -> dict[str, float]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L."""
    predicted, expected = (ROUGE_WORD.findall(text.lower()) for text in (prediction, label))
    common = longest_common_subsequence(predicted, expected)
    return {
        "rouge1": bag_f1(Counter(predicted), Counter(expected)),
        "rouge2": bag_f1(Counter(pairwise(predicted)), Counter(pairwise(expected))),
        "rougeL": 2 * common / (len(predicted) + len(expected)) if common else 0.0,
    }


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence, by dynamic programming over rows."""
    # row[j]: length of the longest common subsequence of the words of a so far and b[:j]
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0  # value at (i - 1, j - 1)
        for j, other in enumerate(b, start=1):
            above = row[j]  # value at (i - 1, j)
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]
