"""Further claims on WordNet verbs: adapters, CorDA's start, and methods that were added later."""

from dataclasses import replace

from claims.claim import Claim, Shown, Statement
from claims.measures import loss_at
from claims.verbs import EVEN, VERBS

# Compacter and adapters: width 22 gives an adapter as many parameters as LoRA of rank 5
COMPACTER = "compacter method.reduction_factor=16"
SEQUENTIAL = "adapter method.r=22"
PARALLEL = "adapter method.r=22 method.placement=parallel"
LORA_5 = "lora method.r=5"

ADAPTERS = Claim(
    name="compacter",
    title="Compacter is as good as adapters with under 0.1 % of the parameters; LoRA and parallel "
    "adapters are better than sequential ones",
    paper="Karimi Mahabadi et al. 2021, arXiv:2106.04647; Hu et al. 2022, arXiv:2106.09685; He et "
    "al. 2022, arXiv:2110.04366",
    paper_says="T5-base on GLUE: Compacter with 0.07 % of the parameters is as good as adapters "
    "with 0.8 %. LoRA's paper has it above adapters of equal size; a unified view of both finds "
    "parallel adapters better than sequential ones.",
    statements=(
        Statement(
            "Compacter is no worse than adapters with many times its parameters",
            "no_worse",
            COMPACTER,
            SEQUENTIAL,
        ),
        Statement("LoRA beats adapters of equal size", "beats", LORA_5, SEQUENTIAL),
        Statement("parallel adapters beat sequential ones", "beats", PARALLEL, SEQUENTIAL),
    ),
    setting=VERBS,
    labels={
        COMPACTER: "Compacter, width 24",
        SEQUENTIAL: "adapters, width 22",
        PARALLEL: "parallel adapters, width 22",
        LORA_5: "LoRA, rank 5",
    },
    pages=("compacter", "adapter"),
    limits=(
        "Layer norms are frozen for all; the published runs of Compacter train them, which alone "
        "would exceed 0.1 % with this model.",
    ),
)

# CorDA's instruction mode against other starts: after a quarter of the steps, and at the end. In
# the setups of the papers lora_alpha is the rank, for all of them.
CORDA = "corda method.r=8 method.lora_alpha=8"
LORA_8 = "lora method.r=8 method.lora_alpha=8"
PISSA = f"{LORA_8} method.init_lora_weights=pissa"
CURVES = replace(
    VERBS,
    name="verbs-curves",
    title=f"{VERBS.title}; the validation loss every 16 of the 188 steps",
    overrides=(*VERBS.overrides, "train.eval_steps=16"),
)
EARLY = loss_at(48, "validation loss after a quarter")
OTHERS = {"LoRA": LORA_8, "PiSSA": PISSA}

START = Claim(
    name="corda",
    title="CorDA in instruction mode learns faster than LoRA and PiSSA",
    paper="Yang et al. 2024, arXiv:2406.05223",
    paper_says="Llama-2-7B, rank 128: started from components that are oriented by samples of the "
    "task, CorDA has lower losses early in training and higher scores at its end than LoRA and "
    "PiSSA (GSM8k: 54.6 %, LoRA 42.7 %, as the authors publish; 53.5 %, PiSSA 51.6 %, in the "
    "example of PEFT).",
    statements=(
        *(
            Statement(f"in the end, CorDA beats {name}", "beats", CORDA, words, paper=gain)
            for (name, words), gain in zip(OTHERS.items(), (11.9, 1.8), strict=True)
        ),
        *(
            Statement(
                f"after a quarter of the steps, CorDA has a lower loss than {name}",
                "beats",
                CORDA,
                words,
                margin=0.02,
                measure=EARLY,
            )
            for name, words in OTHERS.items()
        ),
    ),
    setting=CURVES,
    labels={CORDA: "CorDA, instruction mode", LORA_8: "LoRA", PISSA: "PiSSA"},
    pages=("corda",),
    limits=(
        "Rank 8 instead of 128. The updates of all three have the scale 1, as in the papers' "
        "setups, where lora_alpha is the rank; petl's default for LoRA is 2.",
        "The test rows are scored with the best of the 12 checkpoints on the validation rows; "
        "learning rates are chosen by the last one. The losses are in nats, on validation rows.",
    ),
)

# Methods that were added later
PREGATED = f"{EVEN} method.router_type=pregated"
DSEE = "dsee method.init_seed={seed}"  # of the places of its entries
PRUNED = f"{DSEE} method.target_prune_ratio=0.2 method.prune_step=0.33"
# SHERL has 370,850 parameters; rank 53 in one block has 366,336. LoRA in the last block alone needs
# no backward pass below it either: that is what SHERL has to exceed.
SHERL, LORA = "sherl method.reduction_factor=4", "lora"
LAST = "lora method.layers_to_transform=[5]"
LAST_53 = f"{LAST} method.r=53 method.lora_alpha=106"

LATER = Claim(
    name="later",
    title="Methods that were added later: pre-gated routers, DSEE, SHERL",
    paper="Cai et al. 2024 (Read-ME), arXiv:2410.19123; Chen et al. 2023 (DSEE), "
    "arXiv:2111.00160; Diao et al. 2024 (SHERL), arXiv:2407.07523",
    paper_says="Read-ME: a router that decides before the first layer costs no quality. DSEE: a "
    "low-rank update with free entries keeps its score when base weights are pruned by it. SHERL: "
    "without a backward pass through the frozen blocks, scores are comparable with those of "
    "methods that need it.",
    statements=(
        Statement("a pre-gated router is no worse than linear ones", "no_worse", PREGATED, EVEN),
        Statement(
            "DSEE with 20 % of the target weights pruned is no worse than DSEE",
            "no_worse",
            PRUNED,
            DSEE,
        ),
        Statement("SHERL is no worse than LoRA", "no_worse", SHERL, LORA),
        Statement("SHERL beats LoRA in the last block", "beats", SHERL, LAST),
        Statement("SHERL beats LoRA of equal size in the last block", "beats", SHERL, LAST_53),
    ),
    setting=VERBS,
    labels={
        PREGATED: "MoLA, pre-gated router",
        EVEN: "MoLA, linear routers",
        DSEE: "DSEE",
        PRUNED: "DSEE, 20 % pruned",
        SHERL: "SHERL",
        LORA: "LoRA, rank 8",
        LAST: "LoRA, rank 8, last block",
        LAST_53: "LoRA, rank 53, last block",
    },
    pages=("mola", "dsee", "sherl"),
    limits=(
        "One of the five runs of SHERL reached 43.9 %, the others 49.0 to 51.3 %, which widens its "
        "intervals.",
    ),
    shown=(Shown("Load of the experts, pre-gated router", PREGATED, "expert_load"),),
)
