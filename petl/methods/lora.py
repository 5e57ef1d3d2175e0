"""LoRA, DoRA and rsLoRA: PEFT's own implementation, with checks of its config, and two optimizers.

Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", ICLR (arXiv:2106.09685). Every
variant that `peft.LoraConfig` supports is available through its fields. LoRA+ is Hayou et al. 2024,
"LoRA+: Efficient Low Rank Adaptation of Large Models", ICML (arXiv:2402.12354); LoRA-FA is Zhang et
al. 2023, arXiv:2308.03303.

What is added to PEFT: initializations that need data run on wrapping, and raise where the data are
missing; settings that PEFT cannot save correctly raise an error.
"""

from functools import partial
from typing import Any

import peft
from accelerate.utils import send_to_device
from peft import PeftModel
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch.optim import Optimizer

from petl.core.layers.layer import is_lora_b
from petl.core.layers.wrappers import factors_of_experts
from petl.core.method import Finish, WrapContext
from petl.core.model.targets import resolve_targets
from petl.core.parameters import check_module
from petl.core.registry import adopt, no_calibration
from petl.core.spec.components import Components, Ordered
from petl.core.spec.facts import facts_of, modifies_base_weights
from petl.core.support import BASES, Capability
from petl.errors import InputError


def data_driven_initialization(config: peft.LoraConfig) -> str:
    """The setting of this config that needs calibration data, as `name=value`, or ""."""
    init = config.init_lora_weights
    return f"init_lora_weights={init!r}" if init in ("eva", "lora_ga") else ""


def needs_dense_weights(config: peft.LoraConfig) -> str:
    """The reason why this config needs unsharded, unquantized base weights, or ""."""
    init = config.init_lora_weights
    if not modifies_base_weights(config) and not data_driven_initialization(config):
        return ""
    return f"init_lora_weights={init!r} needs unsharded, unquantized base weights"


def needs_whole_tensors(config: peft.LoraConfig) -> str:
    """The reason why FSDP1 must not shard a model with an adapter of this config, or ""."""
    return needs_dense_weights(config) or factors_of_experts(config)


DENSE_WEIGHTS = dict.fromkeys((Capability.FSDP, *BASES), needs_dense_weights)


def adapts_a_weight(config: peft.LoraConfig) -> str:
    """Return why its layers take no batches of several adapters; "": they do."""
    names = facts_of(config).target_parameters or ()
    # of a router that is no linear layer; layers of stacked experts tell rows apart
    name = next((each for each in names if each.rpartition(".")[2] == "weight"), None)
    if name is None:
        return ""
    return (
        f"target_parameters={name!r} adapts a parameter for all rows of a batch; leave it out, "
        "or use one adapter at a time"
    )


OF_ROWS = dict.fromkeys((Capability.MIXED_BATCH, Capability.TOGETHER), adapts_a_weight)
OF_LORA = {**DENSE_WEIGHTS, **OF_ROWS, Capability.FSDP1: needs_whole_tensors}


def initialize(c: WrapContext[peft.LoraConfig]) -> Finish | None:
    """Run the initializations that PEFT leaves to the caller; called before wrapping.

    Returns:
        For EVA, a function to call on the wrapped model; otherwise None.

    Raises:
        InputError: calibration data are missing, or the adapter could not be saved relative to the
            original base weights (PEFT only warns).
    """
    model, config, calibration = c.model, c.config, c.calibration
    init = config.init_lora_weights
    if (
        # PEFT converts the adapter on saving, and cannot do so with these settings
        modifies_base_weights(config)
        and config.use_rslora
        and (config.rank_pattern or config.alpha_pattern)
    ):
        raise InputError(
            f"init_lora_weights={init!r} with use_rslora=true and rank_pattern "
            "or alpha_pattern cannot be saved relative to the original base; drop one of them"
        )
    if not data_driven_initialization(config):
        return None
    if calibration is None:
        raise no_calibration(data_driven_initialization(config))
    if callable(calibration):
        raise InputError(
            f"calibration={calibration!r} is a function, and init_lora_weights={init!r} reads "
            "batches: pass a list of them, or a DataLoader"
        )
    if init == "eva":  # PEFT would silently skip it
        return partial(initialize_eva, calibration=calibration)
    if config.lora_ga_config is None:  # PEFT requires one
        config.lora_ga_config = peft.LoraGAConfig()

    resolve_targets(config, model, words=("all-linear",))  # PEFT reads a word as an expression
    device = next(model.parameters()).device

    def backward_over_calibration() -> None:  # LoRA-GA reads the accumulated gradients
        batch = None
        for batch in calibration:
            on_device = send_to_device(dict(batch), device)
            model(**on_device).loss.backward()  # gradients accumulate over batches
        if batch is None:
            raise no_batches("lora_ga")

    # stores gradients on the layers, which PEFT reads on injection
    peft.preprocess_loraga(model, config, backward_over_calibration)
    return None


def no_batches(start: str) -> InputError:
    """Return the error for calibration data without a batch, which a start at these data reads."""
    return InputError(
        f"calibration has no batches, and init_lora_weights={start!r} reads them: pass a "
        "list of batches or a DataLoader, which may have been read to its end already"
    )


