"""Studies types and methods in processes with a time limit, and keeps the results in one file."""

import json
import os
import signal
import time
from collections.abc import Iterable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers

from architectures.small import Type, loss_of
from architectures.study import Outcome, quiet, study
from petl.errors import first_line

RESULTS = Path(__file__).with_name("results.json")
LIMIT = 300  # seconds of a method on a type
LARGEST = 40_000_000  # parameters of a model that counts as small
# by kind/type: "class", "transformers" (its version), "reason", and "methods" by name
Results = dict[str, dict[str, Any]]


def read_results(file: Path = RESULTS) -> Results:
    """Return what was found so far."""
    return json.loads(file.read_text()) if file.is_file() else {}


def write_results(results: Results, file: Path = RESULTS) -> None:
    """Write results, one line a type."""
    lines = [
        f"{json.dumps(k)}: {json.dumps(v, sort_keys=True)}" for k, v in sorted(results.items())
    ]
    new = file.with_suffix(".new")
    new.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    new.replace(file)


def sweep(
    types: Iterable[Type], methods: list[str], *, again: str = "", file: Path = RESULTS
) -> None:
    """Study what is not known yet, and write it after each type.

    Args:
        again: "all", or "broken": study these once more.
    """
    for each in types:
        row = read_results(file).get(str(each), {})
        found = {} if again == "all" else row.get("methods", {})
        missing = [
            name
            for name in methods
            if name not in found or (again and found[name]["verdict"] == "broken")
        ]
        if not missing or (row.get("reason") and not again):
            continue
        start = time.monotonic()
        new = dict(_in_process(each, missing))
        results = read_results(file)  # another process may have written meanwhile
        row = results.setdefault(str(each), {"class": each.class_name})
        row.pop("reason", None)
        if "reason" in new:
            row["reason"] = new.pop("reason")
        row["methods"] = row.get("methods", {}) | new
        row["transformers"] = transformers.__version__
        write_results(results, file)
        print(f"{each}: {summary(row)}, {time.monotonic() - start:.1f} s", flush=True)


def summary(row: dict[str, Any]) -> str:
    """Return the verdicts of a type, in words."""
    if row.get("reason"):
        return f"not built: {row['reason']}"
    verdicts = [found["verdict"] for found in row["methods"].values()]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
    broken = {n: f["detail"] for n, f in row["methods"].items() if f["verdict"] == "broken"}
    return counts + (f" {broken}" if broken else "")


def _in_process(each: Type, methods: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield a result for each method; a process that takes too long is killed and started anew."""
    missing = list(methods)
    while missing:
        receiver, sender = get_context("fork").Pipe(duplex=False)
        process = get_context("fork").Process(target=_work, args=(each, missing, sender))
        process.start()
        sender.close()
        for name in list(missing):
            try:
                found = receiver.recv() if receiver.poll(LIMIT) else _unfinished("takes too long")
            except EOFError:
                found = _unfinished("the process died")
            if isinstance(found, str):
                process.join()
                yield "reason", found
                return
            missing.remove(name)
            yield name, found
            if found.get("detail", "").startswith("UNFINISHED"):
                os.kill(process.pid or 0, signal.SIGKILL)
                break
        process.join()


def _unfinished(why: str) -> dict[str, Any]:
    return Outcome("broken", f"UNFINISHED: {why} (limit: {LIMIT} s)").as_json()


def _work(each: Type, methods: list[str], sender: Connection) -> None:
    torch.set_num_threads(1)
    reason = why_not(each)
    if reason:
        sender.send(reason)
        return
    for name in methods:
        sender.send(study(each, name).as_json())
    sender.close()


def why_not(each: Type) -> str:
    """Return why the base model of a type cannot be studied; "" if it can."""
    try:
        with quiet():
            model = each.build()
            size = sum(p.numel() for p in model.parameters())
            if size > LARGEST:
                return f"its small model has {size:,} parameters"
            loss_of(model.train(), each.inputs(model)).backward()
    except Exception as error:  # of any model's code: the table says it
        return f"{type(error).__name__}: {first_line(error)}"
    return ""
