"""The study of placements: its contenders, and the table and figure of finished runs."""

import json

import placements
import pytest
from placements import READ, RUN, Placement, Row, draw, rows_of, table

from petl.experiments.sweeps.study import Contender, Study, slug


def test_shares_of_the_blocks_that_are_equal_are_one_placement():
    words = [placement.words for placement in placements.placements(6)]
    upper = "lora method.layers_to_transform=top:"
    cached, run = "train.cache_frozen=true", "train.cache_frozen=false"
    assert words == [
        "lora",
        *(f"{upper}{count} {store}" for count in (3, 2, 1) for store in (cached, run)),
        "sherl",
    ]
    counts = [p.name for p in placements.placements(12) if p.kind == READ]
    assert counts == ["last 6 of 12 blocks", "last 4 of 12 blocks", "last 2 of 12 blocks",
                      "last block"]  # fmt: skip
    assert placements.blocks_of([]) == 6  # MiniLM


# what each finished run has, and the study does not use
OTHERS = {
    **dict.fromkeys(("validation", "validation_scores", "best_step", "head_lr")),
    **dict.fromkeys(("tokens", "adapter_bytes", "trainable_parameters", "peak_rss_bytes"), 1),
    **dict.fromkeys(("padding", "seconds"), 0.5),
    "higher_is_better": True,
    "steps": 3,
    "unit": "tokens",
    "task": "classification",
    "time_split": {},
}


@pytest.fixture
def study(tmp_path):
    """A study with finished runs of two placements, and one run that is not finished."""
    given = placements.placements(6)
    done = {
        given[0]: [(0.58, 90.0), (0.6, 94.0)],
        given[3]: [(0.57, 30.0), (0.55, 32.0)],
    }
    made = Study(tmp_path, [Contender(p.words) for p in given], [0, 1, 2], [1e-3])
    for placement, runs in done.items():
        for seed, (accuracy, seconds) in enumerate(runs):
            folder = tmp_path / "runs" / slug(Contender(placement.words).name) / f"seed-{seed}"
            folder.mkdir(parents=True)
            scores = {
                **OTHERS,
                "after": {"accuracy": accuracy},
                "metric": "accuracy",
                "lr": 1e-3,
                "adapter_parameters": 331_776,
                "cpu_seconds": seconds,
            }
            (folder / "scores.json").write_text(json.dumps(scores))
    running = tmp_path / "runs" / slug(Contender(given[0].words).name) / "seed-2"
    running.mkdir()
    (running / "scores.json").write_text(json.dumps({"before": None}))
    return made, given


def test_the_table_has_means_over_finished_seeds_and_times_relative_to_all_blocks(study):
    rows = rows_of(*study)
    assert [row.placement.name for row in rows] == ["all blocks", "last 2 of 6 blocks"]
    first, second = table(rows).rows
    assert first[2:4] == ["59.0 ± 1.4 %", "2"]
    assert second == ["last 2 of 6 blocks", READ, "56.0 ± 1.4 %", "2", "0.001", "331,776", "31.0",
                      "0.34"]  # fmt: skip


def test_each_placement_is_in_the_figure_which_is_the_same_each_time(tmp_path):
    def row(name, score, seconds, kind=RUN):
        placement = Placement(name, name, kind, name)
        return Row(placement, "accuracy", True, 1e-3, 10, [score], [seconds])

    rows = [
        row("best", 0.6, 90),
        row("slow", 0.55, 70),
        row("same", 0.55, 30),
        row("worse", 0.5, 40, READ),
        row("fast", 0.4, 10, READ),
    ]
    file = tmp_path / "figure.svg"
    draw(rows, file)
    text = file.read_text()
    assert all(f">{each.placement.name}<" in text for each in rows)
    draw(rows, file)
    assert file.read_text() == text


def test_a_page_is_refused_before_a_run_is_finished(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- placements -->\n<!-- end -->\n")
    words = ["placements.py", str(tmp_path / "study"), "--page", str(page)]
    monkeypatch.setattr("sys.argv", words)
    assert placements.main() == 2
    assert "no finished run" in capsys.readouterr().err
