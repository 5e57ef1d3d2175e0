"""How an answer in words is compared with those that are right.

SQuAD's exact match and F1 (Rajpurkar et al. 2016, arXiv:1606.05250) look at words without articles,
case and punctuation. ROUGE (Lin 2004) counts words, pairs of words, and the longest common
subsequence of words; here, as in rouge-score without its stemmer, words are runs of digits and of
the letters a to z in lower case, so that it is for text in Latin letters.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
ROUGE_WORD = re.compile(r"[a-z0-9]+")


def plain_words(text: str) -> list[str]:
    """The words that SQuAD's scores compare."""
    return ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split()


def squad_exact(guess: str, truth: str) -> float:
    """1 if the words are the same, else 0."""
    return float(plain_words(guess) == plain_words(truth))


def squad_f1(guess: str, truth: str) -> float:
    """F1 of the words; of an empty guess or truth, whether both are empty."""
    found, there = plain_words(guess), plain_words(truth)
    if not found or not there:
        return float(found == there)
    return overlap(Counter(found), Counter(there))


def best_of(score: Callable[[str, str], float], guess: str, truths: Sequence[str]) -> float:
    """The score against the most favourable of the right answers; "" if there are none."""
    return max(score(guess, truth) for truth in truths or [""])


def overlap(found: Counter, there: Counter) -> float:
    """F1 of two bags."""
    common = (found & there).total()
    return 2 * common / (found.total() + there.total()) if common else 0.0


def rouge(guess: str, truth: str) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L, F1 each."""
    found, there = (ROUGE_WORD.findall(text.lower()) for text in (guess, truth))
    common = longest_common(found, there)
    return {
        "rouge1": overlap(Counter(found), Counter(there)),
        "rouge2": overlap(Counter(pairs(found)), Counter(pairs(there))),
        "rougeL": 2 * common / (len(found) + len(there)) if common else 0.0,
    }


def pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    return list(pairwise(words))


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest subsequence that both have."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]
