"""Plant faults in petl/, one at a time, and see which ones the tests of their room notice.

    python scripts/mutations.py                  # all that have no result yet; minutes each
    python scripts/mutations.py --only methods   # of one package
    python scripts/mutations.py --report         # the stored results: the score, and what survived

`mutations/faults.yaml` lists the faults: a line of a file and the line in its place (another
operator, sign, constant, branch, argument; a call left out). A line is looked up by its text, first
in the file that is named, so that it is found again where code has moved. Each fault is planted in
a copy of petl/; then the tests run that mirror the file: `tests/PLACE/test_NAME*.py`, or those of
the folders above it. Results are in `mutations/results.json`: whether the fault is caught.
"""

import argparse
import collections
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[1]
FAULTS = ROOT / "scripts/mutations/faults.yaml"
RESULTS = ROOT / "scripts/mutations/results.json"
LIMIT = 900  # seconds for the tests of one fault: one that never ends is noticed as well
Verdict = Literal["caught", "survived", "no tests", "stale"]


class Fault(NamedTuple):
    """A line of a file, and what is planted in its place."""

    file: str
    old: str
    new: str

    @property
    def package(self) -> str:
        """The package of petl/ that the line was in when it was listed."""
        return self.file.split("/")[1]


def read_faults() -> list[Fault]:
    """Return the listed faults."""
    return [Fault(**entry) for entry in yaml.safe_load(FAULTS.read_text())]


def read_results() -> dict[str, Verdict]:
    """Return the stored verdicts, by the text of the line."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def place_of(fault: Fault) -> Path | None:
    """Return the file that has the line of a fault, relative to the root; None: none or several.

    Code moves: if the listed file lacks the line, all files are searched.
    """
    files = sorted((ROOT / "petl").rglob("*.py"))
    named = ROOT / fault.file
    having = [file for file in files if _has_line(file, fault.old)]
    if named in having:
        return named.relative_to(ROOT)
    return having[0].relative_to(ROOT) if len(having) == 1 else None


def _has_line(file: Path, line: str) -> bool:
    return [text.strip() for text in file.read_text().splitlines()].count(line) == 1


def tests_of(file: Path) -> list[str]:
    """Return the test files that mirror a file of petl/, or a folder above it.

    The tests of a method stand beside each other, so a file of its folder has all of them.
    """
    parts = file.with_suffix("").parts[1:]
    for depth in range(len(parts), 0, -1):
        folder, name = ROOT / "tests" / Path(*parts[: depth - 1]), parts[depth - 1]
        own = folder / name
        found = sorted(folder.glob(f"test_{name}.py")) + sorted(folder.glob(f"test_{name}_*.py"))
        found += sorted(own.rglob("test_*.py")) if own.is_dir() else []
        if found:
            return [str(test.relative_to(ROOT)) for test in found]
    return []


def plant(fault: Fault, file: Path, copy: Path) -> None:
    """Write the faulty line into `copy`, a copy of the root."""
    text = (ROOT / file).read_text()
    assert fault.old in text
    (copy / file).write_text(text.replace(fault.old, fault.new, 1))


def try_fault(fault: Fault) -> Verdict:
    """Return whether the tests of its room notice a fault."""
    file = place_of(fault)
    if file is None:
        return "stale"
    tests = tests_of(file)
    if not tests:
        return "no tests"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("petl", "tests", "scripts", "configs"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "train.py"):
            shutil.copy(ROOT / name, copy / name)
        plant(fault, file, copy)
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]
        environment = {**os.environ, "PYTHONPATH": folder}
        try:
            run = subprocess.run(
                [*command, *tests], cwd=copy, env=environment, capture_output=True, timeout=LIMIT
            )
        except subprocess.TimeoutExpired:
            return "caught"
    return "survived" if run.returncode == 0 else "caught"


def report(results: dict[str, Verdict]) -> None:
    """Print the score by package, and the faults that nothing noticed."""
    by_package = collections.defaultdict(collections.Counter)
    for fault in read_faults():
        by_package[fault.package][results.get(fault.old, "not tried")] += 1
    total = sum(by_package.values(), collections.Counter())
    for name, counts in [*sorted(by_package.items()), ("all", total)]:
        tried = counts["caught"] + counts["survived"] + counts["no tests"]
        others = ", ".join(f"{n} {what}" for what, n in sorted(counts.items()) if what != "caught")
        print(f"{name:12} {counts['caught']:4} of {tried} caught; {others or 'nothing else'}")
    for fault in read_faults():
        if results.get(fault.old) in ("survived", "no tests"):
            print(f"{results[fault.old]}: {place_of(fault)}: {fault.old}  ->  {fault.new}")


def main() -> None:
    """Try the faults that have no result yet, and print the score."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="PACKAGE", help="faults of one package")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--again", action="store_true", help="try all, whatever is stored")
    arguments = parser.parse_args()
    results = read_results()
    for fault in [] if arguments.report else read_faults():
        is_wanted = arguments.only in (None, fault.package)
        if is_wanted and (arguments.again or fault.old not in results):
            results[fault.old] = try_fault(fault)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{results[fault.old]}: {fault.file}: {fault.old}", flush=True)
    report(results)


if __name__ == "__main__":
    main()
