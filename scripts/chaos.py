"""Fault-injection test: kill training at random, resume it, compare with what was undisturbed.

    python scripts/chaos.py --faults 20 --processes 1
    python scripts/chaos.py --job stored       # states of frozen blocks, read from a store
    python scripts/chaos.py --job study        # several runs, one after another
    python scripts/chaos.py --job together     # runs that train in one pass
    python scripts/chaos.py --job draft        # petl draft, and the drafter that it writes
    python scripts/chaos.py --job serve        # petl serve, its clients and its adapters
    python scripts/chaos.py --job files --faults 1000  # damaged bytes of files, in one process

Each fault hits a process of training (MiniLM on a few WordNet examples, checkpoints every few
steps) at a random moment; the same command then goes on, a run with another number of DataLoader
workers. At the end, losses, scores and adapters must equal those of the undisturbed job bit by bit.
Prints the faults that were survived and how many steps had to be repeated.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import psutil
from chaos_serving import JOBS as OF_ANSWERS
from chaos_serving import try_faults
from safetensors.torch import load_file

from petl.cli.arguments import COUNT, SEED, folder_to_write, number, some_of
from petl.training import program as app
from petl.training.compose import compose
from petl.training.runs.run_config import read_config

FILES = "files"  # a job
TRAIN = Path(__file__).parents[1] / "train.py"
EVAL_STEPS = 10
SETTINGS = [
    *("data.train_rows=240", "data.test_rows=32", "train.batch_size=8", "train.epochs=2"),
    *("train.save_steps=3", f"train.eval_steps={EVAL_STEPS}", "train.log_steps=1"),
    "train.linear_probe=false",
    "train.micro_batch_size=3",  # of 8 rows: some faults hit during accumulation
]
WORKERS = (1, 2)  # DataLoader workers of an attempt; one of the faults kills one
FULL = (
    400_000  # bytes: file size limit that simulates a full disk; files of a checkpoint are larger
)
TIMES = {"seconds", "cpu_seconds"}  # in the log; differ between equal runs
MAX_MISSES = 20  # faults that may come after the end of the run
TIMEOUT = 900  # seconds of an attempt


@dataclass(frozen=True)
class Job:
    """What is disturbed: a command that goes on where it was stopped, and leaves runs.

    Attributes:
        words: the command, without the settings of all runs.
        settings: further ones.
        alone: one run, whose folder and number of workers are settings.
        excluded: kinds of faults that do not apply.
    """

    words: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    alone: bool = True
    excluded: frozenset[str] = frozenset()


# a study goes on with its other runs, and runs in one pass have no workers
ALONE = frozenset({"disk full", "worker killed"})
SEVERAL = ("--methods=lora", "--rates=1e-3,3e-3", "--tuning-seeds=1", "--seeds=0,1")
SHORT = ("train.epochs=1",)
JOBS = {
    "train": Job(),
    "stored": Job(settings=("method.layers_to_transform=[4,5]", "train.cache_frozen=true")),
    "study": Job(SEVERAL, SHORT, alone=False, excluded=ALONE),
    "together": Job((*SEVERAL, "--together", "2"), SHORT, alone=False, excluded=ALONE),
}


@dataclass
class Outcome:
    """The effect of the faults of one type."""

    count: int = 0
    lost: list[int] = field(default_factory=list)  # repeated steps, of each fault


def main() -> int:
    """Run the command; return its exit status."""
    command_line = parser()
    arguments = command_line.parse_args()
    if arguments.job == FILES:
        from chaos_files import try_files as damage  # of torch and the fixtures of tests

        return damage(arguments.faults, arguments.seed)
    if arguments.job in OF_ANSWERS:
        return try_faults(arguments.job, arguments.faults, arguments.seed)
    if not kinds_of(arguments):
        command_line.error(f"--kinds {','.join(arguments.kinds)} needs --processes of 2 or more")
    settings = settings_of(arguments)
    status = app.reported(lambda: read_config(compose(settings)))  # not by a run that fails
    if status:
        return status
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        reference, disturbed = folder / "undisturbed", folder / "disturbed"
        attempt = Attempt(reference, arguments, workers=0)
        if attempt.finish() != 0:
            return report(f"the undisturbed run failed, see {attempt.log}")
        outcomes = inject_faults(reference, disturbed, arguments)
        if outcomes is None:
            return 1
        attempt = Attempt(disturbed, arguments, workers=0)
        if attempt.finish() != 0:
            return report(f"the run was not finished, see {attempt.log}")
        if not report_equal(reference, disturbed):
            return 1
    for kind, outcome in outcomes.items():
        mean = sum(outcome.lost) / len(outcome.lost)
        maximum = max(outcome.lost)
        print(
            f"{kind}: {outcome.count} survived, repeated steps: {mean:.1f} mean, {maximum} maximum"
        )
    print("losses, scores and adapter equal those of the undisturbed run bit by bit")
    return 0


def kinds_of(arguments: argparse.Namespace) -> list[str]:
    """Return the types of faults to inject, without those that need several processes."""
    unfit = JOBS[arguments.job].excluded | (OF_SEVERAL if arguments.processes == 1 else set())
    return [kind for kind in FAULTS if kind in arguments.kinds and kind not in unfit]


def settings_of(arguments: argparse.Namespace) -> list[str]:
    """Return the settings of each run."""
    return [
        f"+method={arguments.method}",
        *SETTINGS,
        *JOBS[arguments.job].settings,
        *arguments.settings,
    ]


def inject_faults(
    reference: Path, disturbed: Path, arguments: argparse.Namespace
) -> dict[str, Outcome] | None:
    """Inject the faults; return their outcomes by type, or None after a message about an error."""
    draw, outcomes = random.Random(arguments.seed), defaultdict(Outcome)
    kinds = kinds_of(arguments)
    done, missed = 0, 0
    while done < arguments.faults:
        kind = kinds[done % len(kinds)]
        lost = inject(disturbed, kind, arguments, draw)
        if lost is None and not is_done(disturbed):
            report(f"the run was not finished, see {disturbed}.log")
            return None
        if lost is None:  # the run ended before the fault, which does not count
            missed += 1
            if missed > MAX_MISSES:
                report(f"{missed} faults came after the end of the run; use a smaller --within")
                return None
            if not report_equal(reference, disturbed):
                return None
            shutil.rmtree(disturbed)
            shutil.rmtree(cache_of(disturbed), ignore_errors=True)
            continue
        done += 1
        outcomes[kind].count += 1
        outcomes[kind].lost.append(lost)
        print(f"[{done}/{arguments.faults}] {kind}: {lost} steps to repeat", flush=True)
    return outcomes


def report(message: str) -> int:
    """Print a message on standard error; return the exit status 1."""
    print(message, file=sys.stderr)
    return 1


class Attempt:
    """One process of the run in `folder`, which resumes from its newest complete checkpoint."""

    def __init__(self, folder: Path, arguments: argparse.Namespace, workers: int) -> None:
        self.folder, self.several = folder, arguments.processes > 1
        self.alone = JOBS[arguments.job].alone
        self.log = folder.with_name(f"{folder.name}.log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        line = [sys.executable, str(TRAIN)]
        if arguments.processes > 1:
            line[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
            line.insert(-1, str(arguments.processes))
        if self.alone:
            where = [f"train.run={folder}", "train.resume=auto", f"train.num_workers={workers}"]
            line += [*settings_of(arguments), *where]
        else:
            words, settings = JOBS[arguments.job].words, settings_of(arguments)[1:]
            line = [sys.executable, "-m", "petl", "study", str(folder), *words, *settings]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                line, stdout=log, stderr=log, start_new_session=True, env=environment(folder)
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_running:  # after an error, or Ctrl-C
            self.kill()

    @property
    def is_running(self) -> bool:
        """True if the process has not ended."""
        return self.process.poll() is None

    def finish(self) -> int:
        """Wait for the end; return the exit status."""
        return self.process.wait(TIMEOUT)

    def trains(self) -> bool:
        """Wait until the attempt has made a step; return False if it ended before."""
        start = step_of(self.folder)
        until = time.monotonic() + TIMEOUT
        while self.is_running and time.monotonic() < until:
            if step_of(self.folder) != start:
                return True
            time.sleep(0.02)
        return False

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Wait until a condition holds, which may be for a moment only, or until the end."""
        until = time.monotonic() + TIMEOUT
        while self.is_running and time.monotonic() < until and not holds():
            time.sleep(0.005)

    def ranks(self) -> list[psutil.Process]:
        """The processes that train."""
        parent = psutil.Process(self.process.pid)
        workers = [p for p in parent.children() if trains_or_loads(p)]
        if self.alone and not self.several:
            return [parent]
        return workers or [parent]  # a study between two runs has none

    def kill(self) -> None:
        """Kill -9 all processes; ranks of torchrun have sessions of their own and would survive."""
        parent = psutil.Process(self.process.pid)
        processes = [parent, *parent.children(recursive=True)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=TIMEOUT)
        self.process.wait()


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of an attempt: offline, one thread, a cache of its own."""
    own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PETL_CACHE": str(cache_of(folder))}
    return {**os.environ, **own}


def cache_of(folder: Path) -> Path:
    """Return the folder of encoded rows and stored states of a job."""
    return folder.with_name(f"{folder.name}.cache")


# The faults


def kill_all(attempt: Attempt, draw: random.Random) -> None:
    """Kill -9 all processes."""
    attempt.kill()


def kill_rank(attempt: Attempt, draw: random.Random) -> None:
    """Kill -9 one rank; torchrun must end the others."""
    draw.choice(attempt.ranks()).kill()
    attempt.finish()


def kill_launcher(attempt: Attempt, draw: random.Random) -> None:
    """Kill -9 torchrun only: its processes must end by themselves."""
    ranks = attempt.ranks()
    attempt.process.kill()
    attempt.process.wait()
    _, left = psutil.wait_procs(ranks, timeout=TIMEOUT)
    if left:
        raise RuntimeError(f"{len(left)} processes run without torchrun, see {attempt.log}")


def kill_saving(attempt: Attempt, draw: random.Random) -> None:
    """Kill -9 all while a checkpoint is being written."""
    attempt.wait_until(lambda: is_saving(attempt.folder))
    attempt.kill()


def is_saving(folder: Path) -> bool:
    """Return True if a checkpoint is being written."""
    # not rglob, which raises where a folder is removed meanwhile
    inside = (names for where, names, _ in os.walk(folder) if Path(where).name == "checkpoints")
    return any(name.startswith(".unfinished-") for names in inside for name in names)


def kill_evaluating(attempt: Attempt, draw: random.Random) -> None:
    """Kill -9 all between the last step before an evaluation and its scores."""
    attempt.wait_until(lambda: is_evaluating(attempt.folder))
    attempt.kill()


def is_evaluating(folder: Path) -> bool:
    """Return True if a log ends at a step after which an evaluation runs."""
    last = [line for run in runs_of(folder) for line in metrics(run)[-1:] if not is_finished(run)]
    return any("validation" not in line and line["step"] % EVAL_STEPS == 0 for line in last)


def fill_disk(attempt: Attempt, draw: random.Random) -> None:
    """Limit the size of files, as on a full disk; the run must end by itself."""
    for rank in attempt.ranks():
        rank.rlimit(psutil.RLIMIT_FSIZE, (FULL, FULL))
    attempt.finish()


def terminate(attempt: Attempt, draw: random.Random) -> None:
    """Send SIGTERM, as a cluster does before the end of a job."""
    attempt.process.send_signal(signal.SIGTERM)
    attempt.finish()


def kill_worker(attempt: Attempt, draw: random.Random) -> None:
    """Kill a DataLoader worker; its run must end by itself."""
    until = time.monotonic() + TIMEOUT
    while attempt.is_running and time.monotonic() < until:
        workers = [child for rank in attempt.ranks() for child in rank.children()]
        copies = [child for child in workers if trains_or_loads(child)]
        if copies:
            draw.choice(copies).kill()
            break
        time.sleep(0.02)
    attempt.finish()


def trains_or_loads(process: psutil.Process) -> bool:
    """Return True if a process is a rank of train.py, or a DataLoader worker of one."""
    try:
        return not {str(TRAIN), "train", "petl.cli.train_together"}.isdisjoint(process.cmdline())
    except psutil.Error:  # it has ended
        return False


def truncate(attempt: Attempt, draw: random.Random) -> None:
    """Kill, and truncate a file of the newest complete checkpoint."""
    attempt.kill()
    file = file_of_newest(attempt.folder, draw)
    if file is not None:
        os.truncate(file, file.stat().st_size // 2)


def flip_bit(attempt: Attempt, draw: random.Random) -> None:
    """Kill, and flip a bit in a file of the newest complete checkpoint."""
    attempt.kill()
    file = file_of_newest(attempt.folder, draw)
    if file is not None:
        flip_bit_of(file, draw)


def flip_bit_of(file: Path, draw: random.Random) -> None:
    """Flip one bit of a file."""
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def set_clock_back(attempt: Attempt, draw: random.Random) -> None:
    """Kill, and date all files a day ahead, as they are after a clock was set back."""
    attempt.kill()
    ahead = time.time() + 24 * 3600
    for path in [*attempt.folder.rglob("*"), *cache_of(attempt.folder).rglob("*")]:
        os.utime(path, (ahead, ahead), follow_symlinks=False)


def damage_cache(attempt: Attempt, draw: random.Random) -> None:
    """Kill, and flip a bit in a file of encoded rows or stored states."""
    attempt.kill()
    folders = [cache_of(attempt.folder) / name for name in ("encoded", "frozen")]
    files = [f for each in folders for f in sorted(each.rglob("*")) if f.is_file()]
    flip_bit_of(draw.choice([f for f in files if f.stat().st_size]), draw)


FAULTS = {
    "kill -9 of all": kill_all,
    "kill -9 of one rank": kill_rank,
    "kill -9 of torchrun": kill_launcher,
    "kill -9 while saving": kill_saving,
    "kill -9 in an evaluation": kill_evaluating,
    "disk full": fill_disk,
    "SIGTERM": terminate,
    "worker killed": kill_worker,
    "checkpoint truncated": truncate,
    "checkpoint with a flipped bit": flip_bit,
    "clock back": set_clock_back,
    "cache with a flipped bit": damage_cache,
}
OF_SEVERAL = {"kill -9 of one rank", "kill -9 of torchrun"}  # the same as kill_all with one process


def inject(
    folder: Path, kind: str, arguments: argparse.Namespace, draw: random.Random
) -> int | None:
    """Start or resume the run and inject a fault; return the number of steps to repeat.

    None if the run was finished nevertheless.
    """
    with Attempt(folder, arguments, draw.choice(WORKERS)) as attempt:
        if not attempt.trains():
            attempt.finish()
            return None
        time.sleep(draw.uniform(0, arguments.within))
        if not attempt.is_running:
            return None
        FAULTS[kind](attempt, draw)
        if is_done(folder):
            return None
        if attempt.is_running:
            raise RuntimeError(f"{kind} did not end the run, see {attempt.log}")
    return sum(_lost(run) for run in runs_of(folder) if not is_finished(run))


def _lost(run: Path) -> int:
    complete = [c for c in checkpoints(run) if is_complete(c)]
    saved = int(complete[-1].name.removeprefix("step-")) if complete else 0
    return last_step(run) - saved


def is_done(folder: Path) -> bool:
    """Return True if the job in a folder has ended: its run is scored, or its page written."""
    return is_finished(folder) or (folder / "index.html").exists()


def is_finished(run: Path) -> bool:
    """Return True if a run is finished."""
    scores = run / "scores.json"
    try:
        return scores.exists() and "after" in json.loads(scores.read_text())
    except ValueError:  # it is being written
        return False


# Files of a job


def runs_of(folder: Path) -> list[Path]:
    """Return the folders of the runs of a job: its own, or those of a study."""
    found = (Path(where) for where, _, names in os.walk(folder) if "metrics.jsonl" in names)
    return sorted(run for run in found if run.parent.name != "checkpoints")


def step_of(folder: Path) -> int:
    """Return the sum of the last steps of all runs."""
    return sum(last_step(run) for run in runs_of(folder))


def last_step(run: Path) -> int:
    """Return the last step in metrics.jsonl, 0 without one."""
    return max((line["step"] for line in metrics(run)), default=0)


def metrics(folder: Path) -> list[dict]:
    """Return the complete lines of metrics.jsonl."""
    file = folder / "metrics.jsonl"
    lines = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:  # the process was killed during a write
            break
    return lines


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, the newest last."""
    return sorted((folder / "checkpoints").glob("step-*"))


