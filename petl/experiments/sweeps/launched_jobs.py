"""Jobs of a sweep that run in other processes: those of submitit, joblib, ray or another launcher.

A job writes SWEEP/jobs/N.json when it begins and again when it ends, where SWEEP is
`hydra.sweep.dir`. The process that started the sweep prints each record as it appears. So nothing
depends on the launcher, only on a file system that all processes share, as the runs do anyway.
"""

import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NotRequired, TextIO, TypedDict

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from petl.errors import InputError, RunStopped, shortened
from petl.experiments.sweeps.progress import fixed_settings
from petl.system.files.disk import append_text, as_json, write_atomic
from petl.system.files.read import read_json
from petl.training import program as app
from petl.training.runs.records import read_results
from petl.training.runs.resume import finished_run, identity, objective_of
from petl.training.runs.run_config import read_config

JOBS = "jobs"  # in the folder of a sweep
SECONDS = 1.0  # between two looks at the folder; assumption: nobody waits for less
logger = logging.getLogger(__name__)


class SweepJob(TypedDict):
    """The content of N.json.

    Attributes:
        number: of the job in its sweep, from 0.
        overrides: its words.
        id: what the launcher or its cluster calls it, and the host.
        log: the file with its output.
        result: what became of it; absent while it runs.
        failed: True if it ended by an error.
    """

    number: int
    overrides: list[str]
    id: str
    log: str
    result: NotRequired[str]
    failed: NotRequired[bool]


def folder_of(config: DictConfig) -> Path:
    """The folder of the records of a sweep."""
    return Path(config.hydra.sweep.dir) / JOBS


# In the process of a job


class Worker:
    """One job in a process of its own: its log and its record.

    The log of a job of submitit is the file in which submitit keeps its standard error; other
    launchers leave it on the terminal, where the lines of several jobs would mix, so that a job
    writes to SWEEP/jobs/N.log instead.
    """

    def __init__(self, config: DictConfig, argv: Sequence[str]) -> None:
        """Prepare the process as `app.entry` does, and write the record.

        Args:
            argv: the command line of the sweep, for messages that say how to resume it.
        """
        folder, number = folder_of(config), int(config.hydra.job.num)
        folder.mkdir(parents=True, exist_ok=True)
        sys.argv[:] = argv  # `how_to_resume` reads it
        self.file, self.streams = folder / f"{number}.json", (sys.stdout, sys.stderr)
        self.opened: TextIO | None = None
        log = submitit_log()
        if log is None:
            log = folder / f"{number}.log"
            self.opened = append_text(log)
            sys.stdout = sys.stderr = self.opened  # one file, in which lines keep their order
        app.log_to_stderr()
        words = list(config.hydra.overrides.task)
        job_id = f"{config.hydra.job.id} on {socket.gethostname()}"
        self.job = SweepJob(number=number, overrides=words, id=job_id, log=str(log))
        write_atomic(self.file, as_json(self.job))
        logger.info("job %d of the sweep: %s", number, " ".join(words))

    def end(self, job_return: JobReturn) -> None:
        """Complete the record, and restore the streams of the process.

        The error of a job becomes one that says where to read on: the process that started the
        sweep raises it, without the traceback, which is in the log.
        """
        # the property without underscore would print lines and raise the error
        error = job_return._return_value
        if job_return.status == JobStatus.FAILED:
            if not isinstance(error, InputError | RunStopped):  # `app.job` has printed those
                app.print_traceback(type(error), error, error.__traceback__)
            text = shortened(f"{error}" if isinstance(error, InputError) else repr(error))
            self.job["result"] = f"failed: {text}"
            job_return.return_value = RunStopped(f"job {self.job['number']} failed, see above")
        else:
            self.job["result"] = described(job_return.cfg)
        self.job["failed"] = job_return.status == JobStatus.FAILED
        write_atomic(self.file, as_json(self.job))
        if self.opened is not None:
            sys.stdout, sys.stderr = self.streams
            self.opened.close()


def submitit_log() -> Path | None:
    """The file with the standard error of this job of submitit; None in any other process."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return None
    return import_module("submitit").JobEnvironment().paths.stderr


def described(cfg: Any) -> str:
    """The finished run of a job and its score, or that the job was skipped."""
    config = read_config(cfg)
    run = finished_run(config.train.output, identity(config.resolved))
    if run is None:
        return "skipped: another worker has it"
    scores = read_results(run)
    return f"finished: {scores['metric']} {objective_of(scores):.4f} in {run}"


# In the process that started the sweep


class JobWatch:
    """Prints what becomes of the jobs of a sweep, from a thread, until `stop`."""

    def __init__(self, config: DictConfig) -> None:
        self.folder, self.fixed = folder_of(config), fixed_settings(config)
        self.seen: dict[int, SweepJob] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        logger.info("the jobs of this sweep and their logs: %s", self.folder)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(SECONDS):  # False after each timeout
            self.look()

    def look(self) -> None:
        """Print the records that are new."""
        for job in jobs_in(self.folder):
            before = self.seen.get(job["number"])
            if before is None:
                words = " ".join(self.own_words(job))
                logger.info("job %d: %s (%s, log: %s)", job["number"], words, job["id"], job["log"])
            if "result" in job and before != job:
                logger.info("job %d %s", job["number"], job["result"])
            self.seen[job["number"]] = job

    def own_words(self, job: SweepJob) -> list[str]:
        """The overrides that not all jobs have; all of them if there are no others."""
        words = job["overrides"]
        return [w for w in words if w.partition("=")[0] not in self.fixed] or words

    def stop(self) -> list[SweepJob]:
        """End the thread; print and return the last state of the jobs."""
        self._stopped.set()
        self._thread.join()
        self.look()  # for jobs that ended since the last look
        jobs = [job for _, job in sorted(self.seen.items())]
        for job in jobs:
            if "result" not in job:
                logger.warning(
                    "job %d has not ended: it still runs, or was killed; its log: %s",
                    job["number"],
                    job["log"],
                )
        return jobs


def jobs_in(folder: Path) -> Iterator[SweepJob]:
    """Yield the records of a sweep by the number of the job."""
    # by number: as a text, 10 comes before 9
    for file in sorted(folder.glob("[0-9]*.json"), key=lambda path: int(path.stem)):
        try:
            yield read_json(file, SweepJob)
        except InputError as error:
            logger.warning("skipping %s", error)
