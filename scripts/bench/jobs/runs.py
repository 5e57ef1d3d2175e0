"""Runs of a job: one process each, whose result is a file; a run that has one is not repeated."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.jobs.data import export
from bench.jobs.definitions import JOBS, Job, Settings, Variant
from bench.kept import keep, kept
from petl.errors import InputError, RunStopped
from petl.experiments.sweeps.study import slug
from petl.system.files.disk import as_json, write_atomic
from petl.system.files.paths import cache_folder
from petl.training.runs.environment import git_revision
from petl.training.runs.records import read_results

ROOT = Path(__file__).parents[3]
TUNING_SEED = 0
Rates = tuple[float, float]  # of the adapter, and of the head


@contextmanager
def terminable() -> Generator[None]:
    """In the block, SIGTERM raises SystemExit, as Ctrl-C raises KeyboardInterrupt."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class Runner:
    """Does the runs of one job.

    Attributes:
        about: of the exported data, see `data.export`.
        threads: of a run.
    """

    job: Job
    settings: Settings
    threads: int
    progress: Callable[[str], Any]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The results of the job."""
        size = "-quick" if self.settings.quick else ""
        return self.settings.folder.absolute() / f"{self.job.name}{size}"

    @property
    def variants(self) -> list[Variant]:
        """The variants that were asked for.

        Raises:
            InputError: no job has a variant of such a name.
        """
        wanted = self.settings.variants
        known = {v.name for job in JOBS.values() for v in job.variants}
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise InputError(f"no variant {unknown[0]!r}; variants: {', '.join(sorted(known))}")
        return [v for v in self.job.variants if not wanted or v.name in wanted]

    def prepare(self) -> None:
        """Export the rows, and read what is known of them."""
        words = [*self.job.words, *(self.job.quick if self.settings.quick else ())]
        about = export(self.job, words, self.settings.folder, self.folder / "data")
        self.about.update(about)
        encoded = self.cache / "encoded"
        if not encoded.is_symlink():  # rows that `export` has encoded
            self.cache.mkdir(exist_ok=True)
            encoded.symlink_to(cache_folder() / "encoded")

    # Results

    def file(self, variant: Variant, rates: Rates, seed: int | None) -> Path:
        """The file of a run; seed None: of the run that holds rows out."""
        kind, number = ("tune", TUNING_SEED) if seed is None else ("final", seed)
        place = self.folder / kind / slug(variant.name) / slug("{:g}-{:g}".format(*rates))
        return place / f"{number}.json"

    def result(self, variant: Variant, rates: Rates, seed: int | None) -> dict[str, Any] | None:
        """The result of a run, or None."""
        return kept(self.file(variant, rates, seed))

    def run(self, variant: Variant, rates: Rates, seed: int | None) -> dict[str, Any]:
        """Return the result of a run, done now unless it is known.

        Raises:
            RunStopped: it failed.
        """
        return keep(self.file(variant, rates, seed), lambda: self._measured(variant, rates, seed))

    def _measured(self, variant: Variant, rates: Rates, seed: int | None) -> dict[str, Any]:
        what = "held-out rows" if seed is None else f"seed {seed}"
        lr, head = rates
        self.progress(f"job: {self.job.name}, {variant.name}, {what}, rates {lr:g}, {head:g}")
        if variant.store != "reads":
            shutil.rmtree(self.features, ignore_errors=True)
        if variant.store == "fills":
            shutil.rmtree(self.frozen, ignore_errors=True)
        while True:
            before = self.stores()
            result = self._run(variant, rates, seed)
            # a run that reads the store has computed it, if it was not there: once more
            if variant.store != "reads" or before == self.stores():
                return result

    def stores(self) -> list[str]:
        """Names of the stores of frozen blocks, and of the files of features, that exist."""
        stores = [path.parent.parent.name for path in self.frozen.glob("*/*/store.json")]
        return sorted([*stores, *(path.name for path in self.features.glob("*.safetensors"))])

    @property
    def frozen(self) -> Path:
        """The folder of the stores."""
        return self.cache / "frozen"

    @property
    def features(self) -> Path:
        """The folder of the inputs of heads that a linear probe has computed."""
        return self.cache / "features"

    @property
    def cache(self) -> Path:
        """The cache of petl for the runs of this job, so that no other run has filled it."""
        return self.folder / "cache"

    # Rates

    def tune(self, arm: str) -> Rates:
        """Return the best rates of an arm on the held-out rows, and write them to rates.json.

        Of equal scores those with the lower loss.
        """
        variant = next(v for v in self.job.variants if v.arm == arm and v.tunes)
        heads = self.settings.head_rates if self.job.has_head else self.settings.head_rates[:1]
        found = {}
        for rates in [(lr, head) for lr in self.settings.rates for head in heads]:
            scores = self.run(variant, rates, None)["points"][-1]["scores"]
            found[rates] = scores
        best = max(found, key=lambda rates: self.quality(found[rates]))
        known = self.tuned | {
            arm: {
                "variant": variant.name,
                "validation": {f"{lr:g}, {head:g}": s for (lr, head), s in found.items()},
                "taken": list(best),
            }
        }
        write_atomic(self.folder / "rates.json", as_json(known))
        return best

    def quality(self, scores: dict[str, float]) -> tuple[float, float]:
        """The order of scores: by the metric, then by the loss."""
        sign = 1 if self.about["higher_is_better"] else -1
        # rankings have no loss
        return sign * scores[self.about["metric"]], -scores.get("loss", 0.0)

    @property
    def tuned(self) -> dict[str, Any]:
        """The content of rates.json."""
        return kept(self.folder / "rates.json") or {}

    def rates_of(self, variant: Variant) -> Rates:
        """The chosen rates of a variant; those of petl's configuration without `--tune`."""
        chosen = self.tuned.get(variant.arm)
        if chosen is None:
            return self.about["rates"]["lr"], self.about["rates"]["head_lr"]
        lr, head = chosen["taken"]
        return lr, head

    # Processes

    def _run(self, variant: Variant, rates: Rates, seed: int | None) -> dict[str, Any]:
        with TemporaryDirectory(dir=self.folder) as place:
            out, run = Path(place) / "out.json", Path(place) / "run"
            if variant.is_petl:
                request = {"words": self._words(variant, rates, seed, run), "out": str(out)}
                module = "bench.jobs.petl_job"
            else:
                request = {
                    "data": str(self.folder / "data"),
                    "out": str(out),
                    "options": self._options(variant, rates, seed),
                }
                module = f"bench.jobs.{self.job.trainer}"
            job_seconds = self._process(module, request)
            found = json.loads(out.read_text())
            results = read_results(run) if variant.is_petl else found
            marks = found["marks"]
            return {
                "job": job_seconds,
                "before training": marks["before training"],
                "training": marks["after training"] - marks["before training"],
                "peak": found["peak"],
                "points": found["points"],
                "scores": results["after"] if variant.is_petl else found["scores"],
                "steps": results["steps"],
                "rates": list(rates),
                "threads": self.threads,
                "git": git_revision(ROOT),
            }

    def _words(self, variant: Variant, rates: Rates, seed: int | None, run: Path) -> list[str]:
        words = ["+method=lora", *self.about["words"], *variant.words]
        words += [f"train.lr={rates[0]:g}", f"train.head_lr={rates[1]:g}", f"train.run='{run}'"]
        if seed is not None:
            return [*words, f"train.seed={seed}"]
        settings = self.about["settings"]
        steps = settings["epochs"] * self.about["rows"]["rest"] / settings["batch_size"]
        every = max(1, round(steps / self.job.points))
        return [
            *words,
            f"train.seed={TUNING_SEED}",
            f"train.eval_steps={every}",
            "train.test=false",
            "train.keep_checkpoints=1",
        ]

    def _options(self, variant: Variant, rates: Rates, seed: int | None) -> dict[str, Any]:
        return {
            **self.about["settings"],
            "seed": TUNING_SEED if seed is None else seed,
            "lr": rates[0],
            "head_lr": rates[1],
            "grouped": variant.grouped,
            "bf16": variant.bf16,
            "sft": variant.sft,
            "points": self.job.points if seed is None else 0,
        }

    def _process(self, module: str, request: dict[str, Any]) -> float:
        """Run a module with a request as its input; return its processor seconds.

        Raises:
            RunStopped: it failed; the message has the last line of its log.
        """
        paths = [str(ROOT / "scripts"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": str(self.threads),
            "HF_HUB_OFFLINE": "1",
            "PETL_CACHE": str(self.cache),
        }
        log = self.folder / "last.log"
        with log.open("wb") as opened, terminable():
            # -P: the folder of the module is no place for imports
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", module],
                stdin=subprocess.PIPE,
                stdout=opened,
                stderr=opened,
                env=environment,
                cwd=self.folder,
            )
            assert process.stdin is not None
            process.stdin.write(json.dumps(request).encode())
            process.stdin.close()
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:  # the run must not stay behind
                process.kill()
                process.wait()
                raise
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
            raise RunStopped(
                f"{module} failed with status {process.returncode}: {lines[-1]}; see {log}"
            )
        return usage.ru_utime + usage.ru_stime
