"""`import petl` is fast, and petl's methods are registered with PEFT in either import order."""

import ast
import importlib
import importlib.util
import inspect
import logging
import sys
import threading
from pathlib import Path

import pytest
import torch
import warm_python
from fresh_python import SLOW, fresh

import petl
from petl import testing
from petl.system.imports import peft_hook
from petl.system.imports.peft_hook import without_import_noise
from petl.testing import Case

CASE = Case("mola", "llama")
# what imports PEFT, and when
ORDERS = {
    "petl first": "import petl; from peft import PeftModel",
    "PEFT first": "from peft import PeftModel; import petl, importlib; importlib.reload(petl)",
    "Trainer is what imports PEFT": "import petl; from transformers import Trainer; import peft",
    "a module of petl imports PEFT": "from petl.core.losses import LOSSES; import peft",
}
LOAD = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, saved = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
batch, expected = torch.load(saved)
with torch.no_grad():
    # a file's tensors lie elsewhere in memory, by which products may round otherwise
    print(torch.allclose(model(**batch).logits, expected, atol=1e-5))
print([finder for finder in sys.meta_path if "petl" in str(finder)])
"""


# Cost of importing petl


def test_import_petl_imports_nothing_slow():
    found = set(fresh("import sys, petl, petl.errors; print(*sys.modules)").split())
    assert not found & SLOW
    assert {name for name in found if name.startswith("petl")} == {
        "petl",
        "petl.errors",
        "petl.system",
        "petl.system.imports",
        "petl.system.imports.peft_hook",
        "petl.version",
    }


def test_type_checkers_see_lazily_imported_names():
    block = next(n for n in ast.parse(inspect.getsource(petl)).body if isinstance(n, ast.If))
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    packages = set(petl._PACKAGES)
    assert set(petl.__all__) == set(seen) - packages
    assert set(seen) <= set(dir(petl))
    for name, module in seen.items():
        home = "petl.core.registry" if module == "petl.signatures" else str(module)  # a stub
        assert getattr(petl, name) is getattr(importlib.import_module(home), name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'warp'"):
        petl.warp  # noqa: B018
    with pytest.raises(ImportError):
        exec("from petl import warp")


# PEFT's side


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Save a base model, a MoLA adapter for it, and a batch with their logits."""
    folder = tmp_path_factory.mktemp("saved")
    files = [folder / "base", folder / "adapter", folder / "outputs.pt"]
    model, batch = CASE.wrap_stirred(), CASE.batch()
    CASE.base().save_pretrained(files[0])
    model.save_pretrained(files[1])
    torch.save((batch, testing.logits(model, batch)), files[2])
    return files


@pytest.mark.cells(1)
@pytest.mark.parametrize("first", ORDERS.values(), ids=ORDERS)
def test_peft_loads_an_adapter_of_petl_in_a_fresh_process(first, saved):
    code = f"import sys; assert 'peft' not in sys.modules\n{first}\n{LOAD}"
    assert fresh(code, *saved, python=warm_python.without_peft()) == "True\n[]\n"


# The finder, on a stand-in for PEFT


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a package `host` in place of PEFT, and `guest`, which registers with it."""
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "__init__.py").write_text("import time; time.sleep(0.05); known = []\n")
    (tmp_path / "guest.py").write_text("import host; host.known.append('guest')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(peft_hook, "PEFT", "host")
    monkeypatch.setattr(peft_hook, "REGISTERING", ("guest",))
    yield tmp_path
    for name in ("host", "guest"):
        sys.modules.pop(name, None)


def waiting() -> int:
    return sum(isinstance(finder, peft_hook.PeftFinder) for finder in sys.meta_path)


def test_there_is_one_finder_until_methods_are_registered(stand_in):
    before = list(sys.meta_path)
    peft_hook.register_with_peft()
    peft_hook.register_with_peft()
    assert waiting() == 1
    assert importlib.import_module("host").known == ["guest"]
    assert sys.meta_path == before
    peft_hook.register_with_peft()  # as importlib.reload(petl) does
    assert sys.meta_path == before
    assert sys.modules["host"].known == ["guest"]


def test_finding_peft_does_not_register(stand_in):
    peft_hook.register_with_peft()
    assert importlib.util.find_spec("host") is not None
    assert "host" not in sys.modules
    assert importlib.import_module("host").known == ["guest"]


def test_peft_has_its_own_loader_after_the_import(stand_in):
    peft_hook.register_with_peft()
    host = importlib.import_module("host")
    loader = host.__spec__.loader
    assert isinstance(loader, importlib.machinery.SourceFileLoader)
    assert host.__loader__ is loader
    assert inspect.getsource(host).endswith("known = []\n")
    assert importlib.reload(host).known == []  # reloading does not register again


def test_missing_peft_is_still_missing(stand_in):
    (stand_in / "host" / "__init__.py").unlink()
    (stand_in / "host").rmdir()
    peft_hook.register_with_peft()
    assert importlib.util.find_spec("host") is None
    with pytest.raises(ModuleNotFoundError, match="host"):
        importlib.import_module("host")


def test_noisy_messages_are_dropped_only_while_peft_is_imported(caplog, monkeypatch):
    def said() -> list[str]:
        caplog.clear()
        for name, message in (
            (
                "bitsandbytes.backends.cpu.ops",
                "Failed to load CPU gemm_4bit_forward from "
                "kernels-community: No module named 'kernels'.",
            ),
            ("bitsandbytes.backends.cpu.ops", "another thing"),
            ("torchao", "Failed to load /site/torchao/_C_mxfp8.cpython-310-x86_64-linux-gnu.so: x"),
        ):
            logging.getLogger(name).warning(message)
        return [record.getMessage()[:20] for record in caplog.records]

    everything = said()
    assert len(everything) == 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with without_import_noise():
        assert said() == ["another thing"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with without_import_noise():
        assert said() == everything[1:]
    assert said() == everything


def test_an_error_while_registering_is_raised_again_by_the_next_import(stand_in):
    (stand_in / "guest.py").write_text("raise RuntimeError('unfit')\n")
    peft_hook.register_with_peft()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="unfit"):
            importlib.import_module("host")
    assert "host" not in sys.modules


def test_threads_that_import_together_all_find_methods_registered(stand_in):
    peft_hook.register_with_peft()
    start, found = threading.Barrier(8), []

    def work() -> None:
        start.wait()
        peft_hook.register_with_peft()
        found.append(list(importlib.import_module("host").known))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=280)
    assert found == [["guest"]] * 8
    assert waiting() == 0
