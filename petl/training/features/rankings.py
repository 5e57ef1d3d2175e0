"""What training changed in the rankings of an embedder, on the page of its run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from statistics import fmean
from typing import NotRequired, TypedDict

import numpy as np

from petl.core.types import Record
from petl.system.files.read import iterate_json_lines
from petl.training.features import RunFeature
from petl.training.features.bars import Bar, Bars
from petl.training.features.section import Curve, Examples, Lines, Section
from petl.training.runs.records import BEFORE, PREDICTIONS

WHEN = ("before training", "adapted")
MOST = 20  # queries that a page shows
BINS = 24  # of similarities
PARTS = 4  # of queries, by their length


class RankingLine(TypedDict):
    """A line of a file of predictions; those of queries have all columns."""

    row: int
    text: NotRequired[str]
    label: NotRequired[str]
    prediction: NotRequired[str]
    ndcg_at_10: NotRequired[Real]
    nearest_relevant: NotRequired[Real]
    nearest_other: NotRequired[Real | None]


@dataclass(frozen=True)
class Query:
    """A query, the document that was found first, and a relevant one; nDCG@10 in [0, 1]."""

    text: str
    first: str
    relevant: str
    ndcg: float
    nearest_relevant: float
    nearest_other: float | None


class RankingSection(RunFeature):
    """Shows queries with another first document than before, similarities, and scores by length."""

    @classmethod
    def section(cls, folder: Path, scores: Record) -> Section | None:
        """Return the rankings before and after training; None without predictions of queries."""
        files = [folder / name for name in (BEFORE, PREDICTIONS)]
        found = [queries_of(file) if file.exists() else {} for file in files]
        before, after = found
        if not after:
            return None
        named = {when: own for when, own in zip(WHEN, found, strict=True) if own}
        changed = [row for row in before if row in after and before[row].first != after[row].first]
        # the largest change in either direction says most about what was learned
        by_change = sorted(changed, key=lambda row: -abs(after[row].ndcg - before[row].ndcg))
        return Section(
            "Rankings",
            text=change_text(before, after, changed) if before else "",
            charts=[*similarities(named), by_length(named)],
            examples=Examples(
                ("query", "relevant", "first before training", "first adapted", "nDCG@10"),
                [cells(before[row], after[row]) for row in by_change[:MOST]],
            )
            if changed
            else None,
        )


def queries_of(file: Path) -> dict[int, Query]:
    """Return the queries of a file of predictions, by row.

    Raises:
        InputError: it is damaged.
    """
    found = {}
    for line in iterate_json_lines(file, RankingLine):
        if "nearest_relevant" in line:
            texts = (line["text"], line["prediction"], line["label"])
            values = (line["ndcg_at_10"], line["nearest_relevant"], line["nearest_other"])
            found[line["row"]] = Query(*texts, *values)
    return found


def change_text(
    before: Mapping[int, Query], after: Mapping[int, Query], changed: Sequence[int]
) -> str:
    """Return how many queries have another first document, and what it changed."""
    gains = [after[row].ndcg - before[row].ndcg for row in changed]
    better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    text = (
        f"Of {len(before):,} queries {len(changed):,} have another first document than before "
        f"training: nDCG@10 is higher for {better:,} of them, and lower for {worse:,}."
    )
    if len(changed) > MOST:
        text += f" The {MOST} with the largest change are below; predictions.jsonl has all."
    return text


def cells(before: Query, after: Query) -> list[str]:
    """Return the row of a query whose first document changed."""
    texts = (before.text, before.relevant, before.first, after.first)
    return [*map(shown_text, texts), f"{100 * before.ndcg:.0f} → {100 * after.ndcg:.0f} %"]


def shown_text(text: str) -> str:
    """Return the beginning of a text, with single spaces."""
    words = " ".join(text.split())
    return words if len(words) <= 200 else f"{words[:199]}…"


def similarities(named: Mapping[str, Mapping[int, Query]]) -> Iterator[Lines]:
    """Yield a chart of the similarities of documents with their query, for each time."""
    values = {
        when: {
            "relevant": [query.nearest_relevant for query in own.values()],
            "nearest other": [q.nearest_other for q in own.values() if q.nearest_other is not None],
        }
        for when, own in named.items()
    }
    every = [value for own in values.values() for each in own.values() for value in each]
    # the same bins for both times, so that the charts can be compared
    edges = np.linspace(min(every), max(every), BINS + 1)
    for when, own in values.items():
        curves = [
            Curve(name, [*zip(middles(edges), shares(each, edges), strict=True)])
            for name, each in own.items()
            if each
        ]
        title = f"Similarities with the query, {when}"
        yield Lines(title, "similarity", "queries (%)", curves)


def middles(edges: np.ndarray) -> list[float]:
    """Return the middles of bins."""
    return ((edges[1:] + edges[:-1]) / 2).tolist()


def shares(values: Sequence[float], edges: np.ndarray) -> list[float]:
    """Return the share of values in each bin, in percent."""
    counts, _ = np.histogram(values, edges)
    return (100 * counts / len(values)).tolist()


def by_length(named: Mapping[str, Mapping[int, Query]]) -> Bars:
    """Return a chart of the mean nDCG@10 of queries with similarly many words."""
    words = {row: len(query.text.split()) for row, query in named[WHEN[1]].items()}
    ordered = sorted(words.values())
    # the last length of each part, of which equal ones are one
    # many queries may have one length: the parts are then unequal
    ends = sorted({ordered[(i * len(ordered)) // PARTS - 1] for i in range(1, PARTS + 1)})
    bars, least = [], ordered[0]
    for end in ends:
        rows = [row for row, count in words.items() if least <= count <= end]
        name = f"{least}" if least == end else f"{least} to {end}"
        for when, own in named.items():
            scores = [100 * own[row].ndcg for row in rows if row in own]
            if scores:
                text = f"{when}: {fmean(scores):.1f} % of {len(scores):,} queries of {name} words"
                bars.append(Bar(when, name if when == WHEN[-1] else "", fmean(scores), text))
        least = end + 1
    return Bars("nDCG@10 by length of the query", "words of the query", "nDCG@10 (%)", bars)
