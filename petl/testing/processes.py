"""Run functions in new processes: a single one, or several of one process group.

On Unix the processes are forked from a server that has imported PyTorch, transformers and PEFT, but
neither petl nor anything else of the caller: as clean as a new interpreter, and much faster.
"""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")
PRELOAD = (
    "peft",
    "transformers.models.bert.modeling_bert",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.t5.modeling_t5",
    "transformers.models.vit.modeling_vit",
)


def in_fresh_process(function: Callable[..., T], *args: object, imports: tuple[str, ...] = ()) -> T:
    """Return `function(*args)`, run in a new process that has imported only what it needs.

    Args:
        function: a module-level function; its module is imported in the new process.
        args: its arguments; they and the result are pickled, tensors use shared memory.
        imports: modules to import first, such as one that registers a method.
    """
    with ProcessPoolExecutor(1, _context()) as pool:
        return pool.submit(partial(_call, function, imports), *args).result()


def in_processes(
    count: int, function: Callable[..., T], *args: object, imports: tuple[str, ...] = ()
) -> list[T]:
    """Return `function(*args)` of each of `count` new processes of one gloo group, by rank.

    Args:
        count: the number of processes.
        function: a module-level function.
        args: its arguments.
        imports: modules to import first, such as one that registers a method.
    """
    with TemporaryDirectory() as folder, ProcessPoolExecutor(count, _context()) as pool:
        store = Path(folder) / "store"
        ranks = [
            pool.submit(partial(_call_in_group, store, rank, count, function, imports), *args)
            for rank in range(count)
        ]
        return [rank.result() for rank in ranks]


def _context() -> BaseContext:
    if "forkserver" not in get_all_start_methods():
        # Windows has no fork; slower, since each process imports everything
        return get_context("spawn")
    # plain fork would copy the caller's imports and threads
    context = get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    return context


def _call(function: Callable[..., T], imports: tuple[str, ...], *args: object) -> T:
    # several processes would compete for the cores
    torch.set_num_threads(1)
    for module in imports:
        import_module(module)
    return function(*args)


def _call_in_group(
    store: Path,
    rank: int,
    count: int,
    function: Callable[..., T],
    imports: tuple[str, ...],
    *args: object,
) -> T:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ["MASTER_ADDR"] = "localhost"  # Accelerate reads it, although the group exists
    distributed.init_process_group(
        "gloo", init_method=store.resolve().as_uri(), rank=rank, world_size=count
    )
    try:
        return _call(function, imports, *args)
    finally:
        distributed.destroy_process_group()
