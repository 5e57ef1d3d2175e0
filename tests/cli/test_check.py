"""The command `petl check`: exit status, table, JSON."""

import json
import shutil

import checked_folders as folders
import pytest

from petl.cli.main import main


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(folders.healthy("rslora", "petl"), tmp_path / "adapter")


def test_a_healthy_adapter_is_status_0(folder, capsys):
    assert main(["check", str(folder), "--strict"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{folder}: rsLoRA r 8, 3 blocks of 3, from petl ")
    assert any("not checked: base.fits" in line and "no base given" in line for line in lines)


def test_an_error_is_status_1_and_a_warning_only_with_strict(folder, capsys):
    assert main(["check", str(folder), "--engine", "sglang"]) == 1
    assert "2.8 times too weak" in capsys.readouterr().out
    (folder / "optimizer.pt").write_bytes(b"")
    assert main(["check", str(folder)]) == 0
    assert main(["check", str(folder), "--strict"]) == 1


def test_what_cannot_be_read_is_status_2(folder, capsys):
    (folder / "adapter_config.json").write_text("{")
    assert main(["check", str(folder)]) == 2
    assert main(["check", str(folder.parent)]) == 2


def test_json_has_everything(folder, capsys):
    (folder / "optimizer.pt").write_bytes(b"")
    main(["check", str(folder), "--json"])
    content = json.loads(capsys.readouterr().out)
    assert content["kind"] == "rsLoRA r 8, 3 blocks of 3"
    warning, note = content["findings"][0], content["findings"][1]
    assert warning["id"] == "leftovers.files"
    assert warning.keys() == {"id", "severity", "what", "where", "remedy"}
    assert note["severity"] == "note"
    assert {"id": "base.fits", "reason": "no base given: --base FOLDER"} in content["not_checked"]
