"""Files that several writers write at the same time."""

from petl.system.files.disk import atomic_file


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
