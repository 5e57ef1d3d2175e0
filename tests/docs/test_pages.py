"""README and pages: short, linked, current."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import warm_python
from run_page import blocks

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
TOP = ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")
PAGES = [*(ROOT / f"{name}.md" for name in TOP), *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """The text of a page without its code blocks."""
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as MkDocs and forges make them."""
    heads = re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE)
    plain = (re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", head).lower() for head in heads)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", head).strip()) for head in plain}


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 200


def test_the_two_commands_of_readme_are_those_that_ci_runs():
    first, second = [block.code.strip() for block in blocks(README.read_text())][:2]
    assert first == "pip install -e '.[quickstart]' && python train.py +method=mola"
    assert second == "pip install -e '.[test]' && pytest"
    assert second in (ROOT / ".ci/run").read_text().splitlines()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page):
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def test_commands_fit_the_column_of_a_page():
    for page in (ROOT / "docs").rglob("*.md"):
        shell = [b for b in blocks(page.read_text()) if b.language == "bash"]
        too_long = [line for b in shell for line in b.code.splitlines() if len(line) > 91]
        assert too_long == [], page


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert str(page.relative_to(ROOT / "docs")) in navigation


def test_extras_that_pages_name_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    for page in PAGES:
        for found in re.findall(r"(?<=['`])\.\[([\w,]+)\]", page.read_text()):
            assert set(found.split(",")) <= extras, f"{page.name}: {found}"


@pytest.mark.thorough
def test_generated_parts_are_current():
    script = ROOT / "scripts" / "build_docs.py"
    command = [warm_python.python(), str(script), "check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}"
