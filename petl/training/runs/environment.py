"""The environment of a run (versions, machine, command), its memory and its time by phase."""

import os
import platform
import resource
import subprocess
import sys
import time
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from petl.core.types import Record
from petl.system.settings.command_line import command
from petl.version import __version__

Mark = Any  # seconds of the host, or an event of the device
PACKAGES = (
    "torch",
    "peft",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "pillow",
    "scipy",
    "soundfile",
    "hydra-core",
)


def describe_environment(accelerator: Accelerator, seed: int) -> Record:
    """Return the content of environment.json: versions, machine, processes, command."""
    return {
        "command": command(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "seed": seed,
        "processes": accelerator.num_processes,
        "device": device_name(accelerator.device),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "git": own_revision(),
    }


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def processor_name() -> str:
    """Return the model name of the processor."""
    # platform.processor() is empty on most Linux systems
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def package_versions() -> dict[str, str | None]:
    """Versions of petl and of the packages that its results depend on; None: not installed."""
    return {"petl": __version__, **{name: installed_version(name) for name in PACKAGES}}


@cache
def installed_version(package: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache  # the code of this process stays that of its start
def own_revision() -> str | None:
    """Return the `git_revision` of petl."""
    return git_revision(Path(__file__).parent)


def git_revision(folder: Path) -> str | None:
    """Return the commit of the repository of `folder`, with "+" if files differ, or None.

    None also if the repository has no file of the folder.
    """
    try:
        # else it may be that of a project around an environment in which petl is installed
        git(folder, "ls-files", "--error-unmatch", ".")
        # untracked files do not count as a difference
        revision = git(folder, "rev-parse", "HEAD")
        return revision + ("+" if git(folder, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None  # installed without git, or from a package


def git(folder: Path, *arguments: str) -> str:
    """Run git in `folder` and return its output."""
    line = ["git", "-C", str(folder), *arguments]
    return subprocess.run(
        line, capture_output=True, text=True, check=True, timeout=20
    ).stdout.strip()


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the peak memory of this process in bytes: on the host, and on the device."""
    # getrusage counts kilobytes on Linux, bytes on macOS
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["peak_device_bytes"] = torch.cuda.max_memory_allocated(device)
    return peak


class PhaseTimer:
    """Seconds by phase; a phase lasts from the previous mark to its own.

    On a CUDA device the marks are events in its stream, so a phase is the time that the device
    worked on it or idled because of it. The host only queues work there: its clock would measure
    the queueing. The events are read by `totals`.

    Attributes:
        spent: seconds by phase, as of the last `totals`.
        on_device: True if they are measured by the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_device = device.type == "cuda"
        self.spent: dict[str, float] = {}
        self.last: Mark = 0.0
        self.open: list[tuple[str, Mark, Mark]] = []

    def start(self) -> None:
        """Set a mark that ends no phase: the time before it is not counted."""
        self.last = self._now()

    def mark(self, phase: str) -> None:
        """Count the time since the last mark for `phase`."""
        now = self._now()
        # read in `totals` only: elapsed_time would wait for the device here
        self.open.append((phase, self.last, now))
        self.last = now

    def totals(self) -> dict[str, float]:
        """Return the seconds by phase so far; synchronizes with the device."""
        if self.on_device and self.open:
            # the last event: those before it in the stream are over by then
            self.open[-1][2].synchronize()
        for phase, start, end in self.open:
            # elapsed_time is in milliseconds
            seconds = start.elapsed_time(end) / 1e3 if self.on_device else end - start
            self.spent[phase] = self.spent.get(phase, 0.0) + seconds
        self.open.clear()
        return dict(self.spent)

    def _now(self) -> Mark:
        if not self.on_device:
            return time.perf_counter()
        # recorded in the current stream, without synchronization
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
