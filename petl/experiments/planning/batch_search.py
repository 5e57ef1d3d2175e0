"""Find the largest batch that fits into memory, by trial training steps on the device.

The search of Żelasko et al. 2025, arXiv:2503.05931: sizes double while they fit and are halved
while they do not; then the gap is bisected until it is small.
"""

import copy
import gc
from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import Optimizer

from petl.core.parameters import trainable
from petl.system.random_states import restore, states
from petl.training.dataloader import Batch, to_device
from petl.training.distributed.launch import StepEngine

# gap between a size that fits and one that does not, relative to the latter, at which the search
# ends (assumption: a larger batch by less than this is not worth another trial)
TOLERANCE = 0.05
# fraction of a device's memory that steps may use; the rest is left for fragmentation and for rows
# that a method adds while it trains (assumption)
MEMORY_FRACTION = 0.9


def largest(fits: Callable[[int], bool], start: int, maximum: int) -> int:
    """Return the largest number of rows that fits, within `TOLERANCE` or one row; 0 if none fits.

    Args:
        fits: True if this number of rows fits; must be monotonic.
        start: the first number to try, at most `maximum`.
        maximum: the largest number that is of use.
    """
    # invariant: `good` fits, `bad` does not (None: no such size is known yet)
    good, bad, size = 0, None, start
    while True:
        if fits(size):
            good = size
        else:
            bad = size
        if bad is None:  # all sizes so far fit: double
            if good == maximum:
                return good
            size = min(2 * good, maximum)
        elif bad - good == 1 or (good and bad - good <= TOLERANCE * bad):
            return good
        else:
            size = (good + bad) // 2  # `bad` halved, while nothing fits


@contextmanager
def restored(model: nn.Module, optimizer: Optimizer, device: torch.device) -> Generator[None]:
    """Restore weights, optimizer and random states after the block, and clear all gradients.

    The copies are kept in main memory, so that they do not use the memory that is measured.
    """
    # buffers as well: methods keep masks and ranks in them
    changing = [*(tensor for _, tensor in trainable(model)), *model.buffers()]
    copies = [tensor.detach().to("cpu", copy=True) for tensor in changing]
    state, random_states = copy.deepcopy(optimizer.state_dict()), states(device)
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in zip(changing, copies, strict=True):
                tensor.copy_(before)
        optimizer.load_state_dict(state)
        optimizer.zero_grad()
        restore(random_states, device)


@contextmanager
def limited_memory(device: torch.device) -> Generator[None]:
    """In the block, let this process use at most `MEMORY_FRACTION` of a GPU's memory."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(MEMORY_FRACTION, device)
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)


class StepTrials:
    """Trial steps of a model in training mode; use inside `restored` and `limited_memory`.

    Holds a second copy of the gradients, which several processes or gradient accumulation need.
    """

    def __init__(self, engine: StepEngine) -> None:
        self.engine, self.device = engine, engine.accelerator.device
        # allocated here, so that it takes part in every trial
        self.copies = [torch.empty_like(tensor) for tensor in engine.tensors]

    def fits(self, batch: Batch) -> bool:
        """Return True if a step on this batch fits into the memory of the device."""
        optimizer = self.engine.optimizer
        fitted = True
        try:
            for _ in range(1 if optimizer.state else 2):  # the first step allocates the state
                self.step(batch)
        except torch.OutOfMemoryError:
            fitted = False
        optimizer.zero_grad()  # here, because the error kept the tensors of its pass alive
        if self.device.type == "cuda":  # or fragments of this size would disturb the next trial
            gc.collect()
            torch.cuda.empty_cache()
        return fitted

    def step(self, batch: Batch) -> None:
        """Make one training step, with the optimizer."""
        engine = self.engine
        with engine.passes(last=True):  # with communication of the gradients, as the last one has
            with engine.accelerator.autocast():
                loss = engine.wrapped(**to_device(batch, self.device)).loss
            engine.backward(loss)
        engine.step()
        engine.optimizer.zero_grad()
