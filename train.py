"""Train one adapter and save it: python train.py +method=mola model=minilm data=wordnet

The same as `petl train`, from a checkout; the run itself is petl/cli/train.py.
"""

import sys

from petl.system.imports.collector import rare_collections
from petl.system.settings.command_line import read_words

if __name__ == "__main__":
    words = sys.argv[1:]
    if read_words(words):
        from petl.cli.main import main as petl

        sys.exit(petl(["train", *words]))
    try:
        with rare_collections():
            # imports torch, for which the help does not wait
            from petl.cli.train import main
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)  # 128 + SIGINT, as of a shell

    main(words)
