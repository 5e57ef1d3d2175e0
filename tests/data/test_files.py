import csv
import json
import os
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from petl.data.base import read_data
from petl.data.files import FIRST, located_rows, read_rows
from petl.data.task_columns import in_order
from petl.data.validation import every
from petl.errors import InputError

pytest_plugins = ["training_fixtures"]


def read(train, test=None, **settings):
    cfg = {"name": "files", "source": "files", "task": "classification", "max_length": 32}
    return read_data({**cfg, "train": str(train), "test": test and str(test), **settings})


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def named(raw, split):
    return {row["text"]: raw.task.labels[row["label"]] for row in getattr(raw, split)}


ROWS = {"good film": "pos", "bad film": "neg", "fine, really": "pos", 'a "must"\nsee': "pos"}
CSV = 'text,label\ngood film,pos\nbad film,neg\n"fine, really",pos\n"a ""must""\nsee",pos\n'


@pytest.mark.parametrize(
    "content",
    [
        CSV.encode(),
        CSV.replace("\n", "\r\n").replace('must""\r\n', 'must""\n').encode(),
        b"\xef\xbb\xbf" + CSV.encode(),
        CSV.replace("pos\nbad", "pos\n\n\nbad").encode(),
        CSV.rstrip("\n").encode(),
        CSV.encode("utf-16"),
        CSV.replace(",", ";").replace("fine;", "fine,").encode(),
        CSV.replace(",", "\t").replace("fine\t", "fine,").encode(),
        CSV.replace('""', '\\"').encode(),
    ],
    ids=[
        *("plain", "crlf", "bom", "empty lines", "no last newline", "utf-16", "semicolons", "tabs"),
        "backslashes",
    ],
)
def test_csv_variants_give_the_same_rows(tmp_path, content):
    file = write(tmp_path, "a.csv", content)
    raw = read(file, file)
    assert named(raw, "train") == ROWS
    assert raw.task.labels == ["neg", "pos"]


def test_every_format_gives_the_same_rows(tmp_path):
    rows = [{"text": text, "label": label, "id": i} for i, (text, label) in enumerate(ROWS.items())]
    files = [
        write(tmp_path, "a.csv", CSV),
        write(tmp_path, "a.tsv", CSV.replace(",", "\t").replace("fine\t", "fine,")),
        write(tmp_path, "a.json", json.dumps(rows, indent=1)),
        write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n"),
        tmp_path / "a.parquet",
    ]
    pq.write_table(pa.Table.from_pylist(rows), files[-1])
    expected = read(files[0], files[0])
    for file in files:
        raw = read(file, file)
        assert named(raw, "train") == ROWS
        assert raw.train.to_dict() == expected.train.to_dict()


def test_a_field_longer_than_the_csv_module_allows_is_read(tmp_path):
    long = "x" * 200_000
    raw = read(write(tmp_path, "a.csv", f"text,label\n{long},a\nb,b\n"), test_share=0.5)
    assert max(len(text) for s in (raw.train, raw.test) for text in s["text"]) == 200_000


def test_a_csv_file_of_long_fields_is_read_beside_others(tmp_path):
    limit = csv.field_size_limit()
    short = write(tmp_path, "short.csv", "text,label\na,x\nb,y\n")
    long = write(tmp_path, "long.csv", "text,label\n" + f"{'x' * 200_000},a\n" * 3)
    first, second = (located_rows("data.train", [str(file)], every) for file in (short, long))
    next(first), next(second)
    assert csv.field_size_limit() == limit  # that of other code
    assert len([*first, *second]) == 3


def test_json_strings_may_hold_line_separators(tmp_path):
    content = '{"text": "one\u2028two\x85", "label": 1}\n{"text": "b", "label": 0}\n'
    file = write(tmp_path, "a.jsonl", content)
    assert named(read(file, file), "train") == {"one\u2028two\x85": "1", "b": "0"}


def test_a_parquet_column_that_is_read_must_not_be_there_twice(tmp_path):
    columns = {"text": ["a", "b"], "label": [0, 1], "id": [3, 4]}
    for twice in ("text", "id"):
        names = [*columns, twice]
        table = pa.Table.from_arrays([pa.array(columns[name]) for name in names], names=names)
        pq.write_table(table, tmp_path / f"{twice}.parquet")
    with pytest.raises(InputError):
        read(tmp_path / "text.parquet")
    assert len(read(tmp_path / "id.parquet", test_share=0.5).train) == 1


def test_integer_labels_are_ordered_by_value(tmp_path):
    content = "text,label\n" + "".join(f"t{i},{i % 11 - 1}\n" for i in range(22))
    file = write(tmp_path, "a.csv", content)
    raw = read(file, file)
    assert raw.task.labels == [str(i) for i in range(-1, 10)]
    assert named(raw, "test")["t10"] == "9"


def test_the_order_of_labels_depends_on_the_labels_alone():
    assert in_order({"1", "01", "10", "-2"}) == ["-2", "01", "1", "10"]
    assert in_order({"b", "a", "10", "9"}) == ["10", "9", "a", "b"]


