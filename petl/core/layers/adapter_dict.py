"""Modules by name, most of which may be out of sight for a moment."""

from collections.abc import Iterable, Iterator, KeysView

from torch import nn


class VisibleModules(dict[str, nn.Module]):
    """Those modules of a shelf that are shown, and the `whole` that it has."""

    def __init__(self, names: Iterable[str], whole: dict[str, nn.Module]) -> None:
        super().__init__((name, whole[name]) for name in names if name in whole)
        self.whole = whole


class AdapterDict(nn.ModuleDict):
    """A module dict of which whoever walks over a model may be shown a part.

    Its names, and a look-up by name, are always of all that it has, in another thread too. What is
    added or deleted while a part is shown stays so. A `ModuleDict` becomes one by its `__class__`.
    """

    @property
    def all_modules(self) -> dict[str, nn.Module]:
        """All modules by name, shown or not."""
        modules = self._modules  # read once: another thread may show a part at any time
        return modules.whole if isinstance(modules, VisibleModules) else modules

    def show_only(self, names: Iterable[str]) -> None:
        """Show only those of these names, until `show_all`."""
        self._modules = VisibleModules(names, self.all_modules)

    def show_all(self) -> None:
        """Show all of them."""
        self._modules = self.all_modules

    def keys(self) -> KeysView[str]:
        """The names of all modules."""
        return self.all_modules.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.all_modules)

    def __len__(self) -> int:
        return len(self.all_modules)

    # Each forward pass of each layer asks these two several times: `all_modules`, without its call.

    def __contains__(self, key: str) -> bool:
        modules = self._modules
        return key in (modules.whole if isinstance(modules, VisibleModules) else modules)

    def __getitem__(self, key: str) -> nn.Module:
        modules = self._modules
        return (modules.whole if isinstance(modules, VisibleModules) else modules)[key]

    def __setitem__(self, key: str, module: nn.Module) -> None:
        super().__setitem__(key, module)
        self.all_modules[key] = module

    def __delitem__(self, key: str) -> None:
        del self.all_modules[key]
        self._modules.pop(key, None)


def convert_module_dicts(owner: nn.Module) -> None:
    """Make the module dicts of `owner` shelves."""
    for child in owner.children():
        if type(child) is nn.ModuleDict:
            child.__class__ = AdapterDict
