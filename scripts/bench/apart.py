"""What must be measured in a process of its own: peak memory, and several processes together."""

import ctypes
import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from bench.clocks import Spread, Times, in_turn
from bench.contenders import Contender
from bench.counters import Collectives
from bench.records import Record
from bench.shapes import Bench, Shape
from bench.step import UNFIT, floor_of
from petl.errors import UnsupportedError, first_line
from petl.runs.settings import TrainConfig
from petl.training.optimizer import make_optimizer

STEPS = 3
AT_ONCE = 2  # processes whose memory is measured; their times are not
FLOOR = "floor"
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def apart(call: Callable[..., Any], *tasks: Sequence[Any]) -> list[Any]:
    """`call(*task)` for each task, all at once, each in a process that has done nothing yet.

    Raises:
        Exception: whatever a call raises.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(len(tasks), mp_context=context, max_tasks_per_child=1) as pool:
        return [job.result() for job in [pool.submit(call, *task) for task in tasks]]


def quieten() -> None:
    """Leave out what methods and libraries have to say of tiny runs with random weights."""
    warnings.simplefilter("ignore")
    for name in ("petl", "peft", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


# Peak memory


def peaks(rows: Sequence[Contender], shape: Shape) -> list[Record]:
    """Section `peak`: a record for the floor and each row."""
    with ThreadPoolExecutor(AT_ONCE if shape.device == "cpu" else 1) as pool:
        first, *others = pool.map(lambda row: _peak_or_why(row, shape), [None, *rows])
    assert isinstance(first, int)  # of the floor
    records = [Record("peak", str(shape), FLOOR, facts={"peak MB": first / 1e6})]
    for row, found in zip(rows, others, strict=True):
        if isinstance(found, str):
            records.append(Record("peak", str(shape), row.name, found, is_own=False))
            continue
        facts = {"peak MB": found / 1e6, "peak / floor": found / first}
        records.append(Record("peak", str(shape), row.name, is_own=row.is_own, facts=facts))
    return records


def _peak_or_why(row: Contender | None, shape: Shape) -> int | str:
    """`peak_of`, or why a peer cannot be measured."""
    try:
        return peak_of(row, shape)
    except UNFIT as error:
        if row is None or (row.is_own and not isinstance(error, UnsupportedError)):
            raise
        return f"{type(error).__name__}: {first_line(error)}"


def peak_of(row: Contender | None, shape: Shape) -> int:
    """Bytes that steps of a row, or of the floor, take at most beside the wrapped model."""
    return apart(_peak, (row, shape, torch.get_num_threads()))[0]


def _peak(row: Contender | None, shape: Shape, threads: int) -> int:
    quieten()
    torch.set_num_threads(threads)
    bench = Bench(shape)
    step = floor_of(bench)[0] if row is None else bench.step(row.wrap(bench))
    if shape.device != "cpu":
        torch.cuda.synchronize(shape.device)
        torch.cuda.reset_peak_memory_stats(shape.device)
        before = torch.cuda.memory_allocated(shape.device)
    else:
        before = resident_from_here()
    for _ in range(STEPS):
        step()
    if shape.device != "cpu":
        return torch.cuda.max_memory_allocated(shape.device) - before
    return _status("VmHWM") - before


def resident_from_here() -> int:
    """Bytes of this process in memory, from which on the peak counts."""
    before = resident()
    RESET.write_text("5")
    return before


def resident() -> int:
    """Bytes of this process in memory; free ones are given back before.

    Raises:
        UnsupportedError: the system is not Linux.
    """
    if not RESET.exists():
        raise UnsupportedError("memory is measured on Linux only, which tells of it by process")
    ctypes.CDLL(None).malloc_trim(0)  # what building the model left would serve the steps unseen
    return _status("VmRSS")


def _status(field: str) -> int:
    """Bytes that the system tells of this process."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


# Several processes


WAYS = ((1, 1), (1, 2), (2, 1))  # processes, and threads of each


@dataclass(frozen=True)
class Group:
    """Processes that train together, threads of each, and a folder where they meet."""

    processes: int
    threads: int
    folder: str


