import csv
import json
import os
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from petl.data.base import read_data
from petl.data.files import located_rows
from petl.data.task_columns import in_order
from petl.data.validation import every
from petl.errors import InputError, UnknownNameError


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
    ],
    ids=["plain", "crlf", "bom", "empty lines", "no last newline"],
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
    long = write(tmp_path, "long.csv", f"text,label\n{'x' * 200_000},a\n" * 2)
    first, second = (located_rows("data.train", [str(file)], every) for file in (short, long))
    next(first), next(second)
    assert csv.field_size_limit() == limit  # that of other code
    assert len([*first, *second]) == 3


def test_json_strings_may_hold_line_separators(tmp_path):
    content = '{"text": "one\u2028two\x85", "label": 1}\n{"text": "b", "label": 0}\n'
    file = write(tmp_path, "a.jsonl", content)
    assert named(read(file, file), "train") == {"one\u2028two\x85": "1", "b": "0"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\na,x\nb\nc,y\n", r"a\.csv, line 3: 1 fields, but the header has 2"),
        ("a.csv", 'text,label\n"a\nb",x\nc,y,z\n', r"line 4: 3 fields, but"),
        ("a.csv", 'text,label\na,x\n"b,y\nc,z\n', r"line 3: unexpected end of data; check its"),
        ("a.csv", 'text,label\na,x\n"b"c,y\n', r"line 3: ',' expected after '\"'"),
        ("a.csv", b"text,label\na,x\n\xe9t\xe9,y\n", r"line 3: byte 0xe9 is not UTF-8"),
        (
            "a.csv",
            "text,label\na,x\nb,\nc,y\nd,\n",
            r"line 3: label is empty \(and 1 more with errors\)",
        ),
        ("a.csv", 'text,label\n"a\n\n",x\n,y\n', r"line 5: text is empty"),
        ("a.csv", "text,label,label\na,x,y\n", r"has 2 columns named 'label'"),
        (
            "a.csv",
            "text,lable\na,x\n",
            r"no column 'label'; available: text, lable; did you mean 'lable'\? "
            r"Name the column with data\.label=NAME",
        ),
        ("a.csv", "text,label\n", r"a\.csv has no rows"),
        ("a.csv", "", r"a\.csv has no rows"),
        ("a.csv", "text,label\na,x\nb,x\n", r"a single class, 'x'"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": \n', r"a\.jsonl, line 2: Expecting value"),
        ("a.jsonl", '{"text": "a", "label": 1}\n\n[1]\n', r"line 3: \[1\] is not an object"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', r"line 2 has no column 'label'"),
        ("a.jsonl", '{"text": "a", "label": null}\n', r"line 1: label is missing"),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n{"text": 3, "label": 2}\n',
            r"line 2: text is 3, not",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": 0.5}\n',
            r"line 1: label is 0\.5, not the name or number",
        ),
        (
            "a.json",
            '[{"text": "a", "label": 1},\n{"text": }]',
            r"a\.json, line 2, column 10: Expect",
        ),
        ("a.json", '{"text": "a"}\n{"text": "b"}', r"line 2, column 1: Extra data; .* \.jsonl"),
        ("a.json", '{"text": "a"}', r"not a list of objects"),
        ("a.json", '[{"text": "a", "label": 1}, 2]', r"a\.json, item 2: 2 is not an object"),
        ("a.json", "[]", r"a\.json has no rows"),
        ("a.parquet", "not parquet at all", r"a\.parquet cannot be read as parquet"),
    ],
)
def test_an_invalid_file_is_named_with_the_line_of_its_error(tmp_path, name, content, message):
    file = write(tmp_path, name, content)
    with pytest.raises(InputError, match=message):
        read(file, file)


