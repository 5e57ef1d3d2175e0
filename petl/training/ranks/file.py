"""The file ranks.json of a run with +ranks: read, checked and drawn."""

import math
from numbers import Real
from pathlib import Path
from typing import TypedDict

from petl.core.types import Record, Settings
from petl.errors import InputError
from petl.system.files.read import read_json
from petl.system.values import LARGEST
from petl.training.features.bars import Bar, Bars, draw_bars

RANKS = "ranks.json"
PICTURE = "ranks.png"
MOST_BLOCKS = 2000  # the deepest models have some hundred


class BlockRank(TypedDict):
    """A block in ranks.json; without a rank if it has no targets."""

    path: str
    importance: Real
    rank: int | None


class RanksData(TypedDict):
    """The data with which importance was measured; `data` is null for the training rows."""

    data: Record | None
    num_samples: int
    seq_len: int


class Ranks(TypedDict):
    """The content of ranks.json that reports use."""

    metric: str
    mean: int
    calibration: RanksData
    blocks: list[BlockRank]


def read_ranks(run: Path) -> Record:
    """Read ranks.json of a run's folder.

    Raises:
        InputError: it cannot be read, lacks the entries of `Ranks`, or has numbers or blocks that
            no run writes.
    """
    file = run / RANKS
    ranks = read_json(file, Ranks)
    blocks = ranks["blocks"]
    if not 1 <= len(blocks) <= MOST_BLOCKS:
        raise InputError(f"{file} cannot be used: {len(blocks)} blocks, not 1 to {MOST_BLOCKS}")
    for i, block in enumerate(blocks):
        importance, rank = block["importance"], block["rank"]
        if not 0 <= importance < math.inf or (rank is not None and not 1 <= rank <= LARGEST):
            raise InputError(
                f"{file} cannot be used: [{i}] has importance {importance} and rank {rank}, "
                "not a number from 0 and an integer from 1"
            )
    return ranks


def rank_charts(ranks: Settings) -> list[Bars]:
    """Return the charts of ranks.json: the rank of each block, and its importance."""
    blocks = ranks["blocks"]
    stacks = [block["path"].rpartition(".") for block in blocks]
    texts = [
        f"{block['path']}\nrank: {block['rank'] or 'none'}\nimportance: {block['importance']:.4g}"
        for block in blocks
    ]

    def chart(title: str, y: str, values: list[float], line: tuple[str, float] | None) -> Bars:
        named = zip(stacks, values, texts, strict=True)
        bars = [Bar(stack, name, value, text) for (stack, _, name), value, text in named]
        return Bars(title, "block of the model, from 0", y, bars, line)

    heights = [float(block["rank"] or 0) for block in blocks]
    importance = [float(block["importance"]) for block in blocks]
    return [
        chart("Rank by block", "rank", heights, (f"mean {ranks['mean']}", ranks["mean"])),
        chart("Importance by block", ranks["metric"], importance, None),
    ]


def draw_ranks(run: Path) -> None:
    """Draw ranks.json of a run's folder as ranks.png."""
    draw_bars(rank_charts(read_ranks(run)), run / PICTURE)
