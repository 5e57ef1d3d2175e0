"""Make the WordNet asset that petl ships from Debian's package of the database.

    apt-get download wordnet-base && dpkg -x wordnet-base_*.deb DIR
    python scripts/make_wordnet.py DIR

Writes `petl/data/wordnet_verbs.tsv.gz`, one verb definition a line behind its class, in the
database's order and in its words, and `petl/data/wordnet_license.txt`, the notice that the
database carries and asks every copy to carry. The same input gives the same bytes.
"""

import argparse
import gzip
import re
from pathlib import Path

from petl.data.bundled import WORDNET_CLASSES, WORDNET_FILE, WORDNET_NOTICE

FIRST_VERB_CLASS = 29  # the number of `verb.body` in lexnames(5WN)


def notice(database: str) -> str:
    """The licence at the head of a database file, without the line numbers before it."""
    lines = [line for line in database.splitlines() if line.startswith("  ")]
    return "".join(re.sub(r"^ +\d+ ?", "", line).rstrip() + "\n" for line in lines)


def definitions(database: str) -> list[tuple[str, str]]:
    """Class and definition of each synonym set; examples, which follow `; "`, are left out."""
    rows = []
    for line in database.splitlines():
        if line.startswith("  "):
            continue
        fields, gloss = line.split("|", 1)
        number = int(fields.split()[1])
        rows.append((WORDNET_CLASSES[number - FIRST_VERB_CLASS], gloss.split('; "')[0].strip()))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the Debian package was unpacked")
    database = (parser.parse_args().folder / "usr/share/wordnet/data.verb").read_text("ascii")
    rows = definitions(database)
    table = "".join(f"{label}\t{text}\n" for label, text in rows)
    # no time and no name in the archive, so that it depends on the database alone
    WORDNET_FILE.write_bytes(gzip.compress(table.encode("ascii"), compresslevel=9, mtime=0))
    WORDNET_NOTICE.write_text(notice(database), encoding="ascii")
    print(f"{len(rows)} definitions in {WORDNET_FILE.stat().st_size} bytes: {WORDNET_FILE}")


if __name__ == "__main__":
    main()
