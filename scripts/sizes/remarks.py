"""Sentences on what the tables show, what did not work among it; each is computed from records."""

import statistics
from collections.abc import Iterator, Sequence

from petl.experiments.reports.formatting import size
from sizes.cells import FACTORS, PAIRS, RANK, SEPARATE
from sizes.divisors import ETAS
from sizes.records import Record
from sizes.rows import Row, rows_of, standard_error
from sizes.train import LORA

TOLERANCE = 2  # standard errors below which a difference may be chance in the choice of rows
CLOSE = 1e-9  # of a divisor to 1 - P
EXACT = 1e-3  # fraction of the norm: what `linear` loses is rounding


def remarks(records: Sequence[Record]) -> list[str]:
    """Return the sentences for which there are records."""
    base = next(iter(rows_of(records, "trained", method=LORA)), None)
    if base is None:
        return []
    error = standard_error(base)
    sentences = [
        f"One standard error of a score on these test rows is {100 * error:.1f} points, whatever "
        "the number of seeds: differences below twice that may be chance in the choice of rows. "
        "All settings that were tried are shown; the highest of several is a little optimistic."
    ]
    sentences += about_small(records, base, error)
    sentences += about_compress(records, base)
    sentences += about_prune(records, base)
    for pair in PAIRS:
        sentences += about_pair(rows_of(records, "combine", tasks="+".join(pair)), pair)
    return sentences


def about_small(records: Sequence[Record], base: Row, error: float) -> Iterator[str]:
    """Yield which changed adapters keep the score, and whether any exceeds it."""
    for group, what in (("trained", "that are small by training"), ("compress", "compressed")):
        rows = [row for row in rows_of(records, group) if row.bytes() < base.bytes()]
        kept = [row for row in rows if row.mean() > base.mean() - TOLERANCE * error]
        if not rows:
            continue
        if kept:
            least = min(kept, key=Row.bytes)
            yield (
                f"Of the adapters {what}, the smallest within two standard errors of {LORA} is "
                f"{least.name}: {size(round(least.bytes()))}, {base.bytes() / least.bytes():.1f} "
                "times smaller."
            )
        else:
            yield f"Of the adapters {what}, none is within two standard errors of {LORA}."
    changed = [*rows_of(records, "compress"), *rows_of(records, "prune")]
    above = [row.name for row in changed if row.is_above(base)]
    if above:
        yield f"Above {LORA} with every seed: {'; '.join(above)}."
    elif changed:
        yield f"No compressed or pruned adapter scores above {LORA} with every seed."


def about_compress(records: Sequence[Record], base: Row) -> Iterator[str]:
    """Yield where tensors lost all values, and what scope and magnitude make of the score."""
    rows = rows_of(records, "compress")
    for density in sorted({row.settings["density"] for row in rows}):
        own = [row for row in rows if row.settings["density"] == density]
        emptied = [
            row for row in own if row.settings["scope"] == "global" and any(row.fact("emptied"))
        ]
        if emptied:
            most = max(emptied[0].fact("emptied"))
            yield (
                f"compress, density {density:g}: with the largest values of all tensors together, "
                f"up to {most:g} of {emptied[0].fact('tensors')[0]:g} tensors have no value left."
            )
        best = max(own, key=Row.mean)
        lowest = min(own, key=Row.mean)
        yield (
            f"compress, density {density:g}: from {_share(lowest)} ({_code(lowest)}) to "
            f"{_share(best)} ({_code(best)}); {LORA} has {_share(base)}."
        )


def about_prune(records: Sequence[Record], base: Row) -> Iterator[str]:
    """Yield which divisor is best for each fraction, and what the searches ended at."""
    rows = rows_of(records, "prune")
    for drop in sorted({row.settings["drop"] for row in rows}):
        own = sorted((r for r in rows if r.settings["drop"] == drop), key=Row.mean, reverse=True)
        best = own[0]
        worse = [row.settings["q"] for row in own[1:] if row.is_below(best)]
        others = f"; below it with every seed: {', '.join(worse)}" if worse else ""
        yield (
            f"prune {drop:g}: {best.settings['q']} has the highest mean, {_share(best)}{others}."
        )
    searched = [record for row in rows if row.settings["q"] == "searched" for record in row.records]
    edge = sum(r.facts["q"] <= 1 - r.settings["drop"] + CLOSE for r in searched)
    if searched:
        yield (
            f"In {edge} of {len(searched)} searches the best divisor was 1 - P, which is DARE's."
        )
    scanned = [record for row in rows if row.settings["q"] == "analytic" for record in row.records]
    at_edge = sum(r.facts["eta"] in (ETAS[0], ETAS[-1]) for r in scanned)
    if scanned:
        yield (
            f"analytic: eta was chosen from {', '.join(f'{eta:g}' for eta in ETAS)}, and in "
            f"{at_edge} of {len(scanned)} cases was at an edge of them; the published values "
            "belong to sums in half precision. At 0.5 the bound is not defined."
        )
    plain = [row for row in rows if row.settings["q"] == "dare"]
    if plain:
        yield (
            "A pruned file is as large as before: its zeros are stored. In gzip, the largest "
            f"fraction takes {size(round(min(row.bytes(packed=True) for row in plain)))}, since A "
            "of LoRA and the head are not pruned."
        )


def about_pair(rows: Sequence[Row], pair: tuple[str, str]) -> Iterator[str]:
    """Yield the best combination of two tasks, and those that are no better than one adapter."""
    names = " and ".join(pair)
    base = next((row for row in rows if row.settings["method"] == SEPARATE), None)
    ours = sorted((r for r in rows if "level" in r.settings), key=lambda r: -r.mean(None))
    alone = [row for row in rows if row.settings["method"].endswith(" alone")]
    if base is None or not ours or not alone:
        return
    best = ours[0]
    loss = 100 * (best.mean(None) - base.mean(None))
    yield (
        f"{names}: of the combinations, {best.name} has the highest mean, {loss:+.1f} points from "
        f"separate adapters at {base.bytes() / best.bytes():.1f} times fewer bytes."
    )
    one = max(alone, key=lambda row: row.mean(None))
    failed = [row.name for row in ours if row.mean(None) <= one.mean(None)]
    if failed:
        yield (
            f"{names}: no better on average than {one.settings['method']}, with the heads of both "
            f"tasks: {'; '.join(failed)}."
        )
    factors = [f"{statistics.fmean(base.fact(f'cosine of {f}')):.3f} of {f}" for f in FACTORS]
    yield f"{names}: the mean cosine between the tasks' tensors is {' and '.join(factors)}."
    cut = [row for row in ours if max(row.fact("lost")) > EXACT]
    if cut:
        lost = [f"{100 * statistics.fmean(r.fact('lost')):.0f} % ({r.name})" for r in cut]
        yield f"{names}: rank {RANK} loses of the norm of a combined update: {'; '.join(lost)}."


def _share(row: Row) -> str:
    return f"{100 * row.mean():.1f} %"


def _code(row: Row) -> str:
    scope = ", of each tensor" if row.settings["scope"] == "tensor" else ""
    return f"alpha {row.settings['alpha']}{scope}"
