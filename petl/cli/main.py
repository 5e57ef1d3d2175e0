"""The `petl` command: its arguments and help texts.

Only the standard library is imported here, so that `petl --help` is instant. Most commands import
torch and PEFT, which takes seconds; `petl.cli.commands` is imported once a command was parsed.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from petl.cli import deltas, drafts, hub, predictions, serve, squeeze, studies, writing
from petl.cli.arguments import add_out, add_run, new_folder_to_write, number
from petl.errors import did_you_mean, printable
from petl.system.imports.collector import rare_collections
from petl.system.imports.extras import install_hint
from petl.version import __version__

EPILOG = """\
Train with `petl train +method=NAME`; `petl plan +method=NAME` estimates its cost beforehand. Your
own configurations, such as configs/method/mine.yaml, are found in ./configs and in --config-dir.
RUN is the folder of a run (runs/lora-minilm-wordnet-...) or of an adapter alone; the base model of
an adapter alone is the one that its adapter_config.json names.
"""


class Parser(argparse.ArgumentParser):
    """Shows a word that it refuses with control characters escaped: `runs/*` may contain any.

    Attributes:
        commands: the parsers of the sub-commands by name.
    """

    commands: Mapping[str, argparse.ArgumentParser] = {}

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def parser() -> Parser:
    """Return the parser of the `petl` command."""
    command_line = Parser(
        prog="petl",
        description="Parameter-efficient fine-tuning: list methods; plan, train, evaluate, "
        "compare, merge, export, push and pull runs; let models answer.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a new option would change the meaning of abbreviations
    )
    command_line.add_argument("--version", action="version", version=f"petl {__version__}")
    commands = command_line.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command_line.commands = commands.choices

    def add(name: str, summary: str, description: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    _add_config_dir(add("methods", "list methods, extra losses and recipes", METHODS))
    # for the lists of commands: `main` passes the words after `train` to Hydra
    add("train", "train one adapter and save it, or several: a sweep", TRAIN).usage = TRAIN_USAGE
    show = add("show", "describe a method, loss or recipe and its fields", SHOW)
    show.add_argument("name", metavar="NAME", help="a name from `petl methods`")
    show.add_argument("field", metavar="FIELD", nargs="?", help="print one field in full")
    plan = add("plan", "estimate parameters, memory and length of a run without training", PLAN)
    plan.add_argument(
        "overrides",
        metavar="SETTING",
        nargs="*",
        help="settings of `petl train`, such as +method=mola train.lr=1e-3",
    )
    data = add("data", "preview the training data: examples, lengths, labels", DATA)
    data.add_argument(
        "overrides",
        metavar="SETTING",
        nargs="*",
        help="settings of `petl train`, such as data=hamlet model=smollm2",
    )
    data.add_argument(
        "--examples",
        type=number(int, 0, 10**6),
        default=3,
        metavar="N",
        help="number of training examples to print (default: 3)",
    )
    # methods has the option already, and Hydra reads that of train
    for command in (show, plan, data):
        _add_config_dir(command)
    predictions.add_parsers(add)
    writing.add_parsers(add)
    serve.add_parsers(add)
    _add_config_dir(drafts.add_parsers(add))
    merge = add("merge", "merge an adapter into its base model", MERGE)
    add_run(merge)
    _add_checked_out(merge)
    merge.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="dtype of the merged model (default: that of the base; bfloat16 rounds the sum)",
    )
    export = add(
        "export", "convert an adapter (LoRA, small model, GGUF, ONNX) or a drafter", EXPORT
    )
    add_run(export)
    _add_checked_out(export)
    formats = export.add_mutually_exclusive_group(required=True)
    # each stores its own name in the same place
    for name, meaning in FORMATS.items():
        formats.add_argument(
            f"--{name}", action="store_const", dest="format", const=name, help=meaning
        )
    hub.add_parsers(add)
    deltas.add_parsers(add)
    squeeze.add_parsers(add)
    report = add("report", "write the report of a run (report.html)", REPORT)
    report.add_argument("run", metavar="RUN", help="folder of a run, finished or not")
    compare = add("compare", "compare finished runs: scores, sizes, times", COMPARE)
    compare.add_argument(
        "runs", metavar="RUN", nargs="+", help="folder of a run, or a folder that contains runs"
    )
    compare.add_argument(
        "--out",
        metavar="FOLDER",
        type=new_folder_to_write(("index.html", "results.md", "*.svg"), ("results.md",)),
        help="write index.html, results.md and charts to this folder",
    )
    compare.add_argument(
        "--baseline",
        metavar="NAME",
        default="lora",
        help="the row that the others are compared with (default: lora)",
    )
    compare.add_argument(
        "--answers",
        action="store_true",
        help="of two runs, also show on which test examples their predictions differ",
    )
    compare.add_argument(
        "--examples",
        metavar="N",
        type=number(int, 0, 10**4),
        default=5,
        help="number of such examples to show for each run (default: 5)",
    )
    # the commands of studies that read configurations
    for command in studies.add_parsers(add):
        _add_config_dir(command)
    return command_line


def _add_config_dir(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config-dir",
        metavar="DIR",
        help="a folder with configurations of yours, such as method/mine.yaml",
    )


def _add_checked_out(command: argparse.ArgumentParser) -> None:
    add_out(command)
    command.add_argument(
        "--tolerance",
        type=number(float, 0),  # None: the default depends on the dtype of the base model
        metavar="X",
        help="largest allowed difference of the outputs, relative to their norm (default: 1e-4 for "
        "a float32 base model, 5e-2 for bfloat16)",
    )


TRAIN_USAGE = "petl train [-m] [--config-dir DIR] +method=NAME [GROUP=NAME ...] [SETTING=VALUE ...]"
TRAIN = """\
Train one adapter and save it. `petl train --help` lists the groups, their names and all settings.

  petl train +method=mola
  petl train -m +method=lora,mola train.seed=0,1,2      # one run for each combination
  torchrun --nproc_per_node 2 -m petl train +method=mola

