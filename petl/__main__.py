"""`python -m petl`: the same as the command `petl`."""

import sys

from petl.cli.main import main

if __name__ == "__main__":  # not in the processes of a DataLoader, which import this file as well
    sys.exit(main())
