"""What a run would be, before it is one: targets, sizes, memory, length. No weight is loaded.

Shapes are what everything here follows from: the model is built on the meta device, the adapter put
on it, and one training pass made without data (see petl/dry_run.py).
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from omegaconf import DictConfig
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from petl import losses
from petl.core.adapter_file import safetensors_bytes, saved_shapes
from petl.core.dry_run import on_shapes, takes_mixed_batches, without_data, without_values
from petl.core.parameters import trainable
from petl.core.refusals import lora_refusal, merge_refusal
from petl.core.registry import build_config
from petl.core.spec.method import modifies_base_weights
from petl.data.buckets import padding_share
from petl.data.streaming import refuse_stream
from petl.distributed.launch import (
    FSDP,
    alone,
    number_of_processes,
    refuse_fsdp,
    start,
)
from petl.models.loading import dense_modules, load_base, load_processor
from petl.models.quantization import quantized_layers
from petl.planning.memory import Memory, Storage, base_layer, memory_of
from petl.runs.run_config import RunConfig, names_of, read_config
from petl.runs.settings import TrainConfig
from petl.tasks.base import Task
from petl.training.dataloader import Splits, encode_splits, row_lengths
from petl.training.optimizer import head_names, peak_lr
from petl.training.wrapping import (
    apply_memory_options,
    for_training,
    sized_fields,
    train_new_modules,
)

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
    run = read_config(cfg)
    settings, launch = run.train, run.launch
    with alone():  # a plan is made by one process
        accelerator = start(settings.seed, run.precision)
    data = run.data.read()
    refuse_stream(data.train, "petl plan")
    splits = encode_splits(data, load_processor(run.model, data.task), settings, accelerator)
    fields = sized_fields(run, data.task, splits.sampler(settings).steps)
    model, notes = model_on_shapes(run, data.task, fields)
    if hasattr(type(model.base_model), "update_and_allocate"):
        notes.append("the method changes while it trains; the adapter file is that of its start")
    config = build_config(**fields)
    storage = storage_of(run, data.task, config)
    if storage.processes > 1:
        notes.append(
            f"memory is that of one of {storage.processes} processes; WORLD_SIZE=N petl plan ... "
            "is that of one of N"
        )
    if launch.name == "deepspeed":
        notes.append("memory is that with all of the optimizer's state, of which each has a share")
    doubles = modifies_base_weights(config)  # saved relative to its start: twice the rank
    saved = saved_shapes(model, rank_factor=2 if doubles else 1)
    targets = targets_of(model, fields.get("target_modules"))
    with without_values(model, accelerator.device):
        with for_training(model, settings):
            device, dtype = accelerator.device, run.model.dtype
            memory = memory_of(model, splits, settings, dtype, device, storage)
        capabilities = supports(model)
    return RunPlan(
        names=tuple(names_of(run.resolved)),
        targets=targets,
        groups=groups_of(model, settings),
        parameters=sum(p.numel() for p in model.parameters()),
        saved=sum(shape.numel() for _, shape in saved.values()),
        file_bytes=safetensors_bytes(saved),
        length=length_of(splits, settings),
        supports=capabilities,
        memory=memory,
        notes=notes,
    )


def model_on_shapes(
    run: RunConfig, task: Task, fields: Mapping[str, Any]
) -> tuple[PeftModel, list[str]]:
    """The model that a run trains, without weights, and what to say about it.

    Args:
        fields: of the method, as `sized_fields` gives them.
    """
    planned, notes = without_data(fields)

    def build() -> PreTrainedModel:
        return load_base(run.model, task, meta=True)

    with warnings.catch_warnings(record=True) as caught:
        model = on_shapes(build, train_new_modules(planned, build()))
    apply_memory_options(model, run.train)
    losses.attach(model, run.loss)
    for _, parameter in trainable(model):
        parameter.data = parameter.data.float()  # as `make_optimizer` does
    # what is deprecated is ours to mend
    notes += dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning))
    return model, notes


def storage_of(run: RunConfig, task: Task, config: PeftConfig) -> Storage:
    """How the weights of a run lie, of as many processes as WORLD_SIZE says; FSDP2 has two or more.

    Raises:
        UnsupportedError: FSDP2 does not train this method on such weights.
    """
    kind, launch = run.model.quantization, run.launch
    if isinstance(launch, FSDP):
        refuse_fsdp(config, kind)
    processes, few = number_of_processes(), []
    if kind is not None:
        base = load_base(run.model, task, meta=True)
        few = quantized_layers(base, kind, dense_modules(base, task))
    quantized = {path: str(kind) for path in few}
    if isinstance(launch, FSDP):
        return Storage(quantized, max(2, processes), True, launch.reshard_after_forward)
    return Storage(quantized, processes)


# Targets and parameters


def targets_of(model: PeftModel, patterns: Any) -> list[Target]:
    """The adapted modules by pattern and weight shape.

    A preset, a regular expression or PEFT's own choice is one pattern for modules of many kinds:
    there the last part of the module's name stands behind it.
    """
    base, tuner = model.get_base_model(), cast(Any, model.base_model)
    found: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name in tuner.targeted_module_names:
        weight = next(base_layer(base.get_submodule(name)).parameters())
        found.setdefault((pattern_of(name, patterns), tuple(weight.shape)), []).append(name)
    return [
        Target(pattern, shape, len(names), names[0]) for (pattern, shape), names in found.items()
    ]


def pattern_of(name: str, patterns: Any) -> str:
    """Which of `patterns` the module called `name` fits."""
    if patterns is None or isinstance(patterns, str):
        return f"{patterns or DEFAULT}: {name.rpartition('.')[2]}"
    return next(p for p in patterns if name == p or name.endswith(f".{p}"))


def groups_of(model: PeftModel, settings: TrainConfig) -> list[Group]:
    """The trainable tensors by role and peak rate."""
    found: dict[tuple[str, float], list[int]] = {}
    heads = head_names(model)
    for name, parameter in trainable(model):
        whole = "norm" if "modules_to_save" in name.split(".") else "adapter"
        role = "head" if name in heads else whole
        found.setdefault((role, peak_lr(name, settings, heads)), []).append(parameter.numel())
    return [Group(role, len(sizes), sum(sizes), lr) for (role, lr), sizes in sorted(found.items())]


# Length


def length_of(splits: Splits, settings: TrainConfig) -> Length:
    """Rows, steps, the amount of data and the padding of the run."""
    plan, lengths = splits.sampler(settings), row_lengths(splits.task, splits.known)
    passes, rest = divmod(plan.steps, plan.steps_per_epoch)
    amount = passes * int(lengths.sum())
    if rest:
        last = splits.sampler(settings, done=plan.steps - rest)
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
