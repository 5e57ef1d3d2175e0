"""The structure of the tree: imports point one way, tests mirror the package, names agree.

`scripts/structure.py` prints the figures that these tests bound.
"""

import ast
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

import petl

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

import structure  # noqa: E402

OWN = [name for name in petl.list_methods() if petl.method(name).own]

# A package of petl/ may import what comes before it, and itself.
ORDER = (
    "version",
    "errors",
    "system",
    "ops",
    "core",
    "efficiency",
    "data",
    "training",
    "methods",
    "adapters",
    "generation",
    "experiments",
    "cli",
    "testing",
    "__main__",
)
# Tests that are about more than one module: whole runs, all methods, promises, pages of the docs.
CROSS_CUTTING = {
    "compatibility",
    "contract",
    "docs",
    "fixtures",
    "journeys",
    "scripts",
    "security",
    "silent_wrongs",
}


def package_of(module: str) -> str:
    """The package of petl/ that `module` is in; "" for petl itself."""
    return module.removeprefix("petl").removeprefix(".").partition(".")[0]


MODULES = structure.modules()
INSIDE = sorted(module for module in MODULES if module != "petl")


def test_imports_point_one_way():
    for module in INSIDE:
        own = package_of(module)
        assert own in ORDER, f"{module} is in no package that ORDER names"
        for imported in structure.imports(module):
            package = package_of(imported)
            assert imported != "petl", f"{module} imports petl itself"
            assert ORDER.index(package) <= ORDER.index(own), f"{module} imports {imported}"


def test_no_files_import_each_other_in_a_circle():
    assert structure.cycles() == []


def test_chains_of_imports_are_short():
    chain = structure.longest_chain()
    assert len(chain) <= 15, " -> ".join(chain)


def test_few_files_stand_outside_a_folder():
    assert len(list((ROOT / "petl").glob("*.py"))) <= 4


def room_of(module: str) -> str:
    """The method or loss that a module belongs to; "" for one that belongs to none."""
    parts = module.split(".")[2:]
    if not module.startswith("petl.methods.") or parts[0] == "families":
        return ""
    return ".".join(parts[:2]) if parts[0] == "losses" else parts[0]


def test_methods_and_losses_never_import_one_another():
    for module in INSIDE:
        own = room_of(module)
        if own and own != "losses":
            rooms = {room_of(name) for name in structure.imports(module)}
            assert rooms <= {own, ""}, f"{module} imports {rooms - {own, ''}}"


def test_the_loop_knows_no_method():
    names = set(petl.list_methods()) - {"adapter", "sparse"}  # also words of their own
    for module in INSIDE:
        if package_of(module) == "training":
            nodes = [*ast.walk(ast.parse(MODULES[module].read_text()))]
            docs = [node.value for node in nodes if isinstance(node, ast.Expr)]
            texts = [node.value for node in nodes if is_text(node) and node not in docs]
            words = {word for text in texts for word in re.findall(r"\w+", text)}
            assert not words & names, f"{module} names a method"


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_private_parts_of_peft_are_used_in_one_place():
    for module, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ImportFrom) or not str(node.module).startswith("peft"):
                continue
            private = [alias.name for alias in node.names if alias.name.startswith("_")]
            assert not private or module == "petl.core.compat", f"{module} imports {private}"
            inside = str(node.module).startswith("peft.tuners") and module.startswith("petl.core.")
            assert not inside or module == "petl.core.compat", f"{module} imports {node.module}"


@pytest.mark.parametrize("file", sorted((ROOT / "scripts").rglob("*.py")), ids=lambda f: f.stem)
def test_scripts_import_what_is_there(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "petl":
            module = import_module(str(node.module))
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                assert hasattr(module, alias.name) or full in MODULES, f"{file} imports {full}"


def test_no_module_is_called_after_nothing():
    nothing = {"utils", "helpers", "common", "misc", "util"}
    assert not [file for file in MODULES.values() if file.stem in nothing]


def test_each_test_file_stands_where_its_module_does():
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        place = file.relative_to(ROOT / "tests")
        if place.parts[0] in CROSS_CUTTING or len(place.parts) == 1:
            continue
        folder = ROOT / "petl" / place.parent
        stems = {path.stem for path in folder.iterdir()}
        subject = file.stem.removeprefix("test_")
        fits = [stem for stem in stems if f"{subject}_".startswith(f"{stem}_")]
        assert fits, f"tests/{place}: petl/{place.parent} has no module of that name"


@pytest.mark.parametrize("name", OWN)
def test_one_word_from_the_file_to_the_tensors(name):
    capital = "".join(part.capitalize() for part in name.split("_"))
    config_cls = petl.get(name)
    assert config_cls.__module__.split(".")[:3] == ["petl", "methods", name]
    assert config_cls.__name__ == f"{capital}Config"
    config = petl.build_config(name)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    assert tuner.__name__ == f"{capital}Model"
    if not petl.method(name).has_inner:  # else the adapter is another method's
        adapter = "BottleneckAdapter" if name == "adapter" else f"{capital}Adapter"
        assert tuner.method.adapter_cls.__name__ == adapter
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
