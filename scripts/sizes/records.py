"""Results of the study as files: one adapter each, its bytes and its scores."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

import petl
from petl.errors import InputError
from petl.experiments.sweeps.study import slug
from petl.system.files.disk import as_json, write_atomic
from petl.training.runs.environment import git_revision, package_versions, processor_name

FOLDER = "records"


@dataclass(frozen=True)
class Record:
    """One adapter.

    Attributes:
        group: of rows: trained, compress, prune or combine.
        settings: what tells the row from the others of its group.
        seed: of the training, and of the masks.
        bytes: of the file of weights.
        packed: bytes of that file compressed by gzip.
        scores: test accuracy by task.
        rows: number of test rows by task.
        facts: what else was measured.
        environment: versions and machine.
    """

    group: str
    settings: Mapping[str, Any]
    seed: int
    bytes: int
    packed: int
    scores: Mapping[str, float]
    rows: Mapping[str, int]
    facts: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[Any, ...]:
        """What records of several seeds have in common."""
        return self.group, *self.settings.items()

    def write(self, folder: Path) -> None:
        """Write the record to the folder of a study."""
        file = path(folder, self.group, self.settings, self.seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, as_json(asdict(self), in_order=True))


def path(folder: Path, group: str, settings: Mapping[str, Any], seed: int) -> Path:
    """Return the file of a record in the folder of a study."""
    words = [f"{key}-{value}" for key, value in settings.items()]
    return folder / FOLDER / f"{slug('-'.join([group, *words]))}-seed-{seed}.json"


def read_all(folder: Path) -> list[Record]:
    """Return all records of a study, by file name.

    Raises:
        InputError: there is none, or one cannot be read.
    """
    files = sorted((folder / FOLDER).glob("*.json"))
    if not files:
        raise InputError(f"{folder} contains no records; run the study first, without --report")
    return [_read(file) for file in files]


def _read(file: Path) -> Record:
    try:
        return Record(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{file} cannot be read as a record of this study: {error}") from error


def by_key(records: Iterable[Record]) -> dict[tuple[Any, ...], list[Record]]:
    """Return records that differ only in the seed together, in the order of the seeds."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in sorted(records, key=lambda record: record.seed):
        found.setdefault(record.key, []).append(record)
    return found


def environment() -> dict[str, Any]:
    """Return versions and machine."""
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "git": git_revision(Path(petl.__file__).parent),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "packages": package_versions(),
    }
