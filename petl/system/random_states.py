"""The random states of a process: of torch on the CPU and on a device, of NumPy and Python."""

import random
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class RandomStates(NamedTuple):
    """The states of all generators that a process draws from; `device` on a CPU: as `cpu`."""

    cpu: Tensor
    device: Tensor
    numpy: Any
    python: tuple[Any, ...]


def states(device: torch.device) -> RandomStates:
    """Return the states of all generators of this process."""
    cpu = torch.get_rng_state()
    on_cpu = device.type == "cpu"
    own = cpu if on_cpu else torch.get_device_module(device).get_rng_state(device)
    return RandomStates(cpu, own, np.random.get_state(), random.getstate())


def restore(saved: RandomStates, device: torch.device) -> None:
    """Set all generators of this process to what `states` has returned."""
    if device.type == "cpu":
        torch.set_rng_state(saved.device)
    else:
        torch.set_rng_state(saved.cpu)
        torch.get_device_module(device).set_rng_state(saved.device, device)
    np.random.set_state(saved.numpy)
    random.setstate(saved.python)


@contextmanager
def states_kept(device: torch.device | None = None) -> Generator[None]:
    """After the block, all generators are as before; without a device, those of CUDA in use."""
    device = device or torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
    before = states(device)
    try:
        yield
    finally:
        restore(before, device)
