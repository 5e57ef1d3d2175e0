"""ICV on a constructed task: share of upper-case letters in SmolLM2's answers, by strength.

    python scripts/upper_case.py                      # three draws of 32 demonstrations
    python scripts/upper_case.py --draws 5 --prompts 32

A demonstration is a line of Hamlet and the next one in upper case. Prompts are other lines, each as
the user's turn of the chat template; answers are decoded greedily. The lines are those of
`data=hamlet`, the model that of `model=smollm2`.
"""

import argparse
import os
import random
import sys
from collections.abc import Sequence
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see train.py

import torch
from peft import PeftModel

import petl
from petl.cli.arguments import COUNT
from petl.data.base import as_dataset
from petl.data.models.loading import load_base, load_processor
from petl.data.tasks.chat import question
from petl.methods import icv
from petl.methods.icv.demonstrations import Pairs
from petl.training import program as app
from petl.training.compose import compose
from petl.training.generation import written
from petl.training.runs.run_config import read_config

STRENGTHS = (0.0, 0.05, 0.1, 0.2)
DEMONSTRATIONS, NEW_TOKENS, BATCH = 32, 16, 8
WORDS = range(5, 13)  # of the lines that are used: neither headings nor names


def main() -> int:
    """Run the command; return its exit status."""
    arguments = parser().parse_args()
    app.log_to_stderr()
    return app.reported(lambda: measure(arguments.draws, arguments.prompts, arguments.mode))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--draws", type=COUNT, default=3, help="draws of demonstrations")
    made.add_argument("--prompts", type=COUNT, default=16, help="prompts that are answered")
    made.add_argument("--mode", default="mlp", choices=("mlp", "stream"), help="of the method")
    return made


def measure(draws: int, prompts: int, mode: str) -> None:
    """Print the share of upper-case letters by draw and strength, with an answer of each."""
    config = read_config(compose(["+method=icv", "model=smollm2", "data=hamlet"]))
    data = config.data.read()
    tokenizer: Any = load_processor(config.model, data.task)
    lines = usable("\n".join(as_dataset(data, 1)["text"]))
    asked = [[{"role": "user", "content": line}] for line in lines[-prompts:]]
    ids = [question(tokenizer, messages) for messages in asked]
    base: Any = load_base(config.model, data.task, processor=tokenizer)
    model: PeftModel | None = None
    shares: list[list[float]] = []
    print(f"strengths: {', '.join(map(str, STRENGTHS))}")
    for draw in range(draws):
        calibration = demonstrations(lines[:-prompts], tokenizer, draw)
        if model is None:
            model = petl.wrap(base, "icv", calibration=calibration, mode=mode).eval()
        else:
            icv.calibrate(model, calibration)
        answers = by_strength(model, tokenizer, ids)
        shares.append([mean(map(upper_share, answers[strength])) for strength in STRENGTHS])
        print(f"draw {draw}: {', '.join(f'{100 * share:.1f} %' for share in shares[-1])}")
        for strength in STRENGTHS:
            print(f"    strength {strength}: {answers[strength][0]!r}", flush=True)
    means = [mean(column) for column in zip(*shares, strict=True)]
    print(f"mean of {draws} draws: {', '.join(f'{100 * share:.1f} %' for share in means)}")


def usable(text: str) -> list[str]:
    """Return the lines of a play that are spoken."""
    lines = (line.strip() for line in text.splitlines())
    return [
        line
        for line in lines
        if len(line.split()) in WORDS and line[0] not in "[(" and not line.isupper()
    ]


def demonstrations(lines: Sequence[str], tokenizer: Any, seed: int) -> list[dict[str, Any]]:
    """Return batches of demonstrations: a line, and the next one in upper case."""
    places = random.Random(seed).sample(range(len(lines) - 1), DEMONSTRATIONS)
    rows: Any = [{"text": lines[i], "target": lines[i + 1].upper()} for i in places]
    pairs = Pairs(rows, tokenizer, "columns")
    numbers = range(DEMONSTRATIONS)
    chunks = (numbers[i : i + BATCH] for i in range(0, DEMONSTRATIONS, BATCH))
    return [pairs.collate([pairs[i] for i in chunk]) for chunk in chunks]


@torch.no_grad()
def by_strength(
    model: PeftModel, tokenizer: Any, prompts: Sequence[list[int]]
) -> dict[float, list[str]]:
    """Return the answers to all prompts, by strength."""
    config: Any = model.active_peft_config
    answers: dict[float, list[str]] = {}
    for strength in STRENGTHS:
        config.strength = strength
        answers[strength] = []
        for i in range(0, len(prompts), BATCH):
            answers[strength] += written(model, tokenizer, prompts[i : i + BATCH], NEW_TOKENS)
    return answers


def upper_share(text: str) -> float:
    """Return the share of upper-case letters among the letters of a text; 0 if it has none."""
    letters = [letter for letter in text if letter.isalpha()]
    return sum(map(str.isupper, letters)) / len(letters) if letters else 0.0


if __name__ == "__main__":
    sys.exit(main())
