"""PEFT's types of petl's methods, which PEFT's tables have before a method is imported.

Importing this module adds them, each with stand-ins for its config and its tuner; `register`
replaces these by the classes. So PEFT loads an adapter of any method of petl.
"""

from petl.core.compat import announce_method
from petl.system.imports.tables import METHODS


class StandIn(type):
    """The class of stand-ins: what is asked of one is asked of the class that it stands for."""

    def __getattribute__(cls, name: str) -> object:
        return getattr(_real(cls), name)

    def __call__(cls, *args: object, **kwargs: object) -> object:
        """Create an instance of the class."""
        return _real(cls)(*args, **kwargs)


def _real(stand_in: type) -> type:
    method, attribute = type.__getattribute__(stand_in, "place")
    return getattr(METHODS[method], attribute)


for _name, _entry in METHODS.index.items():
    if _entry.prefix and _name not in METHODS.loaded:
        places = [(_name, attribute) for attribute in ("config_cls", "tuner")]
        config, tuner = (StandIn(_entry.config, (), {"place": place}) for place in places)
        announce_method(f"petl_{_name}", _entry.prefix, config, tuner)
