"""A ModuleDict that can hide entries, so that a walk over the model skips idle adapters."""

from collections.abc import Iterable, Iterator, KeysView

from torch import nn


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


def convert_module_dicts(owner: nn.Module) -> None:
    """Turn the plain ModuleDicts among the children of `owner` into AdapterDicts."""
    for child in owner.children():
        if type(child) is nn.ModuleDict:  # not subclasses: they may override the same methods
            child.__class__ = AdapterDict
