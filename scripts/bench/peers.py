"""Section `peers`: bottleneck and Compacter of the `adapters` package.

The package needs another version of transformers than petl, so it is measured in an environment of
its own, with the lower bound of that environment: compare ratios, not seconds.
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
    """Return a record for each adapter of the package.

    Args:
        python: the interpreter of an environment with `adapters`; "": no records.

    Raises:
        InputError: the interpreter cannot run them.
    """
    if not python:
        return []
    model, config = shape.model()
    request = {
        "model": model.__name__,
        "config": config.to_diff_dict(),
        "batch": {name: rows.tolist() for name, rows in shape.batch().items()},
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "rows": rows_of(shape),
    }
    answer = _answer(python, request)
    times = Times(answer["floor"], answer["candidate"])
    versions = ", ".join(f"{name} {number}" for name, number in answer["packages"].items())
    return [
        Record(
            "peers",
            f"{shape} ({versions})",
            row["name"],
            is_own=False,
            ratios={"time / floor": times.over_floor(row["name"])},
            counts={"parameters": answer["parameters"][row["name"]]},
        )
        for row in request["rows"]
    ]


def rows_of(shape: Shape) -> list[dict[str, Any]]:
    """Return the adapters by the names of their configs, in the places and of the width of ours."""
    sizes = {"reduction_factor": shape.hidden / WIDTH, "mh_adapter": True, "output_adapter": True}
    plain = {"original_ln_before": False, "original_ln_after": True, "non_linearity": "gelu"}
    return [
        {"name": "adapters: bottleneck 48", "kind": "SeqBnConfig", "fields": {**sizes, **plain}},
        {"name": "adapters: compacter 48", "kind": "CompacterConfig", "fields": sizes},
    ]


def _answer(python: str, request: dict[str, Any]) -> dict[str, Any]:
    own = {
        k: v for k, v in os.environ.items() if k != "PYTHONPATH"
    }  # the packages of this environment do not fit
    try:
        done = subprocess.run(
            [python, str(SCRIPT)],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            check=True,
            env=own,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        output = str(getattr(error, "stderr", "") or error).strip().splitlines()
        raise InputError(
            f"{python} cannot run the adapters package: {output[-1] if output else error}; give "
            "the python of an environment with `pip install adapters`"
        ) from error
    return json.loads(done.stdout.splitlines()[-1])
