"""Run the code blocks of a page in order, in the working directory: python run_page.py PAGE.md

- ```LANGUAGE title="NAME"  the block is a file; it is written.
- ```bash                   runs with `bash -euo pipefail`.
- ```python                 runs in one namespace for the page, as in a notebook.

Other blocks (text, console, yaml without a title) are not executed.
"""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)(?P<options>[^\n]*)\n(?P<code>.*?)^(?P=indent)```[ \t]*$",
    re.DOTALL | re.MULTILINE,
)
TITLE = re.compile(r'title="([^"]+)"')


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file that it is (or ""), its code and first line number."""

    language: str
    file: str
    code: str
    line: int


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page in order."""
    found = []
    for match in FENCE.finditer(text):
        title = TITLE.search(match["options"])
        indent = match["indent"]
        code = "".join(line.removeprefix(indent) for line in match["code"].splitlines(True))
        line = text.count("\n", 0, match.start()) + 2
        found.append(Block(match["language"], title[1] if title else "", code, line))
    return found


def run(page: Path) -> int:
    """Execute a page; the number of blocks that were run or written."""
    space: dict[str, object] = {"__name__": "__main__"}
    done = 0
    for block in blocks(page.read_text()):
        if block.file:
            target = Path(block.file)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.code)
        elif block.language == "bash":
            subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], check=True)
        elif block.language == "python":
            source = "\n" * (block.line - 1) + block.code  # tracebacks name the line of the page
            exec(compile(source, str(page), "exec"), space)
        else:
            continue
        done += 1
        sys.stdout.flush()
    return done


if __name__ == "__main__":
    assert run(Path(sys.argv[1])), f"{sys.argv[1]} has no code block to run"
