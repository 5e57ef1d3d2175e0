"""Reads what W&B keeps offline: a log of blocks, each record a protobuf message."""

import json
from pathlib import Path
from typing import Any

FILE_HEADER, BLOCK, RECORD_HEADER = 7, 32_768, 7
FULL, FIRST, LAST = 1, 2, 4


def offline_files(run: Path) -> list[Path]:
    """The files of a petl run's folder, the oldest first."""
    return sorted((run / "wandb").glob("offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime)


def records(file: Path) -> list[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, found = file.read_bytes(), FILE_HEADER, [], []
    while at + RECORD_HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < RECORD_HEADER:  # padding: no header fits into the rest of a block
            at += left
            continue
        length = int.from_bytes(data[at + 4 : at + 6], "little")
        kind = data[at + 6]
        body = data[at + RECORD_HEADER : at + RECORD_HEADER + length]
        parts = [body] if kind in (FULL, FIRST) else [*parts, body]
        if kind in (FULL, LAST):
            found.append(Record.FromString(b"".join(parts)))
        at += RECORD_HEADER + length
    return found


def history(file: Path) -> dict[int, dict[str, Any]]:
    """What was logged, by step."""
    steps: dict[int, dict[str, Any]] = {}
    for record in records(file):
        if record.WhichOneof("record_type") == "history":
            step = steps.setdefault(record.history.step.num, {})
            step |= {name_of(item): json.loads(item.value_json) for item in record.history.item}
    return steps


def summary(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in records(file):
        if record.WhichOneof("record_type") == "summary":
            found |= {name_of(item): json.loads(item.value_json) for item in record.summary.update}
    return found


def name_of(item: Any) -> str:
    return item.key or "/".join(item.nested_key)
