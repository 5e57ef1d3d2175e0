"""Kill training runs at random, resume them, and compare them with one that nobody disturbed.

    python scripts/chaos.py --faults 20 --processes 1

Every fault hits a real `train.py` (MiniLM on a few WordNet rows, checkpoints every few steps) at a
random moment; `train.resume=auto` then goes on, with another number of workers. At the end the
losses, the scores and the adapter must be those of the undisturbed run, to the last digit. Prints
what was survived and how many steps had to be done again.
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

import psutil
from safetensors.torch import load_file

TRAIN = Path(__file__).parents[1] / "train.py"
EVAL_STEPS = 10
SETTINGS = [
    *("data.train_rows=240", "data.test_rows=32", "train.batch_size=8", "train.epochs=2"),
    *("train.save_steps=3", f"train.eval_steps={EVAL_STEPS}", "train.log_steps=1"),
    "train.linear_probe=false",
    "train.micro_batch_size=3",  # of 8 rows: some faults come in mid-accumulation
]
WORKERS = (1, 2)  # of an attempt; one of the faults kills one
FULL = 400_000  # bytes; on a full disk no file grows beyond, such as those of a checkpoint
TIMELESS = {"seconds", "cpu_seconds"}  # what two equal runs may differ in
MISSES = 20  # faults that may come too late
PATIENCE = 300  # seconds that an attempt may take


@dataclass
class Outcome:
    """What faults of one kind did."""

    count: int = 0
    lost: list[int] = field(default_factory=list)  # steps done again after each


def main() -> int:
    arguments = parser().parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.folder or Path(made)
        quiet, loud = folder / "undisturbed", folder / "disturbed"
        attempt = Attempt(quiet, arguments, workers=0)
        if attempt.finish() != 0:
            return told(f"the undisturbed run failed, see {attempt.log}")
        outcomes = disturbed(quiet, loud, arguments)
        if outcomes is None:
            return 1
        attempt = Attempt(loud, arguments, workers=0)
        if attempt.finish() != 0:
            return told(f"the run did not come through, see {attempt.log}")
        if not told_same(quiet, loud):
            return 1
    for kind, outcome in outcomes.items():
        mean = sum(outcome.lost) / len(outcome.lost)
        most = max(outcome.lost)
        print(f"{kind}: {outcome.count} survived, {mean:.1f} steps lost each, {most} at most")
    print("losses, scores and adapter are those of the undisturbed run, to the digit")
    return 0


def disturbed(quiet: Path, loud: Path, arguments: argparse.Namespace) -> dict[str, Outcome] | None:
    """Let the faults happen; what they did by kind, or None after a message of what went wrong."""
    draw, outcomes = random.Random(arguments.seed), defaultdict(Outcome)
    kinds = [kind for kind in FAULTS if kind in arguments.kinds.split(",")]
    if arguments.processes == 1:
        kinds = [kind for kind in kinds if kind not in OF_SEVERAL]
    done, missed = 0, 0
    while done < arguments.faults:
        kind = kinds[done % len(kinds)]
        lost = disturb(loud, kind, arguments, draw)
        if lost is None and not is_through(loud):
            told(f"the run did not come through, see {loud}.log")
            return None
        if lost is None:  # it was through before the fault, which does not count
            missed += 1
            if missed > MISSES:
                told(f"{missed} faults came too late; give a smaller --within")
                return None
            if not told_same(quiet, loud):
                return None
            shutil.rmtree(loud)
            continue
        done += 1
        outcomes[kind].count += 1
        outcomes[kind].lost.append(lost)
        print(f"[{done}/{arguments.faults}] {kind}: {lost} steps to do again", flush=True)
    return outcomes


def told(message: str) -> int:
    print(message, file=sys.stderr)
    return 1


class Attempt:
    """One start of the run in `folder`, which goes on from its newest whole checkpoint."""

    def __init__(self, folder: Path, arguments: argparse.Namespace, workers: int) -> None:
        self.folder, self.several = folder, arguments.processes > 1
        self.log = folder.with_name(f"{folder.name}.log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        line = [sys.executable, str(TRAIN)]
        if arguments.processes > 1:
            line[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
            line.insert(-1, str(arguments.processes))
        where = [f"train.run={folder}", "train.resume=auto"]
        where.append(f"train.num_workers={workers}")
        line += [f"+method={arguments.method}", *SETTINGS, *arguments.settings, *where]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                line, stdout=log, stderr=log, start_new_session=True, env=environment()
            )

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def finish(self) -> int:
        """Wait for the end; the exit status."""
        return self.process.wait(PATIENCE)

    def trains(self) -> bool:
        """Wait until it has done a step beyond what it went on from; False if it ended."""
        there = step_of(self.folder)
        until = time.monotonic() + PATIENCE
        while self.is_running and time.monotonic() < until:
            if step_of(self.folder) != there:
                return True
            time.sleep(0.02)
        return False

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Wait for something that may last for moments only, or for the end."""
        until = time.monotonic() + PATIENCE
        while self.is_running and time.monotonic() < until and not holds():
            time.sleep(0.005)

    def ranks(self) -> list[psutil.Process]:
        """The processes that train."""
        whole = psutil.Process(self.process.pid)
        workers = [p for p in whole.children() if trains_or_loads(p)]
        return workers if self.several else [whole]

    def kill(self) -> None:
        """Kill -9 all of it; torchrun's ranks are in sessions of their own and would live on."""
        whole = psutil.Process(self.process.pid)
        every = [whole, *whole.children(recursive=True)]
        for process in every:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(every, timeout=PATIENCE)
        self.process.wait()


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


