"""The claims that are tried on definitions of WordNet verbs, with MiniLM."""

from dataclasses import replace

from claims.claim import TWICE, Claim, Setting, Shown, Statement
from claims.measures import Measure
from claims.routers import agreement

ONE_TASK = (
    "One encoder and one task of short English texts: a large decoder, long texts or another "
    "kind of task may give another verdict."
)

# of the 13,767 definitions that petl has: most are test rows, which tell more than training rows
# when small differences are compared
VERBS = Setting(
    name="verbs",
    title="WordNet verb definitions in 15 classes, MiniLM (22.7 M parameters): 3,000 rows for "
    "training, 1,000 for validation, 8,000 for the test; two passes in batches of 32",
    overrides=(
        "model=minilm",
        "data=wordnet",
        "data.train_rows=4000",
        "data.test_rows=8000",
        "train.validation_share=0.25",
        "train.epochs=2",
        "train.buckets=auto",
    ),
    limits=(ONE_TASK,),
)
TEN_SEEDS = replace(VERBS, seeds=TWICE)
# MoLA. With 6 layers the published patterns have unequal sums (2468: 28 experts, 8642: 32), so the
# numbers of each layer are resampled to a sum of 30 for all three.
HIGH = "mola method.num_experts=[2,3,4,6,7,8]"
EVEN = "mola method.num_experts=5"
LOW = "mola method.num_experts=[8,7,6,4,3,2]"
RECURRENT = (
    "mola method.num_experts=[2,3,4,6,7,8] method.router_type=recurrent method.router_hidden_size=8"
)

MOLA = Claim(
    name="mola",
    title="MoLA: more experts in the higher layers are better; so is a recurrent router",
    paper="Gao et al. 2025, arXiv:2402.08562; the router: Qiu et al. 2025 (RMoE), arXiv:2408.06793",
    paper_says="Llama-2-7B, six tasks, 32 layers: with equal numbers of parameters the average "
    "accuracy is 84.6 % for 2468, 84.3 % for 5555 and 83.6 % for 8642 (means of the paper's "
    "columns). RMoE: a router with a state that is passed from layer to layer beats linear "
    "routers in pre-training (0.91B parameters: 55.31 against 54.26 on average).",
    statements=(
        Statement(
            "more experts in the higher layers beat the same number spread evenly",
            "beats",
            HIGH,
            EVEN,
            paper=0.28,
        ),
        Statement(
            "more experts in the higher layers beat the same number put low",
            "beats",
            HIGH,
            LOW,
            paper=0.98,
        ),
        Statement("a recurrent router beats linear ones", "beats", RECURRENT, HIGH, paper=1.05),
    ),
    setting=VERBS,
    labels={
        HIGH: "high: 2, 3, 4, 6, 7, 8 experts",
        EVEN: "even: 5 in each layer",
        LOW: "low: 8, 7, 6, 4, 3, 2 experts",
        RECURRENT: "high, recurrent router",
    },
    pages=("mola",),
    shown=(
        Shown("Load of the experts, linear routers", HIGH, "expert_load"),
        Shown("Load of the experts, recurrent router", RECURRENT, "expert_load"),
    ),
    limits=(
        "Six layers instead of 32: 2468 and 8642 are resampled to six numbers, with 30 experts in "
        "all three models.",
        "The recurrent router has width 8, with which the adapter has about as many parameters as "
        "with linear ones; the published one is wider.",
    ),
)

# Routers; the contenders are those of MOLA, whose runs it shares
AGREEMENT = Measure(
    "router_agreement", "agreement of routers", agreement, lambda value: f"{value:.3f}"
)

ROUTERS = Claim(
    name="routers",
    title="A recurrent router makes the layers agree more",
    paper="Qiu et al. 2025 (RMoE), arXiv:2408.06793",
    paper_says="Pre-trained language models: linear routers of different layers choose experts "
    "independently; a state that is passed from layer to layer lets them share information, to "
    "which the paper attributes its gain.",
    statements=(
        Statement(
            "recurrent routers of neighboring layers agree more than linear ones",
            "beats",
            RECURRENT,
            HIGH,
            margin=0.05,
            measure=AGREEMENT,
        ),
    ),
    setting=VERBS,
    labels={HIGH: "linear routers", RECURRENT: "recurrent router"},
    pages=("mola",),
    limits=(
        "Agreement is the normalized mutual information (0 to 1) of the experts that two modules "
        "of one name in neighboring layers choose first, over the tokens of 1,000 test rows.",
        "Neighboring layers have unequal numbers of experts here, which bounds it below 1 for both "
        "contenders alike.",
    ),
)

