"""Each promise of SECURITY.md names a test of it, and the tests named there and in README exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECURITY = (ROOT / "SECURITY.md").read_text()
NAMES = re.findall(r"tests/[\w/]+\.py::\w+", SECURITY)


def promises():
    """The items of the section of promises."""
    _, _, rest = SECURITY.partition("\n## What petl promises")
    section, _, _ = rest.partition("\n## ")
    return [item.partition("\n\n")[0] for item in section.split("\n- ")[1:]]


IN_README = re.findall(r"tests/[\w/]+\.py::\w+", (ROOT / "README.md").read_text())


@pytest.mark.parametrize("name", sorted({*NAMES, *IN_README}))
def test_a_test_that_a_promise_names_exists(name):
    file, _, function = name.partition("::")
    tree = ast.parse((ROOT / file).read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert function.startswith("test_")


@pytest.mark.parametrize("promise", promises(), ids=lambda text: " ".join(text.split()[:3]))
def test_each_promise_names_a_test(promise):
    assert [name for name in NAMES if name in promise]
