"""The report of one run."""

import json
import re

import pytest
from comparable import write_run
from training_fixtures import train

from petl.cli import main
from petl.errors import InputError
from petl.experiments.reports.run_report import REPORT, write_page

pytest_plugins = ["training_fixtures"]

SCORES = {
    "trainable_parameters": 3000,
    "tokens": 12345,
    "unit": "tokens",
    "padding": 0.25,
    "best_step": None,
    "lr": 0.002,
    "head_lr": None,
    "task": "classification",
    "time_split": {"forward": 3.0, "backward": 1.0},
}
LOG = [
    {"step": 10, "epoch": 0.1, "loss": 2.5, "grad_norm": 1.0, "lr": 0.002, "expert_load_max": 1.5},
    {"step": 10, "validation": {"accuracy": 0.25, "loss": 2.4, "rows": 40}},
    {"step": 20, "epoch": 0.2, "loss": 2.1, "grad_norm": 0.9, "lr": 0.001, "expert_load_max": 1.4},
]


@pytest.fixture
def folder(tmp_path):
    run = write_run(tmp_path / "run", 0.592, "+method=mola", **SCORES)
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in LOG))
    environment = json.loads((run / "environment.json").read_text())
    more = {"platform": "Linux", "python": "3.11", "processes": 2, "command": "python <train>.py"}
    (run / "environment.json").write_text(json.dumps(environment | more))
    (run / "adapter").mkdir()
    readme = "# it\n```python\nimport petl\nmodel = petl.load(base, 'here')\n```\n"
    (run / "adapter" / "README.md").write_text(readme)
    return run


def titles(page):
    return re.findall(r"<svg[^>]*>\s*<title>(.*?)</title>", page)


def test_each_metric_of_the_log_has_a_chart(folder):
    drawn = titles(write_page(folder).read_text())
    assert drawn == [
        "Loss: training, validation",
        "Validation accuracy: accuracy",
        "Busiest expert: expert_load_max",
        "Gradient norm: grad_norm",
        "Learning rate: lr",
        "Time by activity: forward, backward",
    ]


@pytest.mark.parametrize(
    ("words", "line", "title"),
    [
        (["+method=pst"], "pruned_share", "Changes of the mask"),
        (["+method=binary", "method.inner=mola"], "expert_load_max", "Busiest expert"),
        (["+method=lora", "+loss=density"], "density_loss", "Density loss"),
        (["+method=lora", "data.order=by_class"], "stage_accuracy", "Accuracy after each stage"),
        (["+method=lora"], "total_rank", "Total rank"),  # as its name reads
        (["+method=lora"], "retained_drift", None),  # another part of the page has it
    ],
)
def test_what_a_part_of_a_run_logs_is_drawn_as_it_says(tmp_path, words, line, title):
    run = write_run(tmp_path / "run", 0.592, *words, **SCORES)
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.5, line: 0.5}))
    drawn = titles(write_page(run).read_text())
    assert ([] if title is None else [f"{title}: {line}"]) == [t for t in drawn if line in t]


@pytest.mark.parametrize(
    ("task", "unit"),
    [("causal_lm", "nats per token"), ("multi_label", "nats per class"), ("regression", None)],
)
def test_the_axis_of_the_loss_has_the_unit_of_the_task(tmp_path, task, unit):
    run = write_run(tmp_path / "run", 0.592, "+method=lora", **SCORES | {"task": task})
    (run / "metrics.jsonl").write_text(json.dumps(LOG[0]))
    page = write_page(run).read_text()
    assert re.findall(r"training loss \((.*?)\)", page) == ([] if unit is None else [unit])


def test_the_page_needs_no_other_file(folder):
    (folder / "ranks.png").write_bytes(b"\x89PNG picture")
    page = write_page(folder).read_text()
    assert '<img alt="Ranks" src="data:image/png;base64,iVBORyBwaWN0dXJl">' in page
    assert not re.findall(r'src="(?!data:)|href="\w+:|@import|url\((?!#)', page)
    assert page.count("<script") == 1  # petl's own, without attributes
    assert "<script>\n" in page


@pytest.mark.thorough
def test_the_page_shows_what_the_method_did_once(folder):
    heat_map = {
        "name": "expert_load",
        "title": "Load <b>",
        "unit": "%",
        "rows": ["<script>alert(1)</script>"],
        "columns": ["0", "1"],
        "cells": [[25.0, None]],
    }
    (folder / "heat_maps.json").write_text(json.dumps([heat_map]))
    (folder / "expert_load.png").write_bytes(b"\x89PNG of the same")
    page = write_page(folder).read_text()
    assert "What the method did" in page
    assert "<strong>Load &lt;b&gt;</strong>" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; · 0: 25 %" in page
    assert "data:image/png" not in page
    heat_map["cells"] = [[25.0]]
    (folder / "heat_maps.json").write_text(json.dumps([heat_map]))
    with pytest.raises(InputError, match=r"heat_maps\.json.*\[0\]\.cells"):
        write_page(folder)
    (folder / "heat_maps.json").write_text(json.dumps([{**heat_map, "cells": [["<b>"]]}]))
    with pytest.raises(InputError):
        write_page(folder)


def test_an_unfinished_run_has_a_page(folder, capsys):
    for name in ("scores.json", "environment.json", "adapter/README.md"):
        (folder / name).unlink()
    with (folder / "metrics.jsonl").open("a") as log:
        log.write('{"step": 30, "lo')  # killed while it wrote
    assert main.main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / REPORT}\n"
    page = (folder / REPORT).read_text()
    assert "The run is not finished; its log ends at step 20." in page
    assert "Loss: training, validation" in titles(page)


def test_the_page_of_a_training_run_accounts_for_its_time(tiny, tmp_path):
    words = ["+method=mola", "train.log_steps=2", "train.save_steps=2", "train.eval_steps=4"]
    run = train([*tiny.classify, *words], tmp_path / "run")
    split = run.scores["time_split"]
    parts = {"data", "forward", "backward", "optimizer", "logging", "evaluation", "checkpoints"}
    assert parts <= set(split)
    assert all(seconds > 0 for name, seconds in split.items() if name in parts)
    in_steps = sum(split[name] for name in ("data", "forward", "backward", "optimizer"))
    assert in_steps < run.scores["seconds"]
    page = (run.path / REPORT).read_text()
    loading = re.search(
        r"```python\n(.*?)```", (run.path / "adapter" / "README.md").read_text(), re.S
    )
    assert loading[1].splitlines()[-2] in page.replace("&#39;", "'")
    assert len(titles(page)) == 10
