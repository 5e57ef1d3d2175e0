import argparse
import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest

from petl.cli import main
from petl.system.imports.collector import RARE, rare_collections
from petl.training import program as app


@pytest.fixture
def own() -> tuple[int, int, int]:
    """The thresholds of the process of the tests."""
    return gc.get_threshold()


@pytest.fixture(autouse=True)
def _frozen_again() -> Iterator[None]:
    """Leave what is imported out of the collections of later tests, as before these."""
    yield
    gc.freeze()


def test_full_collections_skip_what_the_block_made() -> None:
    gc.unfreeze()
    with rare_collections():
        made = [[] for _ in range(1000)]
    assert gc.get_freeze_count() >= len(made)


@pytest.mark.parametrize(("module", "left"), [("triton", True), ("other", False)])
def test_the_last_collection_sees_all_where_triton_reports_what_it_misses(module, left) -> None:
    code = (
        "import atexit, gc, sys, types\n"
        "atexit.register(lambda: print(gc.get_freeze_count() == 0))\n"
        "from petl.system.imports.collector import rare_collections\n"
        f"with rare_collections(): sys.modules[{module!r}] = types.ModuleType({module!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{left}\n"


def test_thresholds_are_those_of_before_also_after_an_error(own) -> None:
    seen = []

    def import_nothing() -> None:
        with rare_collections():
            seen.append(gc.get_threshold()[0])
            raise ImportError

    with pytest.raises(ImportError):
        import_nothing()
    assert seen == [RARE]
    assert gc.get_threshold() == own


def test_importing_petl_changes_no_threshold() -> None:
    code = (
        "import gc; before = gc.get_threshold(); import petl; print(before == gc.get_threshold())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_training_collects_as_usual(own, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("petl.cli.start.main", lambda words: seen.append(gc.get_threshold()) or 0)
    assert main.main(["train", "+method=lora"]) == 0
    assert seen == [own]


def test_a_command_imports_with_rare_collections(own, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(command: object, arguments: argparse.Namespace, **options: object) -> int:
        seen.append(gc.get_threshold()[0])
        return 0

    monkeypatch.setattr(app, "run_command", run)
    assert main.main(["methods"]) == 0
    assert seen == [RARE]
    assert gc.get_threshold() == own
