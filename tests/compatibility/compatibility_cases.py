"""The pinned cases, methods with fields on tiny base models, and a hand-written training loop.

Each entry of `ADAPTERS` has a folder of its name in `adapters/`; `losses.json` has the losses of
these, of `PEFT_METHODS` and of `IN_TRAINING`. Recorded files belong to an entry as it is: a new
saved form gets a new entry.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from compatibility_bases import base, batch, formula
from peft import PeftModel

import petl

STEPS = 5  # of the recorded losses
LR = 1e-2
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FEW = ["q_proj", "v_proj", "down_proj"]
GROWS = {"tinit": 0, "deltaT": 1, "top_h": 2, "total_step": 20, "target_modules": FEW}
SHARDS = {"r": 3, "equivalent_rank": 2, "shards_per_vector": 4, "private_rank": 1}
PHASES = {"total_step": 20, "reselection_steps": 2, "selection_accumulation_steps": 1}


@dataclass(frozen=True)
class Case:
    """A method, its fields, and the base model that it adapts.

    Attributes:
        steps: training steps before the adapter is saved.
    """

    base: str
    method: str
    fields: dict[str, Any] = field(default_factory=dict)
    steps: int = 3


def low_rank(**fields: Any) -> dict[str, Any]:
    return {"r": 2, "lora_alpha": 4, "target_modules": FEW, **fields}


ADAPTERS = {
    # PEFT's LoRA, which petl computes in one function after petl.fuse_lora
    "lora": Case("llama", "lora", low_rank(target_modules=LINEAR)),
    "lora-patterns": Case(
        "llama",
        "lora",
        low_rank(
            rank_pattern={"layers.1.self_attn.q_proj": 3, "down_proj": 1},
            alpha_pattern={"layers.1.self_attn.q_proj": 9},
            use_rslora=True,
        ),
    ),
    "lora-modules-to-save": Case(
        "bert",
        "lora",
        {
            "r": 2,
            "target_modules": ["query", "value"],
            "modules_to_save": ["pooler"],
            "task_type": "SEQ_CLS",
        },
    ),
    "lora-conv1d": Case("gpt2", "lora", {"r": 2, "target_modules": ["c_attn", "c_proj"]}),
    # deft: LoRA with the density loss, which writes density.json beside the adapter
    "deft": Case(
        "llama",
        "density",
        {"method_config": {"r": 2, "target_modules": ["q_proj", "v_proj"]}, "eps": 1e-3},
    ),
    "increlora-growing": Case("llama", "increlora", {**GROWS, "target_total_rank": 16}),
    "increlora-grown": Case("llama", "increlora", {**GROWS, "target_total_rank": 9}, steps=6),
    "increlora-without-reserve": Case(
        "gpt2",
        "increlora",
        {
            **GROWS,
            "target_modules": ["c_attn", "c_fc"],
            "init_r": 2,
            "target_r": 3,
            "advance_learn": False,
            "score_norm": "mean",
            "restart_warmup": False,
        },
    ),
    "mola-linear": Case(
        "llama-4-layers", "mola", low_rank(num_experts="2468", target_modules=["v_proj"])
    ),
    "mola-list": Case("llama", "mola", low_rank(num_experts=[2, 3], top_k=1, use_rslora=True)),
    "mola-shape": Case(
        "bert",
        "mola",
        {
            "r": 1,
            "num_experts": "inverted_triangle",
            "target_modules": ["query", "value"],
            "task_type": "SEQ_CLS",
        },
    ),
    "mola-recurrent": Case(
        "llama",
        "mola",
        low_rank(num_experts=3, router_type="recurrent", router_hidden_size=4),
    ),
    "mos": Case("llama", "mos", {**SHARDS, "target_modules": LINEAR}),
    "mos-without-private": Case(
        "llama-4-layers",
        "mos",
        {
            "r": 4,
            "equivalent_rank": 2,
            "shards_per_vector": 2,
            "private_rank": 0,
            "subset_selection": False,
            "pair_dissociation": False,
            "seed": 7,
            "target_modules": ["q_proj", "down_proj"],
        },
    ),
    "mos-of-two-shapes": Case("stack", "mos", {**SHARDS, "target_modules": ["0", "1", "2", "3"]}),
    "adapter": Case("bert", "adapter", {"r": 4, "task_type": "SEQ_CLS"}),
    "adapter-parallel": Case(
        "bert",
        "adapter",
        {
            "r": 4,
            "locations": ["ffn"],
            "placement": "parallel_residual",
            "non_linearity": "relu",
            "scaling": "learned",
            "use_bias": False,
            "task_type": "SEQ_CLS",
        },
    ),
    "adapter-with-norms": Case(
        "llama",
        "adapter",
        {"r": 3, "ln_before": True, "ln_after": True, "placement": "parallel", "scaling": 0.5},
    ),
    "adapter-conformer": Case(
        "bert",
        "adapter",
        {
            "r": 2,
            "locations": ["ffn"],
            "placement": "parallel",
            "block": "conformer",
            "conv_kernel_size": 3,
            "train_layer_norms": True,
            "task_type": "SEQ_CLS",
        },
    ),
    "adapter-cross-attention": Case(
        "t5", "adapter", {"r": 2, "locations": ["attn", "cross_attn", "ffn"]}
    ),
    "adapter-inputs-named": Case(
        "llama",
        "adapter",
        {
            "r": 2,
            "target_modules": ["mlp.down_proj"],
            "placement": "parallel",
            "input_modules": {"mlp.down_proj": "mlp.gate_proj"},
        },
    ),
    "compacter": Case("llama", "compacter", {"r": 8, "phm_dim": 4}),
    "compacter-rules-of-layers": Case(
        "bert",
        "compacter",
        {
            "r": 4,
            "phm_dim": 2,
            "phm_rank": 2,
            "shared_phm_rule": False,
            "factorized_phm_rule": True,
            "task_type": "SEQ_CLS",
        },
    ),
    "compacter-own-rules": Case(
        "llama", "compacter", {"r": 4, "phm_dim": 2, "shared_phm_rule": False}
    ),
    "compacter-full-weights": Case(
        "llama",
        "compacter",
        {"r": 4, "phm_dim": 2, "factorized_phm": False, "factorized_phm_rule": True},
    ),
    "compacter-frozen-rule": Case(
        "llama",
        "compacter",
        {"r": 4, "phm_dim": 2, "learn_phm": False, "phm_c_init": "uniform", "scaling": "learned"},
    ),
    "compacter-lowrank": Case("llama", "compacter", {"r": 4, "projection": "lowrank"}),
    # saved with the names of the inner method and codes and statistics of each weight
    "binary-packed": Case("bert", "binary", {"r": 4, "task_type": "SEQ_CLS"}),
    "binary-packed-8-bits": Case(
        "llama", "binary", {"inner": "compacter", "r": 4, "phm_dim": 2, "bits": 8}
    ),
    "binary-packed-mos": Case(
        "llama", "binary", {"inner": "mos", **SHARDS, "target_modules": FEW, "bits": 2}
    ),
    "binary-packed-head": Case(
        "bert",
        "binary",
        {
            "inner": "lora",
            "r": 2,
            "target_modules": ["query", "value"],
            "head_bits": 4,
            "task_type": "SEQ_CLS",
        },
    ),
    "binary-packed-some": Case(
        "llama", "binary", {"inner": "lora", **low_rank(), "exclude_params": ["lora_A"], "bits": 4}
    ),
    "binary-stacked": Case(
        "llama",
        "binary",
        {"inner": "lora", **low_rank(target_modules=LINEAR), "save_format": "stacked"},
    ),
    "binary-stacked-mola": Case(
        "llama",
        "binary",
        {"inner": "mola", **low_rank(num_experts=2), "bits": 2, "save_format": "stacked"},
    ),
    "binary-stacked-mos": Case(
        "llama",
        "binary",
        {"inner": "mos", **SHARDS, "target_modules": FEW, "save_format": "stacked"},
    ),
    "binary-stacked-head": Case(
        "bert",
        "binary",
        {"r": 4, "head_bits": 1, "save_format": "stacked", "task_type": "SEQ_CLS"},
    ),
    "binary-latent": Case(
        "llama", "binary", {"inner": "lora", **low_rank(), "save_format": "latent"}
    ),
    "sparse": Case("llama", "sparse", {**PHASES, "density": 0.02, "target_modules": LINEAR}),
    "sparse-sm3": Case(
        "llama",
        "sparse",
        {**PHASES, "r": 1, "selection_algorithm": "sm3", "target_modules": FEW},
    ),
    "sparse-conv1d": Case(
        "gpt2",
        "sparse",
        {**PHASES, "num_tunable_weights": 60, "target_modules": ["c_attn", "c_fc", "c_proj"]},
    ),
    "sparse-fixed": Case(
        "bert",
        "sparse",
        {
            "num_tunable_weights": 40,
            "selection_algorithm": "none",
            "target_modules": ["query", "value"],
            "task_type": "SEQ_CLS",
        },
    ),
    # saved as a plain LoRA of twice the rank: what was trained, and the negative of its start
    "corda": Case("llama", "corda", low_rank(target_modules=LINEAR)),
    "corda-kpm": Case(
        "llama",
        "corda",
        low_rank(corda_method="kpm", use_rslora=True, rank_pattern={"down_proj": 3}),
    ),
    "corda-budget": Case(
        "gpt2",
        "corda",
        {"r": 2, "corda_method": "kpm", "rank_budget": 400, "target_modules": ["c_attn", "c_fc"]},
    ),
}

# small scales: at PEFT's own these few numbers saturate the attention, and gradients are rounding
PEFT_METHODS = {
    "adalora": Case(
        "llama",
        "adalora",
        {
            "init_r": 4,
            "target_r": 2,
            "tinit": 1,
            "tfinal": 1,
            "deltaT": 1,
            "total_step": STEPS,
            "target_modules": LINEAR,
        },
    ),
    "boft": Case("llama", "boft", {"boft_block_size": 4, "target_modules": LINEAR}),
    "c3a": Case("llama", "c3a", {"block_size": 8, "target_modules": LINEAR}),
    "delora": Case("llama", "delora", {"r": 2, "target_modules": LINEAR}),
    "dora": Case("llama", "dora", low_rank(target_modules=LINEAR)),
    "fourierft": Case(
        "llama", "fourierft", {"n_frequency": 20, "scaling": 10.0, "target_modules": LINEAR}
    ),
    "hra": Case("llama", "hra", {"r": 2, "target_modules": LINEAR}),
    "ia3": Case(
        "llama",
        "ia3",
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "ln_tuning": Case(
        "llama", "ln_tuning", {"target_modules": ["input_layernorm", "post_attention_layernorm"]}
    ),
    "loha": Case("llama", "loha", {"r": 2, "target_modules": LINEAR}),
    "lokr": Case("llama", "lokr", {"r": 2, "target_modules": LINEAR}),
    "miss": Case("llama", "miss", {"r": 4, "target_modules": LINEAR}),
    "oft": Case("llama", "oft", {"oft_block_size": 4, "target_modules": LINEAR}),
    "randlora": Case("llama", "randlora", {"r": 4, "randlora_alpha": 8, "target_modules": LINEAR}),
    "rslora": Case("llama", "rslora", low_rank(target_modules=LINEAR)),
    "shira": Case("llama", "shira", {"r": 1, "target_modules": LINEAR}),
    "vblora": Case(
        "llama",
        "vblora",
        {"r": 2, "num_vectors": 16, "vector_length": 8, "topk": 2, "target_modules": LINEAR},
    ),
    "vera": Case("llama", "vera", {"r": 8, "target_modules": LINEAR}),
}

# losses only: LoRA in petl's fused layers, dropout, and a loss over another method
IN_TRAINING = {
    "lora-fused": Case("llama", "lora", low_rank(target_modules=LINEAR)),
    "lora-fused-dropout": Case("llama", "lora", low_rank(lora_dropout=0.2)),
    "mola-dropout": Case(
        "llama", "mola", low_rank(num_experts=3, lora_dropout=0.2, router_aux_loss_coef=0.1)
    ),
    "mos-dropout": Case("llama", "mos", {**SHARDS, "target_modules": FEW, "lora_dropout": 0.2}),
    "increlora-dropout": Case("llama", "increlora", {**GROWS, "lora_dropout": 0.2}),
    "density-on-mola": Case(
        "llama",
        "density",
        {"method": "mola", "method_config": low_rank(num_experts=3), "eps": 1e-2},
    ),
}
LOSSES = {**ADAPTERS, **PEFT_METHODS, **IN_TRAINING}
METHODS = petl.list_methods()  # before other tests of this process register methods of their own
BASES = {case.base for case in ADAPTERS.values()}


def wrap(name: str) -> PeftModel:
    """The base model of a case with a new adapter, the same each time, in train mode."""
    case, extra = LOSSES[name], {}
    if case.method == "corda":
        extra["calibration"] = [batch(case.base, number) for number in range(10, 14)]
    torch.manual_seed(0)
    model = petl.wrap(base(case.base), case.method, **extra, **case.fields)
    if name.startswith("lora-fused"):
        petl.fuse_lora(model)
    return model.train()


@torch.no_grad()
def stir(model: PeftModel) -> PeftModel:
    """`model` with noise in every trainable tensor, so that each has an effect on the logits."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * formula(name, *parameter.shape))
    return model


def train(model: PeftModel, base_name: str, steps: int) -> list[float]:
    """The loss of each step of a loop written by hand, as the README shows it."""
    life = petl.lifecycle(model)
    batches = [batch(base_name, number) for number in range(steps)]
    life.prepare(batches)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": trained, "lr": LR, "weight_decay": 0.0}]
    optimizer = life.make_optimizer(groups) or torch.optim.AdamW(groups)
    life.attach_optimizer(optimizer, total_steps=max(steps, 20))
    losses = []
    for step, inputs in enumerate(batches, 1):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        life.after_step(step, optimizer)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


# The command of the README, short; batches and their order are those of all 4,000 rows
QUICKSTART = [
    "+method=mola",
    "train.steps=3",
    "train.log_steps=1",
    "train.save_steps=null",
    "train.frozen_head=false",
    "data.test_rows=16",
]


def losses(name: str) -> list[float]:
    """The losses of the first `STEPS` steps of a case."""
    return train(stir(wrap(name)), LOSSES[name].base, STEPS)
