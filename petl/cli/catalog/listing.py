"""The tables of `petl methods`, cached in listing.json: to compute them takes PEFT and seconds."""

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any

from petl.cli.catalog.verdicts import tried
from petl.system.files.disk import write_atomic
from petl.system.imports.peft_hook import plugins
from petl.system.settings.command_line import config_dir, config_file, options_of

PACKAGE = Path(__file__).parents[2]
CACHE = Path(__file__).with_name("listing.json")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ListingTable:
    """One table of the listing.

    Attributes:
        columns: their names; one that begins with ">" is right-aligned.
        notes: lines to print below the table.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def listing() -> list[ListingTable]:
    """Return the tables that `petl methods` prints, from the cache if it is up to date.

    Methods of other packages are counted each time, and the user's own recipes are added.
    """
    # shipped with the package, so it is trusted
    cached: dict[str, Any] = json.loads(CACHE.read_text())
    if cached["made_of"] == fingerprint():
        tables = [ListingTable(**table) for table in cached["tables"]]
    else:
        logger.info(
            "counting parameters: methods or configs have changed since %s was written; "
            "`python scripts/support.py` updates it",
            CACHE.name,
        )
        tables = compute_tables()
    tables = with_foreign(tables) if plugins() else tables
    tables = with_own_recipes(tables) if users_recipes() else tables
    return [*tables[:-1], _tried(), tables[-1]]


def users_recipes() -> list[str]:
    """The names in method/ of `./configs` and `--config-dir` that petl's own folder lacks."""
    own = config_dir() / "method"
    return [name for name in options_of("method") if not (own / f"{name}.yaml").is_file()]


def with_own_recipes(tables: Sequence[ListingTable]) -> list[ListingTable]:
    """Return the tables with a row for each recipe in a folder of the user's."""
    # the order of `compute_tables`
    *others, recipes, first = tables
    listed = {row[0] for row in recipes.rows}
    added = [row for row in _recipes().rows if row[0] not in listed]
    return [*others, replace(recipes, rows=[*recipes.rows, *added]), first]


def with_foreign(tables: Sequence[ListingTable]) -> list[ListingTable]:
    """Return the tables with a row for each method that another package registered."""
    from petl.core.registry import list_methods
    from petl.methods import BUILT_IN

    methods, *others = tables
    added = [_row(name) for name in list_methods() if name not in BUILT_IN]
    # unzips, also if nothing was added
    rows, refusals = ([*map(itemgetter(i), added)] for i in (0, 1))
    notes = [*methods.notes, *filter(None, refusals)]
    return [replace(methods, rows=[*methods.rows, *rows], notes=notes), *others]


def fingerprint() -> str:
    """Return a hash of the names of all methods and losses, and of their YAML files.

    The code of the methods is left out: users change it rarely, and a test compares the cache with
    the code.
    """
    hasher = hashlib.sha256()
    # names of modules: a method that is added or removed changes the listing
    for folder in (PACKAGE / "methods", PACKAGE / "methods" / "losses"):
        # sorted: the order of a directory depends on the file system
        for path in sorted(folder.iterdir()):
            if path.suffix == ".py" or (path / "__init__.py").is_file():
                hasher.update(f"{folder.name} {path.stem}\n".encode())
    # contents of the configs: trainable parameters depend on ranks and targets
    for folder in (config_dir() / "method", config_dir() / "loss"):
        for path in sorted(folder.glob("*.yaml")):
            file = config_file(folder.name, path.stem) or path  # --config-dir may have another
            hasher.update(f"{folder.name} {path.stem}\n{file.read_text()}".encode())
    return hasher.hexdigest()


def write_cache() -> Path:
    """Write listing.json; return the file."""
    tables = [asdict(table) for table in compute_tables()]
    content = {"made_of": fingerprint(), "tables": tables}
    write_atomic(CACHE, json.dumps(content, indent=1) + "\n")
    return CACHE


def compute_tables() -> list[ListingTable]:
    """Compute the tables from the registries; wraps the reference model with each method."""
    # the recommendations last: a terminal shows the end of what is printed
    return [_methods(), _losses(), _recipes(), _recommended()]


def _methods() -> ListingTable:
    # here, because it imports torch and transformers, which reading the cache does not need
    from petl.cli.catalog.reference import REFERENCE
    from petl.methods import BUILT_IN

    rows, refusals = zip(*map(_row, sorted(BUILT_IN, key=_by_need)), strict=True)
    return ListingTable(
        f"trainable: parameters with configs/method/NAME.yaml on {REFERENCE}; "
        f"PEFT {version('peft')}",
        ["method", ">trainable", "for", "merges", "LoRA export", "by", "paper"],
        list(rows),
        list(filter(None, refusals)),
    )


def _row(name: str) -> tuple[list[str], str]:
    """Return the row of a method, and why it cannot adapt the reference model, or on which other
    one it is counted, or "".
    """
    from petl.cli.catalog.reference import REFERENCE, counted
    from petl.core.registry import method

    entry, (count, model) = method(name), counted(name)
    refusal = f"{name}: on {model}" if model != REFERENCE else ""
    refusal = f"{name}: {count}" if isinstance(count, str) else refusal
    trainable = "-" if isinstance(count, str) else f"{count:,}"
    flags = ("yes" if flag else "no" for flag in (entry.merges, entry.exports_lora))
    return [name, trainable, entry.need, *flags, entry.by, short_paper(entry.paper)], refusal


def _by_need(name: str) -> tuple[bool, bool, str, bool, str]:
    """The place of a method in the table: by need, LoRA's first; in it, the recommended one."""
    from petl.core.registry import method

    entry = method(name)
    usual = entry.need == method("lora").need
    # False sorts before True
    return not usual, not entry.need, entry.need, not entry.recommended, name


def short_paper(paper: str) -> str:
    """Return authors, year and arXiv id of a paper, without its title.

    >>> short_paper("Wang et al. 2025, MoS: Mixture of Shards, ICLR, arXiv:2410.00938")
    'Wang et al. 2025, arXiv:2410.00938'
    """
    first, _, rest = paper.partition(", ")
    # the id is the last word, so no comma follows it
    found = re.search(r"arXiv:\S+", rest)
    return f"{first}, {found[0]}" if found else paper


def _recommended() -> ListingTable:
    from petl.core.registry import method
    from petl.methods import BUILT_IN

    entries = [method(name) for name in sorted(BUILT_IN, key=_by_need)]
    rows = [[e.need, e.name, e.recommended] for e in entries if e.recommended]
    return ListingTable("recommended, by what you need", ["for", "method", "why"], rows)


def _tried() -> ListingTable:
    rows = [[each.verdict, each.claim, each.statement, each.difference] for each in tried()]
    return ListingTable(
        "claims of papers, tried on small models and real data (docs/claims.md)",
        ["verdict", "claim", "statement", "difference, 95 %"],
        rows,
    )


def _losses() -> ListingTable:
    from petl.core.losses import list_losses, loss

    losses = map(loss, list_losses())
    rows = [
        [e.name, f"+method=NAME +loss={e.name}", e.summary, short_paper(e.paper)] for e in losses
    ]
    return ListingTable("extra losses, for any method", ["loss", "usage", "effect", "paper"], rows)


def _recipes() -> ListingTable:
    from petl.cli.catalog.recipes import list_recipes, paper_of, parts_of, recipe

    recipes = map(recipe, list_recipes())
    rows = [[r.name, f"+method={r.name}", parts_of(r), short_paper(paper_of(r))] for r in recipes]
    return ListingTable(
        "recipes: method, loss and settings of a paper", ["recipe", "usage", "parts", "paper"], rows
    )
