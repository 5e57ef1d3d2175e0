"""Plan a run without loading weights: targets, parameters, memory, length, capabilities.

Everything follows from tensor shapes: the model is built on the meta device and wrapped, and one
training pass runs without data (see `petl.experiments.planning.dry_run`).
"""

from dataclasses import dataclass, field, replace
from typing import Any, cast

from omegaconf import DictConfig
from peft import PeftModel
from torch import nn

from petl.core.adapter_file import safetensors_bytes, saved_shapes
from petl.core.compat import AdaLoraModel
from petl.core.experts.linears import by_stack
from petl.core.lifecycle import lifecycle
from petl.core.model.coverage import Coverage, coverage_of
from petl.core.model.heat_map import role_of
from petl.core.parameters import trainable
from petl.core.registry import build_config, method, refusal
from petl.core.spec.facts import modifies_base_weights
from petl.core.support import Capability
from petl.data.base import read_from, refuse_stream
from petl.data.batch_sampler import padding_fraction
from petl.data.models.loading import load_base, load_processor
from petl.errors import InputError, UnsupportedError
from petl.experiments.planning.cost import Time, time_of
from petl.experiments.planning.dry_run import takes_mixed_batches, without_values
from petl.experiments.planning.frozen import FrozenPlan, frozen_plan
from petl.experiments.planning.memory import Memory, base_layer, memory_of
from petl.experiments.planning.savings import (
    NOTABLE,
    OPERATIONS,
    RunCost,
    Saving,
    kept,
    pays,
    percent,
    savings,
    savings_of_passes,
)
from petl.experiments.planning.shapes import model_on_shapes, storage_of
from petl.training.dataloader import Splits, encode_splits, row_lengths
from petl.training.distributed.launch import alone, start
from petl.training.distributed.precision import described
from petl.training.evaluate import for_training
from petl.training.features import Fields, Setup, features_of, orders_of
from petl.training.optimizer import head_names, peak_lr
from petl.training.runs.config import RunConfig, names_of
from petl.training.runs.run_config import read_config
from petl.training.runs.settings import TrainConfig

UPPER = "top:0.33"  # the blocks with adapters of a cheaper run
DEFAULT = "by default"  # the pattern of a method with target_modules=null


@dataclass(frozen=True)
class PlannedTarget:
    """Modules of one place in a layer that have one weight shape.

    Attributes:
        name: the path inside a layer, after the preset of `target_modules` that matched it.
        shape: of the weight.
        modules: how many.
        example: the path of the first.
    """

    name: str
    shape: tuple[int, ...]
    modules: int
    example: str


LAST = PlannedTarget("", (256, 256), 0, "")  # whose shape is measured where no target is a matrix


@dataclass(frozen=True)
class PlanGroup:
    """Trainable tensors of one role: adapter, head or norm (of the backbone), with a peak rate."""

    role: str
    tensors: int
    parameters: int
    lr: float


