"""Entry points of methods, and the setting `imports`: what is imported, and what is reported."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import warm_python
from plugin_package import ROOT, environment, write_metadata

import petl
from petl.errors import InputError
from petl.system.imports import peft_hook
from petl.system.imports.peft_hook import import_modules, load_plugins, not_yet_trusted

TAKEN = """
import peft, petl
petl.adopt("mola", peft.LoraConfig, summary="another", paper="")
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that Python imports from, in a process without memory of other plugins."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(peft_hook, "_tried", set())
    monkeypatch.setattr(peft_hook, "FAILED", {})
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("guest"):
            del sys.modules[name]


def write(site: Path, name: str, code: str) -> None:
    """A distribution `name` whose module, of the same name, has this code."""
    (site / f"{name}.py").write_text(code)
    write_metadata(site, f"[petl.methods]\n{name} = {name}\n", name.replace("_", "-"))


def test_the_modules_of_entry_points_are_imported_once(site):
    write(site, "guest_one", "import sys; sys.modules['guest_count'] = []")
    load_plugins()
    count = sys.modules["guest_count"]
    del sys.modules["guest_one"]
    load_plugins()
    assert sys.modules["guest_count"] is count


def test_a_broken_plugin_is_one_warning_and_the_others_load(site, caplog):
    write(site, "guest_bad", "import no_such_package")
    write(site, "guest_good", "")
    with caplog.at_level(logging.WARNING, "petl"):
        load_plugins()
        load_plugins()
    (message,) = caplog.messages
    for part in ("guest-bad 1.0", "guest_bad = guest_bad", "No module named 'no_such_package'"):
        assert part in message
    assert "guest_good" in sys.modules


def test_an_unknown_method_is_explained_by_its_broken_plugin(site):
    write(site, "guest_bad", "raise RuntimeError('unfit')")
    load_plugins()
    with pytest.raises(InputError, match=r"'guest_bad'.*unfit"):
        petl.method("guest_bad")


def test_a_name_that_is_taken_names_both(site, caplog):
    write(site, "guest_taken", TAKEN)
    load_plugins()
    (message,) = caplog.messages
    assert "guest-taken 1.0" in message
    assert "name 'mola' is taken by petl.methods.mola.MolaConfig" in message
    assert "choose another name for peft.tuners.lora.config.LoraConfig" in message


@pytest.mark.thorough
def test_plugins_are_imported_with_peft_and_not_with_petl(site):
    write(site, "guest_lazy", "import petl; print('loaded')")
    code = "import sys, petl; print(*sys.modules); print('---'); import peft"
    output = subprocess.run(
        [warm_python.without_peft(), "-c", code],
        env=environment(site),
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    before, _, after = output.partition("---")
    assert not {"peft", "guest_lazy"} & set(before.split())
    assert after.split() == ["loaded"]


# The setting `imports`


def test_imports_are_imported(site):
    (site / "guest_module.py").write_text("")
    import_modules(["guest_module"])
    assert "guest_module" in sys.modules
    import_modules(None)


def test_a_module_that_is_not_found_is_an_error_with_the_folders(site):
    with pytest.raises(InputError) as raised:
        import_modules(["guest_none"])
    words = ("'guest_none'", str(site), "PYTHONPATH=")
    assert all(word in str(raised.value) for word in words)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("x = 1\ny = x / 0\n", r"ZeroDivisionError: .*guest\.py, line 2"),
        ("import no_such_package\n", "'guest' .*ModuleNotFoundError"),
    ],
)
def test_a_module_that_fails_is_an_error_with_the_line_or_the_package(site, code, words):
    (site / "guest.py").write_text(code)
    with pytest.raises(InputError, match=words):
        import_modules(["guest"])


def test_modules_of_a_saved_run_are_trusted_if_something_else_imports_them(site):
    write(site, "guest_known", "")
    assert not_yet_trusted(["guest_known", "json", "guest_unknown"]) == ["guest_unknown"]
    assert not_yet_trusted(None) == []
