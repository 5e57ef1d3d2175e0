"""Replace the class of a live object by a generated subclass that survives copy and pickle."""

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
        swapped = type(self)
        return _new_instance, (swapped.mixin, swapped.original), self.__getstate__()


# cached, so that two swaps of one class give the same class and isinstance stays cheap
@cache
def swapped_class(mixin: type[SwappedClass], original: type) -> type[Any]:
    """Generate the subclass of `mixin` and `original`, in this order; cached."""
    attributes = {"original": original, "mixin": mixin, "__doc__": original.__doc__}
    body = {**mixin.extra_methods(original), **attributes, "__module__": original.__module__}
    return type(mixin.class_name(original), (mixin, original), body)


def swap_class(target: Any, mixin: type[SwappedClass]) -> None:
    """Replace the class of `target` by `swapped_class(mixin, ...)` unless it has the mixin."""
    # idempotent: swapping twice would nest classes
    if not isinstance(target, mixin):
        target.__class__ = swapped_class(mixin, type(target))


def _new_instance(mixin: type[SwappedClass], original: type) -> Any:
    """Return an instance without state, which pickle and copy then fill in."""
    swapped = swapped_class(mixin, original)
    return swapped.__new__(swapped)
