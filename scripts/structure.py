"""Print figures about the structure of the code, and how they compare with their bounds.

    python scripts/structure.py           # from the source: sizes, cycles, types, docstrings
    python scripts/structure.py --run     # also runs: files in a training run, in a layer's pass

The bounds are tested in tests/test_layout.py and tests/journeys/test_structure.py.
"""

import argparse
import ast
import contextlib
import functools
import re
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import networkx

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "petl"
# Lines that each package may have. A feature pays for its lines by what it makes unnecessary: lower
# a budget when a package shrinks; who raises one says why in the change.
BUDGETS = {
    "system": 3947,
    "ops": 3792,
    "core": 14973,
    "efficiency": 10430,
    "data": 17929,
    "training": 17756,
    "methods": 19924,
    "adapters": 9768,
    "generation": 8346,
    "experiments": 9273,
    "cli": 4855,
    "testing": 3182,
}
OWN_LINES = 415
OTHERS = {"scripts": 16893, "tests": 89600}
COUNTED = ("quickstart", "loaded", "mola", "lora")
SHORT = ["train.steps=3", "data.train_rows=64", "data.test_rows=16"]  # of the quickstart


class Figure(NamedTuple):
    """One line of the output: a value, and the bound that it has to keep."""

    name: str
    value: float
    bound: float
    at_most: bool = True

    @property
    def holds(self) -> bool:
        """Whether the value keeps its bound."""
        return self.value <= self.bound if self.at_most else self.value >= self.bound


