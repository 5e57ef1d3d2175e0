"""Train one adapter and save it: python train.py +method=mola model=minilm data=wordnet

The same as `petl train`, from a checkout; the run itself is petl/cli/train.py.
"""

import sys

from petl.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
