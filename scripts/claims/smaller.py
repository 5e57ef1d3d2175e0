"""Claims on smaller models and files: pruned and factored weights, compressed adapters."""

from claims.claim import Claim, Statement
from claims.verbs import VERBS

SHARES = (0.5, 0.9)  # of zeros

LORA = "lora"
DENSE_PST = "pst method.final_sparsity=0"
PST = {share: f"pst method.final_sparsity={share:g}" for share in SHARES}
BY_MAGNITUDE = f"{PST[0.9]} method.alpha1=0 method.alpha2=0"
# all linear layers of the blocks are pruned: queries and values by the update, others by magnitude
DENSE_DSEE = "dsee method.init_seed={seed}"
OTHERS = "method.prune_modules=[key,output.dense,intermediate.dense] method.prune_step=0.33"
DSEE = {
    share: f"{DENSE_DSEE} method.target_prune_ratio={share:g} method.prune_ratio={share:g} {OTHERS}"
    for share in SHARES
}
PELA = "pela"
DISTILLED = "pela +loss=distill"

MASKS = Claim(
    name="masks",
    title="Half and nine tenths of the weights can be pruned while an adapter trains; distillation "
    "restores a model of half the weights",
    paper="Li et al. 2022 (PST), arXiv:2205.11005; Chen et al. 2023 (DSEE), arXiv:2111.00160; Guo "
    "et al. 2024 (PELA), arXiv:2310.10700",
    paper_says="PST: BERT, RoBERTa and GPT-2 at sparsities of 0.5 and 0.9: with low-rank scores, "
    "1.5 % of the trained parameters suffice for scores equal to or above those of pruning by "
    "magnitude or movement. DSEE: BERT at a sparsity of 0.5 has scores comparable with the dense "
    "model. PELA: a model of half the size, whose outputs are kept near those of the original "
    "one, loses 0.6 points on average.",
    statements=(
        *(
            Statement(f"PST at sparsity {s:g} is no worse than dense PST", "no_worse", w, DENSE_PST)
            for s, w in PST.items()
        ),
        Statement("at 0.9, PST beats pruning by magnitude", "beats", PST[0.9], BY_MAGNITUDE),
        *(
            Statement(
                f"DSEE at sparsity {s:g} is no worse than DSEE without pruning",
                "no_worse",
                w,
                DENSE_DSEE,
            )
            for s, w in DSEE.items()
        ),
        Statement("PELA with distillation beats PELA without", "beats", DISTILLED, PELA),
        Statement(
            "PELA with distillation is no worse than LoRA on the whole model",
            "no_worse",
            DISTILLED,
            LORA,
            paper=-0.6,
        ),
    ),
    setting=VERBS,
    labels={
        DENSE_PST: "PST, dense",
        **{w: f"PST, sparsity {s:g}" for s, w in PST.items()},
        BY_MAGNITUDE: "by magnitude, sparsity 0.9",
        DENSE_DSEE: "DSEE, dense",
        **{w: f"DSEE, sparsity {s:g}" for s, w in DSEE.items()},
        PELA: "PELA, c = 2",
        DISTILLED: "PELA, c = 2, distillation",
        LORA: "LoRA, rank 8",
    },
    pages=("pst", "dsee", "pela"),
    limits=(
        "Sparsity is that of the linear layers of the blocks. By magnitude is PST without its two "
        "low-rank scores: the weights move by the same product, and the largest stay.",
        "After merging, the targets of DSEE are dense again, since its update is; those of PST are "
        "not.",
        "188 steps; DSEE prunes after a third of them, at once. The papers train for thousands of "
        "steps, and DSEE's has no sparsity of 0.9.",
        "The distillation compares the outputs of the blocks alone, with weight 1; the paper "
        "also keeps each product near its weight.",
        "PST's first factors start from a standard normal distribution, as in the reference code: "
        "at rates of 0.001 and more it learned little or nothing. Dense PST is below LoRA here.",
        "One of the five runs of PELA without distillation learned less, which widens the interval "
        "of its comparison.",
    ),
)

# Edits of finished LoRAs. In bits for each value of 16: 10.7 times smaller with half of the values
# (no density of this code gives 8), 27 times with a tenth.
ALPHAS = {0.5: "1,2,4,fit", 0.1: "2,4,6,8,10,fit"}  # the best one is at no end
COMPRESSED = {
    (density, scope): f"lora | compress density={density:g} alpha={alphas} scope={scope}"
    for density, alphas in ALPHAS.items()
    for scope in ("global", "tensor")
}
TIMES = {0.5: "11", 0.1: "27"}
PLACES = {"global": "largest values of all", "tensor": "largest of each tensor"}
DIVISORS = {
    "dare": "DARE",
    "closed": "petl's closed form",
    "analytic": "the analytic divisor",
    "searched": "the searched divisor",
}
PRUNED = {(drop, q): f"lora | prune drop={drop:g} q={q}" for drop in (0.9, 0.99) for q in DIVISORS}

COMPRESS = Claim(
    name="compress",
    title="Compressed and randomly pruned adapters keep the score",
    paper="Yadav et al. 2023 (ComPEFT), arXiv:2311.13171; Yu et al. 2024 (DARE), arXiv:2311.03099; "
    "Deng et al. 2025 (DAREx), arXiv:2410.09344",
    paper_says="ComPEFT: T5 and LLaMA with 8 to 26 times smaller files than 16 bits and no lower "
    "score, the more so the larger the model. DARE: 90 % of the values of a fine-tuned model's "
    "change can be dropped at random, 99 % of large models. DAREx: other divisors than 1 - p, of a "
    "bound or searched, keep far more at 99 % (30 % and more on two tasks with BERT).",
    statements=(
        *(
            Statement(
                f"{TIMES[density]} times smaller ({PLACES[scope]}) is no worse than LoRA",
                "no_worse",
                w,
                LORA,
            )
            for (density, scope), w in COMPRESSED.items()
        ),
        *(
            Statement(
                f"without {100 * drop:g} % of the values, DARE is no worse than LoRA",
                "no_worse",
                PRUNED[drop, "dare"],
                LORA,
            )
            for drop in (0.9, 0.99)
        ),
        *(
            Statement(
                f"without {100 * drop:g} % of the values, {DIVISORS[q]} beats DARE",
                "beats",
                w,
                PRUNED[drop, "dare"],
                paper=30 if drop > 0.9 and q == "searched" else None,
            )
            for (drop, q), w in PRUNED.items()
            if q != "dare"
        ),
    ),
    setting=VERBS,
    labels={
        LORA: "LoRA, rank 8",
        **{
            w: f"ComPEFT, density {density:g}, {PLACES[scope]}"
            for (density, scope), w in COMPRESSED.items()
        },
        **{w: f"{100 * drop:g} % dropped, {DIVISORS[q]}" for (drop, q), w in PRUNED.items()},
    },
    pages=("compress-and-combine",),
    limits=(
        "One adapter of 0.3 M parameters, trained for two passes; the papers' claims are strongest "
        "for models of billions.",
        "Times are those of the bits of a value, 16 before; files of the table have 32 before, and "
        "a head that is stored in full.",
        "The magnitude of ComPEFT is chosen among four values, six at density 0.1, on validation "
        "rows, the searched divisor by the outputs on 50 train rows.",
        "A seed has one random mask, the same for all divisors; only B of LoRA is pruned.",
    ),
)
