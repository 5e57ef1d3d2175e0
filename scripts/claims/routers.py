"""How far the routers of a MoLA run agree: which expert each token has, layer by layer.

The agreement of two routers is the normalized mutual information of the experts that they choose
first, 2 I(a, b) / (H(a) + H(b)) (Strehl and Ghosh 2002, Cluster Ensembles): 0 if one says nothing
of the other, 1 if each determines the other, whatever the numbers of the experts are.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import nn

from claims.score import first_batches
from petl.adapters.export.saved_adapter import as_inputs, find
from petl.data.models.sources import DTYPES
from petl.methods.mola import MolaAdapter
from petl.system.files.disk import write_json
from petl.system.files.read import read_json

ROWS = 1000  # the first test rows
FILE = "router_agreement.json"
BLOCK = re.compile(r"\.(\d+)\.")

Choices = dict[str, np.ndarray]  # by path of the module: the expert of each token [T]


def agreement(run: Path) -> np.ndarray:
    """Return the agreement of routers of neighboring layers in a finished run, as [1].

    The mean over the pairs of modules of one name in neighboring blocks. It is computed once and
    kept in the folder of the run.
    """
    file = run / FILE
    if not file.exists():
        write_json(file, {"layers": fmean(pairwise(choices(run)))})
    return np.array([read_json(file, dict[str, float])["layers"]])


def choices(run: Path) -> Choices:
    """Return the expert that each router chooses first for the tokens of the first test rows."""
    saved = find(run)
    task, batches = first_batches(saved, ROWS)
    dtype, model = DTYPES[saved.settings["model"]["dtype"]], saved.model()
    found: dict[str, list[torch.Tensor]] = defaultdict(list)
    with recorded(model, found), torch.no_grad():
        masks = []
        for batch in batches:
            model(**as_inputs(batch, task.label_columns, dtype))
            masks.append(batch["attention_mask"].flatten().bool())
    kept = torch.cat(masks)  # padding chooses nothing
    return {key: torch.cat(parts)[kept].cpu().numpy() for key, parts in found.items()}


@contextmanager
def recorded(model: nn.Module, found: Mapping[str, list[torch.Tensor]]) -> Iterator[None]:
    """Append the first expert of each token [B T] to `found`, by path of the module."""
    adapters = [module for module in model.modules() if isinstance(module, MolaAdapter)]

    def record(adapter: MolaAdapter) -> Any:
        def gates(x: torch.Tensor) -> Any:
            gate_TE, *others = MolaAdapter.gates(adapter, x)
            found[adapter.info.key].append(gate_TE.argmax(-1))
            return gate_TE, *others

        return gates

    for adapter in adapters:
        adapter.__dict__["gates"] = record(adapter)
    try:
        yield
    finally:
        for adapter in adapters:
            del adapter.__dict__["gates"]


def pairwise(of_module: Choices) -> list[float]:
    """Return the agreement of each two modules of one name in neighboring blocks."""
    by_place = {}
    for key, chosen in of_module.items():
        block = BLOCK.search(key)
        assert block is not None, "adapted modules are in blocks"
        by_place[BLOCK.sub(".", key, count=1), int(block[1])] = chosen
    return [
        mutual_information(chosen, by_place[name, block + 1])
        for (name, block), chosen in by_place.items()
        if (name, block + 1) in by_place
    ]


def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Return the normalized mutual information of two labelings [T]; 0 if both are constant."""
    joint = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(joint, (a, b), 1 / len(a))
    one, two = entropy(joint.sum(1)), entropy(joint.sum(0))
    return 2 * (one + two - entropy(joint)) / (one + two) if one + two else 0.0


def entropy(shares: np.ndarray) -> float:
    """Return the entropy of shares that sum to 1, in nats."""
    positive = shares[shares > 0]
    return float(-(positive * np.log(positive)).sum())
