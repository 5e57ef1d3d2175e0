"""What the optimizer is given: the trainable tensors in groups, and the rate of each step."""

import math

import torch
from accelerate import Accelerator
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.optim import AdamW, Optimizer

from petl.core.layers.layer import is_lora_b
from petl.core.lifecycle import Lifecycle
from petl.core.model.structure import is_norm
from petl.core.parameters import trainable
from petl.core.registry import keeps_base
from petl.distributed.engine import Engine
from petl.distributed.launch import is_zero
from petl.errors import InputError
from petl.runs.settings import TrainConfig


def make_optimizer(
    model: nn.Module, settings: TrainConfig, life: Lifecycle | None = None
) -> Optimizer:
    """AdamW over everything trainable in `model`, in float32, or what its method insists on.

    A bf16 base leaves the head that PEFT copies from it in bf16, where a step of AdamW is mostly
    rounded away: it is raised to float32 here, and the loop computes under autocast.

    Raises:
        InputError: nothing is trainable, or a setting would be without effect.
    """
    for _, parameter in trainable(model):
        parameter.data = parameter.data.float()
    parts = groups(model, settings)
    own = None if life is None else life.make_optimizer(parts)
    if own is not None:
        return own
    first, second = settings.betas
    return AdamW(parts, lr=settings.lr, betas=(first, second), fused=True)


def groups(model: nn.Module, settings: TrainConfig) -> list[dict]:
    """Parameter groups: rates by role (adapter, LoRA+'s B, head), decay for matrices only.

    Factors that were split off the base weight (CorDA, PiSSA) do not decay: towards 0 is away from
    the pretrained model.

    The rate stands as `initial_lr` too, which `set_rates` scales.
    """
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    names, heads = [], head_names(model)
    is_split = isinstance(model, PeftModel) and not keeps_base(model.active_peft_config)
    for name, parameter in trainable(model):
        names.append(name)
        shrinks = decays(name, parameter) and (name in heads or not is_split)
        decay = settings.weight_decay if shrinks else 0.0
        found.setdefault((rate(name, settings, heads), decay), []).append(parameter)
    if not names:
        raise InputError("the method leaves nothing to train; look at its fields with `petl show`")
    if settings.loraplus_ratio is not None and not any(is_lora_b(name) for name in names):
        raise InputError(
            f"train.loraplus_ratio={settings.loraplus_ratio:g} is for methods with tensors called "
            "lora_B, and this one has none; set it to null"
        )
    return [
        {"params": tensors, "lr": lr, "initial_lr": lr, "weight_decay": decay}
        for (lr, decay), tensors in found.items()
    ]


def head_names(model: nn.Module) -> set[str]:
    """The tensors of modules that are trained whole and are no norms of the backbone.

    Those norms start from what was learned before, and so they keep to the adapter's rate.
    """
    wrappers = {n: m for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    heads = {name: module for name, module in wrappers.items() if not is_norm(module)}
    return {f"{name}.{key}" for name, head in heads.items() for key, _ in head.named_parameters()}


def rate(name: str, settings: TrainConfig, heads: set[str]) -> float:
    """The peak learning rate of the tensor called `name`; `heads` are those of the head."""
    if name in heads:
        return settings.head_lr or settings.lr
    return settings.lr * (settings.loraplus_ratio or 1.0) if is_lora_b(name) else settings.lr


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay acts on a tensor: on matrices, and on `values`, entries of one."""
    return parameter.dim() > 1 or name.endswith(".values")


def share_of_peak(step: int, total: int, warmup: int, schedule: str) -> float:
    """What share of its peak a rate has at optimizer step `step`, from 1 to `total`.

    It rises over `warmup` steps and reaches 1 at the last of them; the next step is at 1 as well.
    """
    if step <= warmup:
        return step / warmup
    progress = (step - 1 - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return 1.0 - progress
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0


def set_rates(optimizer: Optimizer, share: float) -> None:
    """Set every group's rate to `share` of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * share


@torch.no_grad()
def all_finite(model: nn.Module, optimizer: Optimizer) -> bool:
    """Whether every trainable tensor and every tensor of the optimizer is finite; waits once."""
    tensors = [p for _, p in trainable(model)]
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    # a sum is finite when all of it is, short of an overflow that is just as bad
    sums = [t.sum(dtype=torch.float32).to(tensors[0].device) for t in (*tensors, *state)]
    return bool(torch.stack(sums).isfinite().all())


def make_engine(
    model: PeftModel, optimizer: Optimizer, max_norm: float | None, accelerator: Accelerator
) -> Engine:
    """The engine that the run was launched for."""
    if is_zero(accelerator):
        from petl.distributed.deepspeed import ZeroEngine

        return ZeroEngine(model, optimizer, max_norm, accelerator)
    return Engine(model, optimizer, max_norm, accelerator)
