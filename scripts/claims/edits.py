"""Edited contenders: what `petl.deltas` makes of a finished adapter, scored on the test rows.

    "compress density=0.1 alpha=1,2,4 scope=global"    alpha is chosen on the run's validation rows
    "prune drop=0.9 q=searched"                        q: dare, closed, analytic or searched

The folder of an edited adapter has predictions.jsonl, as a run has, and a scores.json with fewer
entries; the adapter itself is not kept. "made_of" in it identifies the weights that were edited.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from claims.divisors import KINDS, divisors
from claims.score import Scorer
from petl.adapters.deltas.adapters import pruned, read, write_compressed, write_pruned
from petl.adapters.deltas.measured import compress_best
from petl.adapters.export.saved_adapter import find
from petl.core.adapter_folder import Folder
from petl.errors import InputError
from petl.system.files.disk import as_json, sha256, write_atomic
from petl.training.runs.records import ADAPTER, PREDICTIONS, SCORES

Settings = dict[str, str]
SCOPES = ("global", "tensor")
MADE_OF = "made_of"  # in scores.json


def parsed(
    words: str, known: Mapping[str, Mapping[str, Sequence[str]]] | None = None
) -> tuple[str, Settings]:
    """Return the kind of an edit and its settings.

    Args:
        known: the values of each setting by kind, none: any; None: of `EDITS`.

    Raises:
        InputError: there is no such kind, or its settings are others.
    """
    kinds = {name: own for name, (_, own) in EDITS.items()} if known is None else known
    kind, *given = words.split()
    settings = dict(word.split("=", 1) for word in given)
    if kind not in kinds or settings.keys() != kinds[kind].keys():
        named = "; ".join(" ".join([name, *keys]) for name, keys in kinds.items())
        raise InputError(f"{words!r} is not an edit; known, with their settings: {named}")
    for name, allowed in kinds[kind].items():
        if allowed and settings[name] not in allowed:
            raise InputError(f"{name}={settings[name]} is not one of {', '.join(allowed)}")
    return kind, settings


def edit(words: str, run: Path, seed: int, scorer: Scorer, out: Path) -> None:
    """Edit the adapter of a finished run, and write its scores and predictions to a folder.

    Args:
        seed: of random choices.
        scorer: of any run with the same base model and test rows.

    Raises:
        InputError: the words are no edit, or the run has not what the edit needs.
    """
    kind, settings = parsed(words)
    write, _ = EDITS[kind]
    start = time.process_time()
    with tempfile.TemporaryDirectory() as place:
        adapter = Path(place) / ADAPTER
        facts = write(run, adapter, seed, settings)
        seconds = time.process_time() - start
        out.mkdir(parents=True, exist_ok=True)
        after = scorer.scores(adapter, kept=out / PREDICTIONS)
        size = Folder(adapter).weights.stat().st_size
    found = {"after": after, "cpu_seconds": seconds, "adapter_bytes": size, "edit": facts}
    found[MADE_OF] = origin([run])
    write_atomic(out / SCORES, as_json(found, in_order=True))  # last: it says that all is done


def origin(runs: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of the weights of finished runs: it changes if one is trained again."""
    return [sha256(Folder(run / ADAPTER).weights) for run in runs]


def compress(run: Path, out: Path, seed: int, settings: Settings) -> Settings:
    """Write a compressed adapter, with the alpha that scores best on the run's validation rows."""
    del seed  # nothing is random
    saved = find(run)
    alphas = [a if a == "fit" else float(a) for a in settings["alpha"].split(",")]
    density = float(settings["density"])
    found, _, _ = compress_best(saved, [density], alphas, scope=settings["scope"])
    write_compressed(read(saved.adapter), found, out)
    return {"alpha": str(found.settings["alpha"]), "bits": f"{found.bits:.4f}"}


def prune(run: Path, out: Path, seed: int, settings: Settings) -> Settings:
    """Write an adapter of which a random share of the values is 0; one mask for all divisors."""
    saved, drop = find(run), float(settings["drop"])
    material = read(saved.adapter)
    q, facts = divisors(saved, material, drop, settings["q"], seed)
    state = pruned(material, drop, q=q, seed=seed)
    write_pruned(material, state, out, drop=drop, q=q, seed=seed)
    return {name: f"{value:.4g}" for name, value in facts.items()}


EDITS = {
    "compress": (compress, {"density": (), "alpha": (), "scope": SCOPES}),
    "prune": (prune, {"drop": (), "q": KINDS}),
}
