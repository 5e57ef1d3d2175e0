"""Replace the class of a live object by a generated subclass that survives copy and pickle."""

from collections.abc import Iterator
from functools import cache
from typing import Any, ClassVar


class SwappedClass:
    """Base of the mixins that `swap_class` puts before an object's own class.

    Attributes:
        original: the class that the object had.
        mixin: the mixin that was put before it.
    """

    original: ClassVar[type]
    mixin: ClassVar[type["SwappedClass"]]

    @classmethod
    def class_name(cls, original: type) -> str:
        """The name of the generated class."""
        return original.__name__

    @classmethod
    def extra_methods(cls, original: type) -> dict[str, Any]:
        """Methods that the generated class has in addition to those of the mixin."""
        return {}

    # used by both pickle and copy.deepcopy
    def __reduce_ex__(self, protocol: Any) -> Any:
        # the generated class cannot be imported by name, so unpickling generates it again
        return _new_instance, tuple(_parts(type(self))), self.__getstate__()


# cached, so that two swaps of one class give the same class and isinstance stays cheap
@cache
def swapped_class(mixin: type[SwappedClass], original: type) -> type[Any]:
    """Generate the subclass of `mixin` and `original`, in this order; cached."""
    attributes = {"original": original, "mixin": mixin, "__doc__": original.__doc__}
    body = {**mixin.extra_methods(original), **attributes, "__module__": original.__module__}
    return type(mixin.class_name(original), (mixin, original), body)


def swap_class(target: Any, mixin: type[SwappedClass]) -> None:
    """Replace the class of `target` by `swapped_class(mixin, ...)` unless it has the mixin.

    A class that was swapped may be swapped again, with another mixin.
    """
    if not isinstance(target, mixin):
        target.__class__ = swapped_class(mixin, type(target))


def _parts(cls: type[Any]) -> Iterator[type]:
    """Yield the mixins of a generated class, the outermost first, and its original class."""
    while "mixin" in vars(cls):
        yield cls.mixin
        cls = cls.original
    yield cls


def _new_instance(*parts: type[Any]) -> Any:
    """Return an instance without state, which pickle and copy then fill in."""
    *mixins, cls = parts
    for mixin in reversed(mixins):
        cls = swapped_class(mixin, cls)
    return cls.__new__(cls)
