"""Several sets of one task: rows of each by size, temperature or share; scores of each."""

import json

import numpy as np
import pytest
from training_fixtures import train

from petl.data.base import read_data
from petl.data.set_mixture import SetMixture
from petl.data.task_mixture import TaskMixture
from petl.data.tasks import SET
from petl.errors import InputError

pytest_plugins = ["task_fixtures", "training_fixtures"]


@pytest.fixture
def sets(tmp_path):
    """Two sets of 30 and 10 rows, and their settings."""
    for name, count in (("long", 30), ("short", 10)):
        rows = [{"text": f"{name} {i}", "label": str(i % 2)} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        name: {"data": "files", "train": f"{tmp_path}/{name}.jsonl", "test_share": 0.2}
        for name in ("long", "short")
    }


def read(sets, **more):
    return read_data(
        {"name": "mixture", "source": "mixture", "task": "classification", "sets": sets, **more}
    )


def test_rows_know_their_set(sets):
    raw = read(sets)
    assert raw.sets == ("long", "short")
    assert (len(raw.train), len(raw.test)) == (24 + 8, 6 + 2)
    for rows in (raw.train, raw.test):
        assert [text.split()[0] for text in rows["text"]] == [raw.sets[i] for i in rows[SET]]
        assert rows["number"] == list(range(len(rows)))


def test_an_epoch_has_the_shares():
    ids = np.repeat([0, 1, 2], [60, 40, 0])
    mixture = TaskMixture.of_shares(ids, [1, 3, 5])
    assert mixture.counts == (25, 75, 0)
    visited = mixture.order(seed=1, epoch=0)
    assert np.bincount(ids[visited], minlength=3).tolist() == [25, 75, 0]
    first = [row for row in visited if row < 60]
    later = [row for row in mixture.order(seed=1, epoch=1) if row < 60]
    assert len({*first, *later}) == 50, "no row is repeated before all were visited"


def test_sets_with_other_classes_or_columns_are_refused(sets, tmp_path):
    rows = [{"text": f"x {i}", "label": str(i % 3)} for i in range(12)]
    (tmp_path / "three.jsonl").write_text("\n".join(map(json.dumps, rows)))
    other = {**sets["long"], "train": f"{tmp_path}/three.jsonl"}
    labels = ["0", "1", "2"]
    raw = read({"long": {**sets["long"], "labels": labels}, "other": {**other, "labels": labels}})
    assert raw.task.classes == labels
    pair = {**sets["short"], "text_pair": "text"}
    for name, given in (("other", other), ("pair", pair), ("hamlet", "hamlet")):
        with pytest.raises(InputError, match=name):
            read({"long": sets["long"], name: given})


def test_settings_of_the_files_have_the_task_of_the_mixture(sets):
    settings = SetMixture.completed({"task": "regression", "sets": sets, "source": "mixture"})
    assert [own["task"] for own in settings["sets"].values()] == ["regression"] * 2


@pytest.mark.cells(1)
@pytest.mark.parametrize("task", ["causal_lm", "question_answering"])
def test_a_run_scores_each_set(families, tmp_path, task):
    words = families(task, "+method=lora", "train.steps=4", "train.eval_steps=2")
    files = dict(word.split("=", 1) for word in words if word.startswith("data."))
    kept = [w for w in words if not w.startswith("data") and "warmup" not in w]
    own = {k.removeprefix("data."): v for k, v in files.items() if k not in ("data.task",)}
    given = ",".join(f"{k}:{v}" for k, v in own.items())
    sets = f"data.sets={{one:{{data:files,{given}}},two:{{data:files,{given},train_rows:20}}}}"
    shares = ["data.sampling=shares", "data.shares={one:0.5,two:0.5}"]
    run = train(
        [*kept, "data=mixture", f"data.task={task}", sets, *shares, "train.warmup=0"],
        tmp_path / "run",
    )
    after = run.scores["after"]
    assert after["one_loss"] == pytest.approx(after["two_loss"], rel=1e-4), "the same test rows"
    assert after["loss"] == pytest.approx(after["one_loss"], rel=1e-4)
    assert {"one_loss", "two_loss"} <= run.metrics[-1].get("validation", after).keys()
    saved = json.loads((run.path / "adapter/task.json").read_text())
    assert "tasks" not in saved, "new rows need no set"


@pytest.mark.thorough
@pytest.mark.parametrize(("task", "loss"), [("classification", "loss"), ("regression", "mse")])
def test_the_frozen_model_and_its_probe_are_scored_on_each_set(tiny, sets, tmp_path, task, loss):
    sets["short"]["test_share"] = 0.5
    sets = {name: {**own, "max_length": 16} for name, own in sets.items()}
    words = [w for w in tiny.classify if not w.startswith("data") and "steps" not in w]
    given = ",".join(
        f"{name}:{{{','.join(f'{k}:{v}' for k, v in own.items())}}}" for name, own in sets.items()
    )
    words += ["data=mixture", f"data.task={task}", f"data.sets={{{given}}}", "+method=lora"]
    words += ["train.steps=2", "train.eval_batch_size=4"]
    beside = train([*words, "train.linear_probe=true"], tmp_path / "beside").scores
    alone = train([*words, "train.linear_probe=false"], tmp_path / "alone").scores
    assert beside["before"].keys() == alone["before"].keys()
    # not correlations, which are noise where an untrained head gives all rows one value
    losses = [name for name in alone["before"] if name.endswith(loss)]
    assert [beside["before"][n] for n in losses] == pytest.approx(
        [alone["before"][n] for n in losses], rel=1e-5
    )
    for scores in (beside["before"], beside["linear_probe"]):
        mean = (6 * scores[f"long_{loss}"] + 5 * scores[f"short_{loss}"]) / 11
        assert mean == pytest.approx(scores[loss], rel=1e-5)


def test_sets_of_preferences_have_the_objective_of_the_mixture(tmp_path):
    sets = {}
    for name in "ab":
        rows = [{"prompt": f"{name}{i}", "chosen": "yes", "rejected": "no"} for i in range(10)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        sets[name] = {"data": "files", "train": f"{tmp_path}/{name}.jsonl"}
    raw = read(sets, task="dpo", objective={"name": "dpo", "beta": 0.5})
    assert (raw.task.beta, len(raw.train), len(raw.test)) == (0.5, 18, 2)
