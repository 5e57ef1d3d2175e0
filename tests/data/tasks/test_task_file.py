"""The task that is saved with an adapter."""

import json
from pkgutil import resolve_name

import pytest

from petl.data.tasks import TASKS
from petl.data.tasks.base import write_task
from petl.data.tasks.causal_lm import CausalLM
from petl.data.tasks.classification import Classification
from petl.data.tasks.task_file import FILE, read_task

CLASSES = {"classes": ["a", "${oc.env:HOME}"]}
OTHERS = {
    "causal_lm": {"chat": True, "generate": 7},
    "multi_label": {"classes": ["a", "b"], "threshold": 0.31},
    "question_answering": {"unanswerable": True},
    "multitask_classification": {
        "classes": ["x/a", "x/b", "y/a", "y/b"],
        "tasks": ["x", "y"],
        "limits": [128, 48],
        "pairs": ["y"],
    },
}


@pytest.mark.parametrize("name", TASKS)
def test_each_task_is_read_as_it_was_written(tmp_path, name):
    more = CLASSES if "classification" in name else {}
    task = resolve_name(TASKS[name])(**OTHERS.get(name, more))
    write_task(tmp_path, task)
    assert read_task(tmp_path) == task


def test_an_adapter_of_an_older_version_has_none(tmp_path):
    assert read_task(tmp_path) is None


def test_the_file_is_readable(tmp_path):
    write_task(tmp_path, Classification(classes=["bad", "good"], max_length=48))
    saved = json.loads((tmp_path / FILE).read_text())
    assert saved == {"task": "classification", "classes": ["bad", "good"], "max_length": 48}
    assert not isinstance(read_task(tmp_path), CausalLM)


def test_the_name_that_retrieval_had_before_is_read(tmp_path):
    (tmp_path / FILE).write_text(json.dumps({"task": "embedding", "max_length": 48}))
    task = read_task(tmp_path)
    assert (task.name, task.max_length) == ("retrieval", 48)