# Imports


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of petl with its file; a package by the name of its folder."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@functools.cache
def imports(module: str) -> frozenset[str]:
    """The modules of petl that a module imports, in functions and for type checkers included."""
    known, found = modules(), set()
    for node in ast.walk(ast.parse(known[module].read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else str(node.module))
    return frozenset(name for name in found if name in known and name != module)


@functools.cache
def graph() -> networkx.DiGraph:
    """Modules as nodes, imports as edges; without `petl` itself, which only names public names."""
    found = networkx.DiGraph()
    found.add_nodes_from(inside())
    found.add_edges_from((m, other) for m in inside() for other in imports(m) if other != "petl")
    return found


def cycles() -> list[list[str]]:
    """Groups of modules that import each other, directly or through others."""
    groups = networkx.strongly_connected_components(graph())
    return [sorted(group) for group in groups if len(group) > 1]


def longest_chain() -> list[str]:
    """The longest chain of modules of which each imports the next; a cycle counts as one."""
    joined = networkx.condensation(graph())
    chain = networkx.dag_longest_path(joined)
    return [" and ".join(sorted(joined.nodes[node]["members"])) for node in chain]


def inside() -> list[str]:
    """All modules but `petl`, which only names what others import from it, and its caller."""
    return [module for module in modules() if module not in ("petl", "petl.__main__")]


def homonyms() -> list[str]:
    """Names of public classes that are defined in several files."""
    bodies = (ast.walk(ast.parse(file.read_text())) for file in modules().values())
    names = Counter(n.name for body in bodies for n in body if isinstance(n, ast.ClassDef))
    return [name for name, count in names.items() if count > 1 and not name.startswith("_")]


# Sizes


def lines_of(folder: Path) -> int:
    """The lines of all Python files in a folder."""
    return sum(file.read_text().count("\n") for file in folder.rglob("*.py"))


def packages() -> list[str]:
    """The packages directly in petl/."""
    return sorted(folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").is_file())


def arrows() -> set[tuple[str, str]]:
    """Pairs of packages of which the first imports the second."""
    pairs = {(a.split(".")[1], b.split(".")[1]) for a, b in graph().edges}
    return {(a, b) for a, b in pairs if a != b and {a, b} <= {*packages()}}


def share_of_any() -> float:
    """The share of annotations that hold `Any`."""
    found = [a for file in modules().values() for a in _annotations(ast.parse(file.read_text()))]
    has_any = (any(getattr(node, "id", "") == "Any" for node in ast.walk(a)) for a in found)
    return sum(has_any) / len(found)


def _annotations(tree: ast.AST) -> Iterator[ast.AST]:
    """The annotations of arguments, results and variables."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            yield node.annotation
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns is not None:
            yield node.returns


# Words


class Words(NamedTuple):
    """Counts of what is documented."""

    public: int
    documented: int
    code_lines: int
    comments: int
    raised: int
    with_value: int


# a function that does nothing but refuse, or the use of one that says why
GUARD = r"def _?(check|refuse|explain)_|_refusal"
FLAG = r"getattr\([^,()]*config[^,()]*, \""


def matches(pattern: str) -> int:
    """The lines of petl in which a pattern occurs."""
    lines = (line for file in modules().values() for line in file.read_text().splitlines())
    return sum(bool(re.search(pattern, line)) for line in lines)


def refusals() -> set[str]:
    """The names of methods that return why something is not possible, and of the table."""
    trees = (ast.parse(file.read_text()) for file in modules().values())
    functions = (
        node.name
        for tree in trees
        for owner in ast.walk(tree)
        if isinstance(owner, ast.ClassDef)
        for node in owner.body
        if isinstance(node, ast.FunctionDef)
    )
    return {name for name in functions if name.endswith("refusal")} | {"lacks"}


def words() -> Words:
    """Docstrings of public functions and classes, comment lines, and messages with a value."""
    public = documented = code = comments = raised = with_value = 0
    for file in modules().values():
        text = file.read_text()
        tree = ast.parse(text)
        for node in _public(tree):
            public += 1
            documented += ast.get_docstring(node) is not None
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                raised += 1
                with_value += not isinstance(node.exc.args[0], ast.Constant)
        lines = [line.strip() for line in text.splitlines()]
        strings = sum(
            node.end_lineno - node.lineno + 1
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
            and node.end_lineno is not None
        )
        code += sum(bool(line) and not line.startswith("#") for line in lines) - strings
        comments += sum("# " in line for line in lines)
    return Words(public, documented, code, comments, raised, with_value)


def _public(tree: ast.AST) -> Iterator[Any]:
    """Functions, classes and methods without an underscore; not functions inside functions."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from _public(node)


# Runs


def files_of(function: Callable[[], Any]) -> dict[str, int]:
    """The files of petl and train.py of which functions run in `function`, with their calls.

    Module bodies, class bodies, comprehensions and generator expressions do not count.
    """
    calls: dict[str, int] = {}
    prefixes = (f"{PACKAGE}/", str(ROOT / "train.py"))

    def note(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(prefixes):
            is_function = code.co_flags & 0x1 and not code.co_name.startswith("<")
            if is_function:
                name = code.co_filename.removeprefix(f"{ROOT}/")
                calls[name] = calls.get(name, 0) + 1

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return calls


def quickstart_files() -> dict[str, int]:
    """The files in three steps of `python train.py +method=mola`, from import to report."""
    import runpy

    with tempfile.TemporaryDirectory() as folder:
        words, sys.argv = sys.argv, ["train.py", "+method=mola", *SHORT]
        sys.argv.append(f"train.run={folder}/run")

        def run() -> None:
            with contextlib.suppress(SystemExit):
                runpy.run_path(str(ROOT / "train.py"), run_name="__main__")

        try:
            return files_of(run)
        finally:
            sys.argv = words


def loaded_by_lora() -> list[str]:
    """The modules of petl that three steps of LoRA in a new process have loaded at their end."""
    code = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print(*(name for name in sys.modules if name[:4] == 'petl')))\n"
        "sys.argv = ['petl', *sys.argv[1:]]\n"
        "runpy.run_module('petl', run_name='__main__')"
    )
    with tempfile.TemporaryDirectory() as folder:
        words = ["train", "+method=lora", *SHORT, f"train.run={folder}/run"]
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
        )
    return sorted(done.stdout.strip().rsplit("\n", 1)[-1].split())


def forward_files(method: str) -> dict[str, int]:
    """The files in a training forward pass of one layer of `method` ("lora" is fused)."""
    import torch

    import petl
    from petl import testing

    fields = {"target_modules": "all-linear"} if method == "lora" else {}
    model = petl.wrap(testing.tiny_llama(), method, **fields).train()
    petl.fuse_lora(model)
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "base_layer")]
    layer, forward, found = layers[0], layers[0].forward, {}

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = []
        found.update(files_of(lambda: result.append(forward(*args, **kwargs))))
        return result[0]

    layer.forward = watched
    ids = torch.randint(0, 50, (2, 8))
    model(input_ids=ids, labels=ids)
    return {name: count for name, count in found.items() if "structure.py" not in name}


