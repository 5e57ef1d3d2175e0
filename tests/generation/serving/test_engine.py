"""The engine: admission, failures and the end."""

import threading
from queue import Queue

import pytest

from petl.errors import RunStopped
from petl.generation.serving.engine import PROMPT_TOKENS, Busy, Engine
from petl.generation.serving.request import AnswerPart


class CountingLane:
    """A lane whose requests take a pass per token, and that records its rows."""

    def __init__(self) -> None:
        self.requests, self.rows = [], []
        self.pause = threading.Event()
        self.pause.set()

    def advance(self, newcomers) -> None:
        self.pause.wait(10)
        self.requests += newcomers
        self.rows.append(len(self.requests))
        if any(each.fails for each in self.requests):
            raise MemoryError("out of memory")
        for each in self.requests:
            each.left -= 1
            each.emit(AnswerPart("x", 1, finish=None if each.left else "stop"))
        self.requests = [each for each in self.requests if each.left]

    @property
    def batches(self):
        return self.requests

    @batches.setter
    def batches(self, value) -> None:
        self.requests = value


class Job:
    def __init__(self, tokens: int = 1, prompt: int = 1, fails: bool = False) -> None:
        self.left, self.prompt, self.fails = tokens, range(prompt), fails
        self.cancelled = threading.Event()
        self.got: Queue = Queue()
        self.emit = self.got.put

    def end(self):
        """The last piece, or the exception."""
        while True:
            piece = self.got.get(timeout=10)
            if isinstance(piece, Exception) or piece.finish:
                return piece


@pytest.fixture
def engine():
    engine = Engine(max_batch=3, max_waiting=10)
    yield engine
    engine.close()


def test_no_more_requests_run_than_allowed_and_the_others_follow(engine):
    lane, jobs = CountingLane(), [Job(tokens=i % 3 + 1) for i in range(8)]
    engine.submit([(lane, job) for job in jobs])
    engine.start()
    for job in jobs:
        assert job.end().finish == "stop"
    assert max(lane.rows) == 3
    assert sum(lane.rows) == sum(i % 3 + 1 for i in range(8))


def test_too_many_waiting_requests_are_refused_all_or_none(engine):
    lane = CountingLane()
    engine.submit([(lane, Job()) for _ in range(8)])
    with pytest.raises(Busy):
        engine.submit([(lane, Job()) for _ in range(3)])
    assert engine.waiting == 8
    engine.submit([(lane, Job()) for _ in range(2)])


def test_long_prompts_are_read_in_several_passes(engine):
    lane = CountingLane()
    jobs = [Job(2, PROMPT_TOKENS // 2), Job(2, PROMPT_TOKENS // 2), Job(2, 10 * PROMPT_TOKENS)]
    engine.submit([(lane, job) for job in jobs])
    engine.start()
    assert [job.end().finish for job in jobs] == ["stop"] * 3
    assert lane.rows == [2, 3, 1]


def test_the_padding_of_short_prompts_counts(engine):
    lane = CountingLane()
    # three rows of half the bound would be computed
    jobs = [Job(2, 1), Job(2, PROMPT_TOKENS // 2), Job(2, 1)]
    engine.submit([(lane, job) for job in jobs])
    engine.start()
    assert [job.end().finish for job in jobs] == ["stop"] * 3
    assert lane.rows == [2, 3, 1]


def test_a_request_that_was_cancelled_keeps_no_place_in_the_queue(engine):
    lane, jobs = CountingLane(), [Job() for _ in range(10)]
    engine.submit([(lane, job) for job in jobs])
    with pytest.raises(Busy):
        engine.submit([(lane, Job())])
    for job in jobs[2:]:
        job.cancelled.set()
    engine.submit([(lane, Job()) for _ in range(8)])
    assert engine.waiting == 10


def test_a_request_that_was_cancelled_never_starts(engine):
    lane, gone, stays = CountingLane(), Job(), Job()
    gone.cancelled.set()
    engine.submit([(lane, gone), (lane, stays)])
    engine.start()
    stays.end()
    assert gone.got.empty()


def test_the_prompt_of_a_cancelled_request_takes_no_room(engine):
    lane, gone = CountingLane(), Job(2, 10 * PROMPT_TOKENS)
    jobs = [Job(2, 1), gone, Job(2, 1)]
    gone.cancelled.set()
    engine.submit([(lane, job) for job in jobs])
    engine.start()
    assert [jobs[i].end().finish for i in (0, 2)] == ["stop"] * 2
    assert lane.rows == [2, 2]


def test_an_engine_that_never_started_can_be_ended(engine):
    engine.close()
    engine.join(10)


def test_a_failed_pass_ends_its_requests_only(engine, caplog):
    first, second = CountingLane(), CountingLane()
    failing, beside, other = Job(fails=True), Job(5), Job(5)
    engine.submit([(first, beside), (first, failing), (second, other)])
    engine.start()
    assert isinstance(failing.end(), MemoryError)
    assert isinstance(beside.end(), MemoryError)
    assert other.end().finish == "stop"
    assert "out of memory" in caplog.text
    later = Job()
    engine.submit([(first, later)])
    assert later.end().finish == "stop"


def test_at_the_end_all_requests_are_told(engine):
    lane = CountingLane()
    lane.pause.clear()
    running, waiting = [Job(10**6) for _ in range(3)], Job()
    engine.submit([(lane, job) for job in running])
    engine.start()
    engine.submit([(lane, waiting)])
    engine.close()
    lane.pause.set()
    for job in (*running, waiting):
        assert isinstance(job.end(), RunStopped)
    engine.join(10)
    with pytest.raises(RunStopped):
        engine.submit([(lane, Job())])
