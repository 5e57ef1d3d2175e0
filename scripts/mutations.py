"""Plant faults in petl/, one at a time, and see which ones the tests of their room notice.

    python scripts/mutations.py                  # all that have no result yet
    python scripts/mutations.py --only methods   # of files or lines with this text
    python scripts/mutations.py --report         # the stored results: the score, and what survived

`mutations/faults.yaml` lists the faults: a line of a file and the line in its place (another
operator, sign, constant, axis, branch, argument; a call left out). A line is looked up by its text,
first in the file that is named, so that it is found again where code has moved. Each fault is
planted in one copy of the project; then a process runs the tests that mirror the file, until one
fails: `tests/PLACE/test_NAME*.py`, then others that name something of the file; for a method, also
its share of `tests/contract`. The processes are forked from one that has
imported the libraries, and never petl. `mutations/results.json` has the test that noticed a fault,
or `survived`, by the digest of the fault: a fault that is edited is tried again.
"""

import argparse
import ast
import collections
import hashlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, NoReturn

import yaml

ROOT = Path(__file__).resolve().parents[1]
FAULTS = ROOT / "scripts/mutations/faults.yaml"
RESULTS = ROOT / "scripts/mutations/results.json"
LIMIT = 900  # seconds for the tests of one fault
NOT_CAUGHT, NOT_TRIED = ("survived", "no tests", "unfinished"), "not tried"
PYTEST = (
    "-q",
    "-x",
    "-n",
    "0",
    "-p",
    "no:cacheprovider",
    "--tb",
    "short",
    "-o",
    "console_output_style=classic",
)
MESSAGES = "tests/test_messages.py"
CONTRACT = ("tests/contract/test_dropout.py", "tests/contract/test_contract.py")
THOROUGH = "thorough and not slow and not hub"
MOST = 6  # test files that name something of a file
NO_TESTS = 5  # exit status of pytest


class Fault(NamedTuple):
    """A line of a file, and what is planted in its place."""

    file: str
    old: str
    new: str

    @property
    def package(self) -> str:
        """The package of petl/ that the line was in when it was listed."""
        return self.file.split("/")[1]

    @property
    def digest(self) -> str:
        """The key of its result."""
        return hashlib.sha256("\n".join(self).encode()).hexdigest()[:10]


def read_faults() -> list[Fault]:
    """Return the listed faults."""
    return [Fault(**entry) for entry in yaml.safe_load(FAULTS.read_text())]


