"""Examples of verbs and the definitions that they are searched in, from WordNet 3.0."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from datasets import Dataset

from petl.data.base import RawData, TextSource, limited, shuffled
from petl.data.bundled import WORDNET_FILE, lines_of
from petl.data.judgements import Judgements, judged, without_queries
from petl.data.retrieval_columns import retrieval_task
from petl.data.tasks import ABOVE_0, DIMS, MARGIN, POOLING
from petl.system.values import field, one_of

WORDNET_EXAMPLES = Path(__file__).parent / "wordnet_examples.tsv.gz"


@dataclass(kw_only=True)
class WordNetRetrieval(TextSource):
    """Verbs of WordNet 3.0: queries are examples of use, documents the definitions of verbs.

    All 13,634 different definitions are documents. Of the test rows, which `test_rows` counts, no
    definition is one of the training rows.
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

    def read(self) -> RawData:
        """Read examples and definitions; columns `query` and `positive`, and those of test rows."""
        definitions = [text for _, text in lines_of(WORDNET_FILE)]
        uses = lines_of(WORDNET_EXAMPLES)
        pairs = [{"query": use, "positive": definitions[int(i) - 1]} for i, use in uses]
        held = self.held([pair["positive"] for pair in pairs])
        test = limited([p for p in pairs if p["positive"] in held], self.test_rows, "test_rows")
        asked, documents = judged((p["query"], [(p["positive"], 1.0)]) for p in test)
        for text in definitions:
            # training definitions are searched as well: the test is not easier than use
            documents.setdefault(text, f"d{len(documents)}")
        numbered = {f"q{i}": entry for i, entry in enumerate(asked.items())}
        judgements = Judgements(numbered, {name: text for text, name in documents.items()})
        train = without_queries([p for p in pairs if p["positive"] not in held], asked)
        order = shuffled(len(train), self.seed)
        kept = limited(order, self.train_rows, "train_rows")
        return RawData(
            task=retrieval_task(self, "in_batch"),
            train=Dataset.from_list([train[i] for i in kept]),
            test=Dataset.from_list(judgements.rows()),
            name=self.name,
        )

    def held(self, definitions: Sequence[str]) -> set[str]:
        """Definitions for the test rows: as many as have `test_rows` examples, a fifth for null."""
        count = len(definitions) // 5 if self.test_rows is None else self.test_rows
        counts, taken = Counter(definitions), 0
        different, held = [*counts], set[str]()
        for i in shuffled(len(different), self.seed):
            if taken >= count:
                break
            held.add(different[i])
            taken += counts[different[i]]
        return held
