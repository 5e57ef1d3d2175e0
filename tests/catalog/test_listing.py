"""`petl methods` is quick because it reads a file, and the file says what the code says."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from fresh_python import SLOW, fresh

import petl
from petl.catalog import listing
from petl.config import compose
from petl.config.compose import config_dir

SPOKEN = """
import sys
from petl.cli import main
assert main.main(["methods"]) == 0
print(*sys.modules)
"""


def without_versions(tables: list[dict]) -> list[dict]:
    """The tables, their titles cut before the version of PEFT: another may count the same."""
    return [{**table, "title": table["title"].partition("; counted")[0]} for table in tables]


def test_the_committed_listing_is_what_the_code_says():
    kept = json.loads(listing.KEPT.read_text())
    assert kept["made_of"] == listing.made_of(), "run: python scripts/support.py"
    found = json.loads(json.dumps([asdict(table) for table in listing.find_out()]))
    assert without_versions(kept["tables"]) == without_versions(found), (
        "run: python scripts/support.py"
    )


def test_petl_methods_imports_nothing_that_is_slow():
    *lines, modules = fresh(SPOKEN).splitlines()
    assert not set(modules.split()) & (SLOW - {"hydra"})
    assert {line.split()[0] for line in lines if line} >= {*petl.list_methods(), "density", "deft"}


def test_petl_show_reads_no_data_and_loads_no_model():
    modules = set(fresh(SPOKEN.replace('"methods"', '"show", "mola"')).splitlines()[-1].split())
    assert not modules & {"datasets", "pandas", "petl.models.loading", "petl.data"}


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the configurations, in their place."""
    copy = shutil.copytree(config_dir(), tmp_path / "configs")
    for module in (compose, listing):
        monkeypatch.setattr(module, "config_dir", lambda: copy)
    return copy


def test_a_yaml_that_was_changed_is_counted_again(configs, caplog):
    def of_lora() -> int:
        (row,) = [row for row in listing.listing()[0].rows if row[0] == "lora"]
        return int(row[1].replace(",", ""))

    with caplog.at_level("INFO", "petl"):
        before = of_lora()
        assert not caplog.records
        yaml = configs / "method" / "lora.yaml"
        text = yaml.read_text()
        assert "\nr: 8" in text
        yaml.write_text(text.replace("\nr: 8", "\nr: 16"))
        assert of_lora() == 2 * before
    assert "counting again" in caplog.text


def test_a_method_that_was_added_is_not_forgotten(tmp_path, monkeypatch):
    before = listing.made_of()
    copy = shutil.copytree(
        listing.PACKAGE, tmp_path / "petl", ignore=shutil.ignore_patterns("*.pyc")
    )
    monkeypatch.setattr(listing, "PACKAGE", copy)
    assert listing.made_of() == before
    (copy / "methods" / "mine.py").touch()
    assert listing.made_of() != before
