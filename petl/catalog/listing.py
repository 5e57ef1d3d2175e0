"""What `petl methods` prints, kept in listing.json: finding it out takes PEFT and seconds."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any

from petl.config.compose import config_dir, config_file
from petl.imports.plugins import plugins

PACKAGE = Path(__file__).parents[1]
KEPT = Path(__file__).with_name("listing.json")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Table:
    """One table of the listing.

    Attributes:
        columns: their names; one that begins with ">" is aligned to the right.
        notes: lines below it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def listing() -> list[Table]:
    """Methods, losses and recipes: as kept, or found out anew if others are there by now."""
    kept: dict[str, Any] = json.loads(KEPT.read_text())
    if kept["made_of"] == made_of():
        tables = [Table(**table) for table in kept["tables"]]
    else:
        logger.info(
            "counting again: methods or YAMLs are not those that %s was made of; "
            "python scripts/support.py writes it",
            KEPT.name,
        )
        tables = find_out()
    return with_foreign(tables) if plugins() else tables


def with_foreign(tables: Sequence[Table]) -> list[Table]:
    """The listing, with a row for each method that another package has registered."""
    from petl.core.registry import list_methods
    from petl.methods import BUILT_IN

    methods, *others = tables
    added = [_row(name) for name in list_methods() if name not in BUILT_IN]
    rows, refusals = ([*map(itemgetter(i), added)] for i in (0, 1))
    notes = [*methods.notes, *filter(None, refusals)]
    return [replace(methods, rows=[*methods.rows, *rows], notes=notes), *others]


def made_of() -> str:
    """A hash of what decides the listing and a user may change: YAMLs, and which methods are there.

    It leaves out the code of methods, whose effect on the listing a test looks at.
    """
    hasher = hashlib.sha256()
    for folder in (PACKAGE / "methods", PACKAGE / "losses"):
        for path in sorted(folder.iterdir()):
            if path.suffix == ".py" or (path / "__init__.py").is_file():
                hasher.update(f"{folder.name} {path.stem}\n".encode())
    for folder in (config_dir() / "method", config_dir() / "loss"):
        for path in sorted(folder.glob("*.yaml")):
            file = config_file(folder.name, path.stem) or path  # --config-dir may have another
            hasher.update(f"{folder.name} {path.stem}\n{file.read_text()}".encode())
    return hasher.hexdigest()


def keep() -> Path:
    """Write listing.json, as of this code and these YAMLs; the file."""
    tables = [asdict(table) for table in find_out()]
    KEPT.write_text(json.dumps({"made_of": made_of(), "tables": tables}, indent=1) + "\n")
    return KEPT


def find_out() -> list[Table]:
    """The tables, from the registries and from wrapping the reference model with each method."""
    return [_methods(), _losses(), _recipes()]


def _methods() -> Table:
    from petl.catalog.reference import REFERENCE
    from petl.methods import BUILT_IN

    rows, refusals = zip(*map(_row, BUILT_IN), strict=True)
    return Table(
        f"trainable: with the method's YAML on {REFERENCE}; counted with PEFT {version('peft')}",
        ["method", ">trainable", "merges", "LoRA export", "by", "paper"],
        list(rows),
        list(filter(None, refusals)),
    )


def _row(name: str) -> tuple[list[str], str]:
    """The row of a method, and why it cannot adapt the reference model, or ""."""
    from petl.catalog.reference import count
    from petl.core.registry import method

    entry, found = method(name), count(name)
    refusal = f"{name}: {found}" if isinstance(found, str) else ""
    trained = "-" if isinstance(found, str) else f"{found:,}"
    can = ("yes" if flag else "no" for flag in (entry.merges, entry.exports_lora))
    return [name, trained, *can, entry.by, entry.paper], refusal


def _losses() -> Table:
    from petl.core.spec.losses import list_losses, loss

    losses = map(loss, list_losses())
    rows = [[e.name, f"+method=NAME +loss={e.name}", e.summary, e.paper] for e in losses]
    return Table("extra losses, for any method", ["loss", "use", "lowers", "paper"], rows)


def _recipes() -> Table:
    from petl.catalog import method_page
    from petl.config.recipes import list_recipes, recipe

    recipes = map(recipe, list_recipes())
    rows = [
        [r.name, f"+method={r.name}", method_page.made_of(r), method_page.paper_of(r)]
        for r in recipes
    ]
    return Table("recipes, which choose both", ["recipe", "use", "is", "paper"], rows)
