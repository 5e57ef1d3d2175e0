"""Registration of PEFT's own methods, so that they train with petl like its own.

Each entry adds to PEFT's config: summary, paper, checks of values, and the features that PEFT's
tuner does not support. Settings for training are in configs/method/NAME.yaml.
"""

import peft

from petl.core.registry import adopt
from petl.core.support import BASES, NO_CONVERSION, Capability
from petl.methods.adopted.values import (
    check_adalora,
    check_boft,
    check_delora,
    check_fourierft,
    check_hra,
    check_lokr,
    check_miss,
    check_oft,
    check_shira,
    check_vblora,
    check_vera,
    fit_boft,
    fit_c3a,
    fit_fourierft,
    fit_miss,
    fit_oft,
    fit_shira,
    fit_vblora,
)

# Features that PEFT's tuners do not support, found by running the contract tests on PEFT 0.21.2.
IGNORES_NAMES = {
    Capability.MIXED_BATCH: "PEFT ignores adapter_names and computes with the active adapter"
}
NO_LORA = {Capability.LORA_EXPORT: NO_CONVERSION}
HOST_DROPOUT = "PEFT draws its module dropout on the host, which breaks the graph"
DENSE = "PEFT reads the base weight as a dense matrix; leave model.quantization unset"

adopt(
    "adalora",
    peft.AdaLoraConfig,
    summary="LoRA that prunes the least important ranks during training",
    need="capacity where it is needed",
    paper="Zhang et al. 2023, Adaptive Budget Allocation for PEFT, ICLR, arXiv:2303.10512",
    check=check_adalora,
    rank="init_r",
    lacks={
        **NO_LORA,
        Capability.FSDP: "it masks complete triplets, and FSDP shards them; launch it with ddp",
        Capability.FSDP1: "it masks complete triplets, and FSDP1 shards them; launch it with ddp",
        Capability.ZERO: "it masks ranks by gradients, which ZeRO has already freed; launch it "
        "with ddp",
        Capability.EXTRA_LOSS: (
            "PEFT's AdaLoraModel calls model.forward and so bypasses its forward hooks; choose "
            "another method, such as increlora"
        ),
        Capability.COMPILE: "its forward pass changes requires_grad, which breaks the graph",
        Capability.MIXED_BATCH: "PEFT's AdaLoRA trains one adapter at a time and does not support "
        "mixed batches",
    },
)
adopt(
    "ia3",
    peft.IA3Config,
    summary="learned scales on keys, values and feed-forward activations; very few parameters",
    need="few parameters",
    paper="Liu et al. 2022, Few-Shot PEFT is Better and Cheaper than ICL, arXiv:2205.05638",
    lr=3e-2,  # measured on the task of the other defaults, less carefully; its scales start at 1
    lacks=IGNORES_NAMES | NO_LORA,
)
adopt(
    "vera",
    peft.VeraConfig,
    summary="frozen random low-rank pairs shared by all layers, with trained scaling vectors",
    need="few parameters",
    paper="Kopiczko et al. 2024, VeRA: Vector-based Random Matrix Adaptation, arXiv:2310.11454",
    check=check_vera,
    lacks=IGNORES_NAMES,
)
adopt(
    "loha",
    peft.LoHaConfig,
    summary="elementwise product of two low-rank updates",
    need="updates of high rank",
    paper="Hyeon-Woo et al. 2022, FedPara, ICLR, arXiv:2108.06098",
    rank="r",
    lacks={**IGNORES_NAMES, Capability.BASE_4BIT: DENSE, Capability.COMPILE: HOST_DROPOUT},
)
adopt(
    "lokr",
    peft.LoKrConfig,
    summary="Kronecker product of two small matrices as the update",
    need="few parameters",
    paper="Yeh et al. 2024, Navigating Text-to-Image Customization (LyCORIS), arXiv:2309.14859",
    check=check_lokr,
    lacks={**IGNORES_NAMES, Capability.BASE_4BIT: DENSE, Capability.COMPILE: HOST_DROPOUT},
)
adopt(
    "oft",
    peft.OFTConfig,
    summary="rotates the output of each weight by block-diagonal orthogonal matrices",
    need="keeping what the model knows",
    paper="Qiu et al. 2023, Controlling Text-to-Image Diffusion by Orthogonal FT, arXiv:2306.07280",
    check=check_oft,
    acts={"num_cayley_neumann_terms": ("use_cayley_neumann=true", lambda c: c.use_cayley_neumann)},
    fit=fit_oft,
    lacks=IGNORES_NAMES | NO_LORA,
)
adopt(
    "boft",
    peft.BOFTConfig,
    summary="orthogonal rotation factored like a butterfly network",
    need="keeping what the model knows",
    paper="Liu et al. 2024, PEFT via Butterfly Factorization, ICLR, arXiv:2311.06243",
    check=check_boft,
    fit=fit_boft,
    lacks=IGNORES_NAMES | NO_LORA,
)
adopt(
    "hra",
    peft.HRAConfig,
    summary="a chain of Householder reflections before each weight",
    need="keeping what the model knows",
    paper="Yuan et al. 2024, Bridging Low-Rank and Orthogonal Adaptation, arXiv:2405.17484",
    rank_step=2,  # reflections come in pairs
    check=check_hra,
    rank="r",
    lacks={**NO_LORA, **IGNORES_NAMES, **dict.fromkeys(BASES, DENSE)},
)
adopt(
    "vblora",
    peft.VBLoRAConfig,
    summary="low-rank factors composed from a bank of vectors shared by all layers",
    need="a small file",
    paper="Li et al. 2024, VB-LoRA: Extreme PEFT with Vector Banks, arXiv:2405.15179",
    check=check_vblora,
    fit=fit_vblora,
    rank="r",
    lacks={
        **IGNORES_NAMES,
        Capability.FSDP: "PEFT registers its vector bank on every layer, which FSDP2 cannot shard",
        Capability.FSDP1: "PEFT registers its vector bank on every layer, and FSDP1 shards one",
        Capability.COMPILE: "it checks for infinite logits on the host, which breaks the graph",
    },
)
adopt(
    "fourierft",
    peft.FourierFTConfig,
    summary="a few trained Fourier coefficients of the update",
    need="few parameters",
    paper="Gao et al. 2024, PEFT with Discrete Fourier Transform, arXiv:2405.03003",
    check=check_fourierft,
    fit=fit_fourierft,
    lacks=IGNORES_NAMES,
)
adopt(
    "randlora",
    peft.RandLoraConfig,
    summary="full-rank update from scaled combinations of frozen random bases",
    need="updates of high rank",
    paper="Albert et al. 2025, RandLoRA: Full-Rank PEFT of Large Models, arXiv:2502.00987",
    lacks=IGNORES_NAMES,
)
adopt(
    "shira",
    peft.ShiraConfig,
    summary="trains a fixed random 1 to 2 % of the weights",
    need="a few single weights",
    paper="Bhardwaj et al. 2024, Sparse High Rank Adapters, NeurIPS, arXiv:2406.13175",
    check=check_shira,
    fit=fit_shira,
    lacks={
        **NO_LORA,
        **IGNORES_NAMES,
        Capability.COMPILE: "it creates a sparse tensor, which breaks the graph",
    },
)
adopt(
    "miss",
    peft.MissConfig,
    summary="one small matrix per weight, expanded over shards of the input",
    need="updates of high rank",
    paper="Kang and Yin 2024, MiSS: Matrix Shard Sharing, arXiv:2409.15371",
    check=check_miss,
    acts={"mini_r": ("init_weights=mini", lambda config: config.init_weights == "mini")},
    fit=fit_miss,
    lacks=IGNORES_NAMES,
)
adopt(
    "ln_tuning",
    peft.LNTuningConfig,
    summary="trains the layer norms only",
    need="few parameters",
    paper="Zhao et al. 2024, Tuning LayerNorm in Attention, ICLR, arXiv:2312.11420",
    lacks=IGNORES_NAMES | NO_LORA,
)
adopt(
    "delora",
    peft.DeloraConfig,
    summary="normalized low-rank update whose strength is trained apart from its direction",
    need="a strong baseline",
    paper="Bini et al. 2025, DeLoRA: Decoupling Angles and Strength, arXiv:2503.18225",
    check=check_delora,
    rank="r",
    lacks={**IGNORES_NAMES, **dict.fromkeys(BASES, DENSE)},
)
adopt(
    "c3a",
    peft.C3AConfig,
    summary="block-circular convolutions as the update",
    need="updates of high rank",
    paper="Chen et al. 2024, PEFT via Circular Convolution, arXiv:2407.19342",
    fit=fit_c3a,
    lacks=IGNORES_NAMES,
)