def is_complete(checkpoint: Path) -> bool:
    """Return True if all files of a checkpoint match their checksums."""
    from petl.errors import InputError
    from petl.training.runs.checkpoint import verify

    try:
        verify(checkpoint)
    except InputError:
        return False
    return True


def file_of_newest(folder: Path, draw: random.Random) -> Path | None:
    """Return a random file of the newest complete checkpoint."""
    runs = [run for run in runs_of(folder) if not is_finished(run)]
    newest = [c for run in runs for c in [c for c in checkpoints(run) if is_complete(c)][-1:]]
    files = [f for c in newest for f in sorted(c.rglob("*")) if f.is_file() and f.stat().st_size]
    return draw.choice(files) if files else None


def report_equal(reference: Path, disturbed: Path) -> bool:
    """Return True if two finished jobs are bit-exact; report what differs."""
    runs = [run.relative_to(reference) for run in runs_of(reference)]
    if runs != [run.relative_to(disturbed) for run in runs_of(disturbed)]:
        report(f"other runs than those of the undisturbed job: see {reference} and {disturbed}")
        return False
    different = [
        f"{name} of {disturbed / run}"
        for run in runs
        for name in _differences(reference / run, disturbed / run)
    ]
    if different:
        report(f"not equal to the undisturbed run: {', '.join(different)}; see {reference}")
    return not different


