"""Runs in threads of one process: one works at a time, until all that train wait for a pass.

Each run is the code of `petl train`, unchanged: it loads, scores, trains, saves and reports. Where
its training loop would call the model, its engine (`engine.py`) asks for a pass and waits. When no
run can go on without one, the pass of all of them is made, and they go on one after the other. A
run works alone, so what a process has once is exchanged when another run's turn comes: states of
random number generators, standard streams, the command line, what Hydra knows of it, and what
accelerate knows of the run.
"""

import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.state import AcceleratorState
from hydra.core.hydra_config import HydraConfig
from torch import Tensor, nn

from petl.system.processes import current_lane, enter_lane, stop_threads
from petl.training.distributed.launch import Engine
from petl.training.runs.checkpoint import RngState, rng_state, set_rng

READY, WAITING, DONE = "ready", "waiting", "done"
WRAPPED = ("base_layer", "original_module")  # names of PEFT's for what an adapter wraps
POLL = 0.5  # seconds after which the main thread looks for a signal


class Lane:
    """A thread that makes one run after another.

    Attributes:
        request: what the run waits for: the kind of a pass, and what it gives to it.
        answer: the result of the pass, or its error.
        random: the states of the random number generators of the run, while it waits.
        device: of the run's model, once it trains.
    """

    def __init__(self, lanes: "Lanes", index: int) -> None:
        self.lanes, self.index = lanes, index
        self.state = READY
        self.request: tuple[str, Any] | None = None
        self.answer: Any = None
        self.random: RngState | None = None
        self.device = torch.device("cpu")
        # keeps a release that comes before the lane waits, which a Condition would lose
        self.go = threading.Semaphore(0)
        self._kept: tuple[Any, ...] | None = None

    def ask(self, kind: str, what: Any) -> Any:
        """Wait for a pass of this kind, and return its result.

        Raises:
            Exception: what the pass raised.
        """
        self.request, self.state = (kind, what), WAITING
        # before others work: they change what the process has once
        self.leave()
        self.lanes.hand_over(self)
        self.enter()
        answer, self.request, self.answer = self.answer, None, None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def leave(self) -> None:
        """Keep what the process has once."""
        self.random = rng_state(self.device)
        self._kept = process_state()

    def enter(self) -> None:
        """Restore what `leave` has kept."""
        assert self.random is not None
        assert self._kept is not None
        set_rng(self.random, self.device)
        set_process_state(self._kept)


class Lanes:
    """Makes runs in lanes, and the passes that they ask for.

    Args:
        width: the number of runs at a time.
        perform: makes the passes of lanes that wait; called with kind and lanes, returns a result
            for each of them. Kinds are performed in the order of `kinds`.
        engine: the class of the engines of runs in these lanes, which ask for passes.
    """

    def __init__(
        self,
        width: int,
        perform: Callable[[str, Sequence[Lane]], Sequence[Any]],
        kinds: Sequence[str],
        engine: type[Engine],
    ) -> None:
        self.lanes = [Lane(self, index) for index in range(width)]
        self.perform, self.kinds, self.engine = perform, kinds, engine
        self.bases: dict[str, nn.Parameter] = {}  # see `share_base`
        self.asked_to_stop = 0
        self._finished = threading.Event()
        self._error: BaseException | None = None

    def run(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Make all runs; each job handles its own errors. Returns after the last of them.

        Raises:
            BaseException: the first that a job did not handle, after the other jobs.
        """
        waiting = deque(jobs)
        self._state = process_state()
        threads = [
            threading.Thread(target=self._work, args=(lane, waiting), daemon=True)
            for lane in self.lanes
        ]
        for thread in threads:
            thread.start()
        self.lanes[0].go.release()
        while not self._finished.wait(POLL):  # wakes up for signals, which only this thread gets
            pass
        # they have nothing left to do
        for thread in threads:
            thread.join()
        set_process_state(self._state)
        if self._error is not None:
            raise self._error

    def stop(self, number: int) -> None:
        """Ask all runs to stop after their step, and start no others."""
        self.asked_to_stop = number
        stop_threads(number)

    def _work(self, lane: Lane, waiting: deque[Callable[[], None]]) -> None:
        lane.go.acquire()
        enter_lane(lane)
        while waiting and not self.asked_to_stop:
            set_process_state(self._state)
            try:
                waiting.popleft()()
            except BaseException as error:  # the others would wait for this lane
                self._error = self._error or error
            lane.device = torch.device("cpu")
        lane.state = DONE
        self.hand_over(lane)

    def hand_over(self, lane: Lane) -> None:
        """Let others work until `lane` can go on; return at once if it is done."""
        while True:
            ready = [other for other in self.lanes if other.state == READY]
            waiting = [other for other in self.lanes if other.state == WAITING]
            if ready and ready[0] is lane:
                return
            if not ready and not waiting:
                self._finished.set()
                return
            # not in the thread of a lane that is done: autocast is a state of the waiting ones
            if not ready and lane.state == WAITING:
                self._answer(waiting)
                continue
            (ready or waiting)[0].go.release()
            if lane.state == DONE:
                return
            lane.go.acquire()

    def _answer(self, waiting: Sequence[Lane]) -> None:
        """Make the passes of the first kind that lanes wait for; these are ready then."""
        kind = next(k for k in self.kinds if any(_kind(lane) == k for lane in waiting))
        own = [lane for lane in waiting if _kind(lane) == kind]
        try:
            answers: Sequence[Any] = self.perform(kind, own)
        except Exception as error:  # all runs of the pass fail with it
            answers = [error] * len(own)
        for lane, answer in zip(own, answers, strict=True):
            lane.answer, lane.state = answer, READY


def _kind(lane: Lane) -> str:
    assert lane.request is not None
    return lane.request[0]


def process_state() -> tuple[Any, ...]:
    """Return what a process has once, and each run sets.

    That is streams, command line, Hydra's config, and the state of accelerate with the precision.
    """
    accelerate = dict(AcceleratorState._shared_state)
    return sys.stdout, sys.stderr, list(sys.argv), HydraConfig.instance().cfg, accelerate


def set_process_state(state: tuple[Any, ...]) -> None:
    """Restore what `process_state` returned."""
    sys.stdout, sys.stderr, sys.argv[:], HydraConfig.instance().cfg, accelerate = state
    # in place: every Accelerator has this dict
    AcceleratorState._shared_state.clear()
    AcceleratorState._shared_state.update(accelerate)


def share_base(base: nn.Module, own: Sequence[nn.Parameter]) -> None:
    """Let a wrapped model use the frozen weights of an earlier one of these lanes, where equal.

    Call it when the adapter has its initial values, which some methods take out of the weights.
    Weights that train stay the run's own, as do new modules, such as a head that each run draws.

    Args:
        base: the transformers model.
        own: its parameters before it was wrapped; an adapter may change others that are frozen.
    """
    lane = current_lane()
    known, ids = lane.lanes.bases, {id(parameter) for parameter in own}
    for path, module in base.named_modules():
        # adapters are on other modules in another run
        place = ".".join(part for part in path.split(".") if part not in WRAPPED)
        for name, parameter in list(module._parameters.items()):
            if parameter is None or parameter.requires_grad or id(parameter) not in ids:
                continue
            earlier = known.setdefault(f"{place}.{name}", parameter)
            if earlier is not parameter and _equal(earlier, parameter):
                module._parameters[name] = earlier


def _equal(one: Tensor, other: Tensor) -> bool:
    alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return alike and type(one) is type(other) and torch.equal(one, other)
