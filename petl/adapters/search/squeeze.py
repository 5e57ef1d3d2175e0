"""Squeeze a saved adapter into a number of bytes: levels by search, compared with even levels.

The fitness is measured on calibration rows: those that the run held out for validation, else train
rows. The test rows decide nothing; the adapter as it was, the even state and the found one are
scored on them at the end.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from accelerate import Accelerator

from petl.adapters.export.saved_adapter import SavedAdapter
from petl.adapters.export.shipped import chosen
from petl.adapters.search.divergence import Divergence, TaskLoss
from petl.adapters.search.evolve import Evolution, even, evolution_of, evolve
from petl.adapters.search.picture import draw, uniform
from petl.adapters.search.records import PICTURE, SEARCH, SearchRecord, SearchResult, SearchSettings
from petl.adapters.search.units import Feature, swapped
from petl.core.adapter_folder import CONFIG
from petl.data.batch_sampler import chunks, permutation
from petl.data.streaming import StreamedRows
from petl.errors import InputError, shown
from petl.system.collectives import on_main
from petl.system.files.disk import as_json, sha256, write_atomic
from petl.system.files.outputs import check_output
from petl.system.files.read import read_json
from petl.system.progress import Pass
from petl.training.dataloader import Batch, Splits, encode_splits, to_device
from petl.training.distributed.launch import start
from petl.training.evaluate import Evaluator

METRICS = {"kl": Divergence, "loss": TaskLoss}
TOKENS = 16384  # positions of the last stage at most
STAGES = ((8, 32), (2, 4))  # survivors of the stages before, and by what TOKENS is divided there
LEAST = 64  # positions of a stage, if there are as many; assumption: fewer select noise
logger = logging.getLogger(__name__)


def squeeze(
    saved: SavedAdapter,
    made: Callable[[SavedAdapter], Feature],
    settings: SearchSettings,
    out: Path,
    *,
    generations: int = 50,
) -> SearchResult:
    """Search levels within a number of bytes, and write the adapter with the best ones to `out`.

    Args:
        saved: the adapter of a run.
        made: loads it with its units, such as `Density`.
        settings: of the search.
        out: a new folder, or one of an earlier search with these settings, which is resumed.
        generations: to search.

    Raises:
        InputError: a setting is out of range, the bytes are too few, the method has no such levels,
            `out` is taken, or holds a search with other settings.
    """
    before = read_record(out, saved, settings)
    config = saved.run_config
    accelerator = start(config.train.seed, config.precision)
    splits = encode_splits(saved.data, saved.processor, config.train, accelerator)
    batches, source = calibration(splits, settings, accelerator)
    # after `start`, which chooses the device of the process
    feature = made(saved)
    # the reference in the precision of the candidates
    with accelerator.autocast():
        distance = METRICS[settings.metric](feature.model, batches, most=TOKENS)
    calibrated = f"{distance.total:,} positions of {source}"
    with swapped(feature.model, feature.units) as to, accelerator.autocast():

        def fitness(state: Sequence[int], tokens: int = TOKENS) -> float:
            to(state)
            return distance(tokens)

        record = before or prepared(saved, settings, feature, fitness)
        save = Writer(out, record, accelerator)
        search = run(record, feature, fitness, save, distance.total, generations)
        found, value = tuple(record.even), record.even_fitness
        if search is not None:
            found, value = search.state, search.fitness
        scores = {}
        for name, state in (("even", record.even), ("found", found)):
            to(state)
            scores[name] = score(feature, splits, accelerator, config.train.eval_batch_size, name)
    # its own tensors are back
    scores["original"] = score(
        feature, splits, accelerator, config.train.eval_batch_size, "original"
    )
    size = on_main(accelerator, lambda: write(feature, found, out))
    record = save.record
    history = search.history if search else ()
    path = [(feature.bytes_of(each.state), each.fitness) for each in history]
    on_main(accelerator, lambda: draw(record, feature, path, out / PICTURE))
    return SearchResult(
        record,
        found,
        value,
        size,
        feature.bytes_of(record.even),
        calibrated,
        table(feature, record.even, found),
        scores,
        splits.task.metric,
    )


def read_record(out: Path, saved: SavedAdapter, settings: SearchSettings) -> SearchRecord | None:
    """Return the record of an earlier search in `out`; None if the folder is new.

    Raises:
        InputError: the folder is taken by something else, or by a search with other settings.
    """
    file = out / SEARCH
    # what is written are files of an adapter, and further ones of the original
    files = (*out.glob("*"), *out.glob("*/*"))
    present = [path.relative_to(out).as_posix() for path in files]
    own = [name.split("/")[0] for name in chosen([CONFIG, *present])]
    own += [path.name for path in saved.adapter.iterdir() if path.is_file()]
    check_output(out, (SEARCH, PICTURE, *own), (SEARCH,))
    if not file.is_file():
        return None
    raw = read_json(file, SearchRecord)
    given = asdict(settings)
    for name, value in raw["settings"].items():
        if value != given[name]:
            raise InputError(
                f"{out} holds a search with {name}={shown(value)}, not {shown(given[name])}; "
                "choose another folder with --out, or the same settings to resume it"
            )
    if raw["adapter"] != sha256(saved.folder.weights):
        raise InputError(
            f"{out} holds a search of another adapter than {saved.adapter}; choose another folder "
            "with --out"
        )
    raw["settings"] = settings
    raw["search"] = evolution_of(raw["search"], SEARCH) if raw.get("search") else None
    return SearchRecord(**raw)


def calibration(
    splits: Splits, settings: SearchSettings, accelerator: Accelerator
) -> tuple[list[Batch], str]:
    """Return batches of random calibration rows, in a fixed order, and what these rows are."""
    rows, source = splits.validation, "validation rows"
    if rows is None:
        rows, source = splits.train, "train rows"
    if isinstance(rows, StreamedRows):  # without length and random access
        rows = rows.first_rows(settings.rows)
    order = permutation(len(rows), settings.seed, 0)[: settings.rows]
    size, device = 16, accelerator.device
    batches = [splits.collate(list(rows.select(part))) for part in chunks(order, size)]
    return [to_device(batch, device) for batch in batches], f"{len(order):,} {source}"


def prepared(
    saved: SavedAdapter,
    settings: SearchSettings,
    feature: Feature,
    fitness: Callable[[Sequence[int]], float],
) -> SearchRecord:
    """Return the record of a new search: the even state within the bytes, and the even curve.

    Raises:
        InputError: the bytes are too few.
    """
    units = feature.units
    smallest = feature.bytes_of([0] * len(units))
    if settings.bytes < smallest:
        raise InputError(
            f"{settings.bytes:,} bytes are too few: with every unit at its lowest {settings.what} "
            f"({units[0].values[0]}) the file has {smallest:,} bytes, of which {feature.fixed:,} "
            "are heads, names and shapes"
        )
    levels, costs = [unit.levels for unit in units], [unit.costs for unit in units]
    start = even(levels, budget(feature, settings), costs)
    states = uniform(levels)
    curve = []
    with Pass("measuring even settings", len(states) + 1, unit="settings") as shown_pass:
        for state in states:
            curve.append([feature.bytes_of(state), fitness(state)])
            shown_pass.advance()
        value = fitness(start)
        shown_pass.advance()
    return SearchRecord(
        sha256(saved.folder.weights),
        settings,
        [unit.name for unit in units],
        [list(unit.values) for unit in units],
        list(start),
        value,
        curve,
    )


def budget(feature: Feature, settings: SearchSettings) -> int:
    """Return the cost that the levels may have together."""
    return (settings.bytes - feature.fixed) // feature.unit_bytes


def run(
    record: SearchRecord,
    feature: Feature,
    fitness: Callable[[Sequence[int], int], float],
    save: Callable[[Evolution], None],
    total: int,
    generations: int,
) -> Evolution | None:
    """Search, saving each generation; on an interrupt, return the best so far.

    Returns:
        The search; None if the bytes hold every unit at its highest level.
    """
    settings = record.settings
    levels, costs = [u.levels for u in feature.units], [u.costs for u in feature.units]
    if all(level + 1 == count for level, count in zip(record.even, levels, strict=True)):
        return None
    found = record.search
    done = len(found.history) if found else 0
    try:
        with Pass("searching", done + generations, unit="generations", done=done) as shown_pass:
            for _ in range(generations):
                found = evolve(
                    levels,
                    budget(feature, settings),
                    fitness,
                    costs=costs,
                    offspring=settings.offspring,
                    stages=stages_of(total),
                    generations=1,
                    seed=settings.seed,
                    state=found or record.even,
                )
                save(found)
                shown_pass.note = f"{settings.metric} {found.fitness:.5f}"
                shown_pass.advance()
    except KeyboardInterrupt:
        if found is None:  # nothing to write that is not the even state
            raise
        logger.warning("interrupted: writing the best of %d generations", len(found.history))
    return found


def stages_of(total: int) -> list[tuple[int, int]]:
    """Return survivors and positions of the stages, for so many calibration positions."""
    last = min(TOKENS, total)
    parts = [(survivors, min(last, max(LEAST, last // part))) for survivors, part in STAGES]
    return [*parts, (1, last)]


class Writer:
    """Writes the record of a search after each generation; called with the search so far."""

    def __init__(self, out: Path, record: SearchRecord, accelerator: Accelerator) -> None:
        self.out, self.record, self.accelerator = out, record, accelerator
        on_main(accelerator, self.write)

    def __call__(self, search: Evolution) -> None:
        """Write the record with this search."""
        self.record = replace(self.record, search=search)
        on_main(self.accelerator, self.write)

    def write(self) -> None:
        """Write squeeze.json."""
        self.out.mkdir(parents=True, exist_ok=True)
        write_atomic(self.out / SEARCH, as_json(asdict(self.record), in_order=True))


def score(
    feature: Feature, splits: Splits, accelerator: Accelerator, batch_size: int, name: str
) -> dict[str, float]:
    """Return the scores of the model as it is on the test rows; `name` is for the display."""
    what = f"scoring {len(splits.test):,} test examples, {name}"
    return Evaluator(feature.model, splits, accelerator, batch_size).rows(splits.test, what=what)


def write(feature: Feature, state: Sequence[int], out: Path) -> int:
    """Write the adapter of a state into `out`; return the size of its file of weights."""
    with TemporaryDirectory(prefix=".petl-", dir=out.absolute().parent) as place:
        draft = Path(place) / "draft"
        feature.write(state, draft)
        # the config last: without it the folder is no adapter
        for file in sorted(draft.iterdir(), key=lambda file: file.name == "adapter_config.json"):
            file.replace(out / file.name)
    return (out / feature.file).stat().st_size


def table(
    feature: Feature, even_state: Sequence[int], found: Sequence[int]
) -> list[tuple[str, float, int, float, int]]:
    """Return name, value and bytes of each unit in the even and in the found state."""
    scale = feature.unit_bytes
    return [
        (
            unit.name,
            unit.values[a],
            scale * int(unit.costs[a]),
            unit.values[b],
            scale * int(unit.costs[b]),
        )
        for unit, a, b in zip(feature.units, even_state, found, strict=True)
    ]
