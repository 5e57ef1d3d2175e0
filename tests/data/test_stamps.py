"""The stamps of Tux Paint: their groups and captions, from a folder as the package has it."""

import json

import pytest
from image_text_fixtures import built, save_picture

from petl.data.base import read_data

STAMPS = {"animals/birds/crow": "A crow.", "animals/frog": "A frog.", "food/nut": "A nut."}


@pytest.fixture
def folder(tmp_path):
    """What `dpkg -x` writes, with a picture that has no caption."""
    root = tmp_path / "usr/share/tuxpaint/stamps"
    for name, caption in STAMPS.items():
        file = root / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_picture(file, "red", (len(name), 20))
        file.with_suffix(".txt").write_text(f"{caption}\nes.utf8=Una cosa.\n")
    save_picture(root / "food/nut_mirror.png", "red")
    return tmp_path


def rows_of(folder, **given):
    settings = {"name": "stamps", "source": "stamps", "test_rows": 1, "path": str(folder)}
    data = read_data({**settings, **given})
    return [*data.train, *data.test], data.task


@pytest.mark.parametrize("inner", ["", "usr/share/tuxpaint/stamps"])
def test_each_stamp_with_a_caption_is_a_chat_about_its_group(folder, inner):
    rows, task = rows_of(folder / inner, generate=4)
    found = {}
    for row in rows:
        question, answer = row["messages"]
        image, text = json.loads(question["more"])["parts"]
        assert text["text"] == question["content"] == "What kind of thing is this?"
        found[image["name"]] = answer["content"]
        assert row["images"][0].endswith(image["name"])
    assert found == {f"{name}.png": name.partition("/")[0] for name in STAMPS}
    assert task.generate == 4


def test_captions_are_the_english_line(folder):
    rows, task = rows_of(folder, asks="caption", max_length=256)
    assert {row["messages"][1]["content"] for row in rows} == {*STAMPS.values()}
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    assert len(task.encode_rows(built("llava")[1], columns)["input_ids"]) == 3
