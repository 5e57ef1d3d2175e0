"""LoRA is PEFT's own: nothing of it is written again, it is only made safe to ask for.

Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", ICLR (arXiv:2106.09685). Every
variant that `peft.LoraConfig` offers is reachable through its fields. LoRA+ is Hayou et al. 2024,
"LoRA+: Efficient Low Rank Adaptation of Large Models", ICML (arXiv:2402.12354).
"""

from functools import partial
from typing import Any

import peft
from peft import PeftModel
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import nn
from torch.optim import Optimizer

from petl.core.layers.layer import is_lora_b
from petl.core.registry import adopt, no_calibration
from petl.core.spec.method import Finish, modifies_base_weights
from petl.errors import InputError


def calibrated(config: Any) -> str:
    """Which start of PEFT's looks at data, if this config has one of those."""
    start = config.init_lora_weights
    return f"init_lora_weights={start!r}" if start in ("eva", "lora_ga") else ""


def dense_start(config: Any) -> str:
    """Why this config's start cannot be had where the weights are not whole and dense."""
    start = config.init_lora_weights
    if not modifies_base_weights(config) and not calibrated(config):
        return ""
    return f"init_lora_weights={start!r} needs the base model's weights whole and dense"


DENSE_START = dict.fromkeys(("fsdp", "4bit", "8bit", "torchao"), dense_start)


def begin(model: nn.Module, config: Any, calibration: Any) -> Finish | None:
    """Refuse what PEFT only warns of, and run the starts that it leaves to the caller."""
    start = config.init_lora_weights
    if (
        modifies_base_weights(config)
        and config.use_rslora
        and (config.rank_pattern or config.alpha_pattern)
    ):
        raise InputError(
            f"init_lora_weights={start!r} with use_rslora=true and rank_pattern "
            "or alpha_pattern cannot be saved relative to the original base; drop one of them"
        )
    if not calibrated(config):
        return None
    if calibration is None:
        raise no_calibration(calibrated(config))
    if start == "eva":  # PEFT would skip it without a word
        return partial(peft.initialize_lora_eva_weights, dataloader=calibration)
    if config.lora_ga_config is None:
        config.lora_ga_config = peft.LoraGAConfig()

    def backward_over_calibration() -> None:
        for batch in calibration:
            model(**batch).loss.backward()

    peft.preprocess_loraga(model, config, backward_over_calibration)
    return None


def loraplus_optimizer(
    model: PeftModel,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
    **opt_kwargs: Any,
) -> Optimizer:
    """An optimizer whose B matrices learn `loraplus_lr_ratio` times as fast as A (LoRA+).

    B matrices are found by the parameter's name (see `petl.core.layers.layer.is_lora_b`), so
    methods of petl with low-rank pairs are served as well as PEFT's.
    """
    optimizer = create_loraplus_optimizer(
        model,
        optimizer_cls,
        lr=lr,
        loraplus_lr_ratio=loraplus_lr_ratio,
        loraplus_weight_decay=loraplus_weight_decay,
        loraplus_lr_embedding=loraplus_lr_embedding,
        **opt_kwargs,
    )
    ours = {id(p) for name, p in model.named_parameters() if is_lora_b(name)}
    slow, _, fast, _ = optimizer.param_groups  # A, embeddings, B, B without decay
    fast["params"] += [p for p in slow["params"] if id(p) in ours]  # those PEFT has no name for
    slow["params"] = [p for p in slow["params"] if id(p) not in ours]
    return optimizer


def lorafa_optimizer(model: PeftModel, **kwargs: Any) -> Optimizer:
    """LoRA-FA's optimizer, PEFT's `create_lorafa_optimizer`: A is frozen, B trains."""
    return create_lorafa_optimizer(model, **kwargs)


adopt(
    "lora",
    peft.LoraConfig,
    summary="a low-rank update beside each frozen weight; the baseline (PEFT's own)",
    paper="Hu et al. 2022, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685",
    exports_lora=True,
    keeps_base=lambda config: not modifies_base_weights(config),
    calibration=calibrated,
    on_wrap=begin,
    unsupported=DENSE_START,
)
adopt(
    "dora",
    peft.LoraConfig,
    summary="LoRA on the direction of a weight, with a trained magnitude per output",
    paper="Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv:2402.09353",
    exports_lora=True,
    defaults={"use_dora": True},
    keeps_base=lambda config: not modifies_base_weights(config),
    calibration=calibrated,
    on_wrap=begin,
    unsupported={
        **DENSE_START,
        "8bit": "PEFT's DoRA takes the norm of the base weight, which it cannot read here",
        "compile": "it looks at the name of the base layer's class, which breaks the graph",
        "mixed": "PEFT cannot pass adapter_names through DoRA",
    },
)
adopt(
    "rslora",
    peft.LoraConfig,
    summary="LoRA scaled by alpha / sqrt(r), so that larger ranks keep learning",
    paper="Kalajdzievski 2023, A Rank Stabilization Scaling Factor for LoRA, arXiv:2312.03732",
    exports_lora=True,
    defaults={"use_rslora": True},
    keeps_base=lambda config: not modifies_base_weights(config),
    calibration=calibrated,
    on_wrap=begin,
    unsupported=DENSE_START,
)
