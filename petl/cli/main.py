"""The `petl` command: its arguments. It stands outside the package so that `--help` is instant.

Most commands import torch and PEFT, which takes seconds; petl/cli.py, and with it what a command
needs, is imported once it is known which one is wanted.
"""

import argparse
import os
import sys
from collections.abc import Sequence

EPILOG = """\
Training is `python train.py +method=NAME`; `petl plan +method=NAME` shows beforehand what it takes.
RUN is the folder of a run (runs/lora-minilm-wordnet-...), or that of an adapter on its own, whose
base model is then the one that its adapter_config.json names.
"""


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog="petl",
        description="Parameter-efficient fine-tuning: look at methods, plan, score and ship runs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, summary: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    _add_config_dir(add("methods", "list the methods, extra losses and recipes", METHODS))
    show = add("show", "explain a method, loss or recipe, and its fields", SHOW)
    show.add_argument("name", metavar="NAME", help="one that `petl methods` lists")
    show.add_argument("field", metavar="FIELD", nargs="?", help="one field of it, in full")
    plan = add("plan", "what a run would train, save and need; trains nothing", PLAN)
    plan.add_argument(
        "overrides",
        metavar="SETTING",
        nargs="*",
        help="as after train.py: +method=mola train.lr=1e-3",
    )
    data = add("data", "what a run would learn from: rows, lengths, labels", DATA)
    data.add_argument(
        "overrides",
        metavar="SETTING",
        nargs="*",
        help="as after train.py: data=hamlet model=smollm2",
    )
    data.add_argument(
        "--examples", type=int, default=3, metavar="N", help="train rows to show (default: 3)"
    )
    for command in (show, plan, data):
        _add_config_dir(command)
    _add_run(add("eval", "score a run's adapter on its test rows", EVAL))
    merge = add("merge", "merge an adapter into its base model", MERGE)
    _add_run(merge)
    _add_out(merge)
    merge.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the merged model (default: that of the base; bfloat16 rounds the sum)",
    )
    export = add("export", "write an adapter in another form", EXPORT)
    _add_run(export)
    _add_out(export)
    export.add_argument("--lora", action="store_true", required=True, help="as a plain LoRA")
    report = add("report", "write a run's page, report.html, anew", REPORT)
    report.add_argument("run", metavar="RUN", help="folder of a run, finished or not")
    compare = add("compare", "runs side by side: scores, sizes, times", COMPARE)
    compare.add_argument(
        "runs", metavar="RUN", nargs="+", help="folder of a run, or one that holds such"
    )
    compare.add_argument("--out", metavar="FOLDER", help="write index.html and results.md there")
    compare.add_argument(
        "--baseline", metavar="NAME", default="lora", help="what the others are measured against"
    )
    return whole


def _add_config_dir(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config-dir",
        metavar="DIR",
        help="a folder with configurations of yours, such as method/mine.yaml, as for train.py",
    )


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", metavar="RUN", help="folder of a run, or of an adapter")
    command.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let a base model that the run trained with model.trust_remote_code=true run its code",
    )


def _add_out(command: argparse.ArgumentParser) -> None:
    command.add_argument("out", metavar="OUT", help="folder to write; must not exist, or be empty")
    command.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="share of the outputs' norm that may differ (default: 1e-4 for a float32 base, "
        "5e-2 for bfloat16)",
    )


METHODS = """\
List the methods: what `+method=NAME` and `petl.wrap(model, NAME)` take, the paper, how many
parameters each trains on one reference model, whether its adapter merges into the base model,
whether `petl export --lora` makes a plain LoRA of it, and whether petl or PEFT implements it.
Then the extra losses, which `+loss=NAME` adds to the training of any method, and the recipes,
which `+method=NAME` takes as well: a method and a loss with a paper's settings."""

SHOW = """\
Show a method, an extra loss or a recipe: its paper, what it can do, how it is used, and each
field with type, default and meaning. The default is that of petl.wrap; where the YAML, and so
train.py, sets another value, it stands beside it. With FIELD, the meaning of that field is shown
in full.

  petl show mola
  petl show density
  petl show deft loss.eps"""

PLAN = """\
Show what `python train.py SETTING ...` would do, without training and without loading weights:
modules matched by each pattern, parameters trained and saved, size of the adapter file, memory of
a step, length of the run, what can be done with the adapter. Takes the settings of train.py.

  petl plan +method=mola
  petl plan +method=lora model=smollm2 data=hamlet train.batch_size=4 train.precision=bf16"""

DATA = """\
Show the rows that `python train.py SETTING ...` would learn from, as the model gets them: decoded,
with the tokens that bear loss in colour (in brackets where the output is no terminal), how many
rows are dropped or cut and how long they are, and how often each label occurs. Needs the model's
tokenizer or processor, not its weights.

  petl data
  petl data model=smollm2 data=reasoning --examples 1
  petl data model=path model.path=FOLDER data=files data.train=rows.jsonl data.task=seq2seq"""

EVAL = """\
Load a run's base model, data and adapter anew, refuse an adapter file with missing or unexpected
tensors, and print its scores on the test rows beside those that the run ended with."""

MERGE = """\
Add an adapter to the weights of its base model and write that as a plain model with config and
tokenizer, which AutoModel...from_pretrained(OUT) reads without petl or PEFT. Outputs on test rows
of the run are compared before and after; nothing is written if they differ by more than the
tolerance. Methods whose update depends on the input cannot merge and say so."""

EXPORT = """\
Write an adapter as a plain LoRA, which PEFT and serving engines read without petl, trained heads
included. Exact where the method's update is a low-rank product, by an SVD of full precision where
it is another update of the weight. Outputs on test rows of the run are compared before anything
is written."""

REPORT = """\
Write report.html into the folder of a run: scores, curves of the log, where the time went,
pictures, configuration, environment, and the lines that load the adapter. A run that finishes has
done so; this is for one that was stopped, or that another version of petl made."""

COMPARE = """\
Show finished runs side by side: test score with its spread over seeds, trained parameters, bytes,
seconds of a step, peak memory, and each seed's difference to a baseline. Each data set has a table
of its own; runs that differ in nothing but the seed are one row of it. With --out, the same as one
HTML page with pictures, and in markdown.
scripts/compare.py makes the runs as well: methods at a matched budget, rates tuned, seeds."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The parsed command line; settings may stand on both sides of an option."""
    commands = parser()
    arguments, others = commands.parse_known_args(argv)
    if others and (not hasattr(arguments, "overrides") or any(w[0] == "-" for w in others)):
        commands.error(f"unrecognized arguments: {' '.join(others)}")
    if others:  # argparse takes the settings in front of the option only
        arguments.overrides += others
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    arguments = parse(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see train.py
    try:
        from petl.cli.commands import run

        status = run(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
