"""The commands study, batch-sizes, buckets and configs: their arguments and what they print.

Like petl.cli.main, imports nothing heavy until a command runs.
"""

import argparse
import os
from pathlib import Path

from petl.cli.arguments import POSITIVE, SEED, Add, each, file_to_write, new_folder_to_write, number

JOBS = number(int, 1, 8 * (os.cpu_count() or 1))  # assumption: more jobs would only wait
# of the folder of a study
FILES = ("runs", "tune", "replaced", "rates.json", "index.html", "results.md", "*.svg")


def add_parsers(add: Add) -> list[argparse.ArgumentParser]:
    """Add the parsers of the commands with `add`; return those that take `--config-dir`."""
    study = add("study", "train several methods and write a page that compares them", STUDY)
    study.add_argument(
        "folder",
        metavar="FOLDER",
        type=new_folder_to_write(FILES, ("runs", "tune", "rates.json")),
        help="folder of the study, new or to be resumed",
    )
    study.add_argument("--methods", default="", metavar="A,B", help="names of methods")
    # one text of several words: the settings in it hold for this method alone
    study.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="WORDS",
        help="a method with settings of its own",
    )
    # the default is a text, which argparse parses too
    study.add_argument(
        "--seeds", type=each(SEED), default="0,1,2", metavar="S,S", help="default: 0,1,2"
    )
    study.add_argument(
        "--rates",
        type=each(POSITIVE),
        default=[],
        metavar="R,R",
        help="learning rates (default: that of each method)",
    )
    study.add_argument("--jobs", type=JOBS, default=1, metavar="N", help="number of runs at a time")
    study.add_argument(
        "--together",
        type=JOBS,
        default=1,
        metavar="N",
        help="runs of a method that train in one pass over one base (default: 1, each alone)",
    )
    sizes = add("batch-sizes", "find the largest batch size for each length", BATCH_SIZES)
    # parsed by `bytes_of`, whose module imports torch
    sizes.add_argument("--memory", metavar="8GB", help="memory of the device of each process")
    sizes.add_argument(
        "--output",
        type=file_to_write,
        default="batch_sizes.yaml",
        metavar="FILE",
        help="YAML to write (default: %(default)s)",
    )
    buckets = add("buckets", "estimate how much padding length buckets save", BUCKETS)
    buckets.add_argument("file", metavar="FILE", type=file_to_write, help="YAML to write")
    configs = add("configs", "list the configurations, or print one", CONFIGS)
    configs.add_argument(
        "name", nargs="?", metavar="GROUP/NAME", help="print this file, such as method/mola"
    )
    for command in (study, sizes, buckets):
        command.add_argument(
            "overrides",
            metavar="SETTING",
            nargs="*",
            default=[],  # without it, argparse says that SETTING is required
            help="settings of `petl train`",
        )
    return [study, sizes, buckets, configs]  # configs lists the names in that folder


STUDY = """\
Train several methods and write a page that compares them (FOLDER/index.html).

  petl study runs/nine --methods lora,mola,mos --seeds 0,1,2 \\
      --rates 3e-4,1e-3,3e-3 train.budget=340000

Each learning rate is scored on validation examples; with the best one, each method is trained again
for each seed and scored on the test set. With --together N, N rates or seeds of a method train in
one process, in one pass over one base. The same command resumes a stopped study. SETTINGs are
those of `petl train`, for every run; --method "binary method.inner=lora" adds a method with
settings of its own."""

BATCH_SIZES = """\
Find the largest batch size for each length bucket, and write a file for train.batch_sizes.

  petl batch-sizes +method=mola model=minilm train.buckets=10
  WORLD_SIZE=8 petl batch-sizes +method=lora model=smollm2 --memory 80GB

SETTINGs are those of `petl train`; the default of train.buckets is 30 here. On a GPU, batch sizes
are found by trial steps, limited to 90 % of its memory. With --memory, or without a GPU, they are
estimated from tensor shapes, for 90 % of that memory, or of the free memory. Batch sizes are
global; the number of processes is WORLD_SIZE."""

BUCKETS = """\
Estimate how much padding length buckets save on a data set, and write their edges.

  petl buckets buckets.yaml model=smollm2 data=reasoning train.buckets=30 train.max_tokens=4096

SETTINGs are those of `petl train`; no method is needed. Without train.max_tokens, each step has
train.batch_size examples. train.buckets=null counts as auto here."""

