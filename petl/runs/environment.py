"""What a run was made with, and how its time was spent."""

import os
import platform
import resource
import subprocess
import sys
import time
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from petl.config.command_line import command
from petl.version import __version__

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


def describe_environment(accelerator: Accelerator, seed: int) -> dict[str, Any]:
    """Versions, machine, processes, git revision of petl, command."""
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
        "git": git_revision(Path(__file__).parent),
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def processor_name() -> str:
    """What the machine calls its processor."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def package_versions() -> dict[str, str | None]:
    """Versions of petl and of the packages that its results depend on; None: not installed."""
    return {"petl": __version__, **{name: installed_version(name) for name in PACKAGES}}


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_revision(folder: Path) -> str | None:
    """The commit of the repository around `folder`, "+" behind it if files differ, or None."""
    try:
        revision = git(folder, "rev-parse", "HEAD")
        return revision + ("+" if git(folder, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None  # installed without git, or from a package


def git(folder: Path, *arguments: str) -> str:
    line = ["git", "-C", str(folder), *arguments]
    return subprocess.run(
        line, capture_output=True, text=True, check=True, timeout=20
    ).stdout.strip()


def peak_memory(device: torch.device) -> dict[str, int]:
    """The most memory this process has held, in bytes: of the machine, and of the device."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["peak_device_bytes"] = torch.cuda.max_memory_allocated(device)
    return peak


class PhaseTimer:
    """Seconds by what they were spent on; each lap reaches from the mark before it to its own.

    On a CUDA device the marks are events in its stream, so that a lap says how long the device was
    at it, or stood idle because of it: the host only queues work there, and its own clock would
    tell how long the queueing took. The marks are read at `settle`.

    Attributes:
        spent: seconds by name, as of the last `settle`.
        on_device: whether they are on the device's clock.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_device = device.type == "cuda"
        self.spent: dict[str, float] = {}
        self.last: Any = None
        self.open: list[tuple[str, Any, Any]] = []

    def start(self) -> None:
        """Set a mark without a lap: what came before it counts for nothing."""
        self.last = self._mark()

    def lap(self, name: str) -> None:
        """The time since the last mark was spent on `name`."""
        mark = self._mark()
        self.open.append((name, self.last, mark))
        self.last = mark

    def settle(self) -> dict[str, float]:
        """Seconds by name so far; waits for the device, so call it where that is done anyway."""
        if self.on_device and self.open:
            self.open[-1][2].synchronize()
        for name, start, end in self.open:
            seconds = start.elapsed_time(end) / 1e3 if self.on_device else end - start
            self.spent[name] = self.spent.get(name, 0.0) + seconds
        self.open.clear()
        return dict(self.spent)

    def _mark(self) -> Any:
        if not self.on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