def _differences(one: Path, other: Path) -> list[str]:
    different = []
    if without_times(metrics(one)) != without_times(metrics(other)):
        different.append("metrics.jsonl")
    scores = [json.loads((run / "scores.json").read_text()) for run in (one, other)]
    if any(scores[0].get(name) != scores[1].get(name) for name in ("after", "validation_scores")):
        different.append("scores.json")
    files = [run / "adapter" / "adapter_model.safetensors" for run in (one, other)]
    a, b = (load_file(file) for file in files)
    if a.keys() != b.keys() or any(not a[k].equal(b[k]) for k in a):
        different.append("the adapter")
    return different


def without_times(lines: list[dict]) -> list[dict]:
    """Return the lines of a log without the values that differ between equal runs."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    command_line = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command_line.add_argument(
        "--faults", type=COUNT, default=12, metavar="N", help="number of faults (12)"
    )
    command_line.add_argument(
        "--processes", type=COUNT, default=1, metavar="N", help="of the run (1)"
    )
    command_line.add_argument(
        "--job",
        choices=[*JOBS, *OF_ANSWERS, FILES],
        default="train",
        help="what is disturbed (train)",
    )
    command_line.add_argument("--method", default="lora", metavar="NAME", help="method (lora)")
    command_line.add_argument("--seed", type=SEED, default=0, help="seed of the moments and files")
    command_line.add_argument(
        "--within",
        type=number(float, 0, 3600),
        default=3.0,
        help="a fault comes within so many seconds of training",
    )
    command_line.add_argument(
        "--kinds",
        type=some_of(FAULTS),
        default=",".join(FAULTS),
        metavar="A,B",
        help=f"types of faults: {', '.join(FAULTS)}",
    )
    command_line.add_argument("--folder", type=folder_to_write, help="keep the runs in this folder")
    command_line.add_argument("settings", nargs="*", metavar="SETTING", help="settings of train.py")
    return command_line


if __name__ == "__main__":
    sys.exit(main())
