"""What a run does when a process that it depends on dies."""

import multiprocessing
import os
import signal
import threading
import time

import psutil
import pytest
import torch
from datasets import Dataset

from petl.errors import RunStopped
from petl.system.processes import end_with_launcher, explain_process_failures
from petl.training.dataloader import load

FORK = multiprocessing.get_context("fork")
BATCHES = [[0, 1], [2, 3], [4], [5, 0], [1]]
CPU = torch.device("cpu")


def collate(rows):
    time.sleep(0.02)  # a signal comes while it is at work
    return {"labels": torch.tensor([row["number"] for row in rows])}


threads = []  # names of those that start in a forked process


def start_threads():
    for name in threads:
        threading.Thread(target=time.sleep, args=(60,), daemon=True, name=name).start()


os.register_at_fork(after_in_child=start_threads)


@pytest.fixture
def loading():
    """The batches of one worker, and its process."""
    rows = Dataset.from_dict({"number": list(range(6))})
    before = set(multiprocessing.active_children())
    batches = load(rows, collate, BATCHES, CPU, 1)
    next(batches)  # starts the worker
    (worker,) = set(multiprocessing.active_children()) - before
    return batches, worker


@pytest.fixture(params=[False, True], ids=["", "with a thread"])
def with_a_thread(request, monkeypatch):
    """Libraries such as W&B start their threads again in forked processes, before the worker's."""
    if request.param:
        monkeypatch.setattr(f"{__name__}.threads", ["of a library"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.usefixtures("with_a_thread")
def test_a_signal_to_everyone_leaves_a_worker_at_its_work(loading, number):
    batches, worker = loading
    sender = FORK.Process(target=os.kill, args=(worker.pid, number))  # not the run itself
    sender.start()
    sender.join()
    assert [batch["labels"].tolist() for batch in batches] == BATCHES[1:]
    del batches
    worker.join(120)
    assert worker.exitcode == 0


def test_the_run_itself_can_end_its_worker(loading):
    _, worker = loading
    worker.terminate()
    worker.join(120)
    assert worker.exitcode == 0


def test_a_worker_that_dies_ends_the_run_in_one_line(loading):
    batches, worker = loading

    def go_on():
        with explain_process_failures():
            for _ in batches:
                os.kill(worker.pid, signal.SIGKILL)
                time.sleep(0.2)

    with pytest.raises(RunStopped, match="num_workers"):
        go_on()


def fail(message):
    with explain_process_failures():
        raise RuntimeError(message)


def test_the_process_whose_worker_died_says_so_whichever_it_is(monkeypatch, caplog):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(RunStopped), caplog.at_level("ERROR", logger="petl"):
        fail("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert "in process 3 of the run a DataLoader worker died" in caplog.text


@pytest.mark.parametrize(
    "message",
    [
        "[pair.cc:547] Connection closed by peer [127.0.0.1]:3381",
        "[pair.cc:547] Read error [127.0.0.1]:3381: Connection reset by peer",
        "ncclRemoteError: A call failed possibly due to a remote process exiting or a network",
    ],
)
def test_a_lost_peer_is_told_in_one_line(message):
    with pytest.raises(RunStopped, match=r"train\.resume=auto"):
        fail(message)


def test_other_errors_pass_as_they_are():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as passed:
        fail("mat1 and mat2 shapes cannot be multiplied")
    assert type(passed.value) is RuntimeError


# The launcher


def launch(names, pipe):
    """As torchrun: start a process in a session of its own, then wait."""
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ.update(dict.fromkeys(names, "1"))
        end_with_launcher()
        pipe.send(os.getpid())
        time.sleep(60)
        os._exit(0)
    time.sleep(60)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("names", "ends"),
    [(["TORCHELASTIC_RUN_ID"], True), ([], False)],  # a run outlives the shell that started it
)
def test_a_process_of_torchrun_ends_with_it(monkeypatch, names, ends):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    ours, theirs = FORK.Pipe()
    launcher = FORK.Process(target=launch, args=(names, theirs))
    launcher.start()
    process = psutil.Process(ours.recv())
    launcher.kill()
    launcher.join()
    gone, _ = psutil.wait_procs([process], timeout=120 if ends else 0.5)
    assert bool(gone) == ends
    for left in {process} - set(gone):
        left.kill()
