"""What a run lost, on its page: in words, bars of all texts, and the tokens of some.

The file retained_tokens.json has the tokens of the texts that lost most and least, with the loss
that each has more, in nats.
"""

import json
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any, TypedDict

from petl.core.types import Record
from petl.data.models.new_tokens import plain_of
from petl.errors import InputError
from petl.system.files.disk import as_json, write_atomic
from petl.system.files.read import read_json, read_json_lines, read_yaml
from petl.system.values import type_problem
from petl.training.features.bars import Bar, Bars
from petl.training.features.section import ColoredText, Curve, Lines, Section
from petl.training.retain.drift import Drift
from petl.training.retain.measure import Retained, RetainedText
from petl.training.retain.rows import AT_START, KEY, RetainedRow, tokenizer_of
from petl.training.retain.settings import RetainConfig
from petl.training.runs.records import CONFIG, METRICS, SCORES

TEXTS, TOKENS = "retained.jsonl", "retained_tokens.json"
SHOWN = 3  # texts that lost most, and as many that lost least
BEGINNING = 60  # characters of a text under the pointer
CURVES = {"retained_lost": "nats per token", "retained_drift": "drift"}


class ShownText(TypedDict):
    """An entry of retained_tokens.json."""

    before: float
    after: float
    pieces: list[list[Any]]


def write_texts(
    folder: Path, found: Retained | Drift, rows: Sequence[RetainedRow], tokenizer: Any
) -> None:
    """Write retained.jsonl, and retained_tokens.json if the loss of each token is known.

    Args:
        rows: the encoded texts; none for rows that are no texts.
        tokenizer: of the model, or its processor.
    """
    # what each token lost is for a few texts, in a file of its own
    names = [each.name for each in fields(found.texts[0]) if each.name != "gained"]
    lines = ({name: getattr(text, name) for name in names} for text in found.texts)
    write_atomic(folder / TEXTS, "".join(f"{json.dumps(line)}\n" for line in lines))
    pairs = [
        (text, row)
        for text, row in zip(found.texts, rows, strict=False)
        if isinstance(text, RetainedText) and text.gained is not None
    ]
    # the most lost first
    pairs.sort(key=lambda pair: pair[0].before - pair[0].after)
    if not pairs:
        return
    # of few texts, each once
    chosen = pairs if len(pairs) <= 2 * SHOWN else [*pairs[:SHOWN], *pairs[-SHOWN:]]
    entries = [
        {"before": text.before, "after": text.after, "pieces": pieces_of(text, row, tokenizer)}
        for text, row in chosen
    ]
    write_atomic(folder / TOKENS, as_json(entries, in_order=True))


def pieces_of(text: RetainedText, row: RetainedRow, tokenizer: Any) -> list[list[Any]]:
    """Return the tokens of a text as strings, each with what was lost on it.

    None for tokens that the model does not predict.
    """
    own, gained = plain_of(tokenizer_of(tokenizer)), list(text.gained or ())
    # of the text that was cut, the tokens that were read
    if own.is_fast:  # parts of the text itself, with its white space
        encoded = own(text.text, verbose=False, return_offsets_mapping=True)
        ends = [end for _, end in encoded["offset_mapping"][: len(row.ids)]]
        words = [text.text[start:end] for start, end in pairwise([0, *ends])]
    else:
        words = [own.decode([each]) for each in row.ids]
    return [*map(list, zip(words, [None] * (len(words) - len(gained)) + gained, strict=True))]


def line_of(scores: Record, where: object = SCORES) -> str:
    """Return what a run has lost, in words, from its scores.

    Raises:
        InputError: they are damaged.
    """
    at_start = scores.get(AT_START)
    started = "" if at_start is None else f"; {at_start:+.2g} before the first step"
    return f"{measured_in(scores[KEY], where)}{started}"


def section_of(folder: Path, scores: Record) -> Section:
    """Return the section of a run's page.

    Args:
        scores: with the entry `retained`.

    Raises:
        InputError: a file of the folder is damaged.
    """
    measured = measured_in(scores[KEY], folder / SCORES)
    line = line_of(scores, folder / SCORES)
    unit = "texts" if isinstance(measured, Retained) else "examples"
    alarm = _alarm(folder, measured)
    tokens = f" of {measured.tokens:,} tokens" if isinstance(measured, Retained) else ""
    each = f"; {TEXTS} has each of them" if (folder / TEXTS).exists() else ""
    return Section(
        "What was lost",
        f"{line[0].upper()}{line[1:]}. Measured on {measured.rows} {unit}{tokens} that the model "
        f"was not trained on{each}.",
        charts=[*_curve(folder), *_bars(folder)],
        line=f"{line} ({alarm})" if alarm else line,
        alarm=alarm,
        passages=_passages(folder),
    )


def measured_in(found: Record, where: object) -> Retained | Drift:
    """Return what the entry `retained` of scores.json says.

    Raises:
        InputError: it is damaged.
    """
    kind: Any = Drift if found.get("kind") == "features" else Retained
    # a loss may be nan, and a ratio infinite
    finite = {n: 0.0 if isinstance(v, float) and not isfinite(v) else v for n, v in found.items()}
    problem = type_problem({**finite, "interval": None, "texts": ()}, kind)
    if problem:
        raise InputError(f"{where} cannot be used: retained has {problem}")
    # JSON has lists only
    limits = found.get("interval")
    return kind(**{**found, "interval": None if limits is None else tuple(limits)})


def _alarm(folder: Path, measured: Retained | Drift) -> str:
    """Return what to say of a run beyond its limit; ""."""
    settings = read_yaml(folder / CONFIG).get("retain") if (folder / CONFIG).exists() else None
    # of a run before there were limits
    if not settings or settings.get("limit") is None:
        return ""
    most = RetainConfig(limit=settings["limit"]).most(measured.kind)
    if most is None or measured.change <= most:
        return ""
    return f"no checkpoint was within retain.limit={settings['limit']}"


def _curve(folder: Path) -> list[Lines]:
    lines = read_json_lines(folder / METRICS) if (folder / METRICS).exists() else []
    charts = []
    for key, unit in CURVES.items():
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            title = "What was lost, by step"
            charts.append(Lines(title, "step", unit, [Curve("lost", points)]))
    return charts


def _bars(folder: Path) -> list[Bars]:
    """Return what was lost on each text, the most first."""
    if not (folder / TEXTS).exists():
        return []
    lines = read_json_lines(folder / TEXTS)
    values = [(_change(line), str(line.get("text", ""))) for line in lines]
    bars = [
        Bar("", str(place), value, f"{value:+.3f}: {text[:BEGINNING]}")
        for place, (value, text) in enumerate(sorted(values, reverse=True), start=1)
    ]
    unit = "nats per token" if lines and "after" in lines[0] else "drift"
    return [Bars("What was lost on each", "by what was lost", unit, bars)] if bars else []


def _change(line: Record) -> float:
    return line["after"] - line["before"] if "after" in line else line["drift"]


def _passages(folder: Path) -> list[ColoredText]:
    """Return the texts that lost most and least, with their tokens."""
    file = folder / TOKENS
    if not file.exists():
        return []
    texts: list[ShownText] = read_json(file, list[ShownText])
    passages = []
    # tuples, which JSON has not
    for text in texts:
        pieces = [(str(piece[0]), piece[1]) for piece in text["pieces"]]
        before, after = text["before"], text["after"]
        title = f"{before:.2f} -> {after:.2f} nats, {after - before:+.2f}"
        passages.append(ColoredText(title, pieces))
    return passages
