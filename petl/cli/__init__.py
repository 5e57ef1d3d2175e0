"""The `petl` command; train.py is a caller of `petl train`."""

import os

# Set before torch loads OpenMP: threads that spin while they wait slow each other down.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