def overridden() -> set[tuple[str, str]]:
    """Class of core and public name, for each name of core that a class of a method overrides."""
    bases: dict[str, list[str]] = {}
    names: dict[str, set[str]] = {}
    places: dict[str, str] = {}
    for module, file in modules().items():
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef):
                own = (n.value if isinstance(n, ast.Subscript) else n for n in node.bases)
                bases[node.name] = [n.id for n in own if isinstance(n, ast.Name)]
                defined = (n.name for n in node.body if isinstance(n, ast.FunctionDef))
                names[node.name] = {n for n in defined if not n.startswith("_")}
                places[node.name] = module.split(".")[1] if "." in module else ""
    found: set[tuple[str, str]] = set()
    for cls in (name for name, place in places.items() if place == "methods"):
        above, left = set[str](), list(bases[cls])
        while left:
            base = left.pop()
            if base not in above and base in bases:
                above.add(base)
                left += bases[base]
        of_core = (base for base in above if places[base] == "core")
        found |= {(base, name) for base in of_core for name in names[cls] & names[base]}
    return found


def hooks() -> set[str]:
    """Hooks of `Method` that some method has."""
    return {name for base, name in overridden() if base == "Method"}


def overridden_besides() -> set[str]:
    """Public names of the other classes of core that some class of a method overrides."""
    return {name for base, name in overridden() if base != "Method"}


def figures(*, run: bool) -> list[Figure]:
    """All figures with their bounds."""
    counted = words()
    sizes = [
        Figure(f"lines of petl/{p}", lines_of(PACKAGE / p), BUDGETS.get(p, 0)) for p in packages()
    ]
    found = [
        *sizes,
        Figure("lines of petl/", lines_of(PACKAGE), sum(BUDGETS.values()) + OWN_LINES),
        *(
            Figure(f"lines of {name}/", lines_of(ROOT / name), most)
            for name, most in OTHERS.items()
        ),
        Figure("packages", len(packages()), 12),
        Figure("arrows between packages", len(arrows()), 60),
        Figure("annotations with Any", share_of_any(), 0.030),
        Figure("hooks of Method that methods have", len(hooks()), 25),
        Figure("other names of core that methods override", len(overridden_besides()), 29),
        Figure("guards", matches(GUARD), 231),
        Figure("kinds of refusal", len(refusals()), 3),
        Figure("flags of configs by getattr", matches(FLAG), 15),
        Figure("Python files directly in petl/", len(list(PACKAGE.glob("*.py"))), 4),
        Figure("cycles between files", len(cycles()), 0),
        Figure("longest chain of imports", len(longest_chain()), 15),
        Figure("class names with several meanings", len(homonyms()), 0),
        Figure("docstrings, of public names", counted.documented / counted.public, 0.9, False),
        Figure("comments a code line", counted.comments / counted.code_lines, 0.075, False),
        Figure("messages with a value", counted.with_value / counted.raised, 0.95, False),
    ]
    if run:
        quickstart = subprocess.run(
            [sys.executable, __file__, "--count", "quickstart"],
            capture_output=True,
            text=True,
            check=True,
        )
        count = re.search(r"^(\d+) files$", quickstart.stdout, re.MULTILINE)
        assert count is not None, quickstart.stdout
        found += [
            Figure("files in three steps of the quickstart", int(count[1]), 120),
            Figure("modules that three steps of LoRA load", len(loaded_by_lora()), 164),
            Figure("files in a training pass of a MoLA layer", len(forward_files("mola")), 5),
            Figure("files in a training pass of a fused LoRA", len(forward_files("lora")), 3),
        ]
    return found


def main() -> int:
    """Print the figures; 1 if a bound is not kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", action="store_true", help="run training as well")
    parser.add_argument("--count", choices=COUNTED, help="list the files")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if arguments.count:
        name = arguments.count
        if name == "loaded":
            print(*loaded_by_lora(), sep="\n")
            return 0
        found = quickstart_files() if name == "quickstart" else forward_files(name)
        for file, count in sorted(found.items()):
            print(f"{count:7} {file}")
        print(f"{len(found)} files")
        return 0
    rows = figures(run=arguments.run)
    for row in rows:
        sign = "at most" if row.at_most else "at least"
        verdict = "" if row.holds else "  NOT KEPT"
        print(f"{row.name:42} {row.value:8.5g}   {sign} {row.bound:g}{verdict}")
    return int(not all(row.holds for row in rows))


if __name__ == "__main__":
    sys.exit(main())
