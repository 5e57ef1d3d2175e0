"""Entries of a comparison: which of several runs counts, and the names that tell entries apart."""

from pathlib import Path

from petl.experiments.reports.entries import RunResult, group_by_settings, unique_names


def run(name: str, started: str = "2025-06-01T12:00:00+00:00", **settings) -> RunResult:
    given = {"method.name": "lora", "train.seed": 0, **settings}
    return RunResult(Path(name), given, {}, {"started": started})


def test_of_runs_with_one_seed_the_latest_counts_whatever_its_time_zone():
    noon = run("noon", "2025-06-01T14:00:00+02:00")
    later = run("later", "2025-06-01T13:00:00+00:00")
    unreadable = run("unreadable", "yesterday")
    ((entry,), (same,)) = map(group_by_settings, ([noon, later, unreadable], [later, noon]))
    assert [entry.runs[0].path.name, same.runs[0].path.name] == ["later", "later"]


def test_settings_that_differ_in_the_last_digits_are_told_apart():
    alike = [run("a", **{"train.lr": 0.0012345678}), run("b", **{"train.lr": 0.0012345679})]
    assert unique_names(alike) == ["lora train.lr=0.0012345678", "lora train.lr=0.0012345679"]
    assert unique_names([run("a", **{"method.alpha": 0.1}), run("b", **{"method.alpha": 0.2})]) == [
        "lora alpha=0.1",
        "lora alpha=0.2",
    ]
