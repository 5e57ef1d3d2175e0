"""Settings of columns for a task that exists."""

import pytest

from petl.data.tasks.classification import Classification
from petl.data.tasks.seq2seq import Seq2Seq
from petl.errors import InputError
from petl.generation.prediction.columns import data_settings


def test_only_settings_that_name_columns_are_taken():
    task = Seq2Seq(prefix="summarize: ")
    assert data_settings({"text": "a"}, task, ["data.target=b"]) == {"text": "a", "target": "b"}


def test_a_setting_of_training_is_answered_by_what_to_do():
    with pytest.raises(InputError) as refused:
        data_settings({}, Classification(classes=["a"]), ["data.bad_rows=skip"])
    assert "did you mean" not in str(refused.value)
