"""Claims on a decoder: what it forgets, and what packing and segments of the loss save."""

from claims.claim import BF16, IN_BF16, Claim, Setting, Statement, around
from claims.measures import LOSS, MEMORY, RUN_LOSS, SECONDS, loss_on
from claims.texts import LONGEST, write_texts, write_verbs

ONE_DECODER = (
    "One decoder of 135 M parameters and short English texts: a larger model or another text may "
    "give another verdict."
)
TEXTS = (
    "model=smollm2",
    "data=files",
    "data.task=causal_lm",
    "data.train={data}/verbs-train.jsonl",
    "data.test={data}/verbs-test.jsonl",
)
MARGIN = 0.02  # nats per token: 2 % of the perplexity

# Forgetting
RANK = "method.r=16 method.lora_alpha=16"
CORDA = (
    f"corda {RANK} method.corda_method=kpm +data@method.calibration_data.data=hamlet "
    "method.factors_cache={data}/factors"  # all runs have the same calibration and the same start
)
LORA = f"lora {RANK}"
PISSA = f"{LORA} method.init_lora_weights=pissa_niter_16"
# a step of 1e-12 of the rate: the base model
UNTRAINED = "lora train.steps=1 train.warmup=1e12 train.lr=3e-4"
COMMON = "train.lr=3e-4"  # the papers train all contenders with one rate
HAMLET = loss_on("hamlet", "loss on Hamlet")
REVIEWS = loss_on("reviews", "loss on reviews")

FORGETTING = Claim(
    name="forgetting",
    title="CorDA in knowledge-preserving mode forgets less than LoRA and PiSSA",
    paper="Yang et al. 2024, arXiv:2406.05223",
    paper_says="Llama-2-7B, rank 128, trained on mathematics, code or instructions: started from "
    "the components that matter least for questions about world knowledge, CorDA keeps more of "
    "that knowledge than LoRA and PiSSA, and learns the task about as well.",
    statements=(
        Statement(
            "CorDA learns the task as well as LoRA",
            "no_worse",
            CORDA,
            LORA,
            margin=MARGIN,
            measure=LOSS,
        ),
        Statement(
            "LoRA forgets: the untrained model beats it on Hamlet",
            "beats",
            UNTRAINED,
            LORA,
            margin=MARGIN,
            measure=HAMLET,
        ),
        *(
            Statement(
                f"on {text}, CorDA beats {name}",
                "beats",
                CORDA,
                words,
                margin=MARGIN,
                measure=measure,
            )
            for text, measure in (
                ("Hamlet, which it was to preserve", HAMLET),
                ("reviews, which it has not seen", REVIEWS),
            )
            for name, words in (("LoRA", LORA), ("PiSSA", PISSA))
        ),
        Statement(
            "on Hamlet, at the learning rate 3e-4 for both, CorDA beats LoRA",
            "beats",
            f"{CORDA} {COMMON}",
            f"{LORA} {COMMON}",
            margin=MARGIN,
            measure=HAMLET,
        ),
    ),
    setting=Setting(
        name="decoder",
        title="SmolLM2-135M trained on definitions of WordNet verbs with their class as plain "
        "text: 900 rows for training, 100 for validation, 1,000 for the test; one pass in batches "
        "of 16. What is preserved: Hamlet (250 passages of two lines) and film reviews (250)",
        overrides=(
            *TEXTS,
            BF16,
            f"data.max_length={LONGEST}",  # none is cut
            "data.train_rows=1000",
            "train.validation_share=0.1",
            "train.epochs=1",
            "train.batch_size=16",
            "train.buckets=auto",
        ),
        rates=around(3e-4),
        limits=(ONE_DECODER, IN_BF16),
        write_files=write_texts,
        also_on=("hamlet", "reviews"),
    ),
    labels={
        UNTRAINED: "before training",
        CORDA: "CorDA, knowledge preserved",
        LORA: "LoRA",
        PISSA: "PiSSA",
        f"{CORDA} {COMMON}": "CorDA, knowledge preserved, at 3e-4",
        f"{LORA} {COMMON}": "LoRA, at 3e-4",
    },
    since=UNTRAINED,
    pages=("corda",),
    limits=(
        "A lower learning rate forgets less and may learn less: each contender has the rate at "
        "which it learns the task best, and one statement has the same rate for both.",
        "Rank 16 instead of 128, and 57 steps. CorDA is calibrated on 256 blocks of the first "
        "nine tenths of the play; the passages that are scored are of the last tenth.",
        "Losses in nats per token, of texts that the base model has not been trained on as such; "
        "the paper scores answers to questions. The untrained model is tuned to chats: training on "
        "one plain text lowers its loss on others, as at 3e-4 on Hamlet, which hides forgetting.",
    ),
)