def read_results() -> dict[str, str]:
    """Return by the digest of a fault what noticed it, or one of `NOT_CAUGHT`."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def place_of(fault: Fault) -> Path | None:
    """Return the file that has the line of a fault, relative to the root; None: none or several.

    Code moves: if the listed file lacks the line, all files are searched.
    """
    if (ROOT / fault.file).exists() and _lines(ROOT / fault.file).count(fault.old) == 1:
        return Path(fault.file)
    having = [file for file in _sources() if _lines(file).count(fault.old) == 1]
    return having[0].relative_to(ROOT) if len(having) == 1 else None


def planted(fault: Fault, file: Path) -> str:
    """Return the text of a file with the fault in it."""
    lines = (ROOT / file).read_text().split("\n")
    at = _lines(ROOT / file).index(fault.old)
    indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
    return "\n".join([*lines[:at], indent + fault.new, *lines[at + 1 :]])


@cache
def _sources() -> list[Path]:
    return sorted((ROOT / "petl").rglob("*.py"))


@cache
def _lines(file: Path) -> list[str]:
    return [line.strip() for line in file.read_text().split("\n")]


def tests_of(file: Path) -> list[list[str]]:
    """Return the arguments of each run of pytest that belongs to a file of petl/, in order.

    First the test files that mirror it, or the folder it is in; then others that name something
    public of it; messages of its package; for a method also its share of the contract; at last the
    thorough tests of the first ones, which may start several processes.
    """
    parts = file.with_suffix("").parts[1:]
    own: list[Path] = []
    room: list[Path] = []
    for depth in range(len(parts), 0, -1):
        found = _mirroring(ROOT / "tests" / Path(*parts[: depth - 1]), parts[depth - 1])
        if found and not own and (depth == len(parts) or parts[-1] == "__init__" or len(found) < 2):
            own = found
        elif found:
            room = found
            break
    of_method = parts[0] == "methods" and parts[1:2] != ("losses",)
    others = room if of_method else _naming(file, room)[:MOST]
    naming = [test for test in others if test not in own]
    runs = [own, naming] if own or naming else [room]
    arguments = [[str(test.relative_to(ROOT)) for test in run] for run in runs if run]
    arguments.append([MESSAGES, "-k", f"[{parts[0]}-"])
    if of_method:
        arguments.append([*CONTRACT, "-k", f"[{parts[1]}-"])
    return [*arguments, *([*run, "-m", THOROUGH] for run in arguments[:1])]


def _mirroring(folder: Path, name: str) -> list[Path]:
    own = folder / name
    found = sorted(folder.glob(f"test_{name}.py")) + sorted(folder.glob(f"test_{name}_*.py"))
    return found + (sorted(own.rglob("test_*.py")) if own.is_dir() else [])


def _naming(file: Path, room: Sequence[Path]) -> list[Path]:
    """Return the tests that import a module, and those of `room` that have a public name of it."""
    module = ".".join(file.with_suffix("").parts)
    public = [
        node.name
        for node in ast.parse((ROOT / file).read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    names = re.compile(rf"\b({'|'.join(map(re.escape, [module, *public]))})\b")
    counts = {}
    for test in sorted((ROOT / "tests").rglob("test_*.py")):
        text = test.read_text()
        if test in room or re.search(rf"\b{re.escape(module)}\b", text):
            counts[test] = len(names.findall(text))
    named = [test for test in counts if counts[test] and "docs" not in test.parts]
    return sorted(named, key=lambda test: (test not in room, -counts[test]))


class Copy:
    """A copy of the project in which faults are planted, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "project"
        left_out = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", ".hypothesis")
        shutil.copytree(ROOT, self.folder, ignore=left_out)

    @contextmanager
    def having(self, fault: Fault, file: Path) -> Iterator[None]:
        """Have the fault in the copy."""
        before = (ROOT / file).read_text()
        self._write(file, planted(fault, file))
        try:
            yield
        finally:
            self._write(file, before)

    def _write(self, file: Path, text: str) -> None:
        path = self.folder / file
        path.write_text(text)
        # bytecode is known by the second and the size of its source
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)

    def run(self, arguments: Sequence[str], words: Iterable[str] = ()) -> str:
        """Run tests in a forked process; what failed, or one of `NOT_CAUGHT`."""
        answer = self.folder / "answer.txt"
        answer.unlink(missing_ok=True)
        process = os.fork()
        if not process:
            self._become_pytest(arguments, FirstFailure(answer, words))
        status = _wait(process)
        with suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)  # what its tests started
        if status is None:
            return "unfinished"
        if status in (0, NO_TESTS):
            return "survived" if status == 0 else "no tests"
        if answer.exists():
            return answer.read_text()
        if status > 0:
            log = (self.folder / "log.txt").read_text()
            if "while loading conftest" in log:
                return "conftest.py"
            raise RuntimeError(f"pytest {' '.join(arguments)} ended with {status}:\n{log}")
        return f"ended by signal {-status}"

    def _become_pytest(self, arguments: Sequence[str], plugin: "FirstFailure") -> NoReturn:
        os.setsid()
        log = os.open(self.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(self.folder)
        os.environ["PYTHONPATH"] = str(self.folder)
        sys.path[:] = [entry for entry in sys.path if not entry.startswith(str(ROOT))]
        sys.path.insert(0, str(self.folder))
        # processes that tests start would run this script again
        sys.modules["__main__"] = ModuleType("__main__")
        status = 1
        try:
            import pytest

            status = int(pytest.main([*PYTEST, *arguments], [plugin]))
            sys.stdout.flush()
        finally:
            os._exit(status)


def words_of(fault: Fault, file: Path) -> set[str]:
    """Return the names in a line and of the functions and classes around it, and their parts."""
    text = (ROOT / file).read_text()
    number = _lines(ROOT / file).index(fault.old) + 1
    around = [
        node.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and node.lineno <= number <= (node.end_lineno or 0)
    ]
    names = {*around, *re.findall(r"[A-Za-z_]\w+", fault.old)}
    parts = {part for name in names for part in re.findall(r"[A-Z]?[a-z]{3,}", name)}
    return {word.lower() for word in names | parts if len(word) > 3}


class FirstFailure:
    """A plugin of pytest that puts likely tests first, and writes down which test fails first.

    Likely is a test whose text has words that few tests have. The first parameters of all tests
    come before the second ones, and so on.
    """

    def __init__(self, answer: Path, words: Iterable[str] = ()) -> None:
        self.answer, self.words = answer, words

    def pytest_collection_modifyitems(self, items) -> None:
        """Order the tests."""
        texts = {item: inspect.getsource(item.function).lower() for item in items}
        having = {word: {item for item in items if word in texts[item]} for word in self.words}
        numbers, places = collections.Counter(), {}
        for item in items:
            test = item.nodeid.partition("[")[0]
            score = sum(1 / len(found) for found in having.values() if item in found)
            places[item] = numbers[test], -score
            numbers[test] += 1
        items.sort(key=places.__getitem__)

    def pytest_collectreport(self, report) -> None:
        """Note a file that cannot be imported."""
        self._note(report)

    def pytest_runtest_logreport(self, report) -> None:
        """Note a test that fails."""
        self._note(report)

    def _note(self, report) -> None:
        if report.failed and not self.answer.exists():
            self.answer.write_text(report.nodeid)


def _wait(process: int) -> int | None:
    """Return the exit status of a process, negative for a signal; None: it was stopped."""
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def try_fault(fault: Fault, copy: Copy, tests: Sequence[str] = ()) -> str:
    """Return what noticed a fault, or one of `NOT_CAUGHT`; `tests` take the place of its own."""
    file = place_of(fault)
    if file is None:
        raise SystemExit(f"{fault.file} has no such line, or several: {fault.old}")
    found = "no tests"
    with copy.having(fault, file):
        for arguments in [tests] if tests else tests_of(file):
            result = copy.run(arguments, words_of(fault, file))
            if result not in ("survived", "no tests"):
                return result
            found = result if result == "survived" else found
    return found


def report(faults: Sequence[Fault], results: dict[str, str]) -> None:
    """Print the score by package as a table of Markdown, and the faults that nothing noticed."""
    by_package = collections.defaultdict(collections.Counter)
    for fault in faults:
        result = results.get(fault.digest, NOT_TRIED)
        by_package[fault.package][result if result in (*NOT_CAUGHT, NOT_TRIED) else "caught"] += 1
    by_package["all"] = sum(by_package.values(), collections.Counter())
    print("| package | faults | noticed | not |", "| --- | --: | --: | --- |", sep="\n")
    for name, counts in by_package.items():
        others = ", ".join(f"{n} {what}" for what, n in sorted(counts.items()) if what != "caught")
        print(f"| {name} | {counts.total()} | {counts['caught']} | {others} |")
    for fault in faults:
        if results.get(fault.digest) in NOT_CAUGHT:
            print(f"{results[fault.digest]}: {fault.file}: {fault.old}  ->  {fault.new}")


def import_libraries() -> None:
    """Import what the tests import, but petl, and have their processes forked from such a one."""
    sys.path.insert(0, str(ROOT / "tests/fixtures"))
    import warm_python
    from warm_python.server import ALL

    for name in (*ALL, "hypothesis", "pytest"):
        importlib.import_module(name)
    warm_python.begin()


def main() -> None:
    """Try the faults that have no result yet, and print the score."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="of such paths or lines")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--again", action="store_true", help="those that survived, too")
    parser.add_argument(
        "--tests", nargs=argparse.REMAINDER, default=(), help="last: run these: files, -k WORDS"
    )
    arguments = parser.parse_args()
    faults, results = read_faults(), read_results()
    results = {key: results[key] for key in (fault.digest for fault in faults) if key in results}
    tried = {
        key for key, result in results.items() if not arguments.again or result not in NOT_CAUGHT
    }
    wanted = [f for f in faults if arguments.only in f"{f.file}: {f.old}" and f.digest not in tried]
    wanted.sort(key=lambda fault: fault.digest)  # at random: a part that is tried is a sample
    if wanted and not arguments.report:
        import_libraries()
        with tempfile.TemporaryDirectory() as folder:
            copy = Copy(Path(folder))
            for fault in wanted:
                start = time.monotonic()
                results[fault.digest] = try_fault(fault, copy, arguments.tests)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                took = time.monotonic() - start
                print(
                    f"{took:4.0f} s {results[fault.digest]}: {fault.file}: {fault.old}", flush=True
                )
    report(faults, results)


if __name__ == "__main__":
    main()
