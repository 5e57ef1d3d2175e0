"""stages.json: average accuracy and forgetting by hand, and files of strangers."""

import json

import pytest

from petl.errors import InputError
from petl.training.features.class_stream import (
    STAGES,
    accuracy_map,
    read_stages,
    stream_scores,
    write_stages,
)


def stage(step, trained, accuracy, **by_class):
    return {"step": step, "trained": trained, "accuracy": accuracy, "by_class": by_class}


STREAM = [
    stage(4, "a", 0.4, a=1.0, b=0.0, c=0.25, d=None),
    stage(6, "b", 0.5, a=0.5, b=0.8, c=0.0, d=None),
    stage(9, "c", 0.4, a=0.2, b=0.6, c=1.0, d=None),
]


def test_scores_equal_the_definitions():
    found = stream_scores(STREAM)
    assert found["average_accuracy"] == pytest.approx((0.2 + 0.6 + 1.0) / 3)
    # best minus last: 0.8 of a, 0.2 of b, nothing of c; d has no test rows
    assert found["forgetting"] == pytest.approx((0.8 + 0.2 + 0.0) / 3)
    assert found["stages"] == 3


def test_stages_read_back_up_to_a_step(tmp_path):
    assert read_stages(tmp_path) == []
    write_stages(tmp_path, STREAM)
    assert read_stages(tmp_path) == STREAM
    assert read_stages(tmp_path, 8) == STREAM[:2]
    shown = accuracy_map(STREAM)
    assert shown.columns == ["a", "b", "c"]
    assert shown.rows == ["a", "b", "c", "d"]
    assert shown.cells[1] == [0.0, 80.0, 60.0]
    assert shown.cells[3] == [None] * 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"step": 1},
        [stage(4, "a", 1.5, a=1.0)],
        [stage(4, "a", 0.5, a=-0.1)],
        [stage(4, "a", 0.5, a=None)],
        [stage(4, "a", 0.5, a=1.0), stage(4, "b", 0.5, a=1.0)],
        [stage(4, "a", 0.5, a=1.0), stage(5, "b", 0.5, b=1.0)],
        [{"step": 4}],
    ],
)
def test_other_contents_are_refused(tmp_path, wrong):
    (tmp_path / STAGES).write_text(json.dumps(wrong))
    with pytest.raises(InputError, match=STAGES):
        read_stages(tmp_path)
