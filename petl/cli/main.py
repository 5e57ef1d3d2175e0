"""The `petl` command: reads the command line and runs a command of `petl.cli.table`.

No torch and no Hydra is imported here, so that help and wrong words are answered at once; the
function of a command is imported once its words were parsed.
"""

import sys
from collections.abc import Sequence

from petl.system.imports.collector import rare_collections
from petl.system.output import until_closed


def train(words: Sequence[str]) -> int:
    """Train with these settings, and exit; or print the help of `petl train` and return 0."""
    from petl.system.settings.command_line import read_words

    if read_words(words):
        from petl.cli.help import text

        sys.stdout.write(text())
        return 0
    from petl.cli.start import main  # Hydra, for which the help does not wait

    return main(words)


def run(words: Sequence[str]) -> int:
    """Run the command in these words; return its exit status."""
    if words[:1] == ["train"]:  # argparse does not know Hydra's words
        return train(words[1:])
    from petl.cli.parser import parse

    command, options = parse(words)
    # imported after parsing, so that a misspelt word is reported at once
    from petl.training.program import run_command

    with rare_collections():  # a command imports what it needs
        return run_command(command.run, options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    try:
        return until_closed(lambda: run(sys.argv[1:] if argv is None else [*argv]))
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130  # 128 + SIGINT, as of a shell
