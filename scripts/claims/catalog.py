"""All claims, in the order in which a user would ask for them, as claims.yaml describes them."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

from claims import fashion, measures, neurons, prompts, routers, task_files, texts
from claims.claim import ONCE, Claim, Kind, Setting, Shown, Statement, Untried, around
from claims.measures import Measure
from petl.system.files.read import read_yaml

FILE = Path(__file__).with_name("claims.yaml")
FILES: dict[str, Callable[..., None]] = {  # by the entry `files` of a setting
    "images": fashion.write_images,
    "long": texts.write_long,
    "prompts": prompts.write_prompts,
    "tasks": task_files.write_tasks,
    "texts": texts.write_texts,
    "verbs": texts.write_verbs,
}
MEASURES = {
    each.name: each
    for each in (
        *(measures.ACCURACY, measures.SECONDS, measures.MEMORY, measures.DENSITY),
        *(measures.RUN_LOSS, measures.LOSS, measures.NDCG),
        measures.loss_on("hamlet", "loss on Hamlet"),
        measures.loss_on("reviews", "loss on reviews"),
        measures.loss_at(48, "validation loss after a quarter"),
        Measure("router_agreement", "agreement of routers", routers.agreement, "{:.3f}".format),
        Measure(
            "neurons_at_ppl_1",
            "neurons needed at 1 % more perplexity",
            neurons.needed,
            measures.share,
            ratio=True,
        ),
    )
}


def setting_of(name: str, entries: Mapping[str, Any]) -> Setting:
    """Return a setting of the file; one that is like another has its name too."""
    own = dict(entries[name])
    if "like" in own:
        name = own.pop("like")
        own = {**entries[name], **own}
    rates = own.pop("rates", None) or around(own.pop("around", 1e-3))
    write, models = FILES.get(own.pop("files", "")), own.pop("models", None)
    if write is not None and models is not None:
        write = partial(write, models=models)
    return Setting(
        name=name,
        rates=tuple(rates),
        seeds=tuple(range(own.pop("seeds", len(ONCE)))),
        write_files=write,
        **{key: tuple(value) if isinstance(value, list) else value for key, value in own.items()},
    )


def statement_of(entry: Mapping[str, Any], words: Mapping[str, str]) -> Statement:
    """Return a statement of the file.

    Args:
        words: of the contenders, by their keys.
    """
    (kind,) = (kind for kind in get_args(Kind) if kind in entry)
    more = {key: entry[key] for key in ("margin", "paper") if key in entry}
    if "than" in entry:
        one, other = (words[key] for key in entry["than"])
        more["than"] = (one, other)
    first, second = (words[key] for key in entry[kind])
    measure = MEASURES[entry.get("measure", "accuracy")]
    return Statement(entry["says"], kind, first, second, measure=measure, **more)


def claim_of(name: str, entry: Mapping[str, Any], settings: Mapping[str, Setting]) -> Claim:
    """Return a claim of the file."""
    words = WORDS[name]
    return Claim(
        name=name,
        title=entry["title"],
        paper=entry.get("paper", ""),
        paper_says=entry["paper_says"],
        statements=tuple(statement_of(each, words) for each in entry["statements"]),
        setting=settings[entry["setting"]],
        labels={each["words"]: each["label"] for each in entry["contenders"].values()},
        pages=tuple(entry["pages"]),
        shown=tuple(
            Shown(each["title"], words[each["contender"]], each["heat_map"])
            for each in entry.get("shown", ())
        ),
        limits=tuple(entry.get("limits", ())),
        beside=tuple(words[key] for key in entry.get("beside", ())),
        since=words.get(entry.get("since", ""), ""),
    )


_FILE: dict[str, Any] = read_yaml(FILE, dict[str, Any])
# by claim and key: the words of a contender
WORDS: dict[str, dict[str, str]] = {
    name: {key: each["words"] for key, each in entry["contenders"].items()}
    for name, entry in _FILE["claims"].items()
}
SETTINGS = {name: setting_of(name, _FILE["settings"]) for name in _FILE["settings"]}
CLAIMS = {name: claim_of(name, entry, SETTINGS) for name, entry in _FILE["claims"].items()}
UNTRIED = [Untried(**each) for each in _FILE["untried"]]
