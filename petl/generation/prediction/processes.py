"""Several processes for one command, on this machine: `--processes N`."""

import logging
import os
import sys
from collections.abc import Sequence
from uuid import uuid4

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from petl.errors import InputError, RunStopped


def run_in_processes(number: int, words: Sequence[str]) -> None:
    """Run a `petl` command in `number` processes, as torchrun does, and wait for them.

    Raises:
        InputError: there are fewer accelerators than processes.
        RunStopped: one of them failed, with its status; it has printed why.
    """
    devices = torch.accelerator.device_count()
    if 0 < devices < number:  # 0: processes share the CPU
        raise InputError(f"--processes={number} is more than the {devices} accelerators there are")
    threads = max(1, (os.cpu_count() or 1) // number)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # all of them have all cores otherwise
    # its own report of a process that failed is twenty lines of where and when
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=number,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # any free port
        max_restarts=0,  # a restart would print rows again
        run_id=uuid4().hex,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "petl", *words)
    except ChildFailedError as error:
        # an exit code is negative if a signal ended the process
        status = max(failure.exitcode for failure in error.failures.values())
        raise RunStopped(f"stopped: one of {number} processes failed", max(1, status)) from error
