"""The largest batch that fits, and real steps of training that say whether one does.

The search is that of Żelasko et al. 2025, arXiv:2503.05931: sizes double while they fit and are
halved while they do not, then the gap is halved until it is small.
"""

import copy
import gc
from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import Optimizer

from petl.core.parameters import trainable
from petl.distributed.engine import Engine
from petl.runs.checkpoint import rng_state, set_rng
from petl.training.dataloader import Batch, to_device

TOLERANCE = 0.05  # of the least size known not to fit, by which the answer may be too small
SHARE = 0.9  # of a device's memory that steps may take


def largest(fits: Callable[[int], bool], start: int, most: int) -> int:
    """The largest number of rows that fits, within `TOLERANCE` or one; 0 if not even one does.

    Args:
        fits: whether so many rows do; of more rows than do not fit, none do.
        start: the first number to ask for, at most `most`.
        most: there is no use in more.
    """
    good, bad, size = 0, None, start
    while True:
        if fits(size):
            good = size
        else:
            bad = size
        if bad is None:
            if good == most:
                return good
            size = min(2 * good, most)
        elif bad - good == 1 or (good and bad - good <= TOLERANCE * bad):
            return good
        else:
            size = (good + bad) // 2  # half of `bad` while nothing is known to fit


@contextmanager
def put_back(model: nn.Module, optimizer: Optimizer, device: torch.device) -> Generator[None]:
    """After it all that steps change is as before: weights, optimizer, random states; no gradient.

    What of the model is kept meanwhile lies in main memory.
    """
    changing = [*(tensor for _, tensor in trainable(model)), *model.buffers()]
    kept = [tensor.detach().to("cpu", copy=True) for tensor in changing]
    state, draws = copy.deepcopy(optimizer.state_dict()), rng_state(device)
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in zip(changing, kept, strict=True):
                tensor.copy_(before)
        optimizer.load_state_dict(state)
        optimizer.zero_grad()
        set_rng(draws, device)


@contextmanager
def share_of_memory(device: torch.device) -> Generator[None]:
    """Within it this process runs out of a GPU's memory when it holds `SHARE` of it."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(SHARE, device)
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)


class Trials:
    """Real steps of a model in training mode, made within `put_back` and `share_of_memory`.

    A copy of the gradients is held beside them, as several processes or accumulation need it.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.device = engine, engine.accelerator.device
        self.copies = [torch.empty_like(tensor) for tensor in engine.tensors]

    def fits(self, batch: Batch) -> bool:
        """Whether the device has memory for a step on this batch."""
        optimizer = self.engine.optimizer
        fitted = True
        try:
            for _ in range(1 if optimizer.state else 2):  # the first one makes the state
                self.step(batch)
        except torch.OutOfMemoryError:
            fitted = False
        optimizer.zero_grad()  # the error, which held on to the pass, is gone by now
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        return fitted

    def step(self, batch: Batch) -> None:
        engine = self.engine
        with engine.passes(last=True):
            with engine.accelerator.autocast():
                loss = engine.wrapped(**to_device(batch, self.device)).loss
            engine.backward(loss)
        engine.step()
        engine.optimizer.zero_grad()