CONFIGS = """\
List the folders and names of configurations, or print the file of one, to start your own from it:

  petl configs
  petl configs method/mola > configs/method/wide.yaml    # then: petl train +method=wide
  petl configs sweep/lora > sweep.yaml                   # then: wandb sweep sweep.yaml

Your own are found in ./configs of the working directory, and in the folder of --config-dir. They
replace those of petl of the same name; groups of your own, such as configs/experiment, are chosen
with a plus: +experiment=NAME. A ./configs with a train.yaml is another program's, or a copy of
petl's, so that only its further names are used, unless --config-dir names it."""


def study(arguments: argparse.Namespace) -> None:
    """Run a study, and write its page, also when runs failed."""
    from petl.errors import InputError
    from petl.experiments.reports.comparison import compare
    from petl.experiments.reports.comparison_report import write_page
    from petl.experiments.sweeps.study import Contender, Study

    # without --methods, splitting "" gives an empty word
    words = [word for word in (*arguments.methods.split(","), *arguments.method) if word.strip()]
    if not words:
        raise InputError(
            f"no method is given (--methods={arguments.methods!r}): use --methods A,B or "
            "--method WORDS"
        )
    folder = arguments.folder
    study = Study(
        folder=folder,
        contenders=[Contender(word) for word in words],
        seeds=arguments.seeds,
        rates=arguments.rates,
        overrides=arguments.overrides,
        jobs=arguments.jobs,
        together=arguments.together,
    )
    try:
        study.run()
    finally:
        if any((folder / "runs").rglob("scores.json")):  # else there is nothing to compare
            write_page(compare([folder / "runs"]), folder, study.tried)


def batch_sizes(arguments: argparse.Namespace) -> None:
    """Find the batch sizes of a run, print them, and write them to a file."""
    from petl.experiments.planning.batch_sizes import bytes_of, find
    from petl.experiments.reports.formatting import echo, print_table
    from petl.system.settings.command_line import config_dir_words, in_shell, word_of
    from petl.training.compose import compose

    file, settings, memory = arguments.output, arguments.overrides, arguments.memory
    result = find(compose(settings), None if memory is None else bytes_of(memory))
    # the buckets of the file replace train.buckets
    kept = [word for word in settings if not word.startswith("train.buckets=")]
    line = in_shell([*config_dir_words(), *kept, word_of("train.batch_sizes", file)])
    _write_yaml(file, {**result, "command": line})  # how to train with them
    keys = ("longest", "rows", "batch_size", "tokens")
    rows = [[f"{bucket[key]:,}" for key in keys] for bucket in result["buckets"]]
    print_table((">tokens", ">examples", ">batch size", ">tokens per step"), rows)
    echo(f"{result['steps']:,} steps per epoch, {result['measured']}; {file}")
    echo(line)


def buckets(arguments: argparse.Namespace) -> None:
    """Estimate the padding, print it, and write the buckets to a file."""
    from petl.experiments.planning.bucket_estimate import estimate
    from petl.experiments.reports.formatting import echo
    from petl.training.compose import compose

    result = estimate(compose(arguments.overrides))
    _write_yaml(arguments.file, result)
    # fractions of all positions
    before, after = (f"{100 * result['padding'][key]:.1f} %" for key in ("before", "after"))
    steps = result["steps"]
    echo(
        f"padding {before} in {steps['before']} steps; with {len(result['buckets'])} buckets",
        end=" ",
    )
    echo(f"{after} in {steps['after']} steps; {arguments.file}")


def _write_yaml(file: Path, content: dict[str, object]) -> None:
    from omegaconf import OmegaConf

    from petl.system.files.disk import write_atomic

    write_atomic(file, OmegaConf.to_yaml(OmegaConf.create(content)))


def configs(arguments: argparse.Namespace) -> None:
    """Print the folders and names of configurations, or the file of one."""
    from petl.experiments.reports.formatting import echo, print_table
    from petl.system.settings.command_line import config_dirs, file_named, groups, options_of, plus

    if arguments.name is not None:
        echo(file_named(arguments.name).read_text(), end="")  # a file has its own last line break
        return
    for folder in config_dirs():
        echo(folder)
    echo()
    # with the plus that Hydra wants for groups outside of the defaults list
    rows = [(f"{plus(g)}{g}", ", ".join(options_of(g))) for g in sorted(groups()) if options_of(g)]
    print_table(("group", "names"), rows)


COMMANDS = {"study": study, "batch-sizes": batch_sizes, "buckets": buckets, "configs": configs}
