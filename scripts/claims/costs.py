"""Claims on MiniLM about time, the density of activations, and ranks."""

from dataclasses import replace

from claims.claim import Claim, Statement, at_most
from claims.measures import DENSITY, MEMORY, SECONDS
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
    paper="none: a promise of these pages",
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

# Density. Values of a GELU are never exactly 0: a neuron counts as active above the threshold.
COUNTED = "lora +loss=density loss.threshold=0.01"
DENSE = f"{COUNTED} loss.weight=0.0"
SHARE = 0.55  # what the paper reports of GELU
SPARSE = {eps: f"{COUNTED} loss.eps={eps}" for eps in ("1e-7", "1e-3")}

DENSITIES = Claim(
    name="density",
    title="The density loss lowers the density of GELUs to 0.55 of it at no loss of score",
    paper="Runwal et al. 2025, arXiv:2402.01911",
    paper_says="Against the same adapters without the loss, density falls by up to 45 % in "
    "RoBERTa-large (GELU) on GLUE, and by 53 % in the encoder and 91 % in the decoder of "
    "Flan-T5-XXL (ReLU) on SQuAD, at comparable scores.",
    statements=tuple(
        statement
        for eps, words in SPARSE.items()
        for statement in (
            at_most(
                SHARE,
                DENSITY,
                f"eps={eps}: at most {SHARE:g} times as many active neurons",
                words,
                DENSE,
                paper=SHARE,
            ),
            Statement(f"eps={eps}: the score does not fall", "no_worse", words, DENSE),
        )
    ),
    setting=VERBS,
    labels={
        DENSE: "LoRA",
        **{words: f"LoRA, density loss, eps={eps}" for eps, words in SPARSE.items()},
    },
    pages=("density",),
    limits=(
        "One model with GELU; a neuron is active if its absolute value is above 0.01. ReLU, for "
        "which the paper reports more (0.47 in an encoder, 0.09 in a decoder), and SwiGLU are not "
        "tried: no package has a pretrained model with ReLU.",
        "What a CPU gains is not tried: torch has no product that skips zeros of activations, so "
        "that a step takes the same time.",
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