def test_without_test_rows_a_fraction_of_train_is_held_out(tmp_path):
    content = "text,label\n" + "".join(f"t{i},{i % 2}\n" for i in range(50))
    raw = read(write(tmp_path, "a.csv", content), test_share=0.2)
    texts = [*raw.train["text"], *raw.test["text"]]
    assert len(raw.test) == 10
    assert sorted(texts) == sorted(f"t{i}" for i in range(50))
    again = read(tmp_path / "a.csv", test_share=0.2)
    assert again.test.to_dict() == raw.test.to_dict()
    other = read(tmp_path / "a.csv", test_share=0.2, seed=14)
    assert other.test.to_dict() != raw.test.to_dict()


def test_rows_are_limited_after_the_shuffle(tmp_path):
    content = "text,label\n" + "".join(f"t{i},{i % 2}\n" for i in range(50))
    file = write(tmp_path, "a.csv", content)
    whole, part = read(file, file), read(file, file, train_rows=7, test_rows=5)
    assert part.train.to_dict() == whole.train.select(range(7)).to_dict()
    assert len(part.test) == 5
    assert whole.train["text"][:7] != [f"t{i}" for i in range(7)]


def test_faulty_rows_are_counted_to_the_end_if_one_is_read(tmp_path):
    rows = [{"text": "a", "label": 1}, *[{"text": "b"}] * FIRST]
    file = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))

    def choose(present, origin):
        if "label" not in present:
            raise InputError(origin)
        return present

    found = read_rows("data.train", [str(file)], choose)
    assert (len(found.values), len(found.unread)) == (1, FIRST)


def turns(*contents):
    roles = ["user", "assistant"] * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


def test_conversations_are_read_from_jsonl(tmp_path):
    rows = [{"chat": turns("a", "b")}, {"chat": [{**t, "id": None} for t in turns("c", "d", "e")]}]
    file = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    raw = read(file, file, task="causal_lm", messages="chat")
    assert (raw.task.name, raw.task.chat, raw.task.labels) == ("causal_lm", True, None)
    assert sorted(row["messages"][0]["content"] for row in raw.train) == ["a", "c"]
    assert raw.train.column_names == ["messages"]


def test_empty_lines_of_plain_text_are_accepted(tmp_path):
    file = write(tmp_path, "a.csv", 'text\n"a b"\n""\n')
    raw = read(file, file, task="causal_lm", pack=True)
    assert sorted(raw.train["text"]) == ["", "a b"]
    assert raw.task.pack


DEEP = "[" * 100_000 + "]" * 100_000
NONSENSE = [
    ("a.json", DEEP, "more than 32 levels"),
    ("a.json", "[" * 200 + "]" * 200, "nested more than 32 levels"),
    ("a.json", f'[{{"text": "a", "label": {"1" * 5000}}}]', "5,000 digits"),
    ("a.json", '[{"text": "\\ud800", "label": 1}]', "is not valid Unicode"),
    ("a.jsonl", f'{{"text": "a", "label": "b"}}\n{DEEP}\n', r"a\.jsonl, line 2: .*nested"),
    ("a.jsonl", f'\n{{"text": "a", "label": {"1" * 5000}}}', r"line 2: it has an integer of 5,000"),
    ("a.jsonl", '{"text": "\\ud800", "label": 1}', r"line 1: .*is not valid Unicode"),
    ("a.jsonl", f'{{"text": "a", "label": 1{"0" * 400}}}', "integer of 401 digits"),
    ("a.csv", "text,label\na," + "1" * 5000 + "\nb,2\n\xff", "line 4: 1 in place of the 2 fields"),
    ("a.csv", b"text,label\na\0b,\0\n", "too few to hold out"),
    ("a.csv", b"\xff\xfet\0e\0x\0t\0", "has no column 'label'; available: text"),
    (
        "a.csv",
        b"text,label\ngood,x\nb\x9dd,y\n",
        r"line 3: byte 0x9d is not cp1252.*data\.encoding",
    ),
    ("a.csv", b"text,label\n" + b"good,x\n" * 50_000 + b"b\xe9d,y\n", "line 50002: byte 0xe9 is"),
    ("a.jsonl", '[{"text": "a", "label": 1},\n{"text": "b", "label": 2}]', r"name it \.json"),
    ("a.jsonl", '\n[\n{"text": "a", "label": 1}\n]', r"name it \.json"),
    ("a.csv", '"' + "a" * 1_000_000, "check its quotes"),
    ("a.parquet", b"PAR1" + bytes(200), "cannot be read as parquet"),
    ("a.xlsx", b"PK\3\4", "is not in a supported format"),
    ("a.csv.gz", b"\x1f\x8b", "is damaged after row 0: Compressed file ended"),
]


@pytest.mark.parametrize(("name", "content", "message"), NONSENSE, ids=lambda v: ascii(v)[:20])
def test_nonsense_in_a_file_is_answered_in_one_line(tmp_path, name, content, message):
    content = content.encode("latin-1") if isinstance(content, str) else content
    with pytest.raises(InputError, match=message) as refused:
        read(write(tmp_path, name, content))
    assert str(refused.value).count("\n") == 0
    assert len(str(refused.value)) < 1000


