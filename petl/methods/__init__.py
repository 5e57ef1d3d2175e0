"""Tuning methods, one module each. Importing this package imports and registers all of them.

Methods of other packages are registered later: see petl/system/imports/peft_hook.py.
"""

from importlib import import_module
from pkgutil import iter_modules

from petl.core.registry import list_methods

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

BUILT_IN = tuple(list_methods())  # no other package registers before this one is imported
