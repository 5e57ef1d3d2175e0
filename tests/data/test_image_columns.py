"""Conversations with images in files: where images may be, and what is refused, with its line."""

import base64
import hashlib
import io
import json
import os
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_text_fixtures import row, save_picture, write_rows
from PIL import Image

from petl.data.base import read_data
from petl.data.inputs import read_inputs
from petl.errors import InputError

QUESTION, ANSWER = "Which color?", "red"


def settings(file, **given):
    base = {"name": "files", "source": "files", "task": "image_text", "test_share": 0.5}
    return {**base, "train": str(file), **given}


def read(file, **given):
    """All rows of a file, in its order."""
    data = read_data(settings(file, **given))
    return [*data.train, *data.test]


def refused(folder, *messages, **given):
    """The message about a file with these rows, the first of which is sound."""
    save_picture(folder / "sound.png", "red")
    file = write_rows(folder / "rows.jsonl", [row("sound.png", "red"), *messages])
    with pytest.raises(InputError) as error:
        read(file, **given)
    return str(error.value)


def data_url(folder):
    content = save_picture(folder / "inside.png", "red").read_bytes()
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def content(found):
    """Roles with the parts of their contents."""
    return [(m["role"], json.loads(m["more"] or "{}").get("parts", m["content"])) for m in found]


def llava(images, text=f"<image>\n{QUESTION}"):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": ANSWER}]
    return {"image": images, "conversations": turns}


def mark(name):
    return {"type": "image", "name": name}


def text(words):
    return {"type": "text", "text": words}


EXPECTED = [("user", [mark("a.png"), text(QUESTION)]), ("assistant", ANSWER)]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (row("a.png", ANSWER), {}),
        (llava("a.png"), {}),
        (llava(["a.png"]), {}),
        (llava("a.png", f"{QUESTION}\n<image>"), {}),
        ({"image": "a.png", "prompt": QUESTION, "completion": ANSWER}, {}),
        ({"photo": "a.png", "q": QUESTION, "a": ANSWER}, {"prompt": "q", "answer": "a"}),
        ({**row(None, ANSWER), "images": ["a.png"]}, {}),
    ],
    ids=["openai", "llava", "list", "behind", "pair", "named", "column"],
)
def test_forms_of_conversations_give_the_same_parts(tmp_path, given, names):
    save_picture(tmp_path / "a.png", "red")
    file = write_rows(tmp_path / "rows.jsonl", [given, given])
    named = {**names, "image": "photo"} if names else names
    found = read(file, **named)[0]
    roles = content(found["messages"])
    if given.get("conversations") == llava("a.png", f"{QUESTION}\n<image>")["conversations"]:
        roles[0] = ("user", roles[0][1][::-1])
    assert roles == EXPECTED
    assert found["images"] == [str(tmp_path / "a.png")]


def test_data_urls_and_bytes_are_images_and_names_stay_short(tmp_path):
    url = data_url(tmp_path)
    file = write_rows(tmp_path / "rows.jsonl", [row(url, ANSWER)] * 2)
    found = read(file)[0]
    assert found["images"] == [url]
    assert len(found["messages"][0]["more"]) < 300
    # as `datasets` stores images
    stored = {"bytes": (tmp_path / "inside.png").read_bytes(), "path": "inside.png"}
    table = pa.Table.from_pylist([{"image": stored, "prompt": QUESTION, "completion": ANSWER}] * 2)
    pq.write_table(table, tmp_path / "rows.parquet")
    again = read(tmp_path / "rows.parquet")[0]
    assert again["sha256"] == found["sha256"]


def test_rows_without_images_and_with_several_are_read(tmp_path):
    for name in ("a.png", "b.png"):
        save_picture(tmp_path / name, "red")
    none = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    several = llava(["a.png", "b.png"], "<image> or <image>?")
    found = read(write_rows(tmp_path / "rows.jsonl", [several, none]))
    images = sorted(len(each["images"]) for each in found)
    assert images == [0, 2]


@pytest.mark.parametrize("column", ["picture", "image"])
def test_a_file_of_questions_without_a_column_of_images_is_said(tmp_path, column, caplog):
    save_picture(tmp_path / "a.png", "red")
    pair = {"prompt": QUESTION, "completion": ANSWER, column: "a.png"}
    read(write_rows(tmp_path / "rows.jsonl", [pair, {**pair, "completion": "blue"}]))
    said = [m for m in caplog.messages if "has no column image or images" in m]
    assert len(said) == (column == "picture")
    assert all(line.endswith("completion, picture, prompt") for line in said)


def test_paths_are_relative_to_their_file_or_to_a_folder_that_is_named(tmp_path):
    for name in ("one", "two", "elsewhere"):
        (tmp_path / name).mkdir()
        save_picture(tmp_path / name / "a.png", "red")
    files = [
        str(write_rows(tmp_path / name / "rows.jsonl", [row("a.png", "red")] * 2))
        for name in ("one", "two")
    ]
    found = {image for each in read(files[0], train=files) for image in each["images"]}
    assert found == {str(tmp_path / name / "a.png") for name in ("one", "two")}
    folder = str(tmp_path / "elsewhere")
    assert read(files[0], image_folder=folder)[0]["images"] == [f"{folder}/a.png"]
    # and in predictions, where rows keep their own columns
    raw, prepared = next(iter(read_inputs(files, read_data(settings(files[0])).task, {})))
    assert raw == row("a.png", "red")
    assert prepared["images"] == [str(tmp_path / "one" / "a.png")]
    assert [m["role"] for m in prepared["messages"]] == ["user"]