def test_a_parquet_file_that_is_cut_is_named(tmp_path):
    file = tmp_path / "a.parquet"
    pq.write_table(
        pa.Table.from_pylist([{"text": "a" * i, "label": str(i)} for i in range(99)]), file
    )
    whole = file.read_bytes()
    for size in (3, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(InputError):
            read(file)


def test_labels_of_thousands_of_digits_are_sorted_as_text():
    assert in_order({"2", "1" * 5000}) == ["1" * 5000, "2"]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo.csv")
    with pytest.raises(InputError) as refused:
        read(tmp_path / "fifo.csv")
    assert "did you mean" not in str(refused.value)


def test_rows_that_fill_the_memory_are_refused(tmp_path, monkeypatch):
    rows = pa.table({"text": ["a"] * 200_000, "label": ["b"] * 200_000})
    pq.write_table(rows, tmp_path / "a.parquet")  # of equal rows: kilobytes
    full = SimpleNamespace(total=100 * 10**9, available=10**9)
    monkeypatch.setattr("petl.data.files.psutil.virtual_memory", lambda: full)
    with pytest.raises(InputError):
        read(tmp_path / "a.parquet")


def test_a_file_of_windows_is_read_and_said(tmp_path, petl_log):
    file = write(tmp_path, "a.csv", "text;label\ncafé €;pos\nthé;neg\n".encode("cp1252"))
    assert named(read(file, file), "train") == {"café €": "pos", "thé": "neg"}
    assert "Windows-1252, by which line 2 has 'café'" in petl_log.text
    assert "separated by semicolons" in petl_log.text


def test_utf8_with_a_wrong_byte_is_not_taken_for_another_encoding(tmp_path):
    lines = ["text,label", *(f"thé {i},pos" for i in range(20)), "x,neg"]
    content = "\n".join(lines).encode() + b"\ncaf\xe9,neg\n"
    file = write(tmp_path, "a.csv", content)
    with pytest.raises(InputError, match="line 23: byte 0xe9"):
        read(file, file)


def test_an_encoding_that_is_named_is_taken(tmp_path):
    file = write(tmp_path, "a.csv", "text,label\n良い,はい\n悪い,いいえ\n".encode("shift_jis"))
    assert named(read(file, file, encoding="shift_jis"), "test") == {
        "良い": "はい",
        "悪い": "いいえ",
    }


def test_quotes_within_the_texts_of_a_tsv_file_are_kept(tmp_path):
    file = write(tmp_path, "a.tsv", 'text\tlabel\n"Ah" he said\tpos\nno "way\tneg\n')
    assert named(read(file, file), "train") == {'"Ah" he said': "pos", 'no "way': "neg"}


@pytest.mark.parametrize("header", ["text,label", "'text','label'"])
def test_fields_in_single_quotes_are_recognized_and_said(tmp_path, petl_log, header):
    file = write(tmp_path, "a.csv", f"{header}\n'a, it''s','pos'\n'b, c','neg'\n'd',neg\n")
    assert named(read(file, file), "train") == {"a, it's": "pos", "b, c": "neg", "d": "neg"}
    assert "single quotes" in petl_log.text
    quotes = write(tmp_path, "b.csv", "text,label\n'tis so,pos\nso 'tis,neg\n")
    assert named(read(quotes, quotes), "train") == {"'tis so": "pos", "so 'tis": "neg"}


def test_line_ends_of_old_macs_and_excels_line_of_the_separator_are_read(tmp_path):
    expected = {"a, b": "pos", "c\nd": "neg"}
    for content in (
        'text,label\r"a, b",pos\r"c\nd",neg\r',
        'sep=|\ntext|label\na, b|pos\n"c\nd"|neg\n',
        'sep=,\r\ntext,label\r\n"a, b",pos\r\n"c\nd",neg',
    ):
        file = write(tmp_path, "a.csv", content)
        assert named(read(file, file), "train") == expected, content


def test_a_table_without_names_of_columns_gets_them_from_a_setting(tmp_path):
    file = write(tmp_path, "a.csv", "pos;good film\nneg;bad film\n")
    found = read(file, file, header=["label", "text"])
    assert named(found, "train") == {"good film": "pos", "bad film": "neg"}


def test_the_list_in_a_json_object_is_read(tmp_path, petl_log):
    rows = [{"text": "a", "label": "pos"}, {"text": "b", "label": "neg"}]
    file = write(tmp_path, "a.json", json.dumps({"version": "1", "data": rows}))
    assert named(read(file, file), "train") == {"a": "pos", "b": "neg"}
    assert "its rows are the list 'data'" in petl_log.text


def test_a_delimiter_that_the_texts_have_is_not_taken_for_that_of_the_file(tmp_path):
    file = write(tmp_path, "a.csv", "text;raw,label\na;b;c,pos\nd;e,neg\n")
    assert named(read(file, file, text="text;raw"), "train") == {"a;b;c": "pos", "d;e": "neg"}
