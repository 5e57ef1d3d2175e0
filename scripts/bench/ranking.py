"""Section `search`: ranking documents by their vectors, relative to chunked products and `topk`.

Queries against documents of 384 numbers in a file that is mapped into memory: the search of
`petl.retrieval.top_k`, the scores of a test set, and hard negatives with a margin, each relative to
`torch.mm` and `topk` of the same chunks, as many queries and as many of the best.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.clocks import Step, in_turn
from bench.isolated import peak_of_steps
from bench.records import Record
from petl.data.judgements import DOCUMENT, QUERY
from petl.data.tasks.retrieval.scores import Rankings
from petl.ops.retrieval import top_k
from petl.ops.retrieval.ranking import CUTS, LeftOut, hardest

WIDTH = 384  # of MiniLM's vectors
DOCUMENTS, QUERIES, CHUNK = 100_000, 1_000, 4096
LARGE, FEWER = 1_000_000, 250  # documents and queries of the row for memory
NEGATIVES, MARGIN = 5, 0.05
GOAL, GOAL_MB = 1.2, 2_000  # of the time, and of the memory with a million documents


def measure(
    rounds: int,
    documents: int = DOCUMENTS,
    queries: int = QUERIES,
    large: tuple[int, int] = (LARGE, FEWER),
) -> list[Record]:
    """Return a record for the search, the scores and the mining.

    Args:
        rounds: timed rounds.
        documents, queries: of all records but the last.
        large: documents and queries of the last, which is mining alone.
    """
    with TemporaryDirectory() as folder, torch.no_grad():
        corpus = vectors(Path(folder, "documents.npy"), documents)
        asked = queries_near(corpus, queries)
        rows = (
            ("top_k", max(CUTS) + 1, lambda: top_k(asked, corpus, max(CUTS) + 1, chunk=CHUNK)),
            ("scores of a test set", max(CUTS) + 1, scoring(asked, corpus)),
            ("hard negatives", NEGATIVES, mining(asked, corpus)),
        )
        found = [timed(name, asked, corpus, k, step, rounds) for name, k, step in rows]
        many = vectors(Path(folder, "many.npy"), large[0])
        peak = peak_of_steps(mining(queries_near(many, large[1]), many)) / 1e6
    facts = {"peak MB": peak, "goal MB": GOAL_MB}
    name = f"{large[1]:,} queries, {large[0]:,} documents"
    return [*found, Record("search", name, "hard negatives", facts=facts)]


def timed(name: str, asked: Tensor, corpus: Tensor, k: int, step: Step, rounds: int) -> Record:
    """The record of a step, relative to products and the `k` best."""
    times = in_turn(
        partial(plain, asked, corpus, k), {name: step}, rounds=rounds, warm_up=1, device="cpu"
    )
    return Record(
        "search",
        f"{len(asked):,} queries, {len(corpus):,} documents",
        name,
        ratios={"time / products": times.over_floor(name)},
        facts={
            "goal products": GOAL,
            "seconds": times.median(name),
            "peak MB": peak_of_steps(step) / 1e6,
        },
    )


def plain(asked: Tensor, corpus: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest products and their rows, of chunk after chunk."""
    best = asked.new_zeros(len(asked), 0), torch.zeros(len(asked), 0, dtype=torch.long)
    for start in range(0, len(corpus), CHUNK):
        products = torch.mm(asked, corpus[start : start + CHUNK].T)
        values, rows = products.topk(min(k, products.shape[1]))
        values, rows = torch.cat([best[0], values], 1), torch.cat([best[1], rows + start], 1)
        values, places = values.topk(min(k, values.shape[1]))
        best = values, rows.gather(1, places)
    return best


def scoring(asked: Tensor, corpus: Tensor) -> Callable[[], Rankings]:
    """A call that ranks all documents for each query, of which one is relevant, and scores."""
    count = len(corpus)
    names = [f"d{i}" for i in range(count)]
    rows = {
        "_role": [QUERY] * len(asked) + [DOCUMENT] * count,
        "_id": [f"q{i}" for i in range(len(asked))] + names,
        "_relevant": [f'{{"d{i}": 1}}' for i in range(len(asked))] + ["{}"] * count,
    }
    values = torch.cat([asked, corpus])
    return lambda: Rankings.of(values, rows, "cosine")


def mining(asked: Tensor, corpus: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call that finds negatives of each query, whose document has the query's number."""
    own = torch.arange(len(asked))
    limits = F.cosine_similarity(asked, corpus[: len(asked)]) - MARGIN
    left_out = LeftOut(torch.stack([own, own], 1), limits)
    return lambda: hardest(asked, corpus, NEGATIVES, left_out, cosine=True, chunk=CHUNK)


def vectors(file: Path, count: int) -> Tensor:
    """Random vectors, [count, `WIDTH`], in a file that is read where it is needed."""
    draws = np.random.default_rng(0)
    written = np.lib.format.open_memmap(file, "w+", np.float32, (count, WIDTH))
    for start in range(0, count, CHUNK):
        part = written[start : start + CHUNK]
        part[:] = draws.standard_normal(part.shape, np.float32)
    written.flush()
    del written
    # copied on writing, as `petl mine` reads it
    return torch.from_numpy(np.lib.format.open_memmap(file, "c"))


def queries_near(corpus: Tensor, count: int) -> Tensor:
    """Queries of unit length, each near to the document of its number, [count, `WIDTH`]."""
    noise = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(0))
    return F.normalize(corpus[:count] + noise, dim=-1)
