"""PEFT's types of petl's methods, which PEFT's tables have before a method is imported.

Importing this module adds them, each with stand-ins for its config and its tuner; `register`
replaces these by the classes. So PEFT loads an adapter of any method of petl.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from petl.core.compat import announce_method
from petl.system.imports.tables import METHODS


class StandIn(type):
    """The class of stand-ins: what is done with one is done with the class that it stands for."""

    def __getattribute__(cls, name: str) -> Any:
        return getattr(_real(cls), name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Create an instance of the class."""
        return _real(cls)(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, _real(cls))

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, _real(cls))


def _real(stand_in: type) -> type[Any]:
    return type.__getattribute__(stand_in, "find")()


def stand_in(name: str, find: Callable[[], type[Any]]) -> type[Any]:
    """Return a stand-in for the class that `find` returns, which is called when it is used."""
    return StandIn(name, (), {"find": staticmethod(find)})


def _class_of(method: str, attribute: str) -> type[Any]:
    return getattr(METHODS[method], attribute)


for _name, _entry in METHODS.index.items():
    if _entry.prefix and _name not in METHODS.loaded:
        config, tuner = (
            stand_in(_entry.config, partial(_class_of, _name, attribute))
            for attribute in ("config_cls", "tuner")
        )
        announce_method(f"petl_{_name}", _entry.prefix, config, tuner)
