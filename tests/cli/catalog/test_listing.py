"""`petl methods` is fast because it reads a cache; the cache equals what the code computes."""

import json
import shutil
from dataclasses import asdict
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import pytest
import warm_python
from fresh_python import SLOW, fresh

import petl
from petl.cli.catalog import listing, verdicts
from petl.cli.catalog.method_page import page_of
from petl.system.settings import command_line
from petl.system.settings.command_line import config_dir

PROGRAM = """
import sys
from petl.cli import main
assert main.main(["methods"]) == 0
print(*sys.modules)
"""


def without_versions(tables: list[dict]) -> list[dict]:
    """The tables without the version of PEFT: another version may give the same counts."""
    return [{**table, "title": table["title"].partition("; PEFT")[0]} for table in tables]


@pytest.fixture(scope="module")
def computed() -> list[listing.ListingTable]:
    """The tables as the code computes them."""
    return listing.compute_tables()


@pytest.mark.thorough
def test_the_committed_listing_equals_what_the_code_computes(computed):
    kept = json.loads(listing.CACHE.read_text())
    assert kept["made_of"] == listing.fingerprint(), "run: python scripts/support.py"
    found = json.loads(json.dumps([asdict(table) for table in computed]))
    assert without_versions(kept["tables"]) == without_versions(found), (
        "run: python scripts/support.py"
    )


def test_petl_methods_imports_nothing_slow():
    *lines, modules = fresh(PROGRAM).splitlines()
    assert not set(modules.split()) & (SLOW - {"hydra"})
    assert {line.split()[0] for line in lines if line} >= {*petl.list_methods(), "density", "deft"}


@pytest.mark.thorough
def test_petl_show_reads_no_data_and_loads_no_model():
    show = PROGRAM.replace('"methods"', '"show", "mola"')
    modules = set(fresh(show, python=warm_python.without_peft()).splitlines()[-1].split())
    assert not modules & {"datasets", "pandas", "petl.data.models.loading", "petl.data.base"}


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a copy of the configurations."""
    copy = shutil.copytree(config_dir(), tmp_path / "configs")
    for module in (command_line, listing):
        monkeypatch.setattr(module, "config_dir", lambda: copy)
    return copy


@pytest.mark.thorough
def test_a_changed_yaml_is_counted_again(configs, caplog, monkeypatch):
    monkeypatch.setattr("petl.methods.BUILT_IN", ("lora", "mola"))  # all would take seconds

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
    assert "counting parameters" in caplog.text


def test_an_added_method_makes_the_cache_out_of_date(tmp_path, monkeypatch):
    before = listing.fingerprint()
    copy = shutil.copytree(
        listing.PACKAGE, tmp_path / "petl", ignore=shutil.ignore_patterns("*.pyc")
    )
    monkeypatch.setattr(listing, "PACKAGE", copy)
    assert listing.fingerprint() == before
    (copy / "methods" / "mine.py").touch()
    assert listing.fingerprint() != before


@pytest.mark.thorough
def test_methods_are_grouped_by_need_and_each_need_recommends_one_at_most(computed):
    methods, *_, recommended = computed
    needs = [row[2] for row in methods.rows]
    assert methods.rows[0][0] == "lora"
    assert list(dict.fromkeys(needs)) == [need for need, _ in groupby(needs)]  # each in one piece
    assert all(needs)
    chosen = [row[0] for row in recommended.rows]
    assert len(set(chosen)) == len(chosen)
    firsts = {need: next(rows)[0] for need, rows in groupby(methods.rows, itemgetter(2))}
    assert all(firsts[need] == name for need, name, _ in recommended.rows)


@pytest.mark.parametrize(
    ("paper", "short"),
    [
        ("Hu et al. 2022, LoRA: A, B, arXiv:2106.09685", "Hu et al. 2022, arXiv:2106.09685"),
        ("Nobody 2020, A paper without a number", "Nobody 2020, A paper without a number"),
    ],
)
def test_a_paper_is_named_without_its_title(paper, short):
    assert listing.short_paper(paper) == short


def test_verdicts_on_claims_are_listed_and_shown_with_their_methods(tmp_path, monkeypatch):
    row = {
        "claim": "sharing",
        "methods": ["mos"],
        "statement": "MoS equals LoRA",
        "verdict": "holds",
        "difference": "+0.10 (-0.30 to +0.50) points",
    }
    other = {**row, "claim": "buckets", "methods": [], "statement": "buckets save time"}
    file = tmp_path / "verdicts.json"
    file.write_text(json.dumps([row, other]))
    monkeypatch.setattr(verdicts, "FILE", file)
    (table,) = [table for table in listing.listing() if "claims" in table.title]
    assert table.rows == [
        ["holds", "sharing", "MoS equals LoRA", "+0.10 (-0.30 to +0.50) points"],
        ["holds", "buckets", "buckets save time", "+0.10 (-0.30 to +0.50) points"],
    ]
    said = "tried: MoS equals LoRA: holds, +0.10 (-0.30 to +0.50) points"
    assert [fact for fact in page_of("mos").facts if fact.startswith("tried")] == [said]
    assert not [fact for fact in page_of("lora").facts if fact.startswith("tried")]