In a checkout, `python train.py` is the same."""

METHODS = """\
List the methods by what they are for, with the number of trainable parameters on one reference
model, whether the adapter can be merged into the base model (`petl merge`) or exported as a plain
LoRA (`petl export --lora`), whether petl or PEFT implements it, and the paper. A method's name goes
after `+method=` and into `petl.wrap(model, NAME)`.
Then list the extra losses, which `+loss=NAME` adds to the training of any method, the recipes:
combinations of method, loss and settings from a paper, chosen by `+method=NAME` as well, and the
method that is recommended for each need."""

SHOW = """\
Describe a method, an extra loss or a recipe: paper, capabilities, usage, and each field with type,
default and meaning. The default is that of petl.wrap; a value that configs/method/NAME.yaml sets
for `petl train` has a column of its own. With FIELD, print the full description of that field.

  petl show mola
  petl show density
  petl show deft loss.eps"""

PLAN = """\
Estimate what `petl train SETTING ...` would do, without training and without loading weights:
target modules, trainable and saved parameters, size of the adapter file, memory of a training step
and of an evaluation, length and time of the run, settings that would make it cheaper, and what the
adapter supports. Takes the settings of `petl train`.

  petl plan +method=mola
  petl plan +method=lora model=smollm2 data=hamlet train.batch_size=4 train.precision=bf16"""

DATA = """\
Preview the examples that `petl train SETTING ...` would train on, as the model reads them:
decoded, with the tokens that the loss is computed on in color (in brackets outside a terminal),
the number of dropped and truncated examples, lengths, and label counts. Needs the tokenizer or
processor of the model, not its weights.

  petl data
  petl data model=smollm2 data=reasoning --examples 1
  petl data model=path model.path=FOLDER data=files data.train=examples.jsonl data.task=seq2seq"""

MERGE = """\
Add an adapter to the weights of its base model and write the result as a plain model with config
and tokenizer, which AutoModel...from_pretrained(OUT) loads without petl or PEFT. The outputs on
test examples of the run are compared before and after merging; if they differ by more than the
tolerance, nothing is written. Methods whose update depends on the input cannot be merged."""

# a name is an option of `petl export`, and `_export_format` finds its module
FORMATS = {
    "lora": "a plain LoRA, for PEFT and serving engines",
    "small": "the plain small model of PELA (method pela), with low-rank layers",
    "gguf": f"an adapter for llama.cpp ({install_hint('gguf')})",
    "vllm": "parallel heads of a drafter, RUN/drafter, as a Medusa model for vLLM",
    "onnx": f"the merged model with its head, for ONNX runtime ({install_hint('onnx')})",
}
EXPORT = """\
Write an adapter for other programs. The outputs on test examples of the run are compared before
anything is kept; if they differ by more than the tolerance, nothing is.

