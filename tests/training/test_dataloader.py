"""How rows are held out and come as batches."""

import pytest
import torch
from datasets import Dataset

from petl.data.batch_sampler import chunks
from petl.errors import InputError
from petl.training.dataloader import hold_out, load, longest_first


@pytest.mark.parametrize("column", ["labels", "_other"])
def test_rows_of_one_group_are_held_out_together(column):
    groups = [i // 3 for i in range(60)]
    rows = Dataset.from_dict({"number": list(range(60)), column: groups})
    train, held = hold_out(rows, 0.25, column)
    assert len(held) == 15  # five groups of twenty
    assert not set(train[column]) & set(held[column])
    assert sorted([*train["number"], *held["number"]]) == list(range(60))


def test_held_out_rows_are_never_trained_on_and_do_not_depend_on_the_seed():
    rows = Dataset.from_dict({"number": list(range(50))})
    train, held = hold_out(rows, 0.1)
    assert len(held) == 5
    assert sorted([*train["number"], *held["number"]]) == list(range(50))
    assert list(hold_out(rows, 0.1)[1]["number"]) == list(held["number"])


def test_loading_leaves_the_random_state_of_dropout_alone():
    rows = Dataset.from_dict({"number": list(range(6))})
    before = torch.get_rng_state()
    device = torch.device("cpu")
    loaded = list(
        load(
            rows,
            lambda rows: {"n": torch.tensor([r["number"] for r in rows])},
            [[0, 3], [5]],
            device,
            workers=0,
        )
    )
    assert [batch["n"].tolist() for batch in loaded] == [[0, 3], [5]]
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_for_scoring_come_longest_first():
    assert longest_first([1, 3, 2]) == [1, 2, 0]
    assert chunks([1, 2, 0], 2) == [[1, 2], [0]]


def without_two(rows):
    """Makes a batch of numbers, but for 2."""
    try:
        return {"n": torch.tensor([row["number"] for row in rows if 1 / (row["number"] - 2)])}
    except ZeroDivisionError as error:
        raise InputError("a.jsonl, line 3: label is 'x', an Error: not a number") from error


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_cannot_be_read_is_told_in_the_same_words_by_a_worker(workers):
    rows = Dataset.from_dict({"number": list(range(4))})
    batches = load(rows, without_two, [[0, 1], [2]], torch.device("cpu"), workers)
    assert next(batches)["n"].tolist() == [0, 1]
    with pytest.raises(InputError) as refused:
        next(batches)
    assert str(refused.value) == "a.jsonl, line 3: label is 'x', an Error: not a number"