def header_of(width, height):
    """A PNG whose header announces this size, with a byte of pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b"x")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def animated():
    """The first page of a document, which Pillow hands to another program."""
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"


@pytest.mark.parametrize(
    ("bytes_", "words"),
    [
        (b"", "a.png"),
        (b"not an image", "a.png"),
        (header_of(20_000, 20_000), "pixels"),
        (header_of(8_200, 8_200), "8200 x 8200"),
        (animated(), "a.png"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a.png"),
    ],
    ids=["empty", "text", "bomb", "large", "eps", "svg"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_hostile_files_are_refused_with_their_line(tmp_path, bytes_, words):
    (tmp_path / "a.png").write_bytes(bytes_)
    message = refused(tmp_path, row("a.png", "red"))
    assert "rows.jsonl, line 2" in message
    assert words in message
    assert "cannot be read as an image" in message


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "a.png").open("wb") as opened:
        opened.truncate(2**26 + 1)  # sparse
    assert f"{2**26:,}" in refused(tmp_path, row("a.png", "red"))


@pytest.mark.parametrize("kind", ["..", "absolute", "link", "link of a folder"])
def test_an_image_outside_of_the_folder_is_refused(tmp_path, kind):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    secret = save_picture(outside / "secret.png", "red")
    if kind == "link":
        (inside / "a.png").symlink_to(secret)
    elif kind != "absolute":
        (inside / "folder").symlink_to(outside)
    names = {
        "..": "../outside/secret.png",
        "absolute": str(secret),
        "link": "a.png",
        "link of a folder": "folder/secret.png",
    }
    message = refused(inside, row(names[kind], "red"))
    assert "line 2" in message
    assert f"outside of {inside}" in message
    assert "data.image_folder" in message
    both = write_rows(inside / "rows.jsonl", [row(names[kind], "red")] * 2)
    if kind == "absolute":  # a folder of both is another answer
        assert read(both, image_folder=str(tmp_path))[0]["images"] == [str(secret)]


def test_pipes_and_folders_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait forever
    assert "regular file" in refused(tmp_path, row("pipe.png", "red"))
    (tmp_path / "folder.png").mkdir()
    assert "regular file" in refused(tmp_path, row("folder.png", "red"))


def test_a_damaged_image_is_refused_before_training_by_its_conversation(tmp_path):
    from image_text_fixtures import built

    whole = save_picture(tmp_path / "a.png", "red", (64, 64)).read_bytes()
    noise = Image.effect_noise((64, 64), 90)
    packed = io.BytesIO()
    noise.save(packed, "PNG")
    assert len(whole) < len(packed.getvalue())
    (tmp_path / "a.png").write_bytes(packed.getvalue()[:-400])  # the header is sound
    file = write_rows(tmp_path / "rows.jsonl", [row("a.png", "red")] * 2)
    data = read_data(settings(file))
    with pytest.raises(InputError, match=r"Which color.*a\.png"):
        data.task.encode(built("llava")[1], data.train)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A web server on this machine, and the paths that it was asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path == "/moved.png":
                self.send_response(302)
                self.send_header("Location", "/elsewhere.png")
            else:
                self.send_response(200)
            self.end_headers()
            self.wfile.write((tmp_path / "a.png").read_bytes())

        def log_message(self, *words):
            pass

    monkeypatch.setenv("PETL_CACHE", str(tmp_path / "cache"))
    save_picture(tmp_path / "a.png", "red")
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/", asked
        server.shutdown()


def test_a_url_that_a_setting_names_is_downloaded_once(tmp_path, site, monkeypatch):
    address, asked = site
    file = write_rows(tmp_path / "rows.jsonl", [row(f"{address}some/a.png", "red")] * 3)
    found = read(file, image_urls=[f"{address}some/"])
    assert found[0]["sha256"] == [hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest()]
    read(file, image_urls=[f"{address}some/"])
    assert asked == ["/some/a.png"]
    assert "data.image_urls" in refused(tmp_path, row(f"{address}other.png", "red"))
    other = refused(tmp_path, row(f"{address}other.png", "red"), image_urls=[f"{address}some/"])
    assert f"{address}some/" in other
    # a redirect may lead anywhere
    moved = refused(tmp_path, row(f"{address}moved.png", "red"), image_urls=[address])
    assert "302" in moved
    assert "/elsewhere.png" not in asked
    monkeypatch.setattr("petl.data.image_columns.MAX_BYTES", 10)
    large = refused(tmp_path, row(f"{address}b.png", "red"), image_urls=[address])
    assert "more than 10 bytes" in large