# The faults


def kill_all(attempt: Attempt, draw: random.Random) -> None:
    attempt.kill()


def kill_rank(attempt: Attempt, draw: random.Random) -> None:
    draw.choice(attempt.ranks()).kill()
    attempt.finish()


def kill_launcher(attempt: Attempt, draw: random.Random) -> None:
    """Kill torchrun alone: its processes must come to an end by themselves."""
    ranks = attempt.ranks()
    attempt.process.kill()
    attempt.process.wait()
    _, left = psutil.wait_procs(ranks, timeout=PATIENCE)
    if left:
        raise RuntimeError(f"{len(left)} processes go on without torchrun, see {attempt.log}")


def kill_saving(attempt: Attempt, draw: random.Random) -> None:
    """Kill -9 all while a checkpoint is being written."""
    drafts = attempt.folder / "checkpoints"
    attempt.wait_until(lambda: any(drafts.glob(".unfinished-*")))
    attempt.kill()


def kill_evaluating(attempt: Attempt, draw: random.Random) -> None:
    """Kill -9 all between the last step before an evaluation and its scores."""
    attempt.wait_until(lambda: is_evaluating(attempt.folder))
    attempt.kill()


def is_evaluating(folder: Path) -> bool:
    last = metrics(folder)[-1:]
    return bool(last) and "validation" not in last[0] and last[0]["step"] % EVAL_STEPS == 0


def fill_disk(attempt: Attempt, draw: random.Random) -> None:
    """Let no file grow large from now on, as on a full disk; the run must end by itself."""
    for rank in attempt.ranks():
        rank.rlimit(psutil.RLIMIT_FSIZE, (FULL, FULL))
    attempt.finish()


def terminate(attempt: Attempt, draw: random.Random) -> None:
    attempt.process.send_signal(signal.SIGTERM)
    attempt.finish()


def kill_worker(attempt: Attempt, draw: random.Random) -> None:
    """Kill a process that makes batches; the run that it served must end by itself."""
    until = time.monotonic() + PATIENCE
    while attempt.is_running and time.monotonic() < until:
        workers = [child for rank in attempt.ranks() for child in rank.children()]
        copies = [child for child in workers if trains_or_loads(child)]
        if copies:
            draw.choice(copies).kill()
            break
        time.sleep(0.02)
    attempt.finish()


def trains_or_loads(process: psutil.Process) -> bool:
    """Whether a process is one of train.py's: a rank, or below one a worker of its DataLoader."""
    try:
        return str(TRAIN) in process.cmdline()
    except psutil.Error:  # it has ended
        return False


