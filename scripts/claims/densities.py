"""Claims on the density loss, by activation: GELU in MiniLM, ReLU in a ViT, SwiGLU in a decoder."""

from functools import partial

from claims.claim import BF16, IN_BF16, MARGIN, Claim, Setting, Statement, around, at_most
from claims.decoder import MARGIN as NATS
from claims.decoder import ONE_DECODER, TEXTS
from claims.fashion import write_images
from claims.images import FASHION
from claims.measures import ACCURACY, DENSITY, LOSS, Measure, share
from claims.neurons import needed
from claims.texts import LONGEST, write_verbs
from claims.verbs import VERBS

PAPER = "Runwal et al. 2025, arXiv:2402.01911"
PAPER_SAYS = (
    "Against the same adapters without the loss, density falls by up to 45 % in RoBERTa-large "
    "(GELU) on GLUE, and by 53 % in the encoder and 91 % in the decoder of Flan-T5-XXL (ReLU) on "
    "SQuAD, at comparable scores."
)
# What the paper reports of GELU, and of ReLU in an encoder. Of SwiGLU it reports nothing.
SHARE, SHARE_RELU = 0.55, 0.47
EPS = "1e-7"  # the paper's


def losses(counted: str, *epsilons: str) -> dict[str, str]:
    """Return the words of contenders with the loss by eps; `counted` has all but it."""
    return {eps: f"{counted} loss.eps={eps}" for eps in epsilons}


def without(counted: str) -> str:
    """Return the words of the contender without the loss; its density is measured all the same."""
    return f"{counted} loss.weight=0.0"


def falls(
    counted: str,
    sparse: dict[str, str],
    limit: float,
    *,
    name: str = "",
    paper: float | None = None,
    score: Measure = ACCURACY,
    stays: str = "the score does not fall",
) -> list[Statement]:
    """Return for each eps the statements that density falls, and the score does not.

    Args:
        limit: the share of the density that is left.
        name: of the model, before the eps.
        paper: the share that the paper reports.
        score: what is not worse, as `stays` says in words.
    """
    dense, found = without(counted), []
    margin = MARGIN if score is ACCURACY else NATS
    for eps, words in sparse.items():
        says = f"{name}eps={eps}"
        fewer = f"{says}: at most {limit:g} times as many active neurons"
        found += [
            at_most(limit, DENSITY, fewer, words, dense, paper=paper),
            Statement(f"{says}: {stays}", "no_worse", words, dense, margin=margin, measure=score),
        ]
    return found


def labels(counted: str, sparse: dict[str, str], name: str = "") -> dict[str, str]:
    """Return the labels of the contenders with and without the loss."""
    return {
        without(counted): f"{name}LoRA",
        **{words: f"{name}LoRA, density loss, eps={eps}" for eps, words in sparse.items()},
    }


NO_GAIN = (
    "An inactive neuron saves no time by itself: torch has no product that skips zeros, and petl "
    "does not skip them either."
)

# Values of a GELU are never exactly 0: a neuron counts as active above the threshold
COUNTED = "lora +loss=density loss.threshold=0.01"
SPARSE = losses(COUNTED, EPS, "1e-3")

GELU = Claim(
    name="density",
    title="The density loss lowers the density of GELUs to 0.55 of it at no loss of score",
    paper=PAPER,
    paper_says=PAPER_SAYS,
    statements=(*falls(COUNTED, SPARSE, SHARE, paper=SHARE),),
    setting=VERBS,
    labels=labels(COUNTED, SPARSE),
    pages=("density",),
    limits=(
        "One model with GELU; a neuron is active if its absolute value is above 0.01. ReLU and "
        "SwiGLU have claims of their own.",
        NO_GAIN,
    ),
)

# ReLU: no package has a pretrained transformer with it, so the command pretrains two ViTs of which
# only the activation differs
ACTIVATIONS = ("relu", "gelu")
VITS = {
    name: (
        "model.settings.num_hidden_layers=6",
        "model.settings.intermediate_size=384",
        f"+model.settings.hidden_act={name}",
    )
    for name in ACTIVATIONS
}
TWINS = Setting(
    name="fashion-activations",
    title="Fashion-MNIST with two ViTs of 6 blocks of width 96, 384 neurons each, and 50 tokens "
    "(0.7 M parameters), one with ReLU and one with GELU, pretrained by the command on 8,000 "
    "images of five of the ten classes, from the same random weights: 1,200 images of all classes "
    "for training, 400 for validation, 10,000 for the test; ten passes in batches of 32",
    overrides=(
        *(word for word in FASHION.overrides if not word.startswith(("model.path=", "train.epo"))),
        "train.epochs=10",
    ),
    rates=FASHION.rates,
    limits=FASHION.limits,
    write_files=partial(write_images, models=VITS),
    stands_for={f"on={name}": (f"model.path={{data}}/{name}",) for name in ACTIVATIONS},
)
OF_RELU = "lora on=relu +loss=density"  # exact zeros
OF_GELU = "lora on=gelu +loss=density loss.threshold=0.01"
SPARSE_RELU, SPARSE_GELU = (losses(words, EPS, "1e-3") for words in (OF_RELU, OF_GELU))