# Packing and segments: the same texts once, about as many tokens in a step
PACKED = "lora data.pack=true data.max_length=128 train.batch_size=3"
ROWS = "data.max_length=48 train.batch_size=32"
PADDED = f"lora {ROWS} train.buckets=null"
SORTED = f"lora {ROWS} train.buckets=auto"
WHOLE = f"{PADDED} train.loss_segment=null train.skip_unread=false"
SEGMENTED = f"{PADDED} train.loss_segment=128 train.skip_unread=false"

PACKING = Claim(
    name="packing",
    title="Packing saves the time of the padding, and a segmented loss the memory of the logits",
    paper="",
    paper_says="Texts of one row do not see each other, so that packing changes speed alone. "
    "Segments of the loss compute what the whole loss computes, with few logits at a time.",
    statements=(
        Statement(
            "packed texts take at most 0.75 of the time",
            "share",
            PACKED,
            PADDED,
            None,
            0.75,
            SECONDS,
        ),
        Statement(
            "length buckets take at most 0.75 of the time",
            "share",
            SORTED,
            PADDED,
            None,
            0.75,
            SECONDS,
        ),
        Statement(
            "packed texts take no more time than length buckets",
            "share",
            PACKED,
            SORTED,
            None,
            1.0,
            SECONDS,
        ),
        Statement(
            "packing does not change the loss", "equals", PACKED, PADDED, None, MARGIN, RUN_LOSS
        ),
        Statement(
            "segments take at most 0.9 of the memory", "share", SEGMENTED, WHOLE, None, 0.9, MEMORY
        ),
        Statement(
            "segments take at most 1.05 of the time", "share", SEGMENTED, WHOLE, None, 1.05, SECONDS
        ),
        Statement(
            "segments do not change the loss", "equals", SEGMENTED, WHOLE, None, MARGIN, RUN_LOSS
        ),
    ),
    setting=Setting(
        name="packing",
        title="SmolLM2-135M trained on definitions of WordNet verbs with their class as plain "
        "text: 640 rows for training, 1,000 for the test; one pass, some 370 tokens a step",
        overrides=(
            *TEXTS,
            "data.train_rows=640",
            "train.eval_batch_size=32",  # the peak memory is that of training
            "train.epochs=1",
        ),
        rates=(3e-4,),
        limits=(ONE_DECODER,),
        write_files=write_verbs,
    ),
    labels={
        PADDED: "one text a row",
        SORTED: "one text a row, length buckets",
        PACKED: "packed",
        WHOLE: "all logits at once, all positions",
        SEGMENTED: "segments of 128 positions, all positions",
    },
    pages=("buckets-and-packing",),
    limits=(
        "Time is the processor time of training on a machine with other work, memory the peak of "
        "the process, of which model and libraries are the larger part.",
        "One learning rate, the default. Packed rows are in other batches than the texts alone, of "
        "about as many tokens: 18 steps either way.",
        "Packed runs of a first trial, with 13 steps and with texts that were cut at the end of a "
        "row, had a loss of 5.7: packing was mended and the numbers of steps made equal before the "
        "packed runs here.",
    ),
)
