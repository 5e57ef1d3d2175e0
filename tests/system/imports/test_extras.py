"""The commands that install optional packages."""

import tomllib
from pathlib import Path

import pytest

import petl
from petl.system.imports import extras
from petl.system.imports.extras import install_hint, need_extra, optional

ROOT = Path(petl.__file__).parents[1]


def test_extras_are_installed_by_the_name_of_the_distribution():
    assert install_hint("sweep") == "pip install 'petl-peft[sweep]'"


def test_the_name_of_the_distribution_is_that_of_the_project_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == extras.DISTRIBUTION


def test_every_extra_in_a_hint_exists():
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"sweep", "plots", "quantized", "smollm2", "reasoning", "tracking", "image"} <= set(
        known
    )


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    with pytest.raises(petl.InputError, match=r"no_such is not .*\[audio\]'"):
        optional("no_such.module", "audio")
    with pytest.raises(petl.InputError, match=r"x=y needs the package no_such, .*\[sweep\]'"):
        need_extra("sweep", "no_such", "x=y")


def test_messages_take_install_commands_of_extras_from_one_function():
    for file in (ROOT / "petl").rglob("*.py"):
        if file.name not in ("extras.py", "support.py"):  # support.py writes a page of the docs
            text = file.read_text()
            assert "pip install -e" not in text, file
            assert "pip install '" not in text, file
