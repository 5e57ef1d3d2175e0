"""The files of a store: content, completeness, locks, the size of the disk."""

import os
import time
from collections import namedtuple

import pytest
import torch

from petl.efficiency.frozen import store
from petl.efficiency.frozen.keys import KEY_BYTES
from petl.efficiency.frozen.store import CONTENT, OutputSpec, Store, exists, locked, size_of, write
from petl.errors import InputError

pytest_plugins = ["training_fixtures"]
FORM = OutputSpec("float32", [4], 0, 0)
KEYS = [bytes([n]) * (KEY_BYTES - 1) + b"\0" for n in (7, 3, 200)]
LENGTHS = [3, 1, 2]


def parts(dtype=torch.float32) -> list[torch.Tensor]:
    return [torch.randn(length, 4).to(dtype) for length in LENGTHS]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_read_as_they_were_written(tmp_path, dtype):
    written, form = parts(getattr(torch, dtype)), OutputSpec(dtype, [4], 2, 0)
    write(tmp_path, form, KEYS, LENGTHS, written)
    opened = Store(tmp_path / CONTENT)
    assert opened.form == form
    assert len(opened) == 3
    numbers = opened.find([*KEYS, b"x" * KEY_BYTES]).tolist()
    assert numbers[3] == -1
    for number, row in zip(numbers[:3], written, strict=True):
        assert torch.equal(opened.row(number), row)
    files = sum(file.stat().st_size for file in (tmp_path / CONTENT).iterdir())
    assert size_of(form, 3, 6) <= files <= size_of(form, 3, 6) + 1500  # headers


def test_a_damaged_store_hides_no_others(tmp_path, petl_log):
    for name, rows in (("one", "r1"), ("two", "r2")):
        write(tmp_path / name, FORM, KEYS, LENGTHS, parts(), computation="c", rows=rows)
    (tmp_path / "two" / CONTENT / "store.json").write_text('{"rows": ')
    assert store.present(tmp_path, "c") == {"r1"}
    assert "skipping a store" in petl_log.text


def test_a_store_that_was_not_finished_is_absent(tmp_path):
    def broken():
        yield parts()[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, FORM, KEYS, LENGTHS, broken())
    assert not exists(tmp_path)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path, FORM, KEYS, LENGTHS, parts())
    assert exists(tmp_path)


@pytest.mark.parametrize("name", ["states.bin", "index.npy"])
@pytest.mark.parametrize("kind", ["a bit", "longer", "shorter", "absent", "a folder"])
def test_any_damage_of_a_file_is_found(tmp_path, name, kind):
    write(tmp_path, FORM, KEYS, LENGTHS, parts())
    file = tmp_path / CONTENT / name
    content = bytearray(file.read_bytes())
    places = range(0, len(content), 7) if kind == "a bit" else [0]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        store.remove(file)
        if kind == "a folder":
            file.mkdir()
        elif kind != "absent":
            damage = {"longer": content + b"more", "shorter": content[:-1]}
            file.write_bytes(damage.get(kind, damaged))
        with pytest.raises(InputError, match=name):
            Store(tmp_path / CONTENT)


@pytest.mark.parametrize("change", [("float32", "int32"), ("4", "2"), ("form", "from"), ("{", "")])
def test_a_changed_description_is_found(tmp_path, change):
    write(tmp_path, FORM, KEYS, LENGTHS, parts())
    about = tmp_path / CONTENT / store.ABOUT
    about.write_text(about.read_text().replace(*change, 1))
    with pytest.raises(InputError, match="store"):
        Store(tmp_path / CONTENT)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    free = size_of(FORM, 3, 6) + store.MARGIN
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: usage(0, 0, free - 1))
    with pytest.raises(InputError):
        write(tmp_path, FORM, KEYS, LENGTHS, parts())
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: usage(0, 0, free))
    write(tmp_path, FORM, KEYS, LENGTHS, parts())


def test_a_process_waits_for_the_one_that_fills_the_store(tmp_path):
    readable, writable = os.pipe()
    child = os.fork()
    if not child:
        with locked(tmp_path):
            os.write(writable, b"locked")
            time.sleep(0.4)
            (tmp_path / "done").touch()
        os._exit(0)
    os.read(readable, 6)
    with locked(tmp_path):
        assert (tmp_path / "done").exists()
    os.waitpid(child, 0)


def test_a_store_that_cannot_be_locked_is_refused(tmp_path):
    (tmp_path / "file").write_text("")  # as where another user has the folder
    with (
        pytest.raises(InputError, match="PETL_CACHE"),
        locked(tmp_path / "file"),
    ):
        pass


def test_a_store_of_another_user_is_not_read(tmp_path, monkeypatch):
    write(tmp_path, FORM, KEYS, LENGTHS, parts())
    monkeypatch.setattr(store.os, "access", lambda *given: False)
    assert not exists(tmp_path)
    with pytest.raises(InputError, match="index"):
        Store(tmp_path / CONTENT)


def test_another_ingredient_makes_another_store():
    names = {store.name_of(*each) for each in (("a", "b"), ("a", "c"), ("b", "b"), ("a",))}
    assert len(names) == 4
    assert store.name_of("a", "b") in names
