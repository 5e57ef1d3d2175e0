"""Rows that the chat template of a model refuses: named by file and line, or left out."""

import json

import pytest
from accelerate import Accelerator
from tiny_tokenizers import CHATML, byte_tokenizer

from petl.data.base import read_data
from petl.errors import InputError
from petl.training.dataloader import encode_splits
from petl.training.runs.settings import TrainConfig

pytest_plugins = ["training_fixtures"]
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if m.content == 'unknown' %}{{ m.absent.key }}{% endif %}{% endfor %}" + CHATML
)
SETTINGS = {"name": "files", "source": "files", "task": "causal_lm", "max_length": 64}
BAD, LACKING = 3, 6  # lines


def turns(*contents, roles=("user", "assistant")):
    said = zip(roles, contents, strict=True)
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def write(file, bad=(BAD, LACKING)):
    """Write ten conversations, of which the template refuses those at some lines."""
    rows = {line: turns(f"question {line} of {file.stem}", "yes") for line in range(1, 11)}
    for line in bad:
        rows[line] = turns("Hi", "there", "yes", roles=("user", "user", "assistant"))
    if LACKING in bad:
        rows[LACKING] = turns("unknown", "yes")
    file.write_text("\n".join(map(json.dumps, rows.values())))
    return str(file)


def splits(data, **settings):
    tokenizer = byte_tokenizer(chat_template=STRICT, pad_token="<|im_end|>")
    settings = TrainConfig(batch_size=2, **settings)
    return encode_splits(data, tokenizer, settings, Accelerator(cpu=True))


def asked(rows):
    """The lines of the questions of encoded rows."""
    decode = byte_tokenizer().decode
    return sorted(int(decode(row["input_ids"]).split("question ")[1].split()[0]) for row in rows)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PETL_CACHE", str(tmp_path / "cache"))


def read(tmp_path, bad=(BAD, LACKING), **settings):
    files = {"train": write(tmp_path / "a.jsonl", bad), "test": write(tmp_path / "b.jsonl", ())}
    return read_data({**SETTINGS, **files, **settings})


def test_all_are_named_by_file_and_line(tmp_path):
    with pytest.raises(InputError) as refused:
        splits(read(tmp_path))
    message = str(refused.value)
    for words in ("a.jsonl, line 3", "must alternate", "line 6", "2 of 10 rows", "bad_rows=skip"):
        assert words in message


def test_they_are_left_out_and_counted(tmp_path, petl_log):
    found = splits(read(tmp_path, bad_rows="skip"))
    assert asked(found.known) == [1, 2, 4, 5, 7, 8, 9, 10]
    [first, second] = found.skipped["training"]
    assert (first.place, second.place) == tuple(f"{tmp_path}/a.jsonl, line {n}" for n in (3, 6))
    assert "alternate" in first.reason
    assert first.values["messages"][0]["content"] == "Hi"
    assert "2 of 10 rows cannot be used" in petl_log.text
    again = splits(read(tmp_path, bad_rows="skip"))
    assert again.known["input_ids"] == found.known["input_ids"]


def test_test_rows_are_left_out_and_numbered_anew(tmp_path):
    data = {"train": write(tmp_path / "a.jsonl", ()), "test": write(tmp_path / "b.jsonl")}
    found = splits(read_data({**SETTINGS, **data, "bad_rows": "skip"}))
    assert [row.place.rpartition(" ")[2] for row in found.skipped["test"]] == ["3", "6"]
    texts = [found.sources[number]["messages"][0]["content"] for number in found.test["_number"]]
    assert [int(text.split()[1]) for text in texts] == [asked([row])[0] for row in found.test]


def test_held_out_rows_keep_their_lines(tmp_path):
    data = {**SETTINGS, "train": write(tmp_path / "a.jsonl"), "test_share": 0.5}
    found = splits(read_data({**data, "bad_rows": "skip"}))
    skipped = [row.place.rpartition(" ")[2] for rows in found.skipped.values() for row in rows]
    assert sorted(skipped) == ["3", "6"]
    assert asked([*found.known, *found.test]) == [1, 2, 4, 5, 7, 8, 9, 10]


def test_no_row_is_left(tmp_path):
    with pytest.raises(InputError):
        splits(read(tmp_path, bad=range(1, 11), bad_rows="skip"))


def test_a_stream_names_the_line(tmp_path):
    data = read(tmp_path, bad=(5,), streaming=True)
    found = splits(data, steps=4)
    with pytest.raises(InputError, match=r"a\.jsonl, line 5"):
        found.train[0]


def test_each_set_of_a_mixture_has_its_own_setting(tmp_path):
    sets = {}
    for name, bad in (("one", (BAD,)), ("two", ()), ("three", (LACKING,))):
        files = {"train": write(tmp_path / f"{name}.jsonl", bad)}
        files["test"] = write(tmp_path / f"{name}-test.jsonl", ())
        sets[name] = {"data": "files", "task": "causal_lm", "max_length": 64, **files}
    mixture = {"name": "mixture", "source": "mixture", "task": "causal_lm", "sets": sets}
    sets["one"]["bad_rows"] = "skip"
    with pytest.raises(InputError, match=r"three\.jsonl, line 6"):
        splits(read_data(mixture))
    sets["three"]["bad_rows"] = "skip"
    found = splits(read_data(mixture))
    places = [row.place.rpartition("/")[2] for row in found.skipped["training"]]
    assert places == ["one.jsonl, line 3", "three.jsonl, line 6"]
    assert len(found.known) == 28