def test_parquet_without_the_column_lists_the_available_columns(tmp_path):
    pq.write_table(pa.table({"sentence": ["a"], "label": [1]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="no column 'text'; available: sentence, label"):
        read(tmp_path / "a.parquet")


def test_a_parquet_column_that_is_read_must_not_be_there_twice(tmp_path):
    columns = {"text": ["a", "b"], "label": [0, 1], "id": [3, 4]}
    for twice in ("text", "id"):
        names = [*columns, twice]
        table = pa.Table.from_arrays([pa.array(columns[name]) for name in names], names=names)
        pq.write_table(table, tmp_path / f"{twice}.parquet")
    with pytest.raises(InputError, match="has 2 columns named 'text': rename all but one"):
        read(tmp_path / "text.parquet")
    assert len(read(tmp_path / "id.parquet", test_share=0.5).train) == 1


def test_missing_parquet_integers_are_missing_labels(tmp_path):
    pq.write_table(pa.table({"text": ["a", "b"], "label": [1.0, None]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="row 2: label is missing"):
        read(tmp_path / "a.parquet")


def test_the_error_about_a_missing_file_suggests_a_similar_name(tmp_path):
    write(tmp_path, "train.csv", CSV)
    with pytest.raises(InputError, match=r"does not exist; did you mean 'train\.csv'"):
        read(tmp_path / "tran.csv")
    with pytest.raises(InputError, match="nor does its directory"):
        read(tmp_path / "no" / "train.csv")
    with pytest.raises(
        InputError, match=r"is not in a supported format; available: \.csv, \.tsv, \.json"
    ):
        read(tmp_path / "train.xlsx")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InputError, match="is a directory"):
        read(tmp_path / "folder.csv")


def test_integer_labels_are_ordered_by_value(tmp_path):
    content = "text,label\n" + "".join(f"t{i},{i % 11 - 1}\n" for i in range(22))
    file = write(tmp_path, "a.csv", content)
    raw = read(file, file)
    assert raw.task.labels == [str(i) for i in range(-1, 10)]
    assert named(raw, "test")["t10"] == "9"


def test_the_order_of_labels_depends_on_the_labels_alone():
    assert in_order({"1", "01", "10", "-2"}) == ["-2", "01", "1", "10"]
    assert in_order({"b", "a", "10", "9"}) == ["10", "9", "a", "b"]


def test_the_first_label_that_train_lacks_is_named_and_the_others_counted(tmp_path):
    train = write(tmp_path, "train.csv", CSV)
    test = write(tmp_path, "test.csv", "text,label\na,pos\nb,meh\nc,so-so\nd,meh\n")
    with pytest.raises(
        InputError,
        match=r"test\.csv, line 3: label is 'meh', which .*train\.csv lacks; .* \(and 2 more",
    ):
        read(train, test, seed=0)


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


def test_holding_out_from_a_single_row_is_refused(tmp_path):
    with pytest.raises(InputError, match="1 rows, too few to hold out 10%"):
        read(write(tmp_path, "a.csv", "text,label\na,x\n"))


def test_rows_are_limited_after_the_shuffle(tmp_path):
    content = "text,label\n" + "".join(f"t{i},{i % 2}\n" for i in range(50))
    file = write(tmp_path, "a.csv", content)
    whole, part = read(file, file), read(file, file, train_rows=7, test_rows=5)
    assert part.train.to_dict() == whole.train.select(range(7)).to_dict()
    assert len(part.test) == 5
    assert whole.train["text"][:7] != [f"t{i}" for i in range(7)]
    with pytest.raises(InputError, match=r"test_rows=51 is more than the 50 rows there are"):
        read(file, file, test_rows=51)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"txt": "a"}, "no setting data.txt; did you mean 'text'"),
        ({"task": "clasification"}, "no task 'clasification'; did you mean 'classification'"),
        ({"source": "file"}, "no data source 'file'; did you mean 'files'"),
        ({"test_share": 1.5}, r"data\.test_share=1\.5 is not between 0 and 1"),
        ({"max_length": "long"}, r"data\.max_length='long' is not of type int"),
        ({"train_rows": "all"}, r"data\.train_rows='all' is not of type int \| null"),
        ({"max_length": 1}, r"data\.max_length=1 is below 2"),
        ({"train_rows": 0}, r"data\.train_rows=0 is below 1"),
        ({"seed": -1}, r"data\.seed=-1 is below 0"),
        ({"seed": 2**32}, r"data\.seed=4294967296 is not below"),
        (
            {"messages": "chat"},
            r"data\.messages=chat is for data\.task=causal_lm, but data\.task is",
        ),
        ({"pack": True}, r"data\.pack=true is for data\.task=causal_lm"),
        ({"target": "out"}, r"data\.target=out is for data\.task=seq2seq"),
        ({"task": "seq2seq", "label": "y"}, r"for data\.task=classification or regression, but"),
        ({"task": "causal_lm", "prompt": "q"}, r"data\.prompt=q and data\.answer=None: give both"),
        ({"task": "causal_lm", "generate": 5}, r"data\.generate=5 is for conversations"),
        ({"task": "seq2seq", "generate": 0}, r"data\.generate=0 is below 1"),
        (
            {"task": "causal_lm", "messages": "a", "prompt": "b", "answer": "c"},
            "give one of them",
        ),
        (
            {"task": "causal_lm", "messages": "chat", "pack": True},
            "is for plain text, but rows are conversations",
        ),
    ],
)
def test_an_invalid_setting_is_named(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        read(write(tmp_path, "a.csv", CSV), **settings)


def test_train_and_source_are_required():
    with pytest.raises(InputError, match=r"data\.train is not given"):
        read_data({"name": "files", "source": "files", "task": "classification", "train": None})
    with pytest.raises(UnknownNameError):
        read_data({"name": "files", "source": "fils"})
    with pytest.raises(InputError, match=r"data\.source is not given; available: .*files, hamlet"):
        read_data({"name": "files"})


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


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ("hello", "line 1: chat is 'hello', not a list of turns"),
        ([], r"chat is \[\], not a list"),
        ([{"speaker": "human", "text": "a"}], "as turn 1, not an object with role and content"),
        ([{"role": "user", "content": None}], "turn 1 with content None, not text"),
        ([{"role": "assistant", "content": "", "tool_calls": [1]}], "1 as a call in turn 1, not"),
    ],
)
def test_an_invalid_conversation_is_named(tmp_path, chat, message):
    file = write(tmp_path, "a.jsonl", json.dumps({"chat": chat}))
    with pytest.raises(InputError, match=message):
        read(file, file, task="causal_lm", messages="chat")


