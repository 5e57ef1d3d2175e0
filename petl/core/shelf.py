"""Modules by name, most of which may be out of sight for a moment."""

from collections.abc import Iterable

from torch import nn


class Shelf(nn.ModuleDict):
    """A module dict of which whoever walks over a model may be shown a part.

    What is added or deleted meanwhile stays so.
    """

    def __init__(self) -> None:
        super().__init__()
        self._whole: dict[str, nn.Module] | None = None  # while a part is shown

    @property
    def every(self) -> dict[str, nn.Module]:
        """All modules by name, shown or not."""
        return self._modules if self._whole is None else self._whole

    def show(self, names: Iterable[str]) -> None:
        """Show only those of these names, until `show_all`."""
        whole = self._whole = self.every
        self._modules = {name: whole[name] for name in names if name in whole}

    def show_all(self) -> None:
        """Show all of them."""
        self._modules, self._whole = self.every, None

    def __setitem__(self, key: str, module: nn.Module) -> None:
        super().__setitem__(key, module)
        self.every[key] = module

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self.every.pop(key, None)
