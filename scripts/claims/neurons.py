"""How many neurons a finished run of a decoder needs: all but those that PPL-1 % leaves out.

PPL-1 % (Luo et al. 2025, arXiv:2411.02335) leaves out the neurons with the smallest contributions
to the outputs of their blocks, token by token, until the perplexity is 1 % higher.
"""

from pathlib import Path

import numpy as np

from claims.score import first_batches
from petl.adapters.export.saved_adapter import find
from petl.methods.losses.density import ActivationDensity, ActivationDensityConfig
from petl.system.files.disk import write_json
from petl.system.files.read import read_json

ROWS = 32  # the first test rows: the search takes some 20 passes
FILE = "neurons_at_ppl_1.json"


def needed(run: Path) -> np.ndarray:
    """Return the share of the neurons that a finished run needs, as [1].

    The mean over blocks and tokens. It is computed once and kept in the folder of the run.
    """
    file = run / FILE
    if not file.exists():
        write_json(file, {"share": share_of(run)})
    return np.array([read_json(file, dict[str, float])["share"]])


def share_of(run: Path) -> float:
    """Search the neurons that the first test rows need."""
    saved = find(run)
    _, batches = first_batches(saved, ROWS)
    term = ActivationDensity(saved.model(), ActivationDensityConfig())
    return term.ppl_sparsity(batches)["activation_ratio"]