def test_empty_lines_of_plain_text_are_accepted(tmp_path):
    file = write(tmp_path, "a.csv", 'text\n"a b"\n""\n')
    raw = read(file, file, task="causal_lm", pack=True)
    assert sorted(raw.train["text"]) == ["", "a b"]
    assert raw.task.pack


DEEP = "[" * 100_000 + "]" * 100_000
NONSENSE = [
    ("a.json", DEEP, "nested too deeply"),
    ("a.json", "[" * 200 + "]" * 200, "nested more than 32 levels"),
    ("a.json", f'[{{"text": "a", "label": {"1" * 5000}}}]', "an integer has thousands of digits"),
    ("a.json", '[{"text": "\\ud800", "label": 1}]', "is not valid Unicode"),
    ("a.jsonl", f'{{"text": "a", "label": "b"}}\n{DEEP}\n', r"a\.jsonl, line 2: .*nested"),
    ("a.jsonl", f'\n{{"text": "a", "label": {"1" * 5000}}}', r"line 2: an integer has thousands"),
    ("a.jsonl", '{"text": "\\ud800", "label": 1}', r"line 1: .*is not valid Unicode"),
    ("a.jsonl", f'{{"text": "a", "label": 1{"0" * 400}}}', "more than 64 bits"),
    ("a.csv", "text,label\na," + "1" * 5000 + "\nb,2\n\xff", "not UTF-8"),
    ("a.csv", b"text,label\na\0b,\0\n", "too few to hold out"),
    ("a.csv", b"\xff\xfet\0e\0x\0t\0", r"line 1: byte 0xff is not UTF-8"),
    ("a.csv", b"text,label\ngood,x\nb\xe9d,y\n", r"line 3: byte 0xe9 is not UTF-8"),
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
        with pytest.raises(InputError, match=r"a\.parquet cannot be read as parquet"):
            read(file)


def test_labels_of_thousands_of_digits_are_sorted_as_text():
    assert in_order({"2", "1" * 5000}) == ["1" * 5000, "2"]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo.csv")
    with pytest.raises(InputError, match="is not a regular file") as refused:
        read(tmp_path / "fifo.csv")
    assert "did you mean" not in str(refused.value)


def test_rows_that_fill_the_memory_are_refused(tmp_path, monkeypatch):
    rows = pa.table({"text": ["a"] * 200_000, "label": ["b"] * 200_000})
    pq.write_table(rows, tmp_path / "a.parquet")  # of equal rows: kilobytes
    full = SimpleNamespace(total=100 * 10**9, available=10**9)
    monkeypatch.setattr("petl.data.files.psutil.virtual_memory", lambda: full)
    with pytest.raises(
        InputError, match="fills the 100 GB of memory of this machine after 100,000"
    ):
        read(tmp_path / "a.parquet")
