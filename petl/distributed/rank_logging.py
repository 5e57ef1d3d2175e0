"""Which process of a run speaks, so that each thing is told, and told once.

The first process does, except of an error that it does not have: that is told by the one that has
it. Then the first keeps quiet, since all that it could tell is that the other is gone. Nothing here
imports torch.
"""

import os
import sys
from contextlib import suppress
from datetime import timedelta
from typing import Any

PATIENCE = timedelta(seconds=5)  # for the first process to tell of an error that all have
_jobs: list[str] = []  # where the processes note, for each job, which of them told of an error


def begin_job() -> None:
    """What one job of a sweep had to tell says nothing of the next; all processes make all jobs."""
    _jobs.append(f"petl/told/{len(_jobs)}")


def note() -> str:
    """Where the processes note which of them has told of an error."""
    return _jobs[-1] if _jobs else "petl/told"


def is_first() -> bool:
    return _rank() == 0


def may_speak() -> bool:
    """Whether this process tells what happens to the run."""
    store = _store()
    if not is_first() or store is None:
        return is_first()
    try:
        return not store.check([note()]) or _is_ours(store)
    except RuntimeError:  # it ended with the launcher
        return True


def may_tell_error() -> bool:
    """Whether this process tells of an error that it has; the answer holds for all of a job.

    Before the processes have met, one of each machine tells.
    """
    store = _store()
    if store is None:
        return is_first() or os.environ.get("LOCAL_RANK") == "0"
    try:
        if not is_first():
            with suppress(RuntimeError):  # that the time is over
                store.wait([note()], PATIENCE)
        return _is_ours(store)
    except RuntimeError:  # it ended with the launcher, or with the first process
        return is_first()


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _store() -> Any:
    """What the processes of a group have in common; None if there is no group."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed.distributed_c10d._get_default_store()  # torch has no public word for it


def _is_ours(store: Any) -> bool:
    """Whether it is this process that tells of errors of this job, now or since the first."""
    ours = str(_rank())
    return store.compare_set(note(), "", ours) == ours.encode()
