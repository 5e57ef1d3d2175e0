"""What a changed adapter does: its outputs beside the original's, and scores on held-out rows."""

import tempfile
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from peft import PeftModel

from petl.adapters.deltas.adapters import (
    Material,
    compressed_each,
    pruned,
    pruned_names,
    read,
    write_compressed,
    write_state,
)
from petl.adapters.deltas.prune import QResult, closed_q, find_q, output_moments, spread_q
from petl.adapters.export.checked_folder import (
    Change,
    Difference,
    adapted_outputs,
    compare,
    outputs,
    unwrap_trained,
)
from petl.adapters.export.saved_adapter import SavedAdapter, device
from petl.core.loading import load
from petl.data.batch_sampler import chunks
from petl.data.streaming import StreamedRows
from petl.data.tasks.base import Task
from petl.errors import InputError
from petl.ops.ternary import State, Ternary
from petl.system.progress import Pass, ProgressItems
from petl.training.dataloader import Batch, Splits, encode_splits
from petl.training.distributed.launch import start
from petl.training.evaluate import Evaluator

ROWS, BATCH = 50, 8  # train rows that a divisor is chosen on, as in the paper's encoders
ADAPTER = "default"

Scorer = Callable[[Path], dict[str, float]]  # of the folder of an adapter


def difference_of(saved: SavedAdapter, out: Path) -> Difference:
    """Return how the outputs of the adapter in `out` differ from those of `saved`, on test rows."""
    batches = saved.batches()
    before, effect = adapted_outputs(saved.model(), batches)
    model = load(saved.base(), out).eval()
    return compare(before, outputs(model, batches, "the new adapter"), effect)


@dataclass(frozen=True)
class MeasuredSetting:
    """One of several settings of a compression, and the scores on the run's validation rows."""

    density: float
    alpha: float | str
    scores: dict[str, float]


def compress_best(
    saved: SavedAdapter,
    densities: Sequence[float],
    alphas: Sequence[float | str],
    *,
    scope: str = "global",
    exclude: Iterable[str] = (),
) -> tuple[Ternary, list[MeasuredSetting], str]:
    """Return the compression that scores best on the run's validation rows, and all trials.

    With one density and one alpha nothing is scored.

    Returns:
        The compression, the trials, and the name of the score.

    Raises:
        InputError: an argument is out of range; the run is absent, or held out no rows.
    """
    material, exclude = read(saved.adapter), list(exclude)
    settings = [(density, alpha) for density in densities for alpha in alphas]
    with Pass("compressing", None, quiet=True):
        found = compressed_each(material, settings, scope=scope, exclude=exclude)
    # nothing to choose, so neither run nor data are needed
    if len(found) == 1:
        return found[0], [], ""
    with scoring(saved) as (score, task):
        trials = []
        pairs = [*zip(settings, found, strict=True)]
        for (density, alpha), ternary in ProgressItems(pairs, "scoring settings", unit="settings"):
            with tempfile.TemporaryDirectory() as folder:
                write_compressed(material, ternary, Path(folder))
                trials.append(MeasuredSetting(density, alpha, score(Path(folder))))
    # of equal qualities, the first
    best = max(range(len(found)), key=lambda i: task.quality(trials[i].scores))
    return found[best], trials, task.metric


@contextmanager
def scoring(saved: SavedAdapter, *, or_test: bool = False) -> Generator[tuple[Scorer, Task]]:
    """Yield a function that scores an adapter folder on a run's validation rows, and the task.

    Args:
        or_test: score on the test rows if the run held out no others; nothing may be chosen then.
    """
    config = saved.run_config
    accelerator = start(config.train.seed, config.precision)
    splits = splits_of(saved, accelerator)
    rows = splits.test if splits.validation is None and or_test else splits.validation
    if rows is None:
        raise InputError(
            f"{saved.adapter} was trained without validation rows, so several settings cannot be "
            "compared: give one density and one alpha, or train with train.eval_steps=N"
        )
    base = saved.base()

    def score(folder: Path) -> dict[str, float]:
        model = load(base, folder).eval()
        found = Evaluator(model, splits, accelerator, config.train.eval_batch_size).rows(rows)
        restore(model)
        return found

    yield score, splits.task


