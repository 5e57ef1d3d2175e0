"""Methods of other packages: entry points of the group `petl.methods`, and the setting `imports`.

A package offers its methods by a line of its pyproject.toml. The value is a module that calls
`petl.register` or `petl.adopt` when it is imported; the name is free, that of the method is usual.

    [project.entry-points."petl.methods"]
    mine = "my_package.mine"

`load_plugins` runs once PEFT is imported and petl's own methods are registered, so `import petl`
reads no metadata of packages and imports none of them.
"""

import logging
import sys
import traceback
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petl.errors import InputError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "petl.methods"
FAILED: dict[str, str] = {}  # by name of the entry point, why it could not be loaded
_tried: set[str] = set()  # the modules of entry points that were imported, or failed
logger = logging.getLogger(__name__)


def plugins() -> list["EntryPoint"]:
    """The entry points of methods that are installed, sorted by name."""
    from importlib.metadata import entry_points  # takes as long as all of `import petl`

    return sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value))


def load_plugins() -> None:
    """Import the modules of all entry points, each once; one that fails is a warning.

    A plugin may be the one that imported petl, and so be imported in part: its methods are
    registered when its own import ends.
    """
    for entry in plugins():
        if entry.value in _tried:
            continue
        _tried.add(entry.value)
        try:
            entry.load()
        except Exception as error:
            FAILED[entry.name] = f"{type(error).__name__}: {error}"
            logger.warning(
                "the methods of package %s cannot be used: its entry point %s = %s does not load: "
                "%s",
                source_of(entry),
                entry.name,
                entry.value,
                FAILED[entry.name],
            )


def source_of(entry: "EntryPoint") -> str:
    """The distribution that an entry point belongs to, with its version."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "(unknown)"


def failure(name: str) -> str:
    """The end of a message about an unknown method `name`, if its entry point did not load."""
    return f"; its entry point does not load: {FAILED[name]}" if name in FAILED else ""


# The setting `imports`


def import_modules(names: Any) -> None:
    """Import the modules that the setting `imports` names; None stands for an empty list.

    Raises:
        InputError: `names` is not a list of module names, or one of them cannot be imported.
    """
    for name in _checked(names):
        try:
            import_module(name)
        except Exception as error:
            raise InputError(f"imports: {_reason(name, error)}") from error


def not_yet_trusted(names: Any) -> list[str]:
    """Those modules of a saved run's `imports` that neither this process nor a plugin imports."""
    names = _checked(names)
    known = {entry.module for entry in plugins()} if names else set()
    return [name for name in names if name not in sys.modules and name not in known]


def _checked(names: Any) -> list[str]:
    names = [] if names is None else names
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise InputError(f"imports={names!r} is not a list of modules: write imports=[{names}]")
    for name in names:
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise InputError(
                f"imports: {name!r} is not the name of a module, such as my_methods or "
                "my_package.mine"
            )
    return list(names)


def _reason(name: str, error: Exception) -> str:
    """Why the module `name` could not be imported, and where Python looked for it."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing is not None and f"{name}.".startswith(f"{missing}."):
        folders = ", ".join(str(Path(folder or ".").absolute()) for folder in sys.path)
        return (
            f"there is no module {name!r} ({error}); Python looked in {folders}; "
            "PYTHONPATH=FOLDER adds a folder"
        )
    place = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"module {name!r} cannot be imported: {type(error).__name__}: {error} "
        f"({place.filename}, line {place.lineno})"
    )
