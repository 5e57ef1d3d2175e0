"""What a run would be, before it is one: targets, sizes, memory, length. No weight is loaded.

Shapes are what everything here follows from: the model is built on the meta device, the adapter put
on it, and one training pass made without data (see petl/dry_run.py).
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from omegaconf import DictConfig
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from petl import losses
from petl.adapter_file import safetensors_bytes, saved_shapes
from petl.batches import Splits, encode_splits, longest_first, row_lengths
from petl.core.compat import BaseTunerLayer
from petl.core.fused_lora import fuse_lora
from petl.core.registry import build_config
from petl.core.starts import rewrites_base
from petl.data import read_data
from petl.data.lengths import padding_share
from petl.data.streaming import Stream
from petl.dry_run import (
    PassMemory,
    on_shapes,
    pass_memory,
    takes_mixed_batches,
    without_data,
    without_values,
)
from petl.errors import InputError, UnsupportedError
from petl.export import lora_refusal, merge_refusal
from petl.launching import read_launch
from petl.models import load_base, load_processor
from petl.optim import head_names, rate, trainable
from petl.processes import start
from petl.settings import TrainConfig, read_loss, read_settings
from petl.training_mode import for_training
from petl.wrapping import sized_fields, train_new_modules

DEFAULT = "by default"  # what a method targets where target_modules is null


@dataclass(frozen=True)
class Target:
    """Modules that one pattern of `target_modules` matched and that have one weight shape."""

    pattern: str
    shape: tuple[int, ...]
    modules: int
    example: str


@dataclass(frozen=True)
class Group:
    """Trainable tensors of one role: adapter, head or norm (of the backbone), with a peak rate."""

    role: str
    tensors: int
    parameters: int
    lr: float


@dataclass(frozen=True)
class Memory:
    """Bytes on the device during a step.

    Attributes:
        weights: base model, adapter and head.
        optimizer: AdamW's two moments, float32.
        gradients: what earlier micro-batches left, under accumulation; else part of the pass.
        pass_: forward and backward of one micro-batch of the longest rows; None: not to be told.
        rows: of that micro-batch.
        tokens: of each of its rows, padding included; None where rows have none.
        unknown: why the pass is not to be told, or "".
    """

    weights: int
    optimizer: int
    gradients: int
    pass_: PassMemory | None
    rows: int
    tokens: int | None
    unknown: str = ""

    @property
    def fixed(self) -> int:
        """Bytes that the pass comes on top of."""
        return self.weights + self.optimizer + self.gradients


@dataclass(frozen=True)
class Length:
    """How long the run is. `amount` is in `unit`: tokens without padding, images or clips.

    `padding` is the share of the positions that one process computes in the first pass over the
    rows, or in the whole run if that is shorter, before lengths are rounded up for the device.
    """

    rows: int
    steps: int
    warmup: int
    epochs: float
    amount: int
    unit: str
    padding: float


@dataclass(frozen=True)
class RunPlan:
    """All of it. `file_bytes` is the size of adapter_model.safetensors; `notes` are sentences."""

    names: tuple[str, ...]  # of method, model and data
    targets: list[Target]
    groups: list[Group]
    parameters: int  # of base, adapter and head
    saved: int  # numbers in the adapter file
    file_bytes: int
    memory: Memory
    length: Length
    supports: dict[str, str]
    notes: list[str]


def plan_run(cfg: DictConfig) -> RunPlan:
    """The plan of the run that `train.py` makes of the same configuration.

    Raises:
        InputError: whatever would stop that run before training.
    """
    settings = read_settings(cfg)
    accelerator = start(settings, cfg.model.dtype)
    data = read_data(cfg.data)
    if isinstance(data.train, Stream):
        raise InputError(
            "petl plan looks at the lengths of all rows, which data.streaming=true leaves unread: "
            "say data.streaming=false with some data.train_rows"
        )
    splits = encode_splits(data, load_processor(cfg.model, data.task), settings, accelerator)
    fields = sized_fields(cfg, data.task, settings, splits.plan(settings).steps)
    planned, notes = without_data(fields)

    def build() -> PreTrainedModel:
        return load_base(cfg.model, data.task, meta=True)

    with warnings.catch_warnings(record=True) as caught:
        model = on_shapes(build, train_new_modules(planned, build()))
    if settings.fuse_lora:
        fuse_lora(model)
    losses.attach(model, read_loss(cfg))
    # what is deprecated is ours to mend
    notes += dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning))
    if hasattr(type(model.base_model), "update_and_allocate"):
        notes.append("the method changes while it trains; the adapter file is that of its start")
    kind = cfg.model.get("quantization")
    if kind is not None:
        notes.append(f"memory is that of dense weights, which model.quantization={kind} makes less")
    shared = {"fsdp": "the whole model", "deepspeed": "all of the optimizer's state"}
    launch = read_launch(cfg).name
    if launch in shared:
        notes.append(
            f"memory is that of one process with {shared[launch]}, of which each has a share"
        )
    for _, parameter in trainable(model):
        parameter.data = parameter.data.float()  # as `make_optimizer` does
    doubles = rewrites_base(build_config(**fields))  # saved relative to its start: twice the rank
    saved = saved_shapes(model, rank_factor=2 if doubles else 1)
    targets = targets_of(model, fields.get("target_modules"))
    with without_values(model, accelerator.device):
        memory = memory_of(model, splits, settings, cfg.model.dtype, accelerator.device)
        abilities = supports(model)
    groups = [group for group in ("method", "loss", "model", "data") if group in cfg]
    names = tuple(str(cfg[group].name) for group in groups)
    return RunPlan(
        names=names,
        targets=targets,
        groups=groups_of(model, settings),
        parameters=sum(p.numel() for p in model.parameters()),
        saved=sum(shape.numel() for _, shape in saved.values()),
        file_bytes=safetensors_bytes(saved),
        length=length_of(splits, settings),
        supports=abilities,
        memory=memory,
        notes=notes,
    )


# Targets and parameters


def targets_of(model: PeftModel, patterns: Any) -> list[Target]:
    """The adapted modules by pattern and weight shape.

    A preset, a regular expression or PEFT's own choice is one pattern for modules of many kinds:
    there the last part of the module's name stands behind it.
    """
    base, tuner = model.get_base_model(), cast(Any, model.base_model)
    found: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name in tuner.targeted_module_names:
        weight = weight_of(base.get_submodule(name))
        found.setdefault((pattern_of(name, patterns), tuple(weight.shape)), []).append(name)
    return [
        Target(pattern, shape, len(names), names[0]) for (pattern, shape), names in found.items()
    ]


def pattern_of(name: str, patterns: Any) -> str:
    """Which of `patterns` the module called `name` fits."""
    if patterns is None or isinstance(patterns, str):
        return f"{patterns or DEFAULT}: {name.rpartition('.')[2]}"
    return next(p for p in patterns if name == p or name.endswith(f".{p}"))


def weight_of(module: nn.Module) -> Tensor:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return next(base.parameters())


def groups_of(model: PeftModel, settings: TrainConfig) -> list[Group]:
    """The trainable tensors by role and peak rate."""
    found: dict[tuple[str, float], list[int]] = {}
    heads = head_names(model)
    for name, parameter in trainable(model):
        whole = "norm" if "modules_to_save" in name.split(".") else "adapter"
        role = "head" if name in heads else whole
        found.setdefault((role, rate(name, settings, heads)), []).append(parameter.numel())
    return [Group(role, len(sizes), sum(sizes), lr) for (role, lr), sizes in sorted(found.items())]


# Memory and length


def memory_of(
    model: PeftModel, splits: Splits, settings: TrainConfig, dtype: str, device: torch.device
) -> Memory:
    """What a step needs on one process; to be called inside `without_values`."""
    longest, accumulates = heaviest_pass(splits, settings)
    batch = splits.collate(list(splits.known.select(longest)))
    trained = sum(p.numel() for _, p in trainable(model))
    weights = unique_bytes((*model.parameters(), *model.buffers()))
    bf16 = settings.computes_in(dtype) == "bf16"
    measured, unknown = None, ""
    try:
        with for_training(model, settings):
            measured = pass_memory(model, batch, device, bf16=bf16)
    except UnsupportedError as error:
        unknown = str(error)
    return Memory(
        weights=weights,
        optimizer=2 * 4 * trained,
        gradients=4 * trained if accumulates else 0,
        pass_=measured,
        rows=len(longest),
        tokens=splits.task.width(batch),
        unknown=unknown,
    )


def heaviest_pass(splits: Splits, settings: TrainConfig) -> tuple[list[int], bool]:
    """The rows of the largest forward pass on one process, and whether a step may take several."""
    buckets, micro = splits.buckets, settings.micro_batch_size
    most = min(settings.batch_size, len(splits.known)) if buckets is None else max(buckets.sizes)
    rows = min(micro or most, most)
    if buckets is not None:
        longest = [int(row) for row in buckets.heaviest(rows)]
    else:
        longest = longest_first(splits.task.lengths(splits.known))[:rows]
    return longest, rows < most


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in {id(t): t for t in tensors}.values())


def length_of(splits: Splits, settings: TrainConfig) -> Length:
    """Rows, steps, the amount of data and the padding of the run."""
    plan, lengths = splits.plan(settings), row_lengths(splits.task, splits.known)
    passes, rest = divmod(plan.steps, plan.steps_per_epoch)
    amount = passes * int(lengths.sum())
    if rest:
        last = splits.plan(settings, done=plan.steps - rest)
        amount += sum(int(lengths[batch].sum()) for batch in last.global_batches())
    first = replace(plan, steps=min(plan.steps, plan.steps_per_epoch))
    return Length(
        rows=len(lengths),
        steps=plan.steps,
        warmup=settings.warmup_steps(plan.steps),
        epochs=plan.steps / plan.steps_per_epoch,
        amount=amount,
        unit=splits.task.unit,
        padding=padding_share(lengths, first),
    )


# What the method can do


def supports(model: PeftModel) -> dict[str, str]:
    """By ability, "yes" or "no" with the reason."""
    config = model.active_peft_config
    merging, export = merge_refusal(config), lora_refusal(config)
    base: Any = model.get_base_model()
    return {
        "petl merge": f"no: {merging}" if merging else "yes",
        "petl export --lora": f"no: {export}" if export else "yes",
        "mixed batches (adapter_names)": "yes" if takes_mixed_batches(model) else "no",
        "gradient checkpointing": "yes" if base.supports_gradient_checkpointing else "no",
    }
