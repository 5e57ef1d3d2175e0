"""Rewards of answers: built-in ones, or a function of a file, which has the form of TRL's.

A function is called as `reward(prompts=..., completions=..., COLUMN=..., ...)` with lists of equal
length, and returns a number for each completion. Prompts are turns, and completions a turn each,
unless `task.plain=true`, with which both are texts.
"""

import math
import re
import runpy
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from petl.data.objectives import REWARDS, GRPOSettings
from petl.errors import InputError, first_line, shown
from petl.system.imports.extras import install_hint

Given = Mapping[str, Any]  # the columns of a row besides the prompt
Reward = Callable[[Sequence[Any], Sequence[str], Sequence[Given]], list[float]]


def reward_of(settings: GRPOSettings) -> Reward:
    """Return a built-in reward.

    Raises:
        InputError: it is a function of a file, which only training runs.
    """
    if settings.reward not in REWARDS:
        raise InputError(
            f"task.reward={settings.reward} is code, which petl train alone runs: scores.json of "
            "the run has its scores, and predictions.jsonl the answers"
        )
    rate = {"exact": exact, "regex": matching(settings.pattern), "reasoning": reasoning}
    chosen = rate[settings.reward]
    return lambda prompts, texts, rows: [chosen(*pair) for pair in zip(texts, rows, strict=True)]


def exact(text: str, row: Given) -> float:
    """1 if a text is the answer of the row, spaces around it aside."""
    return float(text.strip() == str(row["answer"]).strip())


def matching(pattern: str | None) -> Callable[[str, Given], float]:
    """A reward of 1 where the pattern is found, with the answer of the row as its group."""
    compiled = re.compile(pattern or "")

    def rate(text: str, row: Given) -> float:
        found = compiled.search(text)
        if found is None or not compiled.groups:
            return float(found is not None)
        return float((found[1] or "").strip() == str(row["answer"]).strip())

    return rate


def reasoning(text: str, row: Given) -> float:
    """The score of reasoning-gym for an answer to one of its puzzles, from 0 to 1."""
    try:
        scorer = resolve_name("reasoning_gym:get_score_answer_fn")
    except ImportError as error:
        raise InputError(
            f"task.reward=reasoning needs reasoning-gym ({error}); run: {install_hint('reasoning')}"
        ) from error
    entry = {"answer": row["answer"], "metadata": row.get("metadata") or {}}
    return float(scorer(row["puzzle"])(text.strip(), entry))


def from_file(place: str, *, plain: bool) -> Reward:
    """Run a file and return its function as a reward.

    Args:
        place: FILE.py:FUNCTION.
        plain: completions are texts, not turns.
    """
    file, _, name = place.rpartition(":")
    with failing(place):
        function = runpy.run_path(str(Path(file).expanduser()))[name]

    def rate(prompts: Sequence[object], texts: Sequence[str], rows: Sequence[Given]) -> list[float]:
        turns = [[{"role": "assistant", "content": text}] for text in texts]
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        with failing(place):
            own = [*texts] if plain else turns
            found = function(prompts=[*prompts], completions=own, **columns)
        try:
            numbers = [float(value) for value in found]
        except (TypeError, ValueError):  # no list, or of other things than numbers
            numbers = []
        if len(numbers) != len(texts) or not all(map(math.isfinite, numbers)):
            raise InputError(
                f"task.reward={place} returned {shown(found)} for {len(texts)} completions: return "
                "a list with a finite number for each"
            )
        return numbers

    return rate


@contextmanager
def failing(place: str) -> Generator[None]:
    """Say where a reward fails, whatever error its code raises."""
    try:
        yield
    except Exception as error:
        # the innermost place: the traceback is mostly petl's
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(
            f"task.reward={place} fails: {type(error).__name__}: {first_line(error)} ("
            f"{last.filename}, line {last.lineno})"
        ) from error
