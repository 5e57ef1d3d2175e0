"""Register petl's methods with PEFT as soon as both are imported, in either order.

Importing PEFT takes seconds, importing petl almost nothing, and many programs that import petl do
not use a model. So if PEFT is not imported yet, a finder at the head of `sys.meta_path` intercepts
the import of `peft` and registers the methods at its end.
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

# beginnings of messages to drop while PEFT is imported, by logger
NOISE = {
    # from torchao: it registers an enum that torch now supports by itself
    "torch.utils._pytree": "<enum .* is an Enum subclass and is now natively supported",
    # from bitsandbytes: a kernel without a backward pass, which petl does not use (see
    # petl/models/quantization.py)
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
}
# from torchao: CUDA kernels that do not load, which matters on machines with a GPU only
NOISE_WITHOUT_GPU = {"torchao": r"Failed to load .*_C\w*\..*\.so"}


@contextmanager
def without_import_noise() -> Generator[None]:
    """Drop, in the block, the log messages of `NOISE` and `NOISE_WITHOUT_GPU`."""
    filters = [
        *((name, DropMessage(pattern)) for name, pattern in NOISE.items()),
        *((name, DropMessageWithoutGpu(pattern)) for name, pattern in NOISE_WITHOUT_GPU.items()),
    ]
    for name, message_filter in filters:
        logging.getLogger(name).addFilter(message_filter)
    try:
        yield
    finally:
        for name, message_filter in filters:
            logging.getLogger(name).removeFilter(message_filter)


class DropMessage(logging.Filter):
    """Drops messages whose beginning matches `pattern`."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self.pattern = re.compile(pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        """Return True to keep the message."""
        return self.pattern.match(record.getMessage()) is None


class DropMessageWithoutGpu(DropMessage):
    """Drops messages whose beginning matches `pattern` if there is no GPU, else none."""

    def filter(self, record: logging.LogRecord) -> bool:
        torch = sys.modules["torch"]  # the package that logs this has imported it
        return super().filter(record) or torch.cuda.is_available()


PEFT = "peft"
REGISTERING = ("petl.methods", "petl.losses")  # importing these packages registers their contents


def register_with_peft() -> None:
    """Register all methods and losses, now if PEFT is imported, else right after its import."""
    if not any(isinstance(finder, PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, PeftFinder())
    # checked after the finder is in place: another thread may be importing PEFT at this moment
    if sys.modules.get(PEFT) is not None:
        importlib.import_module(PEFT)  # waits for that thread, which may register them
        register_all()


def register_all() -> None:
    """Import methods, losses and with them PEFT; remove the finder; load the plugins."""
    for name in REGISTERING:
        importlib.import_module(name)
    if any(isinstance(finder, PeftFinder) for finder in sys.meta_path):
        # a new list: other threads may be iterating over the old one, and would skip an entry
        sys.meta_path = [other for other in sys.meta_path if not isinstance(other, PeftFinder)]
    from petl.imports.plugins import load_plugins  # here, for `import petl` is to be quick

    load_plugins()


class PeftFinder(importlib.abc.MetaPathFinder):
    """Finds `peft` as the other finders do, with a loader that registers the methods at its end.

    Finding a module does not import it (transformers only tests whether PEFT is installed), so the
    finder stays until methods are registered.
    """

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Return the spec of `peft` with a `ThenRegister` loader; None for all other modules."""
        if fullname != PEFT:
            return None
        others = [finder for finder in sys.meta_path if not isinstance(finder, PeftFinder)]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = ThenRegister(spec.loader)
        return spec


class ThenRegister(importlib.abc.Loader):
    """Loader that runs PEFT's own loader and then registers petl's methods.

    An error during registration makes the import of PEFT fail; the next import tries again.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Delegate to PEFT's loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute PEFT, then register all methods and losses."""
        # restore PEFT's own loader, so that inspect and importlib.resources find its files
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        with without_import_noise():
            self.loader.exec_module(module)
        register_all()