def cut_short(attempt: Attempt, draw: random.Random) -> None:
    """Kill, and cut a file of the newest whole checkpoint short."""
    attempt.kill()
    file = file_of_newest(attempt.folder, draw)
    if file is not None:
        os.truncate(file, file.stat().st_size // 2)


def flip_bit(attempt: Attempt, draw: random.Random) -> None:
    """Kill, and flip a bit in a file of the newest whole checkpoint."""
    attempt.kill()
    file = file_of_newest(attempt.folder, draw)
    if file is not None:
        content = bytearray(file.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)


FAULTS = {
    "kill -9 of all": kill_all,
    "kill -9 of one rank": kill_rank,
    "kill -9 of torchrun": kill_launcher,
    "kill -9 while saving": kill_saving,
    "kill -9 in an evaluation": kill_evaluating,
    "disk full": fill_disk,
    "SIGTERM": terminate,
    "worker killed": kill_worker,
    "checkpoint cut short": cut_short,
    "checkpoint with a flipped bit": flip_bit,
}
OF_SEVERAL = {"kill -9 of one rank", "kill -9 of torchrun"}  # with one process these are another


def disturb(
    folder: Path, kind: str, arguments: argparse.Namespace, draw: random.Random
) -> int | None:
    """Start or go on with the run and let a fault happen; how many steps it cost.

    None: the run came to its end all the same.
    """
    attempt = Attempt(folder, arguments, draw.choice(WORKERS))
    if not attempt.trains():
        attempt.finish()
        return None
    time.sleep(draw.uniform(0, arguments.within))
    if not attempt.is_running:
        return None
    FAULTS[kind](attempt, draw)
    if is_through(folder):
        return None
    if attempt.is_running:
        raise RuntimeError(f"{kind} has not ended the run, see {attempt.log}")
    reached = step_of(folder)
    whole = [c for c in checkpoints(folder) if is_complete(c)]
    return reached - (int(whole[-1].name.removeprefix("step-")) if whole else 0)


def is_through(folder: Path) -> bool:
    """Whether the run in a folder is finished."""
    scores = folder / "scores.json"
    return scores.exists() and "after" in json.loads(scores.read_text())


# What a run left behind


def step_of(folder: Path) -> int:
    """The last step in metrics.jsonl, 0 without one."""
    return max((line["step"] for line in metrics(folder)), default=0)


def metrics(folder: Path) -> list[dict]:
    file = folder / "metrics.jsonl"
    found = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:  # cut off in the middle of a write
            break
    return found


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step-*"))


def is_complete(checkpoint: Path) -> bool:
    from petl.errors import InputError
    from petl.runs.checkpoint import verify

    try:
        verify(checkpoint)
    except InputError:
        return False
    return True


def file_of_newest(folder: Path, draw: random.Random) -> Path | None:
    newest = [c for c in checkpoints(folder) if is_complete(c)][-1:]
    files = [f for c in newest for f in sorted(c.rglob("*")) if f.is_file() and f.stat().st_size]
    return draw.choice(files) if files else None


def told_same(quiet: Path, loud: Path) -> bool:
    """Whether two finished runs are equal to the digit; says what is not."""
    apart = []
    if timeless(metrics(quiet)) != timeless(metrics(loud)):
        apart.append("metrics.jsonl")
    scores = [json.loads((run / "scores.json").read_text()) for run in (quiet, loud)]
    if scores[0]["after"] != scores[1]["after"]:
        apart.append("scores.json")
    one, other = (load_file(r / "adapter" / "adapter_model.safetensors") for r in (quiet, loud))
    if one.keys() != other.keys() or any(not one[k].equal(other[k]) for k in one):
        apart.append("the adapter")
    if apart:
        told(f"not as in the undisturbed run: {', '.join(apart)}; see {quiet} and {loud}")
    return not apart


def timeless(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMELESS} for line in lines]


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whole.add_argument("--faults", type=int, default=12, metavar="N")
    whole.add_argument("--processes", type=int, default=1, metavar="N")
    whole.add_argument("--method", default="lora", metavar="NAME")
    whole.add_argument("--seed", type=int, default=0, help="of the moments and files")
    whole.add_argument("--within", type=float, default=3.0, help="seconds of training per fault")
    whole.add_argument(
        "--kinds", default=",".join(FAULTS), metavar="A,B", help=f"of {', '.join(FAULTS)}"
    )
    whole.add_argument("--folder", type=Path, help="keep the runs here, for a look at them")
    whole.add_argument("settings", nargs="*", metavar="SETTING", help="of train.py")
    return whole


if __name__ == "__main__":
    sys.exit(main())
