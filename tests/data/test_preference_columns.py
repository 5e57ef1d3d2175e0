"""Rows of preferences in the forms that TRL reads."""

import json

import pytest

from petl.data.base import read_data

ASKED, OTHER = ([{"role": "user", "content": text}] for text in ("q", "another"))
GOOD, BAD = ([{"role": "assistant", "content": text}] for text in ("yes", "no"))
PAIR = {"prompt": "q", "chosen": "yes", "rejected": "no"}


@pytest.fixture
def read(tmp_path):
    def read(rows, task="dpo", **settings):
        files = {}
        for name in ("train", "test"):
            file = tmp_path / f"{name}.jsonl"
            file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
            files[name] = str(file)
        data = {"name": "files", "source": "files", "task": task, "allow_overlap": True}
        return read_data({**data, **files, **settings}).test[:]

    return read


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
        {"chosen": [*ASKED, *GOOD], "rejected": [*ASKED, *BAD]},
        {"prompt": "q", "chosen": [*ASKED, *GOOD], "rejected": [*ASKED, *BAD]},
        {"prompt": "q", "chosen": GOOD, "rejected": "no"},
    ],
    ids=["texts", "messages", "implicit", "both", "mixed"],
)
@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_forms_of_pairs(row, task, read):
    assert read([row], task) == {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}


def test_plain_pairs_with_an_implicit_prompt(read):
    rows = [{"chosen": "say it: yes", "rejected": "say it: no"}]
    found = read(rows, objective={"name": "dpo", "plain": True})
    assert found == {"prompt": ["say it:"], "chosen": [" yes"], "rejected": [" no"]}


def test_rated_answers(read):
    rows = [{"prompt": "q", "completion": "yes", "label": label} for label in (True, "0")]
    found = read(rows, "kto")
    assert found["prompt"] == [ASKED] * 2
    assert found["completion"] == [GOOD] * 2
    assert {*found["good"]} == {True, False}


def test_answers_of_one_kind_are_said(read, petl_log):
    rows = [{"prompt": "q", "completion": answer, "label": True} for answer in "ab"]
    assert read(rows, "kto")["good"] == [True, True]
    assert "all answers are good" in petl_log.text
    read([*rows, {**rows[0], "label": False}], "kto")
    assert petl_log.text.count("all answers are") == 1


def test_names_of_columns_keys_of_turns_and_a_system_prompt(read):
    turns = [{"who": "customer", "says": "q"}]
    row = {"question": turns, "better": "yes", "worse": "no", "tone": "brief"}
    keys = {"role": "who", "content": "says", "roles": {"customer": "user"}}
    names = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    found = read([row], system="Be {tone}.", **names, **keys)
    assert found["prompt"] == [[{"role": "system", "content": "Be brief."}, *ASKED]]


def test_faulty_rows_are_left_out(read):
    rows = [PAIR, {**PAIR, "rejected": "yes"}, {**PAIR, "chosen": ""}]
    assert len(read(rows, bad_rows="skip")["prompt"]) == 1
