"""A process that has imported what runs of `petl train` need, and forks a process for each of them.

A run so begins as one that was started alone, without the time to import. It cannot leave anything
to the next one, and one that is killed ends no other. Systems without `fork`, or on which libraries
do not survive it, start each run anew.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from petl.system.files.disk import append_to

TRAIN = (sys.executable, "-m", "petl", "train")  # this interpreter, whatever PATH has
FORKING = (sys.executable, "-m", "petl.cli.train_forked")
FORKS = sys.platform == "linux"  # Accelerate and CUDA do not survive it on macOS


class ForkedRuns:
    """Makes runs one after the other; threads make runs of several at a time.

    Attributes:
        environment: of the processes.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self._process: subprocess.Popen[str] | None = None

    def run(self, words: Sequence[str], log: Path) -> None:
        """Make a run, whose output is appended to a file; it may fail, or be killed.

        Args:
            words: those after `petl train`.
        """
        if not FORKS:
            with append_to(log) as output:
                command = [*TRAIN, *words]
                subprocess.run(
                    command, env=self.environment, stdout=output, stderr=output, check=False
                )
            return
        process = self._started(log)
        assert process.stdin is not None
        assert process.stdout is not None
        # of a process that was killed, the next run starts another one
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps({"words": [*words], "log": str(log)}) + "\n")
            process.stdin.flush()
            if process.stdout.readline():
                return
        self.close()

    def _started(self, log: Path) -> "subprocess.Popen[str]":
        if self._process is None or self._process.poll() is not None:
            with append_to(log) as output:  # what it says if it cannot import
                self._process = subprocess.Popen(
                    FORKING,
                    env=self.environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=output,
                    text=True,
                )
        return self._process

    def terminate(self) -> None:
        """Ask the present run to save a checkpoint and end; twice is as once."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGTERM)

    def close(self) -> None:
        """End the process after its run."""
        if self._process is not None:
            with suppress(BrokenPipeError):
                self._process.communicate()
            self._process = None
