"""Classes that are made for an object which is there already, and take the place of its own."""

from collections.abc import Callable
from typing import Any, ClassVar


class Remade:
    """Mixed into such a class by `remade`. Copies and pickles of an object make it again.

    Attributes:
        plain: what the object was.
        remake: gives the class for `plain`.
    """

    plain: ClassVar[type]
    remake: ClassVar[Callable[[Any], type]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind = type(self)
        return _blank, (kind.remake, kind.plain), self.__getstate__()


def remade(
    mixin: type[Remade], plain: type, remake: Callable[[Any], type], name: str, **methods: Any
) -> Any:
    """The class called `name` of objects of `plain` that are a `mixin` as well.

    Args:
        remake: the function that calls this one, cached; pickles name it.
        methods: what the class has beside.
    """
    facts = {"plain": plain, "remake": staticmethod(remake), "__doc__": plain.__doc__}
    return type(name, (mixin, plain), {**methods, **facts, "__module__": plain.__module__})


def _blank(remake: Callable[[type], type], plain: type) -> Any:
    kind: Any = remake(plain)
    return kind.__new__(kind)
