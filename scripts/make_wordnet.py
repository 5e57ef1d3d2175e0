"""Create the WordNet data set of petl from the Debian package of the database.

    apt-get download wordnet-base && dpkg -x wordnet-base_*.deb DIR
    python scripts/make_wordnet.py DIR

Writes `petl/data/wordnet_verbs.tsv.gz`, one verb definition per line (class, tab, definition) in
the order of the database; `petl/data/wordnet_examples.tsv.gz`, one example of use per line (the
line of its definition in the other file, from 1, tab, example); and
`petl/data/wordnet_license.txt`, the notice of the database, which every copy must contain. The same
input gives the same bytes.
"""

import argparse
import gzip
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from petl.data.bundled import WORDNET_CLASSES, WORDNET_FILE
from petl.data.retrieval_sets import WORDNET_EXAMPLES

FIRST_VERB_CLASS = 29  # the number of `verb.body` in lexnames(5WN)


def notice(database: str) -> str:
    """Return the license at the head of a database file, without its line numbers."""
    lines = [line for line in database.splitlines() if line.startswith("  ")]
    return "".join(re.sub(r"^ +\d+ ?", "", line).rstrip() + "\n" for line in lines)


def definitions(
    database: str, classes: Sequence[str] = WORDNET_CLASSES, first: int = FIRST_VERB_CLASS
) -> list[tuple[str, str]]:
    """Return class and definition of each synonym set, without examples, which follow `; "`.

    Args:
        classes: names in the order of their numbers in lexnames(5WN).
        first: the number of the first one.
    """
    rows = []
    for line in database.splitlines():
        if line.startswith("  "):
            continue
        fields, gloss = line.split("|", 1)
        number = int(fields.split()[1])
        rows.append((classes[number - first], gloss.split('; "')[0].strip()))
    return rows


def examples(database: str) -> list[tuple[int, str]]:
    """Return the number of the synonym set, from 1, and each example that its gloss ends with."""
    glosses = (line.split("|", 1)[1] for line in database.splitlines() if line[:2] != "  ")
    return [
        (number, part.strip().strip('";').strip())
        for number, gloss in enumerate(glosses, start=1)
        for part in gloss.split('; "')[1:]
    ]


def write(file: Path, lines: Iterable[str]) -> None:
    """Write lines compressed."""
    # without time and name in the archive, so that it depends on the database alone
    table = "".join(f"{line}\n" for line in lines)
    file.write_bytes(gzip.compress(table.encode("ascii"), compresslevel=9, mtime=0))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of the unpacked Debian package")
    file = parser.parse_args().folder / "usr/share/wordnet/data.verb"
    if not file.is_file():
        parser.error(f"{file} does not exist: give the folder of an unpacked wordnet-base package")
    database = file.read_text("ascii")
    rows = definitions(database)
    write(WORDNET_FILE, (f"{label}\t{text}" for label, text in rows))
    uses = examples(database)
    write(WORDNET_EXAMPLES, (f"{number}\t{text}" for number, text in uses))
    WORDNET_FILE.with_name("wordnet_license.txt").write_text(notice(database), encoding="ascii")
    print(f"{len(rows)} definitions in {WORDNET_FILE.stat().st_size} bytes: {WORDNET_FILE}")
    print(f"{len(uses)} examples in {WORDNET_EXAMPLES.stat().st_size} bytes: {WORDNET_EXAMPLES}")


if __name__ == "__main__":
    main()