# IncreLoRA
LORA_2 = "lora method.r=2"
INCRELORA = "increlora method.target_r=2 method.parameter_budget=82944"
ADALORA = "adalora method.init_r=3 method.target_r=2"

INCRE = Claim(
    name="increlora",
    title="IncreLoRA is better than LoRA and AdaLoRA at a small budget",
    paper="Zhang et al. 2023, arXiv:2308.12043",
    paper_says="DeBERTaV3-base on GLUE: with small budgets (an average rank of 2, 0.3 M "
    "parameters) IncreLoRA has higher scores than LoRA and AdaLoRA, most clearly on small data "
    "sets such as RTE (88.8 % against 86.0 % for LoRA; at 0.3 M 88.5 %, AdaLoRA 87.4 %).",
    statements=(
        Statement("IncreLoRA beats LoRA of rank 2", "beats", INCRELORA, LORA_2, paper=2.77),
        Statement("IncreLoRA beats AdaLoRA of rank 2", "beats", INCRELORA, ADALORA, paper=1.16),
    ),
    setting=TEN_SEEDS,
    labels={
        INCRELORA: "IncreLoRA, average rank 2",
        LORA_2: "LoRA, rank 2",
        ADALORA: "AdaLoRA, rank 3 pruned to 2",
    },
    pages=("increlora",),
    shown=(Shown("Where IncreLoRA puts its ranks", INCRELORA, "ranks"),),
    limits=(
        "188 steps: growth ends after 35 % of them. The paper trains for thousands of steps.",
        "AdaLoRA trains with rank 3 until its ranks are pruned, as its paper proposes (1.5 times "
        "the final rank); its number of parameters is that before pruning.",
    ),
)

# MoS
LORA_16 = "lora method.r=16"
POOLS = "mos method.equivalent_rank=2 method.seed={seed}"  # five seeds are five draws
MOS = f"{POOLS} method.r=4"
MOS_PARTS = {
    # one draw for all layers: with rank 7 it has all rows of the pools, with rank 4 three quarters
    "subset selection": f"{POOLS} method.r=7 method.lora_alpha=28 method.subset_selection=false",
    "pair dissociation": f"{MOS} method.pair_dissociation=false",
    "vector sharding": f"{MOS} method.shards_per_vector=1",
    "shard privatization": f"{MOS} method.private_rank=0",
}
GAINS = {  # in the paper: the first at 5 M parameters and rank 64, the others at 20 M
    "subset selection": 1.79,
    "pair dissociation": 1.09,
    "vector sharding": 0.41,
    "shard privatization": 1.09,
}

SHARING = Claim(
    name="mos",
    title="MoS with an eighth of the parameters loses nothing against LoRA; each of its four parts "
    "helps",
    paper="Wang et al. 2025, arXiv:2410.00938",
    paper_says="Llama-2-7B, instruction tuning: MoS saves about eight times the parameters of "
    "LoRA at about equal scores; without pair dissociation, vector sharding or shard "
    "privatization its average score is 0.4 to 1.1 points lower, and subset selection (36.1, pure "
    "sharing 34.3) is what makes sharing better than LoRA with as many parameters (MoS 36.4, LoRA "
    "35.0; 37.0 with eight times as many).",
    statements=(
        Statement(
            "MoS is no worse than LoRA with eight times its parameters",
            "no_worse",
            MOS,
            LORA_16,
            paper=-0.58,
        ),
        Statement("MoS beats LoRA with as many parameters", "beats", MOS, LORA_2, paper=1.41),
        *(
            Statement(f"MoS beats MoS without {part}", "beats", MOS, words, paper=GAINS.get(part))
            for part, words in MOS_PARTS.items()
        ),
    ),
    setting=TEN_SEEDS,
    labels={
        MOS: "MoS, parameters of rank 2",
        LORA_16: "LoRA, rank 16",
        LORA_2: "LoRA, rank 2",
        **{words: f"MoS without {part}" for part, words in MOS_PARTS.items()},
    },
    pages=("mos",),
    limits=(
        "Six layers share the pools; in the paper 32 do, so that each shares with more. With six, "
        "an equivalent rank of 2 and a private rank of 1, the rank of a layer is 7 at most; here "
        "it is 4, twice the equivalent rank.",
        "Without subset selection all layers have the same public shards: the rank is 7 there, so "
        "that all shards are in use, at the same scale. Without privatization the layers draw from "
        "twice as many, and none has 8 % of them; with it the draw leaves out 0.5 %.",
    ),
)

