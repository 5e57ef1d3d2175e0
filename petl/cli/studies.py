"""The commands study, batch-sizes, buckets and configs: what they print."""

import signal
from pathlib import Path
from types import FrameType
from typing import NoReturn

from omegaconf import OmegaConf

from petl.cli.commands import composed
from petl.cli.table import BatchSizesOptions, BucketsOptions, ConfigsOptions, StudyOptions
from petl.errors import InputError, RunStopped
from petl.experiments.reports.formatting import count_text, echo, print_table
from petl.system.files.disk import write_atomic
from petl.system.processes import claimed
from petl.system.settings.command_line import (
    config_dir_words,
    config_dirs,
    file_named,
    groups,
    how_to_continue,
    in_shell,
    options_of,
    plus,
    word_of,
)
from petl.training.program import SIGNALLED


def study(options: StudyOptions) -> None:
    """Run a study, and write its page, also when runs failed."""
    # without --methods, splitting "" gives an empty word
    words = [word for word in (*options.methods.split(","), *options.method) if word.strip()]
    if not words:
        raise InputError(
            f"no method is given (--methods={options.methods!r}): use --methods A,B or "
            "--method WORDS"
        )
    for word in words:
        # {seed} stands for that of each run
        method, *others = word.replace("{seed}", "0").split()
        composed([f"+method={method}", *others, *options.overrides])
    from petl.experiments.reports.comparison import compare
    from petl.experiments.reports.comparison_report import write_page
    from petl.experiments.sweeps.study import Contender, Study
    from petl.training.runs.records import is_finished

    folder = options.folder
    study = Study(
        folder=folder,
        contenders=[Contender(word) for word in words],
        seeds=options.seeds,
        rates=options.rates,
        overrides=options.overrides,
        jobs=options.jobs,
        together=options.together,
        tuning_seeds=options.tuning_seeds,
    )
    signal.signal(signal.SIGTERM, _terminated)
    with claimed(folder):  # a second study would take the runs of the first one for failed
        try:
            study.run()
        except KeyboardInterrupt as error:
            raise RunStopped(f"interrupted; {how_to_continue()}", status=130) from error
        finally:
            # else there is nothing to compare
            if any(is_finished(file.parent) for file in (folder / "runs").rglob("scores.json")):
                write_page(compare([folder / "runs"]), folder, study.tried, failures=study.failures)


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise RunStopped(f"terminated; {how_to_continue()}", status=SIGNALLED + number)


def batch_sizes(options: BatchSizesOptions) -> None:
    """Find the batch sizes of a run, print them, and write them to a file."""
    cfg = composed(options.overrides)
    from petl.experiments.planning.batch_sizes import bytes_of, find

    file, settings, memory = options.output, options.overrides, options.memory
    result = find(cfg, None if memory is None else bytes_of(memory))
    # the buckets of the file replace train.buckets
    kept = [word for word in settings if not word.startswith("train.buckets=")]
    line = in_shell([*config_dir_words(), *kept, word_of("train.batch_sizes", file)])
    _write_yaml(file, {**result, "command": line})  # how to train with them
    keys = ("longest", "rows", "batch_size", "tokens")
    rows = [[f"{bucket[key]:,}" for key in keys] for bucket in result["buckets"]]
    print_table((">tokens", ">examples", ">batch size", ">tokens per step"), rows)
    echo(f"{count_text(result['steps'], 'step')} per epoch, {result['measured']}; {file}")
    echo(line)


def buckets(options: BucketsOptions) -> None:
    """Estimate the padding, print it, and write the buckets to a file."""
    cfg = composed(options.overrides)
    from petl.experiments.planning.bucket_estimate import estimate

    result = estimate(cfg)
    _write_yaml(options.file, result)
    # fractions of all positions
    before, after = (f"{100 * result['padding'][key]:.1f} %" for key in ("before", "after"))
    steps = result["steps"]
    echo(
        f"padding {before} in {count_text(steps['before'], 'step')}; "
        f"with {count_text(len(result['buckets']), 'bucket')}",
        end=" ",
    )
    echo(f"{after} in {count_text(steps['after'], 'step')}; {options.file}")


def _write_yaml(file: Path, content: dict[str, object]) -> None:
    write_atomic(file, OmegaConf.to_yaml(OmegaConf.create(content)))


def configs(options: ConfigsOptions) -> None:
    """Print the folders and names of configurations, or the file of one."""
    if options.name is not None:
        echo(file_named(options.name).read_text(), end="")  # a file has its own last line break
        return
    for folder in config_dirs():
        echo(folder)
    echo()
    # with the plus that Hydra wants for groups outside of the defaults list
    rows = [(f"{plus(g)}{g}", ", ".join(options_of(g))) for g in sorted(groups()) if options_of(g)]
    print_table(("group", "names"), rows)
