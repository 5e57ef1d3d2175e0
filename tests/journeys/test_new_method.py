"""A new method in the tree is three files by hand; one command writes all that follows."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import warm_python
from plugin_package import METHOD, YAML

ROOT = Path(__file__).parents[2]
REGISTRY = "from petl.core.method import Method\nfrom petl.core.register import register\n"
COPIED = ("petl", "configs", "docs", "scripts", "tests", "train.py", "pyproject.toml")
# inside the package, petl itself is not imported
IN_TREE = (
    METHOD.replace("import petl\n", "from petl.core.layers.layer import Adapter\n")
    .replace("from petl.core.spec.config", f"{REGISTRY}from petl.core.spec.config")
    .replace("petl.Adapter", "Adapter")
    .replace("@petl.register", "@register")
    .replace("petl.Method[", "Method[")
)
BY_HAND = {
    "petl/methods/diag.py": IN_TREE,
    "configs/method/diag.yaml": YAML,
    "tests/methods/test_diag.py": """
from petl import testing

CONTRACT = {"lr": 0.1}


def test_it_starts_at_the_base_model():
    case = testing.Case("diag")
    batch = case.batch()
    assert testing.difference(*(testing.logits(m, batch) for m in (case.wrap(), case.base()))) == 0
""",
}
GENERATED = {
    "docs/support.md",
    "petl/cli/catalog/listing.json",
    "petl/methods/index.json",
    "petl/signatures.pyi",
}
# what the tests of the tree ask of every method, of this one
TESTS = [
    *("tests/test_layout.py", "tests/methods/test_diag.py", "tests/contract/test_contract.py"),
    *("tests/cli/catalog", "tests/core/test_registry.py", "tests/core/test_registry_signatures.py"),
]


def python(words: list[str], tree: Path) -> str:
    """The output of Python with these arguments, in a copy of the tree; it must succeed."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [warm_python.python(), *words], cwd=tree, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def content(tree: Path) -> dict[str, bytes]:
    files = (file for file in tree.rglob("*") if file.is_file() and file.suffix != ".pyc")
    return {str(file.relative_to(tree)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with a new method in it."""
    folder = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__", "adapters", "checkpoints")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder / name)
    for name, text in BY_HAND.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.thorough
def test_one_command_writes_what_follows_and_the_tests_of_the_tree_pass(tree):
    before = content(tree)
    python(["scripts/support.py"], tree)
    after = content(tree)
    changed = {name for name in after if before.get(name) != after[name]}
    assert changed <= GENERATED, "scripts/support.py writes other files"
    assert all(b"diag" in after[name] for name in GENERATED)
    quick = "diag and not bert and not gpt2 and not t5 and not vit"  # one model of the contract
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "-k", quick]
    output = python(["-m", "pytest", *options, *TESTS], tree)
    assert " passed" in output
