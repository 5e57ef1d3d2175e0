"""Wrap a small model of every type of transformers with every method, and write docs/models.md.

    python scripts/architectures.py                        # what is not known yet, all of it
    python scripts/architectures.py --methods lora mola    # these methods
    python scripts/architectures.py --types mamba llama    # these types, or kinds
    python scripts/architectures.py --again broken         # what did not work, or was not built
    python scripts/architectures.py --types qwen3_moe --again all
    python scripts/architectures.py --write                # the page only

Results are kept in scripts/architectures/results.json; a run goes on where the last one ended.
"""

import argparse

from architectures.page import PAGE, page
from architectures.small import types
from architectures.sweep import read_results, sweep

import petl


def main() -> None:
    """Study, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="*", default=petl.list_methods())
    parser.add_argument("--types", nargs="*", default=[])
    parser.add_argument("--again", choices=("all", "broken"), default="")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    if not given.write:
        wanted = [
            each
            for each in types()
            if not given.types or {each.name, each.kind, str(each)} & {*given.types}
        ]
        sweep(wanted, given.methods, again=given.again)
    PAGE.write_text(page(read_results()))
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
