"""Several data sets as tasks: their settings, the rows of all, and what is refused."""

import csv

import pytest
import yaml

from petl.data.base import read_data
from petl.training.compose import compose
from petl.training.runs.run_config import read_config

VERBS = "verbs:{data:wordnet,train_rows:30,test_rows:20}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with reviews.csv, and a configuration `reviews` of the user's."""
    monkeypatch.chdir(tmp_path)
    rows = [(f"text {i}", ["fresh", "rotten", "motion"][i % 3]) for i in range(30)]
    with (tmp_path / "reviews.csv").open("w", newline="") as opened:
        csv.writer(opened).writerows([("review", "verdict"), *rows])
    columns = {"text": "review", "label": "verdict", "test_share": 0.2, "max_length": 20}
    own = {"name": "reviews", "source": "files", "train": "reviews.csv", **columns}
    (tmp_path / "configs" / "data").mkdir(parents=True)
    (tmp_path / "configs" / "data" / "reviews.yaml").write_text(yaml.safe_dump(own))
    return tmp_path


def config_of(*words, method="lora"):
    return read_config(compose([f"+method={method}", "data=tasks", *words]))


def test_each_set_is_read_by_its_own_source(folder):
    config = config_of(f"data.sets={{{VERBS},reviews:reviews}}")
    data = config.data.read()
    task = data.task
    assert task.tasks == ["verbs", "reviews"]
    assert task.limits == [48, 20]
    assert task.max_length == 48
    assert task.classes[:2] == ["verbs/body", "verbs/change"]
    assert task.classes[15:] == ["reviews/fresh", "reviews/motion", "reviews/rotten"]
    assert (len(data.train), len(data.test)) == (30 + 24, 20 + 6)
    alone = {
        name: read_data(settings) for name, settings in config.resolved["data"]["sets"].items()
    }
    for split in ("train", "test"):
        rows, expected = getattr(data, split), []
        for name, first in (("verbs", 0), ("reviews", 15)):
            own = getattr(alone[name], split)
            expected += [(row["text"], first + row["label"], name) for row in own]
        assert [(row["text"], row["label"], row["task"]) for row in rows] == expected


def test_a_run_stores_all_settings_of_the_sets_and_reads_them_again(folder):
    config = config_of("data.sets=[wordnet,reviews]")
    stored = config.resolved["data"]
    assert stored["sets"]["wordnet"]["train_rows"] == 4000
    assert stored["sets"]["reviews"]["text"] == "review"
    (folder / "configs" / "data" / "reviews.yaml").unlink()
    again = read_data(stored)
    assert [*again.task.tasks] == ["wordnet", "reviews"]


def test_settings_of_one_set_replace_those_of_its_configuration(folder):
    sets = f"data.sets={{{VERBS},one:{{data:reviews,train_rows:5}},two:{{data:reviews,seed:4}}}}"
    found = config_of(sets).data.read()
    assert len(found.train) == 30 + 5 + 24
    assert found.task.classes[15:17] == ["one/fresh", "one/motion"]


def test_a_method_that_serves_tasks_gets_those_of_the_sets(folder):
    config = config_of("data.sets=[wordnet,reviews]", method="polyhistor")
    assert config.method["tasks"] == ["wordnet", "reviews"]


def test_sets_with_and_without_a_second_text(folder):
    pair = "pairs:{data:reviews,text_pair:verdict}"
    data = config_of(f"data.sets={{{VERBS},{pair}}}").data.read()
    assert data.task.pairs == ["pairs"]
    assert {row["text_pair"] for row in data.train if row["task"] == "verbs"} == {None}
    assert "fresh" in {row["text_pair"] for row in data.train if row["task"] == "pairs"}
