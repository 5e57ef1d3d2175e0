"""Which documents answer which queries, from rows or from files; rows to score."""

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from petl.data.validation import Row
from petl.errors import InputError

logger = logging.getLogger(__name__)
QUERY, DOCUMENT = "query", "document"  # roles of rows to score
LABELLED = 1000  # training rows that labelled texts are compared with; assumption: enough to tell
Key = TypeVar("Key")  # a text, or its tokens
Grades = dict[str, float]  # by the id of a document


class Judgements(NamedTuple):
    """Queries with the grades of documents, and documents.

    Attributes:
        queries: by id, a text and the grades of documents, by their ids.
        documents: texts by id.
    """

    queries: Mapping[str, tuple[str, Grades]]
    documents: Mapping[str, str]

    def rows(self) -> list[Row]:
        """Rows to score: `text`, `role`, `id`, and `relevant`, the grades as JSON text.

        Says so if no model can rank them wrongly.
        """
        counts = {sum(grade > 0 for grade in own.values()) for _, own in self.queries.values()}
        if counts - {0} == {len(self.documents)}:
            logger.warning(
                "all documents are relevant for all %d test queries (documents: %d): any model "
                "scores 1",
                len(self.queries),
                len(self.documents),
            )
        asked = [
            {"text": text, "role": QUERY, "id": name, "relevant": json.dumps(grades)}
            for name, (text, grades) in self.queries.items()
        ]
        return asked + [
            {"text": text, "role": DOCUMENT, "id": name, "relevant": "{}"}
            for name, text in self.documents.items()
        ]


def judged(
    rows: Iterable[tuple[Key, Sequence[tuple[Key, float]]]],
) -> tuple[dict[Key, Grades], dict[Key, str]]:
    """Return the grades of each query, and the id of each document: equal ones are one.

    Args:
        rows: queries with their documents and grades; a query may occur several times.
    """
    queries: dict[Key, Grades] = {}
    documents: dict[Key, str] = {}
    # a document is known by what it says, not by the row that it is in
    for query, own in rows:
        grades = queries.setdefault(query, {})
        for document, grade in own:
            name = documents.setdefault(document, f"d{len(documents)}")
            if grade > 0:
                grades[name] = max(grade, grades.get(name, 0))
    return queries, documents


def grades_of(scores: Sequence[float], *, are_grades: bool) -> list[float]:
    """The grades of documents with these scores: their own, or 1 for the best and 0 for others."""
    return list(scores) if are_grades else [float(score == max(scores)) for score in scores]


def are_grades(rows: Iterable[Sequence[float]]) -> bool:
    """True if all scores are whole numbers from 0: a teacher's are not."""
    return all(score >= 0 and score == int(score) for scores in rows for score in scores)


def alike(
    queries: Iterable[tuple[Key, object]], train: Iterable[tuple[Key, object]]
) -> tuple[dict[Key, Grades], dict[Key, str]]:
    """As `judged`, of labelled texts: documents with the label of a query are relevant."""
    documents: dict[Key, str] = {}
    by_label: dict[object, Grades] = {}
    for key, label in train:
        name = documents.setdefault(key, f"d{len(documents)}")
        by_label.setdefault(label, {})[name] = 1.0
    return {key: by_label.get(label, {}) for key, label in queries}, documents


def test_rows(train: Sequence[Row], test: Sequence[Row], *, are_held_out: bool) -> list[Row]:
    """Rows to score, from test rows as a task trains on.

    Each positive is a document, and so is each document of a list, see `are_grades`; labelled
    texts are compared with the first `LABELLED` training rows.

    Args:
        are_held_out: True if the test rows are some of those to train on: the documents of the
            others are searched as well, as in use, and those of the same queries are relevant.
    """
    if "label" in test[0]:
        first = [(row["text"], row["label"]) for row in train[:LABELLED]]
        queries, documents = alike([(row["text"], row["label"]) for row in test], first)
    else:
        held = {row["query"] for row in test}
        same = [row for row in train if row["query"] in held] if are_held_out else []
        # of test rows only the positives are documents
        own = [{n: row[n] for n in row if n != "negatives"} for row in (*test, *same)]
        given = are_grades(row["scores"] for row in own if "scores" in row)
        queries, documents = judged(graded(own, are_grades=given))
        for row in train if are_held_out else ():
            for text in row.get("documents") or [row["positive"]]:
                documents.setdefault(text, f"d{len(documents)}")
    numbered = {f"q{i}": entry for i, entry in enumerate(queries.items())}
    return Judgements(numbered, {name: text for text, name in documents.items()}).rows()


def candidates(
    rows: Iterable[tuple[Key, Sequence[tuple[Key, float]]]],
) -> dict[Key, dict[Key, float]]:
    """The documents that are ranked for each query, with their grades, the highest of each.

    Args:
        rows: as of `judged`.
    """
    found: dict[Key, dict[Key, float]] = {}
    for query, own in rows:
        grades = found.setdefault(query, {})
        for document, grade in own:
            # in one row a document may be a negative, and the positive in another
            grades[document] = max(grade, grades.get(document, 0.0))
    return found


