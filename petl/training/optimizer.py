"""The optimizer: parameter groups, the learning rate of each step, and the engine around it."""

import math
from dataclasses import replace

import torch
from accelerate import Accelerator
from peft import PeftConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.optim import AdamW, Optimizer

from petl.core.layers.layer import is_lora_b
from petl.core.lifecycle import Lifecycle
from petl.core.parameters import is_norm, trainable
from petl.core.registry import method_of
from petl.errors import InputError
from petl.training.distributed.launch import StepEngine, is_zero
from petl.training.runs.settings import TrainConfig

BEGIN_AT_BASE = ("trainable_tokens_delta", "ia3_l", "boft_s")  # tensors that are not 0 in the base


def make_optimizer(
    model: nn.Module, settings: TrainConfig, lifecycle: Lifecycle | None = None
) -> Optimizer:
    """Return the optimizer of everything trainable in `model`: the one that its method needs, if
    any, else that of the settings.

    Trainable tensors are cast to float32. The head that PEFT copies from a bfloat16 base is
    bfloat16, where most of an AdamW step is lost to rounding; the loop computes under autocast.

    Raises:
        InputError: nothing is trainable, or a setting would have no effect; AdamR was chosen for a
            method that needs another optimizer.
    """
    for _, parameter in trainable(model):
        parameter.data = parameter.data.float()
    is_adamr = settings.optimizer == "adamr"
    parts = groups(model, replace(settings, weight_decay=0.0) if is_adamr else settings)
    first, second = settings.betas
    parts = [{**part, "betas": (first, second)} for part in parts]
    # sparse fine-tuning needs SM3, whose accumulators select the entries that train
    own = None if lifecycle is None else lifecycle.make_optimizer(parts)
    if own is not None and is_adamr:
        raise InputError(
            f"train.optimizer=adamr is not possible: this method needs {type(own).__name__}; leave "
            "train.optimizer out"
        )
    if own is not None:
        return own
    if is_adamr:
        # not imported by runs with the default
        from petl.training.adamr import AdamR

        decay, norm = settings.delta_decay, settings.delta_norm
        return AdamR(parts, settings.lr, delta_decay=decay, delta_norm=norm)
    return AdamW(parts, lr=settings.lr, fused=True)


def groups(model: nn.Module, settings: TrainConfig) -> list[dict]:
    """Return parameter groups: learning rate by role (adapter, lora_B, head), decay for matrices.

    A method may have a learning rate of its own for some tensors.

    Initial values taken from base weights (CorDA, PiSSA) do not decay: decay towards 0 would move
    the model away from the pretrained one; nor do scores (PST). `set_lr` scales the `initial_lr` of
    a group.

    Raises:
        InputError: nothing is trainable, or `loraplus_ratio` has no effect.
    """
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    names, heads, life = [], head_names(model), None
    is_fixed = isinstance(model, PeftModel) and not _decays(model.active_peft_config)
    if isinstance(model, PeftModel):
        life = Lifecycle(model)
    for name, parameter in trainable(model):
        names.append(name)
        has_decay = decays(name, parameter) and (name in heads or not is_fixed)
        decay = settings.weight_decay if has_decay else 0.0
        own = None if life is None else life.learning_rate_of(name)
        peak = peak_lr(name, settings, heads) if own is None else own
        # few groups: one fused kernel per group and step
        found.setdefault((peak, decay), []).append(parameter)
    if not names:
        raise InputError(
            f"{type(model).__name__} has no trainable parameter: check the method's fields, which "
            "`petl show METHOD` lists"
        )
    if settings.loraplus_ratio is not None and not any(is_lora_b(name) for name in names):
        raise InputError(
            f"train.loraplus_ratio={settings.loraplus_ratio:g} has no effect: it needs tensors "
            "named lora_B, and this method has none; set it to null"
        )
    return [
        {"params": tensors, "lr": lr, "initial_lr": lr, "weight_decay": decay}
        for (lr, decay), tensors in found.items()
    ]


def _decays(config: PeftConfig) -> bool:
    """Return True if weight decay applies to the matrices of an adapter of this config."""
    entry = method_of(config)
    return entry is None or (entry.decays and entry.keeps_base(config))


def head_names(model: nn.Module) -> set[str]:
    """Return the names of tensors in fully trained modules, without norms of the backbone.

    Those norms are pretrained, so they train with the adapter's learning rate.
    """
    wrappers = {n: m for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    heads = {name: module for name, module in wrappers.items() if not is_norm(module)}
    return {f"{name}.{key}" for name, head in heads.items() for key, _ in head.named_parameters()}


def peak_lr(name: str, settings: TrainConfig, heads: set[str]) -> float:
    """Return the peak learning rate of the tensor `name`; `heads` names those of the head."""
    if name in heads:
        return settings.head_lr or settings.lr
    return settings.lr * (settings.loraplus_ratio or 1.0) if is_lora_b(name) else settings.lr


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Return True for tensors with weight decay: matrices, and `values`, a sparse one.

    Rows of tokens are weights of the base, not what is added to them; scales begin at 1, and PEFT
    has those of IA3 and BOFT as matrices of one row or column.
    """
    begins_at_base = any(f".{kind}." in name for kind in BEGIN_AT_BASE)
    return (parameter.dim() > 1 and not begins_at_base) or name.endswith(".values")


def fraction_of_peak(step: int, total: int, warmup: int, schedule: str) -> float:
    """Return the fraction of its peak that a learning rate has at `step`, from 1 to `total`.

    It rises over `warmup` steps and is 1 at the last of them and at the next step.
    """
    if step <= warmup:
        return step / warmup
    # 0 at the first step after the warm-up, below 1 at the last step: no step has rate 0
    progress = (step - 1 - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return 1.0 - progress
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0


def set_lr(optimizer: Optimizer, fraction: float) -> None:
    """Set every group's learning rate to a fraction of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * fraction


@torch.no_grad()
def all_finite(model: nn.Module, optimizer: Optimizer) -> bool:
    """Return True if all trainable and all optimizer tensors are finite; synchronizes once."""
    tensors = [p for _, p in trainable(model)]
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    # a sum is finite if all terms are; a sum that overflows float32 means divergence as well
    sums = [t.sum(dtype=torch.float32).to(tensors[0].device) for t in (*tensors, *state)]
    return bool(torch.stack(sums).isfinite().all())


def make_engine(
    model: PeftModel, optimizer: Optimizer, max_norm: float | None, accelerator: Accelerator
) -> StepEngine:
    """Return the engine for the run's `launch`."""
    if is_zero(accelerator):
        # DeepSpeed is an optional package
        from petl.training.distributed.deepspeed import ZeroEngine

        return ZeroEngine(model, optimizer, max_norm, accelerator)
    return StepEngine(model, optimizer, max_norm, accelerator)
