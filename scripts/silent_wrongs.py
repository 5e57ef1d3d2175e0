"""Runs the public cases of silent wrongs with PEFT and Trainer, and with petl.

Writes docs/silent-wrongs.md, the picture of a refusal for README, and the number of cases where it
is quoted:

python scripts/silent_wrongs.py            # write the page, about a minute
python scripts/silent_wrongs.py --check    # fail if the page is not that of these versions
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests/fixtures"
PAGE = ROOT / "docs/silent-wrongs.md"
QUOTED = [ROOT / name for name in ("README.md", "docs/index.md")]
PICTURE = ROOT / "docs/assets/refusal.svg"
sys.path.insert(0, str(FIXTURES))

from silent_cases.petl_side import CASES  # noqa: E402
from silent_cases.verdicts import RIGHT, SILENT, Verdict  # noqa: E402
from terminal import COMMAND, FAILURE, drawn  # noqa: E402

GROUPS = {"D": "Data", "W": "Wrapping", "T": "Training", "S": "Saving and loading",
          "M": "Merging and exporting", "V": "Serving", "A": "Several adapters"}  # fmt: skip
LENGTH = 110  # characters of a detail
# the case in the picture, and the command of a user that meets it
SHOWN = ("D12", "petl train +method=lora data=files data.train=reviews.csv data.test=holdout.csv")
HEAD = """# Silent wrongs

Public reports in which somebody who fine-tuned a model got a wrong result without an error, each
reproduced on a tiny model: with {peers} as they are, and with petl.
**{score}.** Of the {both} cases that were run with both, PEFT and
Trainer are silent in {silent}.

- **right**: the result is what it must be. **refuses**: an error that names the matter.
  **warns**: a line that names it. **silent**: a wrong result, and no word. An empty cell: not run
  there (petl has the step, they leave it to your code; or it needs several processes).
- Written by `python scripts/silent_wrongs.py`; the cases are in `tests/fixtures/silent_cases`,
  and each is a test (`tests/silent_wrongs/test_cases.py`).

Later versions of these libraries may have mended a case: run the script to see.
"""


def petl_verdicts() -> dict[str, Verdict]:
    """Run all cases with petl."""
    found = {}
    for name, each in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            os.environ["PETL_CACHE"] = f"{folder}/cache"
            work = Path(folder, "case")
            work.mkdir()
            found[name] = each.run(work)
    return found


def peer_verdicts() -> tuple[dict[str, str], dict[str, Verdict]]:
    """Run the cases of PEFT and Trainer in a process without petl; also return the versions."""
    environment = {**os.environ, "PYTHONPATH": str(FIXTURES), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "silent_cases.peers"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    content = json.loads(done.stdout.splitlines()[-1])
    return content["versions"], {name: Verdict(*each) for name, each in content["verdicts"].items()}


def cell(verdict: Verdict | None) -> str:
    """A verdict as a cell of the table."""
    if verdict is None:
        return ""
    kind = f"**{verdict.kind}**" if verdict.kind == SILENT else verdict.kind
    if verdict.kind == RIGHT:
        return kind
    detail = " ".join(verdict.detail.split()).replace("|", "\\|").replace("<", "&lt;")
    # paths of this run say nothing
    words = [Path(word.strip("'")).name if "/tmp" in word else word for word in detail.split(" ")]
    text = " ".join(words)
    return f"{kind}: {text if len(text) <= LENGTH else text[: LENGTH - 1] + '…'}"


def page_of(versions: dict[str, str], peers: dict[str, Verdict], own: dict[str, Verdict]) -> str:
    """The page as Markdown."""
    kinds = Counter(verdict.kind for verdict in own.values())
    parts = [f"{kinds[kind]} {kind}" for kind in ("right", "refuses", "warns") if kinds[kind]]
    score = f"petl: {', '.join(parts)}, {kinds[SILENT]} silent, of {len(own)}"
    named = " and ".join(f"{name} {number}" for name, number in versions.items())
    silent = sum(verdict.kind == SILENT for verdict in peers.values())
    lines = [HEAD.format(peers=named, score=score, both=len(peers), silent=silent)]
    for letter, title in GROUPS.items():
        lines += [f"\n## {title}\n", "| case | what went wrong, where | PEFT, Trainer | petl |"]
        lines += ["| --- | --- | --- | --- |"]
        for name, each in CASES.items():
            if name[0] == letter:
                where = f"{each.symptom} ({each.threads})"
                lines += [f"| {name} | {where} | {cell(peers.get(name))} | {cell(own[name])} |"]
    return "\n".join(lines) + "\n"


def picture(own: dict[str, Verdict]) -> str:
    """The message of a case as a terminal shows it, as SVG."""
    name, command = SHOWN
    message = own[name].detail.splitlines()[-1].removeprefix("error: ")
    lines = [(f"$ {command}", COMMAND), (f"error: {message}", FAILURE)]
    return drawn("A refusal of petl in a terminal", lines)


def quoted(text: str, count: int) -> str:
    """A page that quotes the number of cases, with this number."""
    return re.sub(r"\d+ public cases", f"{count} public cases", text)


def main() -> None:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare; write nothing")
    options = parser.parse_args()
    own = petl_verdicts()
    text = page_of(*peer_verdicts(), own)
    pages = {PAGE: text} | {page: quoted(page.read_text(), len(own)) for page in QUOTED}
    for page, content in pages.items():
        if not options.check:
            page.write_text(content)
        elif page.read_text() != content:
            sys.exit(f"{page} is not what the cases give: run python scripts/silent_wrongs.py")
    if not options.check:
        PICTURE.write_text(picture(own))


if __name__ == "__main__":
    main()
