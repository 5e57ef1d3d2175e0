"""Encoded rows as the model reads them: labels, ends, beginnings, lengths, and equal rows."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import xxhash
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from petl.data.learned import BRACKETS, pieces
from petl.data.overlap import TrainingInputs
from petl.data.tasks.base import IGNORED
from petl.data.tasks.chat import end_of_turn
from petl.errors import printable
from petl.system.random_states import states_kept
from petl.training.watch.batches import Row, rows_of
from petl.training.watch.findings import Findings, logger

MANY = 0.1  # a share of rows above it is a warning
BLOCKS = 0.9  # a share of rows of one length above it is that of blocks
TAIL = 4  # tokens at the end of a row among which its end is: line breaks follow it
SHORTEST = 8  # tokens of a row that is not in two sets by chance
COMMON = 0.03  # a share of equal rows that is no chance, of shorter ones
MOST = 20_000  # rows that are compared
SHOWN = 300  # characters of a row in the log
LABELS = ("labels", "label")
NUMBERS = ("id", "idx", "index", "__index_level_0__")  # columns that number the rows


def sample_rows(data: Any, count: int, kept: Sequence[object]) -> list[Row]:
    """Encode `count` rows of a data set, evenly spaced, as the model would read them.

    Raises:
        Exception: any of the data set or the collator, which may take no row alone.

    Args:
        data: a data set, a list of rows or of batches, or a loader, whose collator is copied, and
            called with copies of rows. Of a stream nothing is read.
        kept: large objects that the collator may hold, which are not copied.
    """
    collate = None
    if isinstance(data, DataLoader):
        data, collate = data.dataset, data.collate_fn
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        return []
    memo = {id(each): each for each in kept}
    # functions and methods have no state of their own to keep
    if not callable(getattr(collate, "__get__", None)):
        collate = copy.deepcopy(collate, dict(memo))
    found: list[Row] = []
    with states_kept():
        for index in range(0, len(data), max(1, len(data) // count)):
            row = copy.deepcopy(data[index], dict(memo))
            found += rows_of(row if collate is None else collate([row]))
            if len(found) >= count or not found:
                break
    return found


def inspect_rows(
    rows: Sequence[Row],
    findings: Findings,
    base: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int | None,
) -> None:
    """Check labels, ends, beginnings and lengths of encoded rows.

    Args:
        base: the model without adapters.
        max_length: at which rows are truncated; None: it is not known.
    """
    inspect_labels(rows, findings, base, tokenizer)
    if tokenizer is None or not rows:
        return
    if findings.wants("bos"):
        _inspect_beginnings(rows, findings, tokenizer)
    writes = hasattr(base, "can_generate") and base.can_generate()
    learned = [row for row in rows if row.target]
    lengths = [len(row.ids) for row in rows]
    # blocks of a corpus, which end anywhere; the last may be shorter
    if not writes or not learned or lengths.count(max(lengths)) > max(1, BLOCKS * len(rows)):
        return
    ends = _ends_of(tokenizer, base)
    cut = [] if base.config.is_encoder_decoder else _cut(rows, ends, max_length)
    if findings.wants("truncated") and len(cut) > MANY * len(rows):
        findings.add(
            "truncated",
            "warning",
            f"{len(cut)} of {len(rows)} rows end at {len(cut[0].ids)} tokens without an end",
            "raise max_length, or drop these rows",
        )
    whole = [row for row in learned if row not in cut]
    missing = [row for row in whole if ends.isdisjoint(row.target[-TAIL:])]
    if findings.wants("eos") and missing:
        masked = sum(not ends.isdisjoint(row.ids[-TAIL:]) for row in missing)
        names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(sorted(ends))))
        where = f", though {masked} of them have one, masked in the labels" if masked else ""
        findings.add(
            "eos",
            "error" if len(missing) == len(whole) else "note",
            f"{len(missing)} of {len(whole)} rows teach no end ({names}){where}: "
            "the model does not learn to stop",
            "learn it: give the tokenizer a pad token of its own, if it is the end token"
            if masked
            else "add the end token to each row",
        )


def inspect_labels(
    rows: Sequence[Row], findings: Findings, base: Any, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Check that rows have labels, and show the share of tokens that is learned, with a row."""
    known = [row for row in rows if row.labels is not None]
    if not known or not findings.wants("labels"):
        return
    without = sum(not row.target for row in known)
    if without > MANY * len(known):
        findings.add(
            "labels",
            "error" if without == len(known) else "warning",
            f"{without} of {len(known)} rows have no label, so nothing is learned from them",
            "raise max_length if the answers lie behind it, else see which tokens the collator "
            "masks",
        )
    aligned = [row for row in known if len(row.ids) == len(row.labels or ())]
    if not aligned or base.config.is_encoder_decoder or "watch/learned" in findings.metrics:
        return
    share = sum(len(r.target) for r in aligned) / max(1, sum(len(r.ids) for r in aligned))
    findings.metrics["watch/learned"] = share
    first = next((row for row in aligned if row.target), None)
    if tokenizer is not None and first is not None and findings.speaks:
        marks = [label != IGNORED for label in first.labels or ()]
        spans = pieces(tokenizer, first.ids, marks)
        text = "".join(s.text if not s.has_loss else s.text.join(BRACKETS) for s in spans)
        short = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
        logger.info("%.1f %% of the tokens are learned: %s", 100 * share, printable(short))