@dataclass(frozen=True)
class Length:
    """The length of a run.

    Attributes:
        rows: examples of the training data.
        warmup: steps of the warm-up, which are part of `steps`.
        amount: of data in the run, in `unit`: tokens without padding, images or clips.
        padding: fraction of the positions that one process computes in the first epoch (or in the
            run, if that is shorter), before lengths are rounded up for the device.
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
    """The plan of a run."""

    names: tuple[str, ...]  # of method, model and data
    targets: list[PlannedTarget]
    groups: list[PlanGroup]
    parameters: int  # of base model, adapter and head
    saved: int  # values in the adapter file
    file_bytes: int  # size of adapter_model.safetensors
    memory: Memory
    length: Length
    supports: dict[str, str]  # by capability, "yes" or "no" with the reason
    notes: list[str]  # sentences
    time: Time | None = None  # None: unknown
    cheaper: list[Saving] = field(default_factory=list)
    precision: str = ""  # of matrix products, in words; "": float32, as by default
    frozen: FrozenPlan | None = None  # blocks below the first trained one; None: there are none
    coverage: Coverage | None = None  # of the block weights; None: the method adapts none


def plan_run(cfg: DictConfig) -> RunPlan:
    """Return the plan of the run that `petl train` would make of this configuration.

    Raises:
        InputError: an error that would stop the run before training.
    """
    run = read_config(cfg)
    settings = run.train
    with alone():  # a plan is made by one process
        accelerator = start(settings.seed, run.precision)
    data = read_from(run.data)
    refuse_stream(data.train, "petl plan")  # its length is unknown
    processor = load_processor(run.model, data.task)
    features = features_of(run.resolved)
    splits = encode_splits(data, processor, settings, accelerator, orders_of(features))
    setup = Setup(load_base, run, splits, features)
    fields = setup.fields()
    model, notes = model_on_shapes(run, data.task, fields, setup.when_wrapped)
    config = build_config(**fields)
    storage = storage_of(run, data.task)
    notes += [*setup.notes, *notes_of(run, fields, storage.processes)]
    # saved as the difference of two updates: twice the rank
    saved = saved_shapes(model, rank_factor=2 if modifies_base_weights(config) else 1)
    targets = targets_of(model, fields.get("target_modules"))
    coverage = coverage_of(model)
    length = length_of(splits, settings)
    # tokens of padding are computed as well
    positions = (length.amount / (1 - length.padding), scored_positions(splits, settings))
    # from here on tensors have shapes on the run's device instead of the meta device
    with without_values(model, accelerator.device):
        bf16 = run.precision == "bf16"
        with for_training(model, settings):
            memory = memory_of(model, splits, settings, accelerator.device, storage, bf16=bf16)
        frozen = frozen_plan(model, splits, settings, memory.pass_, accelerator.device, bf16=bf16)
        capabilities = supports(model)
        counted = RunCost(
            run,
            splits,
            memory,
            frozen,
            *positions,
            passes=length.epochs,
            device=accelerator.device,
            processes=storage.processes,
        )
        with for_training(model, settings):
            of_passes = savings_of_passes(model, counted)
    shape = next(t.shape for t in (*targets, LAST) if len(t.shape) == 2)
    seconds = time_of(
        memory, *positions, shape, accelerator.device, bf16=bf16, stored=counted.stored
    )
    counted = replace(counted, seconds=seconds)
    if settings.cache_frozen is False:
        frozen = None
    return RunPlan(
        names=tuple(names_of(run.resolved)),
        targets=targets,
        groups=groups_of(model, settings),
        parameters=sum(p.numel() for p in model.parameters()),
        saved=sum(shape.numel() for _, shape in saved.values()),
        file_bytes=safetensors_bytes(saved),
        length=length,
        time=seconds,
        precision=""
        if settings.precision == "no"
        else described(run.precision, run.model, run.float32),
        frozen=frozen,
        coverage=coverage,
        cheaper=savings(counted, [*upper_blocks(counted, fields), *of_passes]),
        supports=capabilities,
        memory=memory,
        notes=notes,
    )


def notes_of(run: RunConfig, fields: Fields, processes: int) -> list[str]:
    """Return what a reader of the plan must know of its numbers.

    Args:
        fields: of the method.
        processes: that the run is planned for.
    """
    notes = []
    entry = method(fields["name"]).variant(fields)
    changes = entry.updates or issubclass(entry.tuner, AdaLoraModel)
    if changes and Capability.ADAMR not in entry.lacks:
        notes.append(
            "this method changes its size during training; the adapter file is that of the start"
        )
    if processes > 1:
        notes.append(
            f"memory of one process of {processes}; for N processes run `WORLD_SIZE=N petl plan "
            "...`"
        )
    if run.launch.name == "deepspeed":
        notes.append(
            "memory includes the complete optimizer state, which DeepSpeed shards across processes"
        )
    return notes


def upper_blocks(counted: RunCost, fields: Fields) -> list[Saving]:
    """Return what adapters in the upper blocks alone would save.

    Args:
        fields: of the method.
    """
    now, splits, settings = counted.memory.pass_, counted.splits, counted.settings
    if now is None or counted.frozen is not None or counted.run.resolved.get("ranks"):
        return []
    if fields.get("layers_to_transform", 0) is not None:  # there is no such field, or it is set
        return []
    bf16 = counted.run.precision == "bf16"
    try:
        model, _ = model_on_shapes(
            counted.run, splits.task, {**fields, "layers_to_transform": UPPER}
        )
        with without_values(model, counted.device), for_training(model, settings):
            then = counted.pass_of(model)
            frozen = frozen_plan(model, splits, settings, then, counted.device, bf16=bf16)
    except (InputError, UnsupportedError):  # the method, or the model, has no upper blocks
        return []
    setting, operations = f"method.layers_to_transform={UPPER}", float(then.operations)
    keeps = frozen is not None and (not frozen.reason or frozen.remedy) and pays(frozen, counted)
    if frozen is not None and keeps:
        setting += " train.cache_frozen=true" if frozen.reason else ""
        operations *= 1 - frozen.saved
    fewer = 1 - operations / now.operations
    if fewer <= NOTABLE:
        return []
    saves = f"{percent(fewer)} {OPERATIONS}"
    if frozen is not None and keeps:
        saves = kept(fewer, frozen)
    return [Saving(setting, saves, "another adapter: tune its rate")]


# Targets and parameters


def targets_of(model: PeftModel, patterns: object) -> list[PlannedTarget]:
    """Group the target modules by their place in a layer and their weight's shape."""
    base, tuner = model.get_base_model(), cast(Any, model.base_model)
    # a preset, or PEFT's default, matches several places, which say what it stands for
    prefix = f"{patterns or DEFAULT}: " if patterns is None or isinstance(patterns, str) else ""
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name in by_stack([*tuner.targeted_module_names, *tuner.targeted_parameter_names]):
        place, shape = prefix + role_of(base, name), tuple(_weight_of(base, name).shape)
        groups.setdefault((place, shape), []).append(name)
    return [
        PlannedTarget(place, shape, len(names), names[0])
        for (place, shape), names in groups.items()
    ]


