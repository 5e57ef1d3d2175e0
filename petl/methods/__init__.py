"""One file a method. Importing this package imports each of them, and each registers itself.

Methods of other packages register themselves later: see petl/imports/plugins.py.
"""

from importlib import import_module
from pkgutil import iter_modules

from petl.core.registry import list_methods

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

BUILT_IN = tuple(list_methods())  # no other package registers before this one is imported