def is_ranked(grades: Iterable[float]) -> bool:
    """True if documents of these grades can be in a wrong order: some are relevant, others not."""
    relevant = {grade > 0 for grade in grades}
    return len(relevant) == 2


def candidate_rows(given: Judgements | Sequence[Row]) -> list[Row]:
    """Pairs to score: `query`, `document`, their ids, and `grade`.

    Args:
        given: a test set, of whose queries the judged documents are ranked; or test rows as a task
            trains on, see `are_grades`.

    Raises:
        InputError: no query has a document that is relevant and one that is not.
    """
    # a whole corpus for each query would take a pass for each pair of both
    if isinstance(given, Judgements):
        by_query = {
            (name, text): {(i, given.documents[i]): grade for i, grade in own.items()}
            for name, (text, own) in given.queries.items()
        }
    else:
        scores = [row["scores"] for row in given if "scores" in row]
        found = candidates(graded(given, are_grades=are_grades(scores)))
        # by text, as ties are in the order of the ids: not by relevance
        names = {
            text: f"d{i}" for i, text in enumerate(sorted({t for d in found.values() for t in d}))
        }
        by_query = {
            (f"q{i}", query): {(names[text], text): grade for text, grade in own.items()}
            for i, (query, own) in enumerate(found.items())
        }
    # before the model is loaded: every score would be 1 or left out
    if not any(is_ranked(own.values()) for own in by_query.values()):
        raise InputError(
            f"none of the {len(by_query)} test queries has a document that is relevant and one "
            "that is not: give negatives (petl mine finds some), or judgements of grade 0"
        )
    return [
        {"query": query, "document": text, "query_id": own, "document_id": name, "grade": grade}
        for (own, query), documents in by_query.items()
        for (name, text), grade in documents.items()
    ]


def graded(
    rows: Iterable[Row], *, are_grades: bool
) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    """Yield the query and the documents with grades of rows as a task trains on.

    Args:
        are_grades: as of `grades_of`.
    """
    for row in rows:
        if "documents" in row:
            grades = grades_of(row["scores"], are_grades=are_grades)
            yield row["query"], [*zip(row["documents"], grades, strict=True)]
        else:
            negatives = [(text, 0.0) for text in row.get("negatives", ())]
            # a positive that is among the negatives is relevant
            yield row["query"], [*negatives, (row["positive"], 1.0)]


def without_queries(train: Sequence[Row], asked: Iterable[str | None]) -> list[Row]:
    """The training rows whose query is none of these; says how many others there are.

    Raises:
        InputError: none is left.
    """
    known = set(asked)
    left = [row for row in train if row.get("query") not in known]
    if not left and len({row["query"] for row in train}) == 1:
        raise InputError(
            f"all {len(train)} training rows have one query, which the test rows have too: nothing "
            "tells documents apart, and none is left to train on; give rows of several queries"
        )
    if len(left) < len(train):
        logger.warning(
            "%d of %d training rows have a query of the test rows, and are left out",
            len(train) - len(left),
            len(train),
        )
    if not left:
        raise InputError("each training row has a query of the test rows: none is left to train on")
    return left


def read_judgements(
    corpus: Iterable[tuple[str, Row]],
    queries: Iterable[tuple[str, Row]],
    judgements: Iterable[tuple[str, Row]],
) -> Judgements:
    """Read a test set: texts by id, and TREC's rows of query, iteration, document and grade.

    Args:
        corpus, queries: places for messages, and rows with `id` and `text`.
        judgements: places, and rows with `query`, `document` and `grade`.

    Raises:
        InputError: an id occurs twice or is unknown, a grade is below 0 or no number, or a document
            has two grades for one query.
    """
    documents, asked = texts_by_id(corpus), texts_by_id(queries)
    grades: dict[str, Grades] = {name: {} for name in asked}
    for place, row in judgements:
        for name, known, what in (
            (row["query"], asked, "data.queries"),
            (row["document"], documents, "data.corpus"),
        ):
            if name not in known:
                raise InputError(f"{place} names {name!r}, which {what} does not have")
        grade, own = row["grade"], grades[row["query"]]
        if not 0 <= grade < math.inf:
            raise InputError(f"{place} has the grade {grade:g}: grades are numbers from 0")
        before = own.setdefault(row["document"], grade)
        if before != grade:
            raise InputError(
                f"{place} judges {row['document']!r} for {row['query']!r} a second time, as "
                f"{grade:g} after {before:g}: leave one of both out"
            )
    return Judgements({name: (text, grades[name]) for name, text in asked.items()}, documents)


def texts_by_id(rows: Iterable[tuple[str, Row]]) -> dict[str, str]:
    """The texts of rows by their ids.

    Raises:
        InputError: an id occurs twice.
    """
    found: dict[str, str] = {}
    for place, row in rows:
        if row["id"] in found:
            raise InputError(f"{place} has the id {row['id']!r} a second time")
        found[row["id"]] = row["text"]
    return found
