"""The figures in README, and in short tables, are those of the generated tables."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
STEPS = (ROOT / "docs" / "performance.md").read_text()
WHOLE_JOBS = (ROOT / "docs" / "performance" / "jobs.md").read_text()
QUICKSTART, DECODER = "MiniLM on WordNet verbs", "SmolLM2-135M on reasoning chats"
# lines of the short table, and the rows of the quickstart's job
JOBS = {
    "PEFT's LoRA, Trainer with `group_by_length`": "Trainer, by length",
    "the same with bf16": "Trainer, by length, bf16",
    "`petl train +method=lora`": "petl, bf16",  # the default where it pays
    "`petl train +method=lora train.precision=no`": "petl",
    "in the upper third of the blocks, bf16": "petl, fast, fills the store",
    "the same, stored states found": "petl, fast, reads the store",
}


def table(text: str, before: str) -> dict[str, dict[str, str]]:
    """The first table behind a text, as rows of cells by the names of lines and columns."""
    after = text[text.index(before) :]
    lines = re.search(r"^\|.*?(?=\n[^|]|\n\n|\Z)", after, re.DOTALL | re.MULTILINE)[0].splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def median(cell: str) -> float:
    """The value of a cell, without its quartiles."""
    return float(cell.split()[0].replace(",", ""))


@pytest.mark.parametrize("start", JOBS)
def test_the_table_of_jobs_is_that_of_the_benchmark(start):
    lines = table(STEPS, "Processor time of the quickstart's whole job")
    assert len(lines) == len(JOBS)
    (shown,) = (cells for name, cells in lines.items() if name.startswith(start))
    measured = table(WHOLE_JOBS, QUICKSTART)[JOBS[start]]
    assert median(shown["over plain Trainer"]) == median(measured["job / Trainer"])
    by_length = measured["job / Trainer, by length"] or "1"  # the row itself
    assert median(shown["over Trainer by length"]) == median(by_length)
    score, spread = (median(measured[name]) for name in ("accuracy %", "accuracy %, s.d."))
    assert shown["accuracy"] == f"{score:.1f} ± {spread:.1f} %"


def test_the_number_of_seeds_is_that_of_the_benchmark():
    assert "(three seeds, rates tuned alike" in README
    assert "(three seeds, rates tuned alike" in STEPS
    measured = table(WHOLE_JOBS, QUICKSTART)
    number = r"(\d\.\d+)"
    said = re.search(
        rf"takes {number} of\s+the processor time[^;]*bf16: {number}\), and {number} in float32",
        README,
    )
    rows = ("petl, bf16", "Trainer, by length, bf16", "petl")
    for share, row in zip(said.groups(), rows, strict=True):
        assert float(share) == median(measured[row]["job / Trainer, by length"])
    assert {measured[row]["seeds"] for row in JOBS.values()} == {"3"}


def test_the_sentence_on_a_decoder_is_that_of_the_benchmark():
    number = r"(\d+\.\d+)"
    said = re.search(
        f"decoder's job takes {number} .* in float32 {number}, in {number} GB in place of {number}",
        README,
    )
    rows = table(WHOLE_JOBS, DECODER)
    for share, row in ((said[1], "petl, bf16"), (said[2], "petl")):
        assert float(share) == median(rows[row]["job / Trainer, by length"])
    for number, row in ((said[3], "petl"), (said[4], "Trainer, by length")):
        assert number == f"{median(rows[row]['peak RSS MB']) / 1000:.1f}"


def test_the_times_of_steps_are_those_of_the_summary():
    rows = table(STEPS, "<!-- bench: summary -->")
    said = README[README.index("Time of a training step") :]
    for before, row in (
        ("LoRA", "lora"),
        (r"\(PEFT's", "PEFT's lora"),
        ("`mos`", "mos"),
        ("`mola`", "mola 8/2"),
    ):
        shown = re.search(rf"{before} (\d\.\d+), (\d\.\d+)", said).groups()
        cells = rows[row]
        # the first of a shape: others are over PEFT's LoRA
        columns = [
            next(name for name in cells if name.startswith(f"{shape}: step /"))
            for shape in ("llama", "minilm")
        ]
        assert [float(number) for number in shown] == [median(cells[c]) for c in columns], row