def _inspect_beginnings(
    rows: Sequence[Row], findings: Findings, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Check that rows do not begin with two tokens of the beginning."""
    bos = tokenizer.bos_token_id
    twice = sum(bos is not None and row.ids[:2] == [bos, bos] for row in rows)
    if not twice:
        return
    if bos in (tokenizer.eos_token_id, tokenizer.pad_token_id):
        # padding without a mask looks alike
        template = str(tokenizer.chat_template or "")
        written = "bos_token" in template or str(tokenizer.bos_token) in template
        if not written or tokenizer("a")["input_ids"][:1] != [bos]:
            return
    findings.add(
        "bos",
        "error" if 2 * twice > len(rows) else "warning",
        f"{twice} of {len(rows)} rows begin with {tokenizer.bos_token} twice: template and "
        "tokenizer both add it",
        "tokenize what the template returns with add_special_tokens=False",
    )


def _ends_of(tokenizer: PreTrainedTokenizerBase, base: Any) -> set[int]:
    """Return the tokens that end an answer: of tokenizer, model and chat template."""
    settings = (tokenizer, getattr(base, "generation_config", None), base.config)
    found = {end_of_turn(tokenizer)} if tokenizer.chat_template else set()
    for each in settings:
        ids = getattr(each, "eos_token_id", None)
        found |= set(ids) if isinstance(ids, list) else {ids}
    return {token for token in found if token is not None}


def _cut(rows: Sequence[Row], ends: set[int], limit: int | None) -> list[Row]:
    """Return the rows of the largest length that have no end."""
    open_ended = [row for row in rows if ends.isdisjoint(row.ids[-TAIL:])]
    if limit is None:  # several of the same largest length, where others have an end
        limit = max(len(row.ids) for row in rows)
        longest = sum(len(row.ids) == limit for row in rows)
        if longest < max(2, MANY * len(rows)) or len(open_ended) == len(rows):
            return []
    return [row for row in open_ended if len(row.ids) >= limit]


# Equal rows


def inspect_same_rows(train: object, test: object, findings: Findings) -> None:
    """Count the rows of `test` that are in `train`: equal inputs and labels."""
    known, asked = (_keys(data, MOST) for data in (train, test))
    if not known or not asked or not findings.wants("same rows"):
        return
    inputs = TrainingInputs(text for text, _ in known)
    long, short = (
        inputs.compare(text for text, is_long in asked if is_long == wanted)
        for wanted in (True, False)
    )
    count = long.found + (short.found if short.found >= COMMON * len(asked) else 0)
    if not count:
        return
    known_texts = {text for text, _ in known}
    example = next((i for i, (text, _) in enumerate(asked) if text in known_texts), None)
    shown = "" if example is None else f", such as row {example}"
    findings.add(
        "same rows",
        "error" if 2 * count > len(asked) else "warning",
        f"{count} of {len(asked)} evaluation rows occur in training{shown}: scores on them say "
        "nothing of new rows",
        "split by unique row",
    )


def digest_of(data: object, count: int) -> str:
    """Return what is equal for data sets whose first `count` rows are equal."""
    return xxhash.xxh3_64_hexdigest(repr(_keys(data, count)).encode())


def _keys(data: object, most: int) -> list[tuple[str, bool]]:
    """Return what is equal for equal rows, and whether a row is long enough to be no chance."""
    parts = data.values() if isinstance(data, dict) else [data]
    sets = [each.dataset if isinstance(each, DataLoader) else each for each in parts]
    with states_kept():
        rows = islice(chain.from_iterable(map(_readable, sets)), most)
        return [key for row in rows for key in _keys_of(row)]


def _keys_of(row: Any) -> Iterator[tuple[str, bool]]:
    encoded = rows_of(row)
    for one in encoded:
        content = repr((one.ids, one.labels or row.get("label")))
        yield xxhash.xxh3_128_hexdigest(content.encode()), len(one.ids) >= SHORTEST
    if not encoded and isinstance(row, Mapping):
        texts = [str(v) for v in row.values() if isinstance(v, str | int | float | list)]
        yield "\x1f".join(texts), len(" ".join(texts).split()) >= SHORTEST


def _readable(data: object) -> Any:
    """Return rows that are quick to read and have no state; of other data sets, none."""
    if not isinstance(data, Dataset):
        return data if isinstance(data, list | tuple) else ()
    names = [name for name in data.column_names if name not in NUMBERS]
    if "input_ids" in names:
        names = [name for name in names if name in ("input_ids", *LABELS)]
    return data.select_columns(names)
