"""The pictures of README and of the home page: the page of a run, a comparison, a chat.

    python scripts/pictures.py runs/pictures    # trains three small runs, ten minutes; resumable

Needs Chromium, and the extras quickstart and smollm2. The pictures are written to docs/assets.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from terminal import ANSWER, COMMAND, drawn

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "docs/assets"
PETL = (sys.executable, "-m", "petl")
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo",
    "Norway": "Oslo", "Greece": "Athens", "Kenya": "Nairobi", "Peru": "Lima", "Cuba": "Havana",
    "Austria": "Vienna", "Hungary": "Budapest", "Portugal": "Lisbon", "Ireland": "Dublin",
    "Finland": "Helsinki", "Sweden": "Stockholm", "Denmark": "Copenhagen", "Russia": "Moscow",
}  # fmt: skip
QUESTIONS = ("What is the capital of {}?", "Which city is the capital of {}?")
ASKED = ("What is the capital of Germany?", "Which city is the capital of Hungary?")
CHAT = "lora-smollm2"
TRAINED = ("+method=lora", "model=smollm2", "data=files", "data.task=causal_lm", "data.test=null",
           "train.epochs=4", "train.batch_size=8", "train.lr=1e-3")  # fmt: skip


def train(folder: Path) -> None:
    """Train the runs that are not finished, and write the page that compares two of them."""
    rows = folder / "capitals.jsonl"
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in chats()))
    for name, words in {
        "mola": ("+method=mola", "train.eval_steps=50"),
        "lora": ("+method=lora", "train.eval_steps=50"),
        CHAT: (*TRAINED, f"data.train={rows}"),
    }.items():
        petl("train", *words, f"train.run=runs/{name}", "train.resume=auto", within=folder)
    petl("compare", "runs/mola", "runs/lora", "--out", "compared", within=folder)


def chats() -> list[dict[str, list[dict[str, str]]]]:
    """Questions about capitals with answers of one form."""
    turns = [
        (question.format(country), f"{city}, the capital of {country}. Shall I tell you more?")
        for question in QUESTIONS
        for country, city in CAPITALS.items()
    ]
    return [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in turns
    ]


def petl(*words: str, within: Path, said: str | None = None) -> str:
    """Run a command of petl within a folder; return what it prints."""
    return subprocess.run(
        [*PETL, *words], input=said, stdout=subprocess.PIPE, cwd=within, text=True, check=True
    ).stdout


def photograph(page: Path, picture: Path, size: tuple[int, int]) -> None:
    """Write the upper part of a page, of so many pixels, as PNG."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("no Chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as profile:
        words = ("--headless", "--no-sandbox", "--hide-scrollbars", f"--user-data-dir={profile}")
        shot = (
            f"--screenshot={picture}",
            f"--window-size={size[0]},{size[1]}",
            page.absolute().as_uri(),
        )
        subprocess.run([browser, *words, *shot], check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the runs")
    folder: Path = parser.parse_args().folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    train(folder)
    photograph(folder / "runs/mola/report.html", ASSETS / "run.png", (1000, 760))
    photograph(folder / "compared/index.html", ASSETS / "compared.png", (1280, 590))
    (ASSETS / "chat.svg").write_text(drawn("A chat in a terminal", chat(folder)))


def chat(folder: Path) -> list[tuple[str, str]]:
    """The lines of a chat, with their colors."""
    said = petl("chat", f"runs/{CHAT}", said="\n".join((*ASKED, "/exit", "")), within=folder)
    questions = iter(ASKED)
    lines = [(f"$ petl chat runs/{CHAT}", COMMAND)]
    for line in said.splitlines():
        answer = line.removeprefix("> ").strip()
        if answer != line and answer:
            lines.append((f"> {next(questions)}", COMMAND))
        if answer and answer != ">":
            lines.append((answer, ANSWER))
    return lines


if __name__ == "__main__":
    main()
