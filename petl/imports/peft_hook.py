"""Makes PEFT know petl's methods as soon as both are imported, in whichever order.

PEFT takes seconds to import, petl next to nothing, and many a program that imports petl does not
get as far as a model. So if PEFT is not there yet, a finder waits at the head of `sys.meta_path`
for the import of `peft`, and has the methods registered at the end of it.
"""

import importlib
import importlib.abc
import logging
import re
import sys
from collections.abc import Generator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# by logger, how messages begin
SAID = {
    # torchao, of a way of its own to register what torch now knows by itself
    "torch.utils._pytree": "<enum .* is an Enum subclass and is now natively supported",
    # bitsandbytes, of a kernel that has no backward pass: petl leaves it off, see quantising.py
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
}
# torchao, of kernels for GPUs: news where there is one
SAID_WITHOUT_GPU = {"torchao": r"Failed to load .*_C\w*\..*\.so"}


@contextmanager
def unsaid() -> Generator[None]:
    """Inside the block, these messages are dropped, and no others."""
    dropped = [
        *((name, Dropped(said)) for name, said in SAID.items()),
        *((name, DroppedWithoutGpu(said)) for name, said in SAID_WITHOUT_GPU.items()),
    ]
    for name, one in dropped:
        logging.getLogger(name).addFilter(one)
    try:
        yield
    finally:
        for name, one in dropped:
            logging.getLogger(name).removeFilter(one)


class Dropped(logging.Filter):
    """Lets pass what does not begin as `said`."""

    def __init__(self, said: str) -> None:
        super().__init__()
        self.said = re.compile(said)

    def filter(self, record: logging.LogRecord) -> bool:
        return self.said.match(record.getMessage()) is None


class DroppedWithoutGpu(Dropped):
    """The same on a machine without a GPU; anywhere else all passes."""

    def filter(self, record: logging.LogRecord) -> bool:
        torch = sys.modules["torch"]  # which whoever speaks of its kernels has imported
        return super().filter(record) or torch.cuda.is_available()


WAITED_FOR = "peft"
REGISTERING = ("petl.methods", "petl.losses")  # importing them registers what is in them


def register_with_peft() -> None:
    """Register all methods and losses: at once if PEFT is imported, else right after it is."""
    if not any(isinstance(finder, PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, PeftFinder())
    # asked after the finder is in place: another thread may be importing PEFT just now
    if sys.modules.get(WAITED_FOR) is not None:
        importlib.import_module(WAITED_FOR)  # to its end, where that thread may register them
        register_all()


def register_all() -> None:
    """Import the modules that register themselves, and then the plugins of other packages.

    PEFT is imported with them if it is not there yet; after that the finder is removed.
    """
    for name in REGISTERING:
        importlib.import_module(name)
    if any(isinstance(finder, PeftFinder) for finder in sys.meta_path):
        # a new list: other threads may be walking through the old one, and would pass over an entry
        sys.meta_path = [found for found in sys.meta_path if not isinstance(found, PeftFinder)]
    from petl.imports.plugins import load_plugins  # here, for `import petl` is to be quick

    load_plugins()


class PeftFinder(importlib.abc.MetaPathFinder):
    """Finds `peft` as the other finders do, with a loader that registers the methods in the end.

    To find is not to import (transformers only asks whether PEFT is there), so the finder stays
    until methods are registered.
    """

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != WAITED_FOR:
            return None
        others = [finder for finder in sys.meta_path if not isinstance(finder, PeftFinder)]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = ThenRegister(spec.loader)
        return spec


class ThenRegister(importlib.abc.Loader):
    """Stands in for PEFT's loader until PEFT is executed.

    An error while methods are registered is one of importing PEFT; the next import tries again.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # from here on PEFT looks as if nobody had waited: its sources and files are found
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        with unsaid():
            self.loader.exec_module(module)
        register_all()
