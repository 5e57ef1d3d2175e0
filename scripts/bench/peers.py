"""Section `peers`: bottleneck and Compacter of the `adapters` package, beside the floor.

The package needs another transformers than petl does, so it is measured in an environment of its
own, with the floor of that environment: compare the ratios, not seconds.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from bench.clocks import Times
from bench.records import Record
from bench.shapes import Shape
from petl.errors import InputError

SCRIPT = Path(__file__).with_name("peer.py")
WIDTH = 48  # of the bottleneck, as in contenders.py


def measure(shape: Shape, rounds: int, python: str) -> list[Record]:
    """A record for each adapter of the package.

    Args:
        python: the interpreter of an environment that has `adapters`; "": there is none.

    Raises:
        InputError: the interpreter cannot run them.
    """
    if not python:
        return []
    model, config = shape.model()
    asked = {
        "model": model.__name__,
        "config": config.to_diff_dict(),
        "batch": {name: rows.tolist() for name, rows in shape.batch().items()},
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "rows": rows_of(shape),
    }
    found = _answer(python, asked)
    times = Times(found["floor"], found["candidate"])
    versions = ", ".join(f"{name} {number}" for name, number in found["packages"].items())
    return [
        Record(
            "peers",
            f"{shape} ({versions})",
            row["name"],
            is_own=False,
            ratios={"time / floor": times.over_floor(row["name"])},
            counts={"parameters": found["parameters"][row["name"]]},
        )
        for row in asked["rows"]
    ]


def rows_of(shape: Shape) -> list[dict[str, Any]]:
    """The adapters by the names of their configs: where ours stand, and as wide."""
    sizes = {"reduction_factor": shape.hidden / WIDTH, "mh_adapter": True, "output_adapter": True}
    plain = {"original_ln_before": False, "original_ln_after": True, "non_linearity": "gelu"}
    return [
        {"name": "adapters: bottleneck 48", "kind": "SeqBnConfig", "fields": {**sizes, **plain}},
        {"name": "adapters: compacter 48", "kind": "CompacterConfig", "fields": sizes},
    ]


def _answer(python: str, asked: dict[str, Any]) -> dict[str, Any]:
    own = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # its packages are not ours
    try:
        done = subprocess.run(
            [python, str(SCRIPT)],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            check=True,
            env=own,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        said = str(getattr(error, "stderr", "") or error).strip().splitlines()
        raise InputError(
            f"{python} cannot time the adapters package: {said[-1] if said else error}; give the "
            "python of an environment with `pip install adapters`"
        ) from error
    return json.loads(done.stdout.splitlines()[-1])
