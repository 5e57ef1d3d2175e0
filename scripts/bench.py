"""Benchmark the methods: time, memory, kernel launches, files, relative to a lower bound.

    python scripts/bench.py                                  # the main sections, six layers
    python scripts/bench.py --sections step,dist --methods mola,mos --shape minilm
    python scripts/bench.py --sections all --peers ENV/bin/python  # ENV has adapters
    python scripts/bench.py --model smollm2 --shape ""       # a model of configs/model
    python scripts/bench.py --sections job --tune        # whole jobs beside Trainer
    python scripts/bench.py --check bench.json           # exit status 1 if a value has grown
    python scripts/bench.py --import mypackage.mymethod --methods mymethod
    python scripts/bench.py --sections drafting          # drafts; --quick: on a tiny model
    python scripts/bench.py --read bench.json --page docs/performance/*.md

The lower bound is the step of the frozen backbone, without any adapter. Times are processor time of
one thread, alternating between lower bound and methods; nothing is downloaded. On a GPU (--device
cuda) they are times of the device, in bfloat16, with absolute values in addition. A method without
a dense reference in scripts/bench/reference.py is measured unchecked.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see train.py

from bench.contenders import IMPORTS, import_methods
from bench.drafting import FIELDS, QUICK, Plan
from bench.isolated import quieten
from bench.jobs.definitions import JOBS
from bench.jobs.definitions import Settings as JobSettings
from bench.page import filled
from bench.records import MARGIN, Result, regressions
from bench.report import circumstances, remarks, tables
from bench.run import LONG, SECTIONS, USUAL, Settings, run

from petl.cli.arguments import (
    COUNT,
    POSITIVE,
    SEED,
    each,
    file_to_read,
    file_to_write,
    folder_to_write,
    number,
    some_of,
)
from petl.errors import InputError
from petl.training import program as app

DRAFTING = (
    "of section `drafting`: model, prompts (of each kind), tokens, dtypes, states (base, lora, "
    "merged, mola, adapter), steps (of training an adapter), heads (answers that draft heads are "
    "trained on), drafters (folders), METHOD=RUN (finished runs), folder (of answered prompts)"
)


def main() -> int:
    """Run the command; return its exit status."""
    arguments = parser().parse_args()
    status = 0

    def work() -> None:
        nonlocal status
        earlier = Result.read(arguments.check) if arguments.check else None
        result = join(arguments.read) if arguments.read else measure(arguments)
        status = show(result, arguments, earlier)

    return app.reported(work) or status


def measure(arguments: argparse.Namespace) -> Result:
    """Measure what the arguments select, and write the result."""
    quieten()
    if arguments.imports:
        os.environ[IMPORTS] = ",".join(arguments.imports)
        import_methods()
    every = [section for section in SECTIONS if section != LONG]
    sections = every if arguments.sections == "all" else words(arguments.sections)
    return run(
        Settings(
            suite=arguments.suite,
            sections=sections,
            shapes=words(arguments.shape),
            models=arguments.model,
            rows=words(arguments.methods),
            rounds=arguments.rounds,
            device=arguments.device,
            threads=arguments.threads,
            peers=arguments.peers,
            drafts=plan_of(arguments),
            jobs=job_settings(arguments),
        ),
        progress=lambda line: print(line, file=sys.stderr, flush=True),
        save=lambda result: result.write(arguments.out),  # after each section: later ones may fail
    )


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Return what section `drafting` measures.

    Raises:
        InputError: a word has no known name, or a value that is no number.
    """
    found = replace(QUICK if arguments.quick else Plan(), report=arguments.finished)
    for word in arguments.drafting.split():
        name, _, value = word.partition("=")
        if name in ("prompts", "tokens", "steps") and value.isdigit() and int(value) > 0:
            found = replace(found, **{name: int(value)})
        elif name in ("dtypes", "states", "drafters") and value:
            found = replace(found, **{name: words(value)})
        elif name == "heads" and value.isdigit():
            found = replace(found, heads=int(value))
        elif name == "model" and value:
            found = replace(found, model=value)
        elif name == "folder" and value:
            found = replace(found, folder=Path(value))
        elif name in FIELDS and value:
            found = replace(found, runs={**found.runs, name: value})
        else:
            raise InputError(f"--drafting has {word!r}; see scripts/bench/drafting.py, `Plan`")
    return found


