"""Find and read the finished runs below some folders; those that cannot be read are left out."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from petl.data.tasks.base import not_finite
from petl.errors import InputError
from petl.experiments.reports.entries import RunResult, validation_of
from petl.system.files.disk import check_links
from petl.training.runs.records import (
    CONFIG,
    SCORES,
    is_finished,
    read_environment,
    read_results,
    read_stored,
)
from petl.training.runs.resume import identity


class RunList(NamedTuple):
    """The finished runs below some folders, and what was left out.

    Attributes:
        runs: sorted by path.
        left_out: for each damaged run, and each path without a run, what is wrong with it.
    """

    runs: list[RunResult]
    left_out: list[str]


def find_runs(paths: Iterable[Path]) -> RunList:
    """Read the finished runs in and below these folders; unfinished ones are not looked at.

    Raises:
        InputError: there is none.
    """
    runs: dict[Path, RunResult] = {}
    left_out: dict[Path, str] = {}  # dicts, since paths may contain each other
    for path in paths:
        # a run in progress has scores.json too, hence `is_finished`
        folders = {file.parent for file in Path(path).rglob(SCORES)}
        # `petl eval` writes one beside the files of its run
        folders = {f for f in folders if (f / CONFIG).exists() or not (f.parent / CONFIG).exists()}
        for folder in sorted(folders):
            try:
                if is_finished(folder):
                    runs[folder] = read_run(folder)
            except InputError as error:
                left_out[folder] = str(error)
        # only unfinished runs, or none
        if not folders & {*runs, *left_out}:
            left_out[path] = _missing(path)
    if not runs:
        # the first reason in full; a long list would hide it
        first, *others = left_out.values() or ["no folder is given"]
        more = f", and {len(others)} more" if others else ""
        raise InputError(f"no finished run to compare: {first}{more}")
    return RunList([runs[path] for path in sorted(runs)], list(left_out.values()))


def _missing(path: Path) -> str:
    """Return why there is no run in or below a path."""
    if path.is_dir():
        return f"no finished run in {path}"
    return f"{path} {'is not a directory' if path.exists() else 'does not exist'}"


def read_run(path: Path) -> RunResult:
    """Read the folder of a finished run.

    Raises:
        InputError: one of its files is damaged; or a link in it leads out of it.
    """
    check_links(path)  # a comparison shows what these files contain
    scores = read_results(path)
    for evaluation in (scores["after"] or {}, validation_of(scores)):
        name = not_finite(evaluation)
        if name:
            raise InputError(f"{path / SCORES} has {name} {evaluation[name]}, which is no score")
    settings = read_stored(path / CONFIG)
    environment = read_environment(path)
    return RunResult(path, identity(settings), scores, environment, settings.get("recipe"))
