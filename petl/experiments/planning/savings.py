"""Settings that would make a planned run cheaper, each with what it saves.

Savings are counts of the plan: operations and bytes of a pass on shapes, lengths of the examples,
products timed on this machine. What this run has already, or would gain nothing from, is left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from peft import PeftModel

from petl.data.batch_sampler import padding_fraction
from petl.efficiency.frozen.store import PAYS
from petl.efficiency.rewrite import REWRITES, rewrite, rewrites_of
from petl.efficiency.together.batches import TOKENS
from petl.efficiency.together.group import Member
from petl.errors import UnsupportedError
from petl.experiments.planning.cost import NOTHING, CachedStates, Time, operations_of
from petl.experiments.planning.dry_run import PassMemory, pass_memory
from petl.experiments.planning.frozen import FrozenPlan
from petl.experiments.planning.memory import Memory, heaviest_batch, megabytes
from petl.training.dataloader import Splits, buckets_of, row_lengths
from petl.training.distributed.precision import bf16_units
from petl.training.runs.config import RunConfig
from petl.training.runs.settings import AUTO, TrainConfig

# assumptions: what makes a setting worth a line
MUCH_PADDING = 0.2  # of the positions
MUCH_FASTER = 0.8  # of the time of matrix products
MUCH_SCORING = 0.25  # of the operations of the steps
MUCH_OF_A_PASS = 0.5  # of the memory of a step
NOTABLE = 0.05  # of operations or bytes

ROUNDING, NONE = "same up to rounding", "same"  # what becomes of the result
OPERATIONS = "of the operations of a step"


@dataclass(frozen=True)
class Saving:
    """Settings of a command line, what they save, and what becomes of the result."""

    setting: str
    saves: str
    result: str


@dataclass(frozen=True)
class RunCost:
    """What savings are counted against: a run, and counts of its plan.

    Attributes:
        frozen: its frozen blocks, also if train.cache_frozen=false.
        positions: that all steps compute.
        scored: that an evaluation of the test examples computes.
        passes: over the train rows.
        device: of the run.
        processes: that train together.
        seconds: None: unknown.
    """

    run: RunConfig
    splits: Splits
    memory: Memory
    frozen: FrozenPlan | None
    positions: float
    scored: float
    passes: float
    device: torch.device
    processes: int
    seconds: Time | None = None

    @property
    def settings(self) -> TrainConfig:
        """The settings under `train`."""
        return self.run.train

    @property
    def stored(self) -> CachedStates:
        """What the run reads from a store."""
        frozen = self.frozen
        if frozen is None or frozen.reason or self.settings.cache_frozen is False:
            return NOTHING
        return CachedStates(frozen.saved, frozen.unfilled)

    def pass_of(self, model: PeftModel) -> PassMemory:
        """Return the largest pass of a model, on shapes."""
        batch = heaviest_batch(self.splits, self.settings, self.processes)
        return pass_memory(model, batch, self.device, bf16=self.run.precision == "bf16")


def savings(counted: RunCost, of_passes: list[Saving]) -> list[Saving]:
    """Return the savings of a run.

    Args:
        of_passes: those of other passes of the model.
    """
    return [
        *_buckets(counted),
        *_precision(counted),
        *_cache(counted),
        *of_passes,
        *_less_memory(counted),
        *_scoring(counted),
    ]


def _buckets(counted: RunCost) -> Iterator[Saving]:
    splits, settings = counted.splits, counted.settings
    lengths = row_lengths(splits.task, splits.known)
    is_free = settings.buckets is None and settings.batch_sizes is None
    # these decide which rows a step has, so that they cannot be of similar length
    is_free &= splits.mixture is None and splits.order is None and not splits.task.packs
    if not (is_free and splits.task.reads_text and len(lengths)):
        return
    padding = padding_fraction(lengths, splits.sampler(settings).global_batches())
    buckets = buckets_of(lengths, replace(settings, buckets="auto"))
    if padding > MUCH_PADDING and buckets is not None:
        after = padding_fraction(lengths, buckets.batches(settings.seed, 0))
        # the same tokens in fewer positions
        less = (1 - padding) / (1 - after)
        yield Saving(
            "train.buckets=auto",
            f"{100 * (1 - less):.0f} % of the positions of a step: {100 * after:.1f} % padding "
            f"instead of {100 * padding:.1f} %, in {len(buckets.rows)} buckets by length",
            "other batches",
        )


def _precision(counted: RunCost) -> Iterator[Saving]:
    seconds, has_units = counted.seconds, bool(bf16_units(counted.device))
    is_chosen = counted.settings.precision == AUTO or counted.run.precision != "no"
    if is_chosen or (seconds is None and not has_units):
        return
    # auto is bf16 where the device is known to have such products
    setting = f"train.precision={'auto' if has_units else 'bf16'}"
    if seconds is None:
        yield Saving(setting, "products in bfloat16; their time was not measured", "not exact")
        return
    slower = seconds.speed / max(seconds.speed_bf16, 1e-9)
    if slower < MUCH_FASTER:
        yield Saving(
            setting,
            f"{100 * (1 - slower):.0f} % of the time of matrix products, as measured here on one "
            "of them; casts and all else take as long",
            "not exact",
        )


def _cache(counted: RunCost) -> Iterator[Saving]:
    frozen = counted.frozen
    if frozen is None or not pays(frozen, counted):
        return
    saves = kept(frozen.saved, frozen)
    if frozen.reason and frozen.remedy:
        yield Saving("train.cache_frozen=true", saves, f"no dropout below block {frozen.k}")
    elif not frozen.reason and counted.settings.cache_frozen is False:
        yield Saving("train.cache_frozen=auto", saves, ROUNDING)


def _less_memory(counted: RunCost) -> Iterator[Saving]:
    """Settings for a smaller pass, if it is much of the memory of a step."""
    memory, settings = counted.memory, counted.settings
    peak = memory.pass_
    if peak is None or not is_large(memory):
        return
    if memory.rows > 1:
        half = memory.rows // 2
        less = megabytes(peak.peak * half // memory.rows)
        yield Saving(
            f"train.micro_batch_size={half}",
            f"memory: about {less} for a pass instead of {megabytes(peak.peak)}",
            ROUNDING,
        )
    if not settings.gradient_checkpointing:
        yield Saving(
            "train.gradient_checkpointing=true",
            f"memory: most of {megabytes(peak.kept)} of activations; about a third more time",
            NONE,
        )


def is_large(memory: Memory) -> bool:
    """Return True if a pass is much of the memory of a step."""
    peak = memory.pass_
    return peak is not None and peak.peak >= MUCH_OF_A_PASS * (memory.fixed + peak.peak)


def _scoring(counted: RunCost) -> Iterator[Saving]:
    """Settings for fewer passes that do not train."""
    settings, task, splits = counted.settings, counted.splits.task, counted.splits
    if counted.memory.pass_ is None or not settings.test:
        return
    each, forward = operations_of(counted.memory, counted.stored.saved)
    steps = max(counted.positions * each, 1.0)
    probes = settings.linear_probe and task.new_head and task.tensors_by_row
    rows, positions, off = [f"{len(splits.test):,} test"], counted.scored, []
    if probes:
        rows.insert(0, f"{len(splits.known):,} train")
        positions += float(row_lengths(task, splits.known).sum())
        off.append("train.linear_probe=false")
    if settings.score_before:
        off.append("train.score_before=false")
    saved = forward * positions / steps
    if off and saved > NOTABLE:
        answers = "" if not task.generate else ", and the answers generated to these"
        yield Saving(
            " ".join(off),
            f"the pass over {' and '.join(rows)} rows before training{answers}: "
            f"{share_of(saved)} the operations of all steps",
            "no scores to compare with",
        )
    share = forward * counted.scored / steps
    if share > MUCH_SCORING:
        yield Saving(
            "test_rows:N of sets" if task.scores_by_task else "data.test_rows=N",
            f"each evaluation of the {len(splits.test):,} test rows takes {share_of(share)} the "
            "operations of all steps",
            "scores of fewer rows",
        )


def percent(fraction: float) -> str:
    """Format a fraction."""
    return f"{100 * fraction:.0f} %"


def share_of(fraction: float) -> str:
    """Format a fraction that may be above 1, in front of what it is of."""
    if fraction <= 1:
        return f"{percent(fraction)} of"
    return f"{fraction:.1f} times" if fraction < 10 else f"{fraction:,.0f} times"


# Passes of the model with another setting


def savings_of_passes(model: PeftModel, counted: RunCost) -> list[Saving]:
    """Return the savings of settings that change what the model of a run computes or keeps.

    Call it inside `without_values` and `for_training`, when all else has been counted: the model is
    changed.
    """
    found = [*_together(model, counted)]
    now, settings = counted.memory.pass_, counted.settings
    if now is None:
        return found
    asked = rewrites_of(settings)
    for name in (name for name in REWRITES if name not in asked):
        each = rewrite(name)
        # what changes passes with gradients alone saves memory
        has_no_use = each.needs_rows or (each.only_trains and not is_large(counted.memory))
        if has_no_use or each.refusal(model, each.value):
            continue
        each.change(model, each.value)
        # what follows is measured on the model as it is now
        before, now = now, counted.pass_of(model)
        setting = f"train.{name}={str(each.value).lower()}"
        result = NONE if each.exact else ROUNDING
        fewer = 1 - now.operations / before.operations
        if fewer > NOTABLE:
            found.append(Saving(setting, f"{percent(fewer)} {OPERATIONS}", result))
        elif is_large(counted.memory) and now.peak < (1 - NOTABLE) * before.peak:
            less = f"memory: {megabytes(now.peak)} for a pass instead of {megabytes(before.peak)}"
            found.append(Saving(setting, f"{less}; {each.saves}", result))
    return found


def _together(model: PeftModel, counted: RunCost) -> Iterator[Saving]:
    """Runs of a sweep in one pass, where the steps of one are small."""
    settings, steps = counted.settings, counted.splits.sampler(counted.settings).steps
    task = counted.splits.task
    if settings.together > 1 or not (task.reads_text and task.tensors_by_row and steps):
        return
    # padding is computed as well
    tokens = counted.positions / steps
    room = int(TOKENS // max(1.0, tokens))
    if room < 2:
        return
    try:
        # refuses adapters without a form for the rows of several
        Member(model)
    except UnsupportedError:
        return
    yield Saving(
        f"train.together={room}",
        f"in a sweep: {room} runs in each pass, whose steps of about {tokens:.0f} tokens are "
        f"small, over one base of {megabytes(counted.memory.weights)}",
        ROUNDING,
    )


def kept(saved: float, frozen: FrozenPlan) -> str:
    """Describe a fraction of operations that is saved by a store of the output of frozen blocks."""
    if not frozen.missing:
        return f"{percent(saved)} {OPERATIONS}, from the store that is there"
    return (
        f"{percent(saved)} {OPERATIONS} after the first epoch, for {megabytes(frozen.missing)} on "
        "disk"
    )


def pays(frozen: FrozenPlan, counted: RunCost) -> bool:
    """Return True if a run reads its rows often enough to keep the output of its frozen blocks."""
    return counted.passes >= PAYS or not frozen.missing
