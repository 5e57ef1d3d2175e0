"""The `petl` command: reads the command line and runs a command of `petl.cli.table`.

No torch and no Hydra is imported here, so that help and wrong words are answered at once; the
function of a command is imported once its words were parsed.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from petl.cli.options import Command, Options, add_options
from petl.cli.table import COMMANDS
from petl.errors import did_you_mean, printable
from petl.system.imports.collector import rare_collections
from petl.version import __version__

EPILOG = """\
Train with `petl train +method=NAME`; `petl plan +method=NAME` estimates its cost beforehand. Your
own configurations, such as configs/method/mine.yaml, are found in ./configs and in --config-dir.
RUN is the folder of a run (runs/lora-minilm-wordnet-...) or of an adapter alone; the base model of
an adapter alone is the one that its adapter_config.json names.
"""

WITHOUT_MODELS = (COMMANDS["methods"], COMMANDS["check"])  # these import no transformers


class Parser(argparse.ArgumentParser):
    """Shows a word that it refuses with control characters escaped: `runs/*` may contain any."""

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
    for name, command in COMMANDS.items():
        child = commands.add_parser(
            name,
            help=command.text.split("\n")[0].rstrip("."),
            description=command.text,
            usage=command.usage,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        add_options(child, command.options)
    return command_line


def parse(argv: Sequence[str]) -> tuple[Command, Options]:
    """Return the command and its options; settings may stand on both sides of an option."""
    commands = parser()
    if not argv:  # argparse would say that COMMAND is missing
        commands.exit(2, commands.format_help())
    word = argv[0]
    if not word.startswith("-") and word not in COMMANDS:  # it would list all of them
        commands.error(f"no command {word!r}{did_you_mean(word, COMMANDS)}")
    arguments, others = commands.parse_known_args(argv)
    # a word with a dash is a misspelt option; others belong to `overrides`, where there are any
    if others and (not hasattr(arguments, "overrides") or any(w.startswith("-") for w in others)):
        commands.error(f"unrecognized arguments: {' '.join(others)}")
    if others:  # argparse takes the settings in front of the option only
        arguments.overrides += others
    command = COMMANDS[arguments.command]
    del arguments.command
    return command, command.options(**vars(arguments), words=[*argv])


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
    command, options = parse(words)
    # imported after parsing, so that a misspelt word is reported at once
    from petl.training.program import run_command

    with rare_collections():  # a command imports what it needs
        return run_command(command.run, options, uses_models=command not in WITHOUT_MODELS)


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
