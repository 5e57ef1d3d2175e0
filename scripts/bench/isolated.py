"""Sections `peak` and `dist`, measured in fresh processes: peak memory, data-parallel training."""

import ctypes
import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from bench.clocks import Spread, Step, Times, in_turn
from bench.contenders import Contender
from bench.counters import Collectives
from bench.records import Record
from bench.shapes import Bench, Shape
from bench.step import floor_of, or_why
from petl.errors import UnsupportedError
from petl.training.optimizer import make_optimizer
from petl.training.runs.settings import TrainConfig

STEPS = 3  # of which the memory is measured; the first allocates gradients
AT_ONCE = 2  # processes that run in parallel while memory is measured; times are not
FLOOR = "floor"
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def in_processes(call: Callable[..., Any], *tasks: Sequence[Any]) -> list[Any]:
    """Return `call(*task)` for each task, all in parallel, each in a fresh process.

    Raises:
        Exception: the exception of a call.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(len(tasks), mp_context=context, max_tasks_per_child=1) as pool:
        return [job.result() for job in [pool.submit(call, *task) for task in tasks]]


def quieten() -> None:
    """Silence warnings of methods and libraries about tiny runs with random weights."""
    warnings.simplefilter("ignore")
    for name in ("petl", "peft", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


# Peak memory


def peaks(rows: Sequence[Contender], shape: Shape) -> list[Record]:
    """Section `peak`: a record for the lower bound and each row."""
    with ThreadPoolExecutor(AT_ONCE if shape.device == "cpu" else 1) as pool:
        measured = pool.map(lambda row: or_why(row, partial(peak_of, row, shape)), [None, *rows])
        first, *others = measured
    assert isinstance(first, int)  # of the floor
    records = [Record("peak", str(shape), FLOOR, facts={"peak MB": first / 1e6})]
    for row, peak in zip(rows, others, strict=True):
        if isinstance(peak, str):
            # not supported by it, if it is petl's: no failure
            records.append(replace(row.record("peak", shape, failed=peak), is_own=False))
            continue
        facts = {"peak MB": peak / 1e6, "peak / floor": peak / first}
        records.append(row.record("peak", shape, facts=facts))
    return records


def peak_of(row: Contender | None, shape: Shape) -> int:
    """Return the peak memory of steps of a row, or of the lower bound, beyond the wrapped model."""
    return in_processes(_peak, (row, shape, torch.get_num_threads()))[0]


def _peak(row: Contender | None, shape: Shape, threads: int) -> int:
    """Run in a fresh process: see `peak_of`."""
    quieten()
    torch.set_num_threads(threads)
    bench = Bench(shape)
    step = floor_of(bench)[0] if row is None else bench.step(row.wrap(bench))
    if shape.device == "cpu":
        return peak_of_steps(step)
    torch.cuda.synchronize(shape.device)
    torch.cuda.reset_peak_memory_stats(shape.device)
    before = torch.cuda.memory_allocated(shape.device)
    for _ in range(STEPS):
        step()
    return torch.cuda.max_memory_allocated(shape.device) - before


def peak_of_steps(step: Step) -> int:
    """Return the peak memory of this process during steps, beyond what it has before, in bytes."""
    before = resident_from_here()
    for _ in range(STEPS):
        step()
    return _status("VmHWM") - before


def resident_from_here() -> int:
    """Reset the peak memory of this process; return its current memory in bytes."""
    before = resident()
    RESET.write_text("5")  # resets VmHWM, see proc(5)
    return before


def resident() -> int:
    """Return the resident memory of this process in bytes, after freed memory was returned.

    Raises:
        UnsupportedError: the system is not Linux.
    """
    if not RESET.exists():
        raise UnsupportedError(
            f"{RESET} does not exist: the peak memory of a process can be measured on Linux only"
        )
    # or steps would reuse memory that was freed while the model was built
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def own_memory() -> int:
    """Return the memory of this process in bytes that is mapped from no file."""
    resident()
    return _status("RssAnon")


def _status(field: str) -> int:
    """Read a field of /proc/self/status, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


# Several processes


WAYS = ((1, 1), (1, 2), (2, 1))  # number of processes, and threads per process


@dataclass(frozen=True)
class Group:
    """A process group: number of processes, threads per process, folder of the rendezvous."""

    processes: int
    threads: int
    folder: str


@dataclass(frozen=True)
class Pace:
    """Times of complete steps, with the optimizer, in one of several processes.

    Attributes:
        joined: processor time of steps with all-reduce over that of steps without.
        wall: seconds of a step with all-reduce.
        parameters: number of trainable parameters.
        collectives: number of collective operations in a step with all-reduce.
    """

    joined: Spread
    wall: float
    parameters: int
    collectives: int


def throughput(rows: Sequence[Contender], shape: Shape, rounds: int) -> list[Record]:
    """Section `dist`: a record for each row of a registered method or loss."""
    rows = [row for row in rows if not row.draws and row.method != "xlora"]
    rows = [row.fitting(shape.layers) for row in rows]
    paces_of: dict[tuple[int, int], list[list[Pace | str]]] = {}
    for processes, threads in WAYS:
        with TemporaryDirectory() as folder:
            group = Group(processes, threads, folder)
            tasks = [(rows, shape, rounds, rank, group) for rank in range(processes)]
            paces_of[processes, threads] = in_processes(_paces, *tasks)
    records = []
    for number, row in enumerate(rows):
        paces: dict[tuple[int, int], list[Pace]] = {}
        failed = ""
        for way, ranks in paces_of.items():
            own = [rank[number] for rank in ranks]
            paces[way] = [pace for pace in own if isinstance(pace, Pace)]
            failed = next((why for why in own if isinstance(why, str)), failed)
        records.append(
            row.record("dist", shape, failed=failed) if failed else _throughput(row, shape, paces)
        )
    return records


def _throughput(
    row: Contender, shape: Shape, found: Mapping[tuple[int, int], Sequence[Pace]]
) -> Record:
    """The record of a row, from the times of its processes for each of `WAYS`."""
    two = found[2, 1]
    walls = {way: max(pace.wall for pace in paces) for way, paces in found.items()}
    return row.record(
        "dist",
        shape,
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
    """Measure each row in a process of the group; a reason where a method cannot be measured."""
    quieten()
    torch.set_num_threads(group.threads)
    if shape.device != "cpu":
        shape = replace(shape, device=f"cuda:{rank % torch.cuda.device_count()}")
        torch.cuda.set_device(shape.device)
    backend = "gloo" if shape.device == "cpu" else "nccl"
    rendezvous = f"file://{Path(group.folder, 'rendezvous')}"
    distributed.init_process_group(
        backend, init_method=rendezvous, rank=rank, world_size=group.processes
    )
    try:
        return [or_why(row, lambda row=row: _pace(row, Bench(shape), rounds)) for row in rows]
    finally:
        distributed.destroy_process_group()


def _pace(row: Contender, bench: Bench, rounds: int) -> Pace:
    model = row.wrap(bench)
    parallel = DistributedDataParallel(model)
    optimizer = make_optimizer(model, TrainConfig())
    walls: list[float] = []

    def step(*, joined: bool) -> None:
        start = time.perf_counter()
        with nullcontext() if joined else parallel.no_sync():
            parallel(**bench.batch).loss.backward()
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


os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine's host name may not resolve