def job_settings(arguments: argparse.Namespace) -> JobSettings:
    """Return the settings of section `job`."""
    return JobSettings(
        folder=arguments.job_folder,
        names=arguments.jobs,
        variants=[name.strip() for name in arguments.variants.split(";") if name.strip()],
        seeds=arguments.seeds,
        rates=arguments.rates,
        head_rates=arguments.head_rates,
        tunes=arguments.tune,
        quick=arguments.quick,
        report=arguments.finished,
    )


def join(files: Sequence[Path]) -> Result:
    """Join results of several runs, with the environment of the first.

    A row that several files contain is taken from the first of them.
    """
    results = [Result.read(file) for file in files]
    started = ", ".join(dict.fromkeys(result.environment["started"] for result in results))
    records = {r.key: r for result in reversed(results) for r in result.records}
    order = dict.fromkeys(r.key for result in results for r in result.records)
    environment = {**results[0].environment, "started": started}
    return Result(environment, [records[key] for key in order])


def words(text: str) -> list[str]:
    """Split at commas."""
    return [word for word in text.split(",") if word]


def show(result: Result, arguments: argparse.Namespace, earlier: Result | None) -> int:
    """Print a result and fill pages; return 1 if it is worse than an earlier one, or has errors."""
    print(circumstances(result.environment))
    for title, table in tables(result).items():
        table.print(title)
        print()
    for remark in remarks(result):
        print(remark)
    if not arguments.read:
        print(f"written: {arguments.out}")
    for page in arguments.page:
        page.write_text(filled(page.read_text(), result))
    worse = [] if earlier is None else regressions(earlier, result, arguments.margin)
    for sentence in worse:
        print(f"worse: {sentence}")
    return int(bool(worse) or any(r.failed and r.is_own for r in result.records))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    command_line = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = command_line.add_argument
    add("--suite", choices=("quick", "full"), default="quick", help="models of 6 or 30 layers")
    sections = f"{', '.join(SECTIONS)}; all: without {LONG}, which takes hours"
    add("--sections", default=",".join(USUAL), metavar="A,B", help=sections)
    add("--shape", default="llama,minilm", metavar="A,B")
    add(
        "--model",
        action="append",
        default=[],
        metavar="'NAME WORDS'",
        help="a model of configs/model",
    )
    add("--methods", default="", metavar="A,B", help="methods or rows; PEFT's LoRA is always added")
    add("--import", dest="imports", action="append", metavar="MODULE", help="registers a method")
    add("--rounds", type=COUNT, default=5, metavar="N", help="timed rounds of a step")
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=COUNT, default=1, metavar="N", help="of the processor (1)")
    add("--peers", default="", metavar="PYTHON", help="an environment with `adapters`")
    add("--drafting", default="", metavar="'KEY=VALUE ...'", help=DRAFTING)
    add("--quick", action="store_true", help="sections drafting and job: tries them, on little")
    add_job_arguments(command_line.add_argument_group("section job"))
    add("--out", type=file_to_write, default="bench.json", metavar="FILE", help="result to write")
    add(
        "--read",
        type=file_to_read,
        action="append",
        metavar="FILE",
        help="print this result, do not measure",
    )
    add(
        "--page",
        type=file_to_read,
        nargs="+",
        default=[],
        metavar="FILE",
        help="update their tables",
    )
    add("--check", type=file_to_read, metavar="OLD", help="compare with an earlier result")
    add("--margin", type=number(float, 0), default=MARGIN, help=f"allowed growth ({MARGIN})")
    return command_line


def add_job_arguments(group: Any) -> None:
    """Add the arguments of section `job`."""
    add, default = group.add_argument, JobSettings()
    add("--jobs", type=some_of(JOBS), default=list(JOBS), metavar="A,B", help=", ".join(JOBS))
    add("--job-folder", type=folder_to_write, default=default.folder, metavar="FOLDER",
        help=f"of its runs, to be resumed ({default.folder})")  # fmt: skip
    add("--variants", default="", metavar="'A; B'", help="rows of its table; default: all")
    add("--seeds", type=each(SEED), default=list(default.seeds), metavar="S,S", help="(0)")
    add("--tune", action="store_true", help="choose learning rates on validation rows, draw curves")
    add("--rates", type=each(POSITIVE), default=list(default.rates), metavar="R,R", help="to try")
    add("--head-rates", type=each(POSITIVE), default=list(default.head_rates), metavar="R,R",
        help="of a new head, to try")  # fmt: skip
    add("--finished", action="store_true", help="measure nothing: the runs that are finished")


if __name__ == "__main__":
    sys.exit(main())
