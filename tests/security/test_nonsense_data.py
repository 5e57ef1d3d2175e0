"""Data files of any content are read, or refused in one line that names the file.

`pytest --hypothesis-profile long tests/security/test_nonsense_data.py` searches for longer.
"""

import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from media_fixtures import write_tone
from nonsense import answered
from PIL import Image

from petl.data.base import read_data
from petl.data.tasks.media_files import read_audio, read_image

ROWS = [{"text": f"text {i}", "label": "ab"[i % 2], "answers": [f"text {i}"]} for i in range(12)]
TASKS = {
    "classification": {},
    "regression": {},
    "token_classification": {"tokens": "text", "tags": "label"},
    "question_answering": {"question": "text", "context": "text", "answers": "label"},
    "causal_lm": {"messages": "text"},
    "seq2seq": {"target": "label"},
}


def as_csv(rows):
    text = io.StringIO()
    csv.writer(text).writerows([list(rows[0]), *(row.values() for row in rows)])
    return text.getvalue().encode()


def as_parquet(rows, **options):
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, **options)
    return sink.getvalue()


VALID = {
    "a.csv": [as_csv(ROWS), "text,label\n\u00e9,\u4e2d\n".encode()],
    "a.tsv": [as_csv(ROWS).replace(b",", b"\t")],
    "a.json": [json.dumps(ROWS).encode()],
    "a.jsonl": ["\n".join(map(json.dumps, ROWS)).encode()],
    "a.parquet": [as_parquet(ROWS), as_parquet(ROWS, compression="gzip", use_dictionary=False)],
}
SPLICES = [
    *(b"", b"\0", b'"', b"\n", b"\r", b",", b"\\", b"[", b"{", b"}", b"\xff", b"\xef\xbb\xbf"),
    *(b"\\ud800", b"1e999", b"NaN", b"null", b"9" * 5000, b"[" * 5000, b'{"text":' * 2000, b"\x1b"),
]


@st.composite
def damaged(draw, contents):
    """A file with some bytes replaced, inserted, removed or repeated."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.sampled_from([1, 1, 2, 4]))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.sampled_from([0, 0, 1, 1, 4, 30, 10**6])))
        new = draw(st.one_of(st.sampled_from(SPLICES), st.binary(max_size=8)))
        content[start:end] = new
    return bytes(content)


@st.composite
def files(draw):
    name = draw(st.sampled_from(sorted(VALID)))
    return name, draw(damaged(VALID[name]))


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.just("\ud800")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=6,
)
texts, labels = st.text(min_size=1) | json_values, st.sampled_from("ab") | json_values
rows_of_any_type = st.lists(st.fixed_dictionaries({"text": texts, "label": labels}), max_size=4)


def read(file, content, task):
    file.write_bytes(content)
    columns = TASKS[task]
    settings = {"name": "files", "source": "files", "task": task, "train": str(file), **columns}
    read_data(settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("nonsense")


@given(files(), st.sampled_from(sorted(TASKS)))
def test_damaged_tables_are_read_or_refused(folder, file, task):
    name, content = file
    answered(read, folder / name, content, task)


@given(rows_of_any_type, st.sampled_from(sorted(TASKS)), st.sampled_from(["a.json", "a.jsonl"]))
def test_values_of_any_type_are_read_or_refused(folder, rows, task, name):
    lines = "\n".join(map(json.dumps, rows)) if name == "a.jsonl" else json.dumps(rows)
    answered(read, folder / name, lines.encode(), task)


@pytest.fixture(scope="module")
def media(folder):
    """Valid files of each format, by suffix."""
    write_tone(folder / "a.wav", 440, seconds=0.1)
    image = Image.effect_mandelbrot((24, 16), (-2, -1, 1, 1), 20).convert("RGB")
    for suffix in (".png", ".jpg", ".gif", ".bmp", ".tif", ".webp", ".ppm"):
        image.save(folder / f"a{suffix}")
    return {file.suffix: file.read_bytes() for file in folder.glob("a.*")}


@given(st.data())
def test_damaged_images_and_sounds_are_read_or_refused(folder, media, data):
    suffix = data.draw(st.sampled_from(sorted(media)))
    file = folder / f"b{suffix}"
    file.write_bytes(data.draw(damaged([media[suffix]])))
    if suffix == ".wav":
        answered(read_audio, file, 8000, 1.0)
    else:
        answered(read_image, file)
