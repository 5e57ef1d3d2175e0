"""Keys and roles of other people's files: turns under their own names, values in objects."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from petl.data.base import read_data
from petl.data.inputs import read_inputs

TURNS = [
    [("customer", "where is it?"), ("agent", "on its way"), ("customer", "thanks")],
    [("bot", "be short"), ("customer", "open?"), ("agent", "yes")],
]
MEANT = [
    [("user", "where is it?"), ("assistant", "on its way"), ("user", "thanks")],
    [("system", "be short"), ("user", "open?"), ("assistant", "yes")],
]
ROLES = {"customer": "user", "agent": "assistant", "bot": "system"}


def read(file, rows, task="causal_lm", **settings):
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("\n".join(map(json.dumps, rows)))
    base = {"name": "files", "source": "files", "task": task, "max_length": 64}
    return read_data({**base, "train": str(file), "test": str(file), **settings})


def pairs(raw):
    rows = sorted(raw.train["messages"], key=len, reverse=False)
    found = [[(turn["role"], turn["content"]) for turn in row] for row in rows]
    return sorted(found)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize(
    ("turn", "settings"),
    [
        (lambda who, what: {"speaker": who, "text": what}, {"role": "speaker", "content": "text"}),
        (lambda who, what: {"role": who, "content": what}, {}),
        (
            lambda who, what: {"author": {"role": who}, "message": {"body": what}},
            {"role": "author.role", "content": "message.body"},
        ),
    ],
    ids=["keys", "roles alone", "nested"],
)
def test_turns_have_the_keys_and_roles_that_settings_name(tmp_path, name, turn, settings):
    rows = [{"dialogue": [turn(*pair) for pair in row]} for row in TURNS]
    raw = read(tmp_path / name, rows, messages="dialogue", roles=ROLES, **settings)
    assert pairs(raw) == sorted(MEANT)


def test_columns_inside_objects_are_named_by_dots(tmp_path):
    rows = [{"id": i, "review": {"body": f"text {i}", "meta": {"stars": str(i % 2)}}, "a.b": "x"}
            for i in range(4)]  # fmt: skip
    for name in ("a.jsonl", "a.parquet"):
        raw = read(tmp_path / name, rows, "classification", text="review.body",
                   label="review.meta.stars")  # fmt: skip
        assert sorted(raw.train["text"]) == [f"text {i}" for i in range(4)]
        assert raw.task.classes == ["0", "1"]
        settings = {"text": "review.body", "label": "review.meta.stars"}
        new = list(read_inputs([str(tmp_path / name)], raw.task, settings))
        assert [own for own, _ in new] == rows, "predictions have the rows as they are"
        assert [row["text"] for _, row in new] == [f"text {i}" for i in range(4)]