--lora converts it to a plain LoRA, including trained heads, which PEFT and serving engines load
without petl. The conversion is exact if the update is a low-rank product; any other update of the
weight is factored by a full SVD. For a language model, the commands by which vLLM and SGLang serve
the LoRA are printed, or why they cannot; `petl serve` serves the adapters of every method.
--small writes the model that PELA (method pela) makes smaller: two thin layers in place of each
adapted one, and ranks.json; petl.methods.pela.load, or the lines in OUT/README.md, loads it.
--vllm writes the parallel heads of a drafter (petl draft RUN +drafter=hydra drafter.kind=parallel)
as vLLM's Medusa model, which drafts beside the merged model. Give RUN/drafter in place of RUN.
--gguf writes this LoRA of a decoder as OUT/adapter.gguf, for llama.cpp's --lora.
--onnx merges the adapter of a classifier, or of an embedding model (task_type=FEATURE_EXTRACTION),
and writes OUT/model.onnx in float32 with config and tokenizer."""

REPORT = """\
Write report.html into the folder of a run: scores, predictions, charts of the training log, what
the method did by layer, time by activity, configuration, environment, and the code that loads the
adapter. A finished run has this file already; use the command for a run that was stopped, or after
an update of petl."""

COMPARE = """\
Compare finished runs: test score with its standard deviation over seeds, trainable parameters, file
size, seconds per step, peak memory, and the difference to a baseline. Runs that differ only in the
seed form one row; each data set has a table of its own. With --out, also write an HTML page with
charts, and the tables in markdown. A run that is damaged, and a path without a finished run, is
named and left out, and the exit status is then 1.

  petl compare runs --out page
  petl compare runs/a runs/b --answers    # which examples only one of them gets right

To train and compare several methods with one command, see `petl study --help`."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The parsed command line; settings may stand on both sides of an option."""
    commands = parser()
    if not argv:  # argparse would say that COMMAND is missing
        commands.exit(2, commands.format_help())
    word = argv[0]
    if not word.startswith("-") and word not in commands.commands:  # it would list all of them
        commands.error(f"no command {word!r}{did_you_mean(word, commands.commands)}")
    arguments, others = commands.parse_known_args(argv)
    # a word with a dash is a misspelt option; others belong to `overrides`, where there are any
    if others and (not hasattr(arguments, "overrides") or any(w.startswith("-") for w in others)):
        commands.error(f"unrecognized arguments: {' '.join(others)}")
    if others:  # argparse takes the settings in front of the option only
        arguments.overrides += others
    return arguments


def train(words: Sequence[str]) -> int:
    """Train with these settings, and exit; or print the help of `petl train` and return 0."""
    from petl.system.settings.command_line import read_words

    if read_words(words):
        from petl.cli.help import text

        sys.stdout.write(text())
        return 0
    with rare_collections():
        # imports torch, for which the help does not wait
        from petl.cli.train import main

    return main(words)


def run(words: Sequence[str]) -> int:
    """Run the command in these words; return its exit status."""
    if words[:1] == ["train"]:  # argparse does not know Hydra's words
        return train(words[1:])
    arguments = parse(words)
    # imported after parsing, so that a misspelt word is reported at once
    from petl.cli import commands
    from petl.training import program as app

    arguments.argv = [*words]  # for a command that starts processes
    # each module lists its functions by the words of the command line
    modules = (commands, hub, studies, predictions, writing, deltas, squeeze, serve, drafts)
    functions = {name: call for module in modules for name, call in module.COMMANDS.items()}
    name = arguments.command
    with rare_collections():  # a command imports what it needs
        return app.run_command(functions[name], arguments, uses_models=name != "methods")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    try:
        status = run(sys.argv[1:] if argv is None else [*argv])
        sys.stdout.flush()  # inside the block, so that a broken pipe is noticed here
        return status
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130  # 128 + SIGINT, as of a shell
    except BrokenPipeError:  # the reader of the pipe has ended, as `head` does
        # or the interpreter would report the error again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE
