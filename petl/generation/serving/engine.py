"""The thread that computes answers: requests join and leave batches while these run."""

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any, Protocol

from petl.data.tasks.image_text.prompt import ImagePrompt
from petl.errors import RunStopped
from petl.generation.inference.language_model import LanguageModel
from petl.generation.serving.batch import Batch, BatchPasses
from petl.generation.serving.choice import Chooser
from petl.generation.serving.request import Request

# of all prompts that one pass reads, padded, unless a single one is longer: a pass delays running
# answers (assumption)
PROMPT_TOKENS = 4096
logger = logging.getLogger(__name__)


class Busy(Exception):
    """No more requests can wait."""


class Lane(Protocol):
    """Requests that an engine answers in one way."""

    def admit(self, chooser: Chooser) -> None:
        """Raise InputError if the engine cannot choose tokens in this way."""


class Slot:
    """Requests that can share passes: those of one method, or of one adapter."""

    def __init__(self, passes: BatchPasses) -> None:
        self.passes = passes
        self.batches: list[Batch] = []

    @property
    def requests(self) -> list[Request]:
        """The requests in progress."""
        return [request for batch in self.batches for request in batch.requests]

    def admit(self, chooser: Chooser) -> None:
        """Take any choice of tokens."""

    def advance(self, newcomers: Sequence[Request]) -> None:
        """Compute a token of each answer in progress, and the first one of each new answer."""
        # before the newcomers join, which would get two tokens otherwise
        for batch in self.batches:
            batch.step()
        if newcomers and self.passes.mergeable:
            self.batches = self.batches or [Batch(self.passes)]
            texts = [each for each in newcomers if not isinstance(each.prompt, ImagePrompt)]
            # tensors of images are those of one request
            pictured = [[each] for each in newcomers if isinstance(each.prompt, ImagePrompt)]
            alike: dict[int, list[Request]] = {}  # by how much of their prompts is known
            for each in texts:
                alike.setdefault(len(self.passes.known(each)), []).append(each)
            for group in [*alike.values(), *pictured]:
                self.batches[0].join(group)
        else:  # each by itself
            for request in newcomers:
                self.batches.append(Batch(self.passes))
                self.batches[-1].join([request])
        self.batches = [batch for batch in self.batches if batch.requests]


@dataclass(frozen=True)
class ServedAdapter:
    """What a request chooses by `model`.

    Attributes:
        name: for requests.
        language: the model, which reads prompts as this adapter's run did.
        adapter: its name in the model; `BASE` for none.
        lane: the requests that it can share passes with.
        positions: tokens of prompt and answer at most; None: no limit.
        path: folder of the run or adapter; None: the base model.
    """

    name: str
    language: LanguageModel
    adapter: str
    lane: Lane
    positions: int | None
    path: str | None = None
    # seconds since 1970: `created` in /v1/models
    created: int = field(default_factory=lambda: int(time.time()))


class AnswerEngine:
    """Answers requests in a thread of its own, which the loop of the server hands them to.

    Attributes:
        max_batch: number of answers in progress at most.
        max_waiting: number of further requests that may wait for them.
    """

    def __init__(self, *, max_batch: int, max_waiting: int) -> None:
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self._waiting: deque[tuple[Any, Request]] = deque()  # with their lanes
        self._changed = Condition()
        self._closed = False
        # daemon: a pass that hangs does not keep the process from ending
        self._thread = Thread(target=self._run, name="petl-serve", daemon=True)

    def start(self) -> None:
        """Begin to compute."""
        self._thread.start()

    def submit(self, jobs: Sequence[tuple[Lane, Request]]) -> None:
        """Add requests, all or none of them.

        Raises:
            Busy: too many are waiting.
            RunStopped: the engine is closed.
        """
        with self._changed:
            if self._closed:
                raise RunStopped("the server is stopping")
            # of a client that has gone nobody waits; it leaves no place to others otherwise
            self._waiting = deque(job for job in self._waiting if not job[1].cancelled.is_set())
            if len(self._waiting) + len(jobs) > self.max_waiting:
                raise Busy(
                    f"{len(self._waiting)} requests are waiting and {len(jobs)} more came, of "
                    f"which {self.max_waiting} may wait; try again later"
                )
            self._waiting += jobs
            self._changed.notify()

    @property
    def running(self) -> int:
        """The number of answers in progress."""
        raise NotImplementedError

    @property
    def waiting(self) -> int:
        """The number of requests that wait."""
        return len(self._waiting)

    def close(self) -> None:
        """End all answers after the pass that runs now, and refuse further requests."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def join(self, timeout: float) -> None:
        """Wait for the thread to end, after `close`; at once if it was never started."""
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        """Answer requests until `close`."""
        raise NotImplementedError

    def _end_waiting(self) -> None:
        # without the lock: `submit` adds nothing after `close`
        for _, request in self._waiting:
            request.emit(RunStopped("the server is stopping"))


class Engine(AnswerEngine):
    """Answers requests in batches, by passes of torch."""

    def __init__(self, *, max_batch: int, max_waiting: int) -> None:
        super().__init__(max_batch=max_batch, max_waiting=max_waiting)
        self._active: dict[Slot, None] = {}  # lanes with answers in progress, in order

    @property
    def running(self) -> int:
        """The number of answers in progress."""
        # a copy: the engine's thread changes it while a request for /health reads
        return sum(len(lane.requests) for lane in list(self._active))

    def _run(self) -> None:
        while True:
            with self._changed:
                # returns at once while there are answers in progress
                self._changed.wait_for(lambda: self._waiting or self._active or self._closed)
                if self._closed:
                    break
                admitted = self._admit()
            # one pass for each lane in turn: none waits until the answers of another have ended
            for lane in dict.fromkeys([*self._active, *(lane for lane, _ in admitted)]):
                self._advance(lane, [request for own, request in admitted if own is lane])
        for request in [*(r for lane in self._active for r in lane.requests)]:
            request.emit(RunStopped("the server is stopping"))
        self._end_waiting()

    def _admit(self) -> list[tuple[Slot, Request]]:
        """Take waiting requests, in order, for which there is room."""
        admitted: list[tuple[Slot, Request]] = []
        room, longest = self.max_batch - self.running, 0
        while self._waiting and len(admitted) < room:
            lane, request = self._waiting[0]
            if not request.cancelled.is_set():  # nobody reads the answer of a cancelled one
                longest = max(longest, len(request.prompt))
                # with the padding of shorter ones, which a pass computes as well
                if admitted and longest * (len(admitted) + 1) > PROMPT_TOKENS:
                    break
                admitted.append((lane, request))
            self._waiting.popleft()
        return admitted

    def _advance(self, lane: Slot, newcomers: Sequence[Request]) -> None:
        try:
            lane.advance(newcomers)
        except Exception as error:  # such as too little memory: the other lanes go on
            logger.exception("a pass failed")
            # each once: a newcomer may have joined a batch before the failure
            failed = dict.fromkeys([*lane.requests, *newcomers])
            lane.batches = []  # a pass that failed leaves caches half written
            for request in failed:
                request.emit(error)
        if lane.requests:
            self._active[lane] = None
        else:
            self._active.pop(lane, None)
