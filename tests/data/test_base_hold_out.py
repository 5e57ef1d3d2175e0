"""Rows that are held out, with the others of their group."""

from petl.data.base import hold_out


def test_no_group_is_on_both_sides():
    keys = [str(i // 4) for i in range(60)]
    train, test = hold_out(60, 0.2, 13, "rows", keys)
    assert sorted(train + test) == list(range(60))
    assert len(test) == 12
    assert not {keys[i] for i in train} & {keys[i] for i in test}


def test_a_prompt_of_most_rows_stays_in_training():
    keys = ["usual"] * 40 + [str(i) for i in range(10)]
    train, test = hold_out(50, 0.1, 13, "rows", keys)
    assert (len(train), {keys[i] for i in test} & {"usual"}) == (45, set())


def test_rows_that_all_differ_are_split_as_ever():
    keys = [str(i) for i in range(50)]
    assert hold_out(50, 0.2, 13, "rows", keys) == hold_out(50, 0.2, 13, "rows")
    assert hold_out(50, 0.2, 13, "rows", ["one"] * 50) == hold_out(50, 0.2, 13, "rows")
