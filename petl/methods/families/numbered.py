"""Numbers for adapters: a custom operator takes tensors and numbers only, and no modules."""

import itertools
from typing import Any
from weakref import WeakValueDictionary

# weak: the registry must not keep deleted models alive
_ADAPTERS: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = itertools.count()


def register_adapter(adapter: Any) -> int:
    """Register an adapter, weakly referenced, and return its number."""
    number = next(_numbers)
    _ADAPTERS[number] = adapter
    return number


def adapter_of(number: int) -> Any:
    """Return the adapter with this number."""
    return _ADAPTERS[number]
