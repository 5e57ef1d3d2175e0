"""Tuning methods, one module each, which is imported when the method is first used.

Their names are in index.json. A module that it does not have yet is imported with this package.
Methods of other packages are registered later: see petl/system/imports/peft_hook.py.
"""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

from petl.system.imports.tables import METHODS

_modules = {module.name for module in iter_modules(__path__)}
_indexed = {entry.module.removeprefix(f"{__name__}.") for entry in METHODS.index.values()}
for _name in sorted(_modules - _indexed - {"families", "losses"}):
    import_module(f"{__name__}.{_name}")

BUILT_IN = tuple(METHODS)  # no other package registers before this one is imported


def __getattr__(name: str) -> ModuleType:
    """The module of a method, imported on first use."""
    if name in _modules:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
