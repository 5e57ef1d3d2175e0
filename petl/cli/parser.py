"""The parser of the `petl` command, made of the commands of `petl.cli.table`.

No torch and no Hydra is imported here, so that help and wrong words are answered at once.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from petl.cli.options import Command, Options, add_options
from petl.cli.table import COMMANDS
from petl.errors import did_you_mean, printable
from petl.version import __version__

# the commands of `petl --help`: those that everybody needs, and others by purpose
PURPOSES = {
    "from data to answers": (
        *("data", "plan", "train", "compare", "predict", "chat", "serve", "merge"),
    ),
    "methods and settings": (
        *("methods", "show", "configs", "batch-sizes", "buckets", "train-predictors"),
    ),
    "what a run reached": ("report", "eval", "study", "advise", "strength"),
    "answers": ("generate", "draft", "retrieve", "mine"),
    "files for others": ("check", "export", "push", "pull"),
    "smaller adapters, and several in one": ("compress", "prune", "squeeze", "narrow", "combine"),
}
EPILOG = """\
Train with `petl train +method=NAME`; `petl plan +method=NAME` estimates its cost beforehand. Your
own configurations, such as configs/method/mine.yaml, are found in ./configs and in --config-dir.
RUN is the folder of a run (runs/lora-minilm-wordnet-...) or of an adapter alone; the base model of
an adapter alone is the one that its adapter_config.json names.
"""


class Parser(argparse.ArgumentParser):
    """Shows a word that it refuses with control characters escaped: `runs/*` may contain any."""

    def error(self, message: str) -> NoReturn:
        """End with a message, and the usage unless a value is wrong."""
        shown = printable(message)
        if isinstance(sys.exception(), argparse.ArgumentError) and message.startswith("argument "):
            self.exit(2, f"{self.prog}: error: {shown}\n")
        super().error(shown)


def listed() -> str:
    """Return the commands by purpose, each with its first sentence."""
    known = {name for names in PURPOSES.values() for name in names}
    rest = tuple(name for name in COMMANDS if name not in known)
    width = max(map(len, COMMANDS))
    parts = []
    for purpose, names in {**PURPOSES, "others": rest}.items():
        lines = [
            f"  {name:<{width}}  {COMMANDS[name].text.split(chr(10))[0].rstrip('.')}"
            for name in names
            if name in COMMANDS
        ]
        parts += [f"{purpose}:", *lines, ""] if lines else []
    return "\n".join(parts).rstrip()


def parser() -> Parser:
    """Return the parser of the `petl` command."""
    command_line = Parser(
        prog="petl",
        usage="petl [-h] [--version] COMMAND ...",
        description="Parameter-efficient fine-tuning: adapts any Hugging Face model by training "
        f"a small\nfraction of its parameters.\n\n{listed()}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a new option would change the meaning of abbreviations
    )
    command_line.add_argument("--version", action="version", version=f"petl {__version__}")
    commands = command_line.add_subparsers(
        dest="command", required=True, prog="petl", metavar="COMMAND", help=argparse.SUPPRESS
    )
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
