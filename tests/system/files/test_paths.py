"""Paths that settings name."""

import os

import pytest

from petl.errors import InputError
from petl.system.files.paths import file_of, path_of

IMPOSSIBLE = ["", "a" * 5000, f"{'a/' * 3000}b", "a\0b", "a\ud800"]


@pytest.mark.parametrize("text", IMPOSSIBLE, ids=lambda text: ascii(text)[:12])
def test_a_path_that_no_file_can_have_is_refused(text):
    with pytest.raises(InputError, match=r"data\.train=") as refused:
        path_of("data.train", text)
    assert len(str(refused.value)) < 600


def test_other_paths_need_not_exist(tmp_path):
    assert path_of("data.train", str(tmp_path / "a")) == tmp_path / "a"
    assert path_of("data.train", "~/a").is_absolute()


def test_what_stands_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "data.csv").touch()
    os.mkfifo(tmp_path / "fifo.csv")
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    for name, reason in {
        "": "is a directory, not a file",
        "fifo.csv": "is not a regular file but a pipe or device",
        "loop.csv": "is a link to a file that does not exist",
        "dat.csv": "does not exist; did you mean 'data.csv'",
        "missing/a.csv": "does not exist, nor does its directory",
    }.items():
        with pytest.raises(InputError, match=reason) as refused:
            file_of("data.train", f"{tmp_path}/{name}", [".csv"])
        assert f"did you mean {name!r}" not in str(refused.value)
    assert file_of("data.train", f"{tmp_path}/data.csv") == tmp_path / "data.csv"
