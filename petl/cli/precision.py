"""What `train.precision=auto` is for a run on this machine, on standard output.

Started by `petl study`, which writes the words after `petl train` on standard input, as JSON.
"""

import json
import sys

from petl.system.settings.command_line import read_words
from petl.training import program as app
from petl.training.compose import compose
from petl.training.runs.run_config import read_config


def main() -> int:
    """Print the precision, or an error; return the exit status."""
    read_words(sys.argv[1:])
    app.log_to_stderr()
    words = json.load(sys.stdin)
    return app.reported(lambda: sys.stdout.write(f"{read_config(compose(words)).precision}\n"))


if __name__ == "__main__":
    sys.exit(main())