def _weight_of(base: nn.Module, name: str) -> nn.Parameter:
    """Return the weight of the target of this name, a module or a stack of experts."""
    owner, _, last = name.rpartition(".")
    own = base_layer(base.get_submodule(owner))._parameters.get(last)
    # the first parameter is the weight, also of convolutions and embeddings
    return next(base_layer(base.get_submodule(name)).parameters()) if own is None else own


def groups_of(model: PeftModel, settings: TrainConfig) -> list[PlanGroup]:
    """Group the trainable tensors by role and peak learning rate."""
    sizes_of: dict[tuple[str, float], list[int]] = {}
    heads, life = head_names(model), lifecycle(model)
    for name, parameter in trainable(model):
        # PEFT trains complete copies of heads and norms as `modules_to_save`
        parts = name.split(".")
        tokens = "tokens" if "trainable_tokens_delta" in parts else "adapter"
        backbone = "norm" if "modules_to_save" in parts else tokens
        role = "head" if name in heads else backbone
        own = life.learning_rate_of(name)  # that of the method, if it sets one
        peak = peak_lr(name, settings, heads) if own is None else own
        sizes_of.setdefault((role, peak), []).append(parameter.numel())
    return [
        PlanGroup(role, len(sizes), sum(sizes), lr)
        for (role, lr), sizes in sorted(sizes_of.items())
    ]


# Length


def length_of(splits: Splits, settings: TrainConfig) -> Length:
    """Return the length of a run: examples, steps, amount of data, padding."""
    plan, lengths = splits.sampler(settings), row_lengths(splits.task, splits.known)
    passes = plan.steps // plan.steps_per_epoch  # complete epochs read every row once
    if splits.mixture is not None or splits.order is not None:  # some more often
        passes = 0
    amount = passes * int(lengths.sum())
    # of an incomplete epoch: its rows depend on its permutation
    rest = splits.sampler(settings, done=passes * plan.steps_per_epoch)
    amount += sum(int(lengths[batch].sum()) for batch in rest.global_batches())
    first = replace(plan, steps=min(plan.steps, plan.steps_per_epoch))
    return Length(
        rows=len(lengths),
        steps=plan.steps,
        warmup=settings.warmup_steps(plan.steps),
        epochs=splits.passes(settings),
        amount=amount,
        unit=splits.task.unit,
        padding=padding_fraction(lengths, first),
    )


def scored_positions(splits: Splits, settings: TrainConfig) -> float:
    """Return the positions that an evaluation of the test examples computes, with padding."""
    if not splits.task.reads_text:
        return len(splits.test)
    lengths = sorted(splits.task.lengths(splits.test), reverse=True)
    batches = (
        lengths[i : i + settings.eval_batch_size]
        for i in range(0, len(lengths), settings.eval_batch_size)
    )
    return float(sum(len(batch) * batch[0] for batch in batches))


# Capabilities


def supports(model: PeftModel) -> dict[str, str]:
    """Return, by capability, "yes" or "no" with the reason."""
    config = model.active_peft_config
    merging, export, mixing = (
        refusal(config, capability)
        for capability in (Capability.MERGE, Capability.LORA_EXPORT, Capability.MIXED_BATCH)
    )
    mixes = not mixing and takes_mixed_batches(model)
    base = model.get_base_model()
    return {
        "petl merge": f"no: {merging}" if merging else "yes",
        "petl export --lora": f"no: {export}" if export else "yes",
        "mixed batches (adapter_names)": "yes" if mixes else f"no: {mixing}" if mixing else "no",
        "gradient checkpointing": "yes" if base.supports_gradient_checkpointing else "no",
    }
