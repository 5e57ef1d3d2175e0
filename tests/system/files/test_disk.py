"""Files that several writers write at the same time, and who may read them."""

import torch
from safetensors.torch import save_file

from petl.system.files.disk import atomic_file, atomic_folder


def test_two_writers_of_one_file_leave_one_whole_content(tmp_path, monkeypatch):
    """As two processes that write one report: each has a draft of its own."""
    file, numbers = tmp_path / "report.html", iter((1, 2))
    monkeypatch.setattr("petl.system.files.disk.os.getpid", lambda: next(numbers))
    with atomic_file(file) as first:
        first.write(b"first, ")
        with atomic_file(file) as second:
            second.write(b"second")
        assert file.read_bytes() == b"second"
        first.write(b"whole")
    assert file.read_bytes() == b"first, whole"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_files_of_a_folder_can_be_read_by_whom_the_umask_allows(tmp_path):
    with atomic_folder(tmp_path / "adapter") as draft:
        save_file({"a": torch.ones(1)}, draft / "a.safetensors")  # for the user alone
        (draft / "config.json").write_text("{}")
        (draft / "deeper").mkdir()
        save_file({"a": torch.ones(1)}, draft / "deeper" / "a.safetensors")
    found = {f.stat().st_mode & 0o777 for f in (tmp_path / "adapter").rglob("*") if f.is_file()}
    (tmp_path / "plain").touch()
    assert found == {(tmp_path / "plain").stat().st_mode & 0o777}