RELU = Claim(
    name="density-relu",
    title="The density loss lowers the density of ReLUs to 0.47 of it at no loss of score, and by "
    "a larger share than that of GELUs",
    paper=PAPER,
    paper_says=PAPER_SAYS,
    statements=(
        *falls(OF_RELU, SPARSE_RELU, SHARE_RELU, name="ReLU, ", paper=SHARE_RELU),
        *falls(OF_GELU, SPARSE_GELU, SHARE, name="GELU, ", paper=SHARE),
        Statement(
            f"eps={EPS}: density falls by a larger share with ReLU than with GELU",
            "share",
            SPARSE_RELU[EPS],
            without(OF_RELU),
            than=(SPARSE_GELU[EPS], without(OF_GELU)),
            margin=1.0,
            measure=DENSITY,
        ),
    ),
    setting=TWINS,
    labels={
        **labels(OF_RELU, SPARSE_RELU, "ReLU, "),
        **labels(OF_GELU, SPARSE_GELU, "GELU, "),
    },
    pages=("density",),
    limits=(
        "With ReLU a neuron is active if its value is not 0, with GELU if its absolute value is "
        "above 0.01. Density is that of 256 test images.",
        "The paper's models with ReLU are encoder-decoders of up to 11 B parameters; no package "
        "has a pretrained transformer with ReLU, and a decoder with it (0.09 in the paper) is not "
        "tried.",
        NO_GAIN,
    ),
)

# SwiGLU. What is counted is the gate: a neuron whose gate is near 0 needs neither its row of the up
# projection nor its column of the down projection. With eps = 0.1^2 a value at the threshold counts
# as half active.
OF_GATES = "lora +loss=density loss.threshold=0.1 loss.ppl_sparsity=false"
SPARSE_GATES = losses(OF_GATES, EPS, "1e-2")
NEEDED = Measure(
    "neurons_at_ppl_1", "neurons needed at 1 % more perplexity", needed, share, ratio=True
)

SWIGLU = Claim(
    name="density-swiglu",
    title="The density loss halves the density of a decoder with SwiGLU at no loss of score",
    paper=f"none on SwiGLU; the loss: {PAPER}",
    paper_says=PAPER_SAYS,
    statements=(
        *falls(
            OF_GATES,
            SPARSE_GATES,
            SHARE,
            score=LOSS,
            stays="the loss does not rise",
        ),
        *(
            at_most(
                SHARE,
                NEEDED,
                f"eps={eps}: at 1 % more perplexity, at most {SHARE:g} times as many neurons are "
                "needed",
                words,
                without(OF_GATES),
            )
            for eps, words in SPARSE_GATES.items()
        ),
    ),
    setting=Setting(
        name="decoder-density",
        title="SmolLM2-135M trained on definitions of WordNet verbs with their class as plain "
        "text: 480 rows for training, 120 for validation, 500 for the test; one pass in batches "
        "of 8",
        overrides=(
            *TEXTS,
            BF16,
            f"data.max_length={LONGEST}",  # none is cut
            "data.train_rows=600",
            "data.test_rows=500",
            "train.validation_share=0.2",
            "train.epochs=1",
            "train.batch_size=8",
            "train.buckets=auto",
        ),
        rates=around(3e-4),
        limits=(ONE_DECODER, IN_BF16),
        write_files=write_verbs,
    ),
    labels=labels(OF_GATES, SPARSE_GATES),
    pages=("density",),
    limits=(
        "Exact zeros never occur with SiLU: a neuron is active if the absolute value of its gate "
        "is above 0.1. With smaller values set to 0, the loss of the untrained model on 60 such "
        "texts was 0.012 nats higher, less than the margin.",
        "What perplexity needs is counted without a threshold (PPL-1 %: Luo et al. 2025, "
        "arXiv:2411.02335), by the product of gate and up projection, which the loss does not "
        "lower; on 32 test rows. Density is that of 256.",
        "With eps=1e-7, a gate of 0.1 is within 1e-5 of what the loss is at most, so that its "
        "gradient is nearly zero.",
        "One of the five runs with eps=1e-2 ended at a loss of 4.0, the others at 3.1: the rate "
        "that was chosen is near those that fail. That widens its interval.",
        "60 steps; the paper trains for thousands.",
        NO_GAIN,
    ),
)
