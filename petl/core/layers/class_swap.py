"""Objects whose class is replaced while they live, and survive copy and pickle.

`swap_class` gives an object a generated subclass. `AdapterDict` is a ModuleDict that can hide
entries, so that a walk over the model skips idle adapters.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping
from functools import cache, update_wrapper
from types import CodeType, FunctionType
from typing import Any, ClassVar, TypeVar

from torch import nn

T = TypeVar("T")


class SwappedClass:
    """Base of the mixins that `swap_class` puts before an object's own class.

    Attributes:
        original: the class that the object had.
        mixin: the mixin that was put before it.
        computes_as_before: True if the object still computes what it did.
        holds_adapters: True for a block with the adapters of one that is adapted as a whole.
        lacks: why an object with the mixin excludes others, by capability of petl/core/support.py.
    """

    computes_as_before: ClassVar[bool] = False
    holds_adapters: ClassVar[bool] = False
    lacks: ClassVar[Mapping[str, str]] = {}
    original: ClassVar[type]
    mixin: ClassVar[type["SwappedClass"]]

    @classmethod
    def class_name(cls, original: type) -> str:
        """The name of the generated class."""
        return original.__name__

    @classmethod
    def extra_methods(cls, original: type) -> dict[str, object]:
        """Methods that the generated class has in addition to those of the mixin."""
        return {}

    # used by both pickle and copy.deepcopy
    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        # the generated class cannot be imported by name, so unpickling generates it again
        return _new_instance, tuple(_parts(type(self))), self.__getstate__()


# cached, so that two swaps of one class give the same class and isinstance stays cheap
@cache
def swapped_class(mixin: type[SwappedClass], original: type) -> type[Any]:
    """Generate the subclass of `mixin` and `original`, in this order; cached."""
    attributes = {"original": original, "mixin": mixin, "__doc__": original.__doc__}
    body = {**mixin.extra_methods(original), **attributes, "__module__": original.__module__}
    return type(mixin.class_name(original), (mixin, original), body)


def with_signature(function: FunctionType, like: Callable[..., object]) -> FunctionType:
    """Return a copy of a function that shows the arguments of another one.

    `generate` looks at those of a model's forward to tell which inputs it takes.
    """
    made = FunctionType(
        function.__code__, function.__globals__, None, function.__defaults__, function.__closure__
    )
    update_wrapper(made, function)
    vars(made)["__signature__"] = inspect.signature(like)
    return made


def swap_class(target: object, mixin: type[SwappedClass]) -> None:
    """Replace the class of `target` by `swapped_class(mixin, ...)` unless it has the mixin.

    A class that was swapped may be swapped again, with another mixin.
    """
    if not isinstance(target, mixin):
        target.__class__ = swapped_class(mixin, type(target))


def restore_class(target: object, mixin: type[SwappedClass]) -> None:
    """Undo `swap_class(target, mixin)` and remove the attributes that the mixin declares.

    Other swaps stay, before it and since. So does a class that something else has replaced since.
    """
    *mixins, cls = _parts(type(target))
    if mixin not in mixins:
        return
    for each in reversed(mixins):
        cls = cls if each is mixin else swapped_class(each, cls)
    target.__class__ = cls
    for name in inspect.get_annotations(mixin):
        target.__dict__.pop(name, None)


def original_class(target: T) -> type[T]:
    """Return the class that an object had before `swap_class`; its own if it was not swapped."""
    *_, cls = _parts(type(target))
    return cls


def mixins_of(target: object) -> list[type[SwappedClass]]:
    """Return the mixins that `swap_class` put before the class of an object."""
    *mixins, _ = _parts(type(target))
    return mixins


def forward_code(module: object) -> CodeType | None:
    """Return the code of a module's own `forward`, by whose names its class is recognized.

    That is the class that it had before `swap_class`, and the function inside of decorators.

    Returns:
        None if `forward` was replaced on the instance (accelerate's offloading does).
    """
    if not isinstance(module, nn.Module) or "forward" in module.__dict__:
        return None
    cls = original_class(module)
    return getattr(inspect.unwrap(cls.forward), "__code__", None)


def _parts(cls: type[Any]) -> Iterator[type[Any]]:
    """Yield the mixins of a generated class, the outermost first, and its original class."""
    while "mixin" in vars(cls):
        yield cls.mixin
        cls = cls.original
    yield cls


def _new_instance(*parts: type[Any]) -> object:
    """Return an instance without state, which pickle and copy then fill in."""
    *mixins, cls = parts
    for mixin in reversed(mixins):
        cls = swapped_class(mixin, cls)
    return cls.__new__(cls)


# A dict of its own takes the place of `nn.Module._modules`, the only thing that traversal reads.
class VisibleModules(dict[str, nn.Module]):
    """The visible entries of an AdapterDict; `all_modules` also has the hidden ones."""

    def __init__(self, names: Iterable[str], all_modules: dict[str, nn.Module]) -> None:
        super().__init__((name, all_modules[name]) for name in names if name in all_modules)
        self.all_modules = all_modules


class AdapterDict(nn.ModuleDict):
    """nn.ModuleDict that can hide entries from traversal (`modules`, `parameters`, `state_dict`).

    Names, length and look-up by name always cover all entries, in other threads too. Additions and
    deletions while entries are hidden are kept. `convert_module_dicts` turns a ModuleDict into one
    by its `__class__`.
    """

    @property
    def all_modules(self) -> dict[str, nn.Module]:
        """All modules by name, hidden ones included."""
        modules = self._modules  # read once: another thread may hide entries at any time
        return modules.all_modules if isinstance(modules, VisibleModules) else modules

    def show_only(self, names: Iterable[str]) -> None:
        """Hide all entries but those of these names, until `show_all`."""
        self._modules = VisibleModules(names, self.all_modules)

    def show_all(self) -> None:
        """Make all entries visible again."""
        self._modules = self.all_modules

    def keys(self) -> KeysView[str]:
        """Return the names of all entries, hidden ones included."""
        return self.all_modules.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.all_modules)

    def __len__(self) -> int:
        return len(self.all_modules)

    # Each layer calls these two several times per forward pass, so `all_modules` is inlined.

    def __contains__(self, key: str) -> bool:
        modules = self._modules
        return key in (modules.all_modules if isinstance(modules, VisibleModules) else modules)

    def __getitem__(self, key: str) -> nn.Module:
        modules = self._modules
        return (modules.all_modules if isinstance(modules, VisibleModules) else modules)[key]

    def __setitem__(self, key: str, module: nn.Module) -> None:
        super().__setitem__(key, module)  # visible from now on, even while others are hidden
        self.all_modules[key] = module

    def __delitem__(self, key: str) -> None:
        del self.all_modules[key]
        self._modules.pop(key, None)


def restore_module_dict(adapter_dict: AdapterDict) -> None:
    """Undo `convert_module_dicts` of one dict."""
    adapter_dict.show_all()
    adapter_dict.__class__ = nn.ModuleDict


def convert_module_dicts(owner: nn.Module) -> None:
    """Turn the plain ModuleDicts among the children of `owner` into AdapterDicts."""
    for child in owner.children():
        if type(child) is nn.ModuleDict:  # not subclasses: they may override the same methods
            child.__class__ = AdapterDict


def outside_adapter_dicts(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of a model, AdapterDicts included but not their contents."""
    # depth first with a stack: `modules()` would descend into AdapterDicts
    left, seen = [model], {model}
    while left:
        module = left.pop()
        yield module
        inner = () if isinstance(module, AdapterDict) else module.children()
        unseen = [child for child in inner if child not in seen]
        seen.update(unseen)
        # reversed, so that modules come in the order of `modules()`
        left += reversed(unseen)


def adapter_dicts_of(model: nn.Module) -> Iterator[AdapterDict]:
    """Yield the AdapterDicts of a model that are not inside others."""
    return (module for module in outside_adapter_dicts(model) if isinstance(module, AdapterDict))