def change_by(saved: SavedAdapter, write: Callable[[Path], object]) -> Change:
    """Return what an adapter does that `write` writes to a folder."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, ADAPTER)
        write(folder)
        difference = difference_of(saved, folder)
        if saved.run is None:
            return Change(difference)
        with scoring(saved, or_test=True) as (score, task):
            before, after = (score(each)[task.metric] for each in (saved.adapter, folder))
    lost = before - after if task.higher_is_better else after - before
    return Change(difference, task.metric, before, after, lost)


def restore(model: PeftModel) -> None:
    """Remove an adapter from its base model, with its trained heads."""
    unwrap_trained(model, keep=False)
    model.unload()


def splits_of(saved: SavedAdapter, accelerator: Accelerator) -> Splits:
    """Return the rows of a saved adapter's run."""
    settings = saved.run_config.train
    return encode_splits(saved.data, saved.processor, settings, accelerator)


# Divisors


def train_batches(saved: SavedAdapter) -> list[Batch]:
    """Return inputs of the model: the first train rows of a run."""
    config = saved.run_config
    splits = splits_of(saved, start(config.train.seed, config.precision))
    rows = splits.train
    # a stream has no length and no random access
    rows = rows.first_rows(ROWS) if isinstance(rows, StreamedRows) else rows
    rows = rows.select(range(min(ROWS, len(rows))))
    parts = chunks(list(range(len(rows))), BATCH)
    return saved.as_inputs(splits.collate(list(rows.select(part))) for part in parts)


def closed_divisors(
    saved: SavedAdapter, material: Material, drop: float, exclude: Iterable[str] = ()
) -> dict[str, float]:
    """Return the divisor of least expected error for each pruned tensor, on the first train rows.

    Raises:
        InputError: no pruned tensor is the weight of a linear layer, or there is no run.
    """
    names = pruned_names(material, exclude)
    # file names lack the adapter's name, which PEFT inserts
    live = {live_name(name): name for name in names}
    delta = {own: material.state[name].to(device()) for own, name in live.items()}
    batches = ProgressItems(train_batches(saved), "measuring outputs of layers")
    sums = output_moments(saved.model(), batches, delta)
    if not sums:
        raise InputError(
            f"{saved.adapter}: no pruned tensor is the weight of a linear layer, so q=auto has "
            "nothing to measure; give a number, q=dare, or q=searched"
        )
    found = {live[own]: closed_q(S2, V, drop) for own, (S2, V) in sums.items()}
    return spread_q(names, found)


def live_name(name: str) -> str:
    """Return the name in a model of a tensor of an adapter file."""
    head, _, last = name.rpartition(".")
    return f"{head}.{ADAPTER}.{last}"


def change_of_outputs(saved: SavedAdapter, material: Material) -> Callable[[State], float]:
    """Return a function of a state that replaces the adapter's: how far outputs move.

    Its value is the norm of the difference over the norm of the adapter's outputs, on the first
    train rows.
    """
    batches, base = train_batches(saved), saved.base()
    model = load(base, saved.adapter).eval()
    before, effect = adapted_outputs(model, batches)
    restore(model)

    def change(state: State) -> float:
        with tempfile.TemporaryDirectory() as folder:
            write_state(material, state, Path(folder), {})
            other = load(base, folder).eval()
        found = compare(before, outputs(other, batches, "the changed adapter"), effect).relative
        restore(other)
        return found

    return change


def searched_divisor(
    saved: SavedAdapter, material: Material, drop: float, *, seed: int, exclude: Sequence[str] = ()
) -> QResult:
    """Return the divisor whose outputs are nearest to the adapter's, on the first train rows."""
    change = change_of_outputs(saved, material)

    def score(q: float, mask: int) -> float:
        return change(pruned(material, drop, q=q, seed=mask, exclude=exclude))

    return find_q(score, drop, seeds=(seed,))
