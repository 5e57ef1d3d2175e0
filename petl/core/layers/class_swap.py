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
        """Methods that the generated class has beside those of the mixin."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:  # the generated class cannot be imported
        kind = type(self)
        return _blank, (kind.mixin, kind.original), self.__getstate__()


@cache
def swapped_class(mixin: type[SwappedClass], original: type) -> type[Any]:
    """The subclass of `mixin` and `original`, in this order; generated once."""
    facts = {"original": original, "mixin": mixin, "__doc__": original.__doc__}
    body = {**mixin.extra_methods(original), **facts, "__module__": original.__module__}
    return type(mixin.class_name(original), (mixin, original), body)


def swap_class(target: Any, mixin: type[SwappedClass]) -> None:
    """Make `target` an instance of `mixin` as well, unless it is one."""
    if not isinstance(target, mixin):
        target.__class__ = swapped_class(mixin, type(target))


def _blank(mixin: type[SwappedClass], original: type) -> Any:
    kind = swapped_class(mixin, original)
    return kind.__new__(kind)