def initialize_eva(model: PeftModel, calibration: Any) -> None:
    """Run EVA's initialization of a model that was just wrapped, and has one adapter."""
    (name,) = model.peft_config  # PEFT's default is the name "default", whatever the adapter's is
    batches = calibration if hasattr(calibration, "__len__") else list(calibration)
    if not len(batches):
        raise no_batches("eva")
    peft.initialize_lora_eva_weights(model, dataloader=batches, adapter_name=name)


def loraplus_optimizer(
    model: PeftModel,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
    **opt_kwargs: object,
) -> Optimizer:
    """An optimizer whose learning rate for B matrices is `loraplus_lr_ratio` times `lr` (LoRA+).

    B matrices are recognized by the parameter's name (see `petl.core.layers.layer.is_lora_b`), so
    this also works with petl's methods that have low-rank pairs.

    Args:
        lr: learning rate of A and of all other matrices. Vectors, such as the bias of a head, have
            that of B, as in PEFT; `train.loraplus_ratio` of `petl train` goes by names alone.
        opt_kwargs: further arguments of `optimizer_cls`.
    """
    check_module(model, "petl.loraplus_optimizer")
    optimizer = create_loraplus_optimizer(
        model,
        optimizer_cls,
        lr=lr,
        loraplus_lr_ratio=loraplus_lr_ratio,
        loraplus_weight_decay=loraplus_weight_decay,
        loraplus_lr_embedding=loraplus_lr_embedding,
        **opt_kwargs,
    )
    B_ids = {id(p) for name, p in model.named_parameters() if is_lora_b(name)}
    group_A, _, group_B, _ = optimizer.param_groups  # A, embeddings, B, B without weight decay
    # PEFT puts B matrices of other names, such as MoS's pool_B_<group>, into A's group
    group_B["params"] += [p for p in group_A["params"] if id(p) in B_ids]
    group_A["params"] = [p for p in group_A["params"] if id(p) not in B_ids]
    return optimizer


def lorafa_optimizer(model: PeftModel, **kwargs: Any) -> Optimizer:
    """PEFT's `create_lorafa_optimizer` (LoRA-FA): A is frozen, B is trained."""
    check_module(model, "petl.lorafa_optimizer")
    return create_lorafa_optimizer(model, **kwargs)


def ordered(config: peft.LoraConfig) -> Ordered:
    """Where the factors have their components, of linear layers, convolutions and embeddings."""
    if facts_of(config).target_parameters:
        return "those of stacked experts alternate in B"
    if modifies_base_weights(config):
        start = config.init_lora_weights
        return f"its start was taken from the base as a whole (init_lora_weights={start})"
    first, second = Components(0), Components(1)
    return {
        "lora_A": first,
        "lora_B": second,
        "lora_embedding_A": first,
        "lora_embedding_B": second,
    }


DATA_DRIVEN = {  # fields of a start, without which PEFT reads none of them
    f"{start}_config": (
        f"init_lora_weights={start}",
        lambda config, start=start: config.init_lora_weights == start,
    )
    for start in ("eva", "corda", "lora_ga")
}
OF_QALORA = {"qalora_group_size": ("use_qalora=true", lambda config: config.use_qalora)}
adopt(
    "lora",
    peft.LoraConfig,
    summary="a low-rank update of each frozen weight; the baseline (PEFT's implementation)",
    need="a strong baseline",
    recommended="merges, runs in every server, the most experience; start here",
    paper="Hu et al. 2022, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685",
    rank="r",
    keeps_base=lambda config: not modifies_base_weights(config),
    needs_data=data_driven_initialization,
    calibrate=initialize,
    acts=DATA_DRIVEN | OF_QALORA,
    components=ordered,
    strength_tensors=("lora_B",),
    lacks=OF_LORA,
)
adopt(
    "dora",
    peft.LoraConfig,
    summary="LoRA on the direction of a weight, with a trained magnitude per output",
    need="a strong baseline",
    paper="Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv:2402.09353",
    rank="r",
    defaults={"use_dora": True},
    keeps_base=lambda config: not modifies_base_weights(config),
    needs_data=data_driven_initialization,
    calibrate=initialize,
    acts=DATA_DRIVEN | OF_QALORA,
    components=ordered,
    lacks={
        **DENSE_WEIGHTS,
        Capability.FSDP1: "it reads its magnitudes outside of the modules that have them, each of "
        "which PEFT's policy wraps by itself",
        Capability.BASE_8BIT: "PEFT's DoRA computes the norm of the base weight, which it cannot "
        "dequantize here",
        Capability.COMPILE: "PEFT's DoRA reads the name of the base layer's class, which breaks "
        "the graph",
        Capability.MIXED_BATCH: "PEFT's DoRA does not support adapter_names",
    },
)
adopt(
    "rslora",
    peft.LoraConfig,
    summary="LoRA scaled by alpha / sqrt(r), which keeps large ranks learning",
    need="a strong baseline",
    paper="Kalajdzievski 2023, A Rank Stabilization Scaling Factor for LoRA, arXiv:2312.03732",
    rank="r",
    defaults={"use_rslora": True},
    keeps_base=lambda config: not modifies_base_weights(config),
    needs_data=data_driven_initialization,
    calibrate=initialize,
    acts=DATA_DRIVEN | OF_QALORA,
    components=ordered,
    strength_tensors=("lora_B",),
    lacks=OF_LORA,
)
