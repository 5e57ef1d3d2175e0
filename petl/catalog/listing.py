"""What `petl methods` prints, kept in listing.json: finding it out takes PEFT and seconds."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from petl.config.compose import config_dir

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
        return [Table(**table) for table in kept["tables"]]
    logger.info(
        "counting anew: %s was made of other methods or YAMLs; python scripts/support.py writes it",
        KEPT.name,
    )
    return find_out()


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
            hasher.update(f"{folder.name} {path.stem}\n{path.read_text()}".encode())
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
    from petl.catalog.reference import REFERENCE, count
    from petl.core.registry import list_methods, method

    rows, refusals = [], []
    for name in list_methods():
        entry, found = method(name), count(name)
        if isinstance(found, str):
            refusals.append(f"{name}: {found}")
        trained = "-" if isinstance(found, str) else f"{found:,}"
        can = ("yes" if flag else "no" for flag in (entry.merges, entry.exports_lora))
        rows.append([name, trained, *can, entry.by, entry.paper])
    return Table(
        f"trainable: with the method's YAML on {REFERENCE}; counted with PEFT {version('peft')}",
        ["method", ">trainable", "merges", "LoRA export", "by", "paper"],
        rows,
        refusals,
    )


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
