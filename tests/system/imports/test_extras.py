"""The commands that install optional packages."""

import tomllib
from pathlib import Path

import petl
from petl.system.imports import extras

ROOT = Path(petl.__file__).parents[1]


def test_the_name_of_the_distribution_is_that_of_the_project_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == extras.DISTRIBUTION


def test_every_extra_in_a_hint_exists():
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"sweep", "quantized", "smollm2", "reasoning", "tracking", "image"} <= set(known)


def test_messages_take_install_commands_of_extras_from_one_function():
    for file in (ROOT / "petl").rglob("*.py"):
        if file.name not in ("extras.py", "support.py"):  # support.py writes a page of the docs
            text = file.read_text()
            assert "pip install -e" not in text, file
            assert "pip install '" not in text, file
