"""Where things stand: imports point one way, and one word runs from the file to the tensors."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

import petl

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "petl"
FILES = sorted(PACKAGE.rglob("*.py"))
OWN = [name for name in petl.list_methods() if petl.method(name).own]

# The side of data, tasks and models: it knows nothing of methods and training.
DATA_SIDE = {
    "data",
    "errors",
    "fields",
    "hub",
    "installed",
    "model_faults",
    "model_sources",
    "models",
    "quantising",
    "smollm2",
    "tasks",
}


def name_of(file: Path) -> str:
    """`petl.core.layers.layer`, or `petl.core` for its __init__.py."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> set[str]:
    return {name_of(file) for file in FILES}


def imports(file: Path) -> Iterator[str]:
    """The modules that a file imports, as `petl.core.layers.layer` rather than `petl.core`.

    A method that is a folder may import what is in it; that is left out.
    """
    known, method = modules(), ".".join(name_of(file).split(".")[:3])
    for node in ast.walk(ast.parse(file.read_text())):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            wholes = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [whole if whole in known else str(node.module) for whole in wholes]
        for name in found:
            if not (name.startswith(f"{method}.") and method.startswith("petl.methods.")):
                yield name


def part_of(module: str) -> str:
    """`core` of `petl.core.layers.layer`; "" of petl itself."""
    return module.partition(".")[2].partition(".")[0]


def of_ours(file: Path) -> set[str]:
    """The parts of petl that a file imports."""
    names = (name for name in imports(file) if name.split(".")[0] == "petl")
    return {part_of(name) for name in names}


def files_in(folder: str) -> list[Path]:
    return sorted((PACKAGE / folder).rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_point_one_way(file):
    part = part_of(name_of(file))
    allowed = {
        "core": {"core", "ops", "errors"},
        "ops": {"ops"},
        "methods": {"core", "ops", "errors", "methods"},  # of its own folder: see the next test
        "losses": {"core", "ops", "errors", "losses"},
        "errors": set(),
    }.get(part)
    if allowed is None and part in DATA_SIDE:
        allowed = DATA_SIDE
    if allowed is None:
        allowed = {part_of(name) for name in modules()}
        allowed -= {"testing"} if part != "testing" else set()
    strange = of_ours(file) - allowed
    assert not strange, f"{name_of(file)} imports petl.{', petl.'.join(sorted(strange))}"


def test_methods_and_losses_never_import_one_another():
    for folder in ("methods", "losses"):
        for file in files_in(folder):
            own = "" if file.parent.name == folder else name_of(file.parent / "__init__.py")
            others = [n for n in imports(file) if re.match(r"petl\.(methods|losses)\.", n)]
            strange = [n for n in others if not own or not f"{n}.".startswith(f"{own}.")]
            assert not strange, f"{file.name} imports {strange}"


def test_the_loop_knows_no_method():
    for module in ("loop", "evaluate", "run", "checkpoint", "optim", "callback"):
        file = PACKAGE / f"{module}.py"
        assert not of_ours(file) & {"methods", "losses"}
        words = {node.value for node in ast.walk(ast.parse(file.read_text())) if is_text(node)}
        names = set(petl.list_methods()) - {"adapter"}  # also the word for what is saved
        assert not words & names, f"{module}.py names a method"


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_private_parts_of_peft_are_used_in_one_place():
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ImportFrom) or not str(node.module).startswith("peft"):
                continue
            private = [alias.name for alias in node.names if alias.name.startswith("_")]
            assert not private or file.name == "compat.py", f"{file} imports {private}"
            inside = str(node.module).startswith("peft.tuners") and file.parent.name == "core"
            assert not inside or file.name == "compat.py", f"{file} imports {node.module}"


def test_no_drawer_for_odds_and_ends():
    drawers = {"utils", "helpers", "common", "misc", "util"}
    assert not [file for file in FILES if file.stem in drawers]


@pytest.mark.parametrize("name", OWN)
def test_one_word_from_the_file_to_the_tensors(name):
    capital = "".join(part.capitalize() for part in name.split("_"))
    config_cls = petl.get(name)
    assert config_cls.__module__.split(".")[:3] == ["petl", "methods", name]
    assert config_cls.__name__ == f"{capital}Config"
    config = petl.build_config(name)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    assert tuner.__name__ == f"{capital}Model"
    if petl.method(name).variant is None:  # else the adapter is another method's
        assert tuner.adapter_cls.__name__ == f"{capital}Adapter"
    assert tuner.prefix == f"petl_{name}_"
    assert config.peft_type.value == f"PETL_{name.upper()}"
    assert (ROOT / "tests" / "methods" / f"test_{name}.py").is_file()


def test_each_method_has_a_yaml_of_its_name_and_each_yaml_a_method():
    folder = ROOT / "configs" / "method"
    files = {file.stem for file in folder.glob("*.yaml")}
    recipes = {f for f in folder.glob("*.yaml") if f.read_text().startswith("# @package _global_")}
    for file in set(folder.glob("*.yaml")) - recipes:  # a recipe composes a method and more
        named = yaml.safe_load(file.read_text()).get("name")
        assert named in petl.list_methods(), f"{file.name} names method {named!r}"
    assert set(petl.list_methods()) <= files


def test_the_public_names_are_there():
    for name in petl.__all__:
        assert getattr(petl, name) is not None