@dataclass(frozen=True)
class Pace:
    """Of whole steps, the optimizer's included, in one of several processes.

    Attributes:
        joined: processor time of steps that average gradients over those that do not.
        wall: seconds of a step that does.
        parameters: that train.
        collectives: operations between processes in such a step.
    """

    joined: Spread
    wall: float
    parameters: int
    collectives: int


def throughput(rows: Sequence[Contender], shape: Shape, rounds: int) -> list[Record]:
    """Section `dist`: a record for each row of a registered method or loss."""
    measured = (row for row in rows if not row.draws and row.method != "xlora")
    rows = [row.fitting(shape.layers) for row in measured]
    found: dict[tuple[int, int], list[list[Pace | str]]] = {}
    for processes, threads in WAYS:
        with TemporaryDirectory() as folder:
            group = Group(processes, threads, folder)
            tasks = [(rows, shape, rounds, rank, group) for rank in range(processes)]
            found[processes, threads] = apart(_paces, *tasks)
    records = []
    for number, row in enumerate(rows):
        paces: dict[tuple[int, int], list[Pace]] = {}
        failed = ""
        for way, ranks in found.items():
            own = [rank[number] for rank in ranks]
            paces[way] = [pace for pace in own if isinstance(pace, Pace)]
            failed = next((why for why in own if isinstance(why, str)), failed)
        records.append(
            Record("dist", str(shape), row.name, failed, is_own=row.is_own)
            if failed
            else _throughput(row, shape, paces)
        )
    return records


def _throughput(
    row: Contender, shape: Shape, found: Mapping[tuple[int, int], Sequence[Pace]]
) -> Record:
    """The record of a row, from the paces of its processes by way."""
    two = found[2, 1]
    walls = {way: max(pace.wall for pace in paces) for way, paces in found.items()}
    return Record(
        "dist",
        str(shape),
        row.name,
        is_own=row.is_own,
        ratios={"joined / alone": max((p.joined for p in two), key=lambda ratio: ratio.median)},
        counts={"B reduced": 4 * two[0].parameters, "collectives": two[0].collectives},
        facts={
            **{f"steps / s, {n} x {k}": n / wall for (n, k), wall in walls.items()},
            "efficiency of 2 x 1": walls[1, 1] / walls[2, 1],
        },
    )


def _paces(
    rows: Sequence[Contender], shape: Shape, rounds: int, rank: int, group: Group
) -> list[Pace | str]:
    """The pace of each row in a process of the group, or why a peer has none."""
    quieten()
    torch.set_num_threads(group.threads)
    if shape.device != "cpu":
        shape = replace(shape, device=f"cuda:{rank % torch.cuda.device_count()}")
        torch.cuda.set_device(shape.device)
    backend = "gloo" if shape.device == "cpu" else "nccl"
    meeting = f"file://{Path(group.folder, 'meeting')}"
    distributed.init_process_group(
        backend, init_method=meeting, rank=rank, world_size=group.processes
    )
    try:
        return [_pace_or_why(row, shape, rounds) for row in rows]
    finally:
        distributed.destroy_process_group()


def _pace_or_why(row: Contender, shape: Shape, rounds: int) -> Pace | str:
    try:
        return _pace(row, Bench(shape), rounds)
    except UNFIT as error:
        if row.is_own:
            raise
        return f"{type(error).__name__}: {first_line(error)}"


def _pace(row: Contender, bench: Bench, rounds: int) -> Pace:
    model = row.wrap(bench)
    joint = DistributedDataParallel(model)
    optimizer = make_optimizer(model, TrainConfig())
    walls: list[float] = []

    def step(*, joined: bool) -> None:
        start = time.perf_counter()
        with nullcontext() if joined else joint.no_sync():
            joint(**bench.batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if joined:
            _wait(bench.shape.device)
            walls.append(time.perf_counter() - start)

    times: Times = in_turn(
        lambda: step(joined=False),
        {"joined": lambda: step(joined=True)},
        rounds=rounds,
        warm_up=1,
        device=bench.shape.device,
    )
    wall = Spread.of(walls[1:]).median
    with Collectives() as seen:
        step(joined=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Pace(times.over_floor("joined"), wall, trained, seen.count)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine's name need not resolve