# Binary. AdaptFormer of width 32 has 12,288 bytes in 1 bit for every 384 x 32 x 2 x 4 of them in
# 32 bits; at equal bytes the width falls as the bits rise. Scale, dropout and start are those of
# `binary`, so that the bits are all that differs.
WHOLE = "adaptformer method.scaling=1.0 method.bneck_dropout=0.1 method.init_weights=binary"
FULL, NARROW = f"{WHOLE} method.r=32", f"{WHOLE} method.r=1"
ONE_BIT = "binary +method.r=32 method.bits=1"
EQUAL_BYTES = {
    2: "binary +method.r=16 method.bits=2",
    4: "binary +method.r=8 method.bits=4",
    8: "binary +method.r=4 method.bits=8",
}

BITS = Claim(
    name="binary",
    title="1-bit adapters lose nothing to full precision, and at equal bytes are the best choice",
    paper="Jie et al. 2023, arXiv:2307.16867",
    paper_says="ViT-B/16 on VTAB-1k: adapters whose weights have 1 bit lose nothing against 32 "
    "bits, and of adapters with equal bytes the widest one, with 1 bit, is the best.",
    statements=(
        Statement("1 bit is no worse than 32 bits at equal width", "no_worse", ONE_BIT, FULL),
        Statement("1 bit beats 32 bits at equal bytes", "beats", ONE_BIT, NARROW),
        *(
            Statement(f"1 bit beats {bits} bits at equal bytes", "beats", ONE_BIT, words)
            for bits, words in EQUAL_BYTES.items()
        ),
    ),
    setting=VERBS,
    labels={
        ONE_BIT: "1 bit, width 32",
        FULL: "32 bits, width 32",
        NARROW: "32 bits, width 1",
        **{w: f"{bits} bits, width {32 // bits}" for bits, w in EQUAL_BYTES.items()},
    },
    pages=("binary",),
    limits=(
        "AdaptFormer beside the feed-forward networks of MiniLM, in 32 bits with the scale, the "
        "dropout and the start that it has in fewer. Files include the head of 5,775 weights in 32 "
        "bits, which is the same for all.",
    ),
)

# Sparse
DRAWN = "method.init_seed={seed}"  # five seeds begin with five random sets
SPARSE_2, SPARSE_16 = f"sparse method.r=2 {DRAWN}", f"sparse method.r=16 {DRAWN}"
SM3 = f"{SPARSE_16} method.selection_algorithm=sm3"
# chosen by the same gradients after the same five steps, and never again
ONCE = f"{SPARSE_16} method.reselection_steps=1000"

SPARSE = Claim(
    name="sparse",
    title="Sparse fine-tuning is better than LoRA at equal parameters, more so with more of them",
    paper="Ansell et al. 2024, arXiv:2401.16405",
    paper_says="Llama-2, instruction tuning at budgets of LoRA ranks 8 to 64: sparse fine-tuning "
    "whose indices move by accumulated gradients (rigl) is mostly above LoRA; by the momenta of "
    "SM3 it comes close, with less memory.",
    statements=(
        Statement("sparse beats LoRA at the parameters of rank 16", "beats", SPARSE_16, LORA_16),
        Statement("sparse beats LoRA at the parameters of rank 2", "beats", SPARSE_2, LORA_2),
        Statement(
            "its gain is larger at rank 16 than at rank 2",
            "beats",
            SPARSE_16,
            LORA_16,
            than=(SPARSE_2, LORA_2),
        ),
        Statement("moving indices beat those that are chosen once", "beats", SPARSE_16, ONCE),
        Statement("growth by gradients (rigl) beats growth by sm3", "beats", SPARSE_16, SM3),
    ),
    setting=VERBS,
    labels={
        SPARSE_16: "sparse, rigl, parameters of rank 16",
        LORA_16: "LoRA, rank 16",
        SPARSE_2: "sparse, rigl, parameters of rank 2",
        LORA_2: "LoRA, rank 2",
        ONCE: "sparse, rigl, chosen once, rank 16",
        SM3: "sparse, sm3, rank 16",
    },
    pages=("sparse",),
    limits=(
        "188 steps: a selection after the first five, which may exchange the whole random set, and "
        "nine more, one in 20 steps, which exchange a fifth of it and less.",
        "With sm3 the tuned entries are also trained by SM3, whose accumulators choose them, and "
        "with rigl by AdamW, as published: the last difference is that of both.",
    ),
)
