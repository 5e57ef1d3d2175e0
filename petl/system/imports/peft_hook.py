"""What `import petl` does: refuse a mixed install, and register methods when PEFT is imported.

The methods are petl's own and those of other packages.

PEFT takes seconds to import and petl almost no time, and many programs that import petl never load
a model. So if PEFT has not been imported yet, a finder at the head of `sys.meta_path` waits for the
import of `peft` and registers the methods at its end.

A package offers its methods by an entry point of the group `petl.methods` in its pyproject.toml.
The value is a module that calls `petl.register` or `petl.adopt` when it is imported:

    [project.entry-points."petl.methods"]
    mine = "my_package.mine"

Metadata of packages are read only after PEFT is imported, so `import petl` stays quick.
"""

import importlib
import importlib.abc
import logging
import os.path  # not pathlib, which would slow down `import petl`
import re
import sys
import traceback
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from petl.errors import InputError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "petl.methods"
FAILED: dict[str, str] = {}  # by name of the entry point, why it could not be loaded
_tried: set[str] = set()  # the modules of entry points that were imported, or failed
logger = logging.getLogger(__name__)


# Subpackages of the table ETL project, none of which this project has.
OTHER_SUBPACKAGES = ("util", "io", "transform")


def refuse_mixed_install(package: str) -> None:
    """Raise if the folder of the package `petl` holds subpackages of the table ETL project.

    Both distributions install files of the same names (`__init__.py`, `errors.py`, `version.py`),
    so that the one installed last has overwritten part of the other. Costs three `stat` calls.

    Raises:
        ImportError: there are such subpackages; the message says how to separate the two.
    """
    # `__init__.py`, since uninstalling leaves folders with only __pycache__ behind
    mixed = [
        name
        for name in OTHER_SUBPACKAGES
        if os.path.isfile(f"{package}/{name}/__init__.py")  # noqa: PTH113 - see the import
    ]
    if mixed:
        raise ImportError(
            f"{package} mixes two distributions: petl-peft (parameter-efficient fine-tuning) and "
            f"petl (table ETL), of which petl/{mixed[0]} is a part. Both install a package named "
            "petl, so use one environment for each; to keep petl-peft here, run: "
            "pip uninstall petl petl-peft && pip install petl-peft"
        )


def plugins() -> list["EntryPoint"]:
    """The entry points of methods that are installed, sorted by name."""
    from importlib.metadata import entry_points  # takes as long as all of `import petl`

    return sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value))


def load_plugins() -> None:
    """Import the modules of all entry points, each once; one that fails is a warning.

    A plugin may be the one that imported petl, and so be imported in part: its methods are
    registered when its own import ends.
    """
    for entry in plugins():
        if entry.value in _tried:
            continue
        _tried.add(entry.value)
        try:
            entry.load()
        except Exception as error:
            FAILED[entry.name] = f"{type(error).__name__}: {error}"
            logger.warning(
                "the methods of package %s cannot be used: its entry point %s = %s does not load: "
                "%s",
                source_of(entry),
                entry.name,
                entry.value,
                FAILED[entry.name],
            )


def source_of(entry: "EntryPoint") -> str:
    """The distribution that an entry point belongs to, with its version."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "(unknown)"


def failure(name: str) -> str:
    """The end of a message about an unknown method `name`, if its entry point did not load."""
    return f"; its entry point does not load: {FAILED[name]}" if name in FAILED else ""


# The setting `imports`


def import_modules(names: object) -> None:
    """Import the modules that the setting `imports` names; None stands for an empty list.

    Raises:
        InputError: `names` is not a list of module names, or one of them cannot be imported.
    """
    for name in _checked(names):
        try:
            import_module(name)
        except Exception as error:
            raise InputError(f"imports: {_reason(name, error)}") from error


def not_yet_trusted(names: object) -> list[str]:
    """Those modules of a saved run's `imports` that neither this process nor a plugin imports."""
    names = _checked(names)
    known = {entry.module for entry in plugins()} if names else set()
    return [name for name in names if name not in sys.modules and name not in known]


def _checked(names: object) -> list[str]:
    names = [] if names is None else names
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise InputError(f"imports={names!r} is not a list of modules: write imports=[{names}]")
    for name in names:
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise InputError(
                f"imports: {name!r} is not the name of a module, such as my_methods or "
                "my_package.mine"
            )
    return list(names)


def _reason(name: str, error: Exception) -> str:
    """Why the module `name` could not be imported, and where Python looked for it."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing is not None and f"{name}.".startswith(f"{missing}."):
        folders = ", ".join(str(Path(folder or ".").absolute()) for folder in sys.path)
        return (
            f"there is no module {name!r} ({error}); Python looked in {folders}; "
            "PYTHONPATH=FOLDER adds a folder"
        )
    place = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"module {name!r} cannot be imported: {type(error).__name__}: {error} "
        f"({place.filename}, line {place.lineno})"
    )


# beginnings of messages to drop while PEFT is imported, by logger
NOISE = {
    # from torchao: it registers an enum that torch now supports by itself
    "torch.utils._pytree": "<enum .* is an Enum subclass and is now natively supported",
    # from bitsandbytes: a kernel without a backward pass, which petl does not use (see
    # petl/data/models/quantization.py)
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
# importing these registers their contents
REGISTERING = ("petl.core.peft_types", "petl.methods", "petl.core.auto_classes")


def register_with_peft() -> None:
    """Register all methods, now if PEFT is imported, else right after its import."""
    if not any(isinstance(finder, PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, PeftFinder())
    # checked after the finder is in place: another thread may be importing PEFT at this moment
    if sys.modules.get(PEFT) is not None:
        importlib.import_module(PEFT)  # waits for that thread, which may register them
        register_all()


def register_all() -> None:
    """Make PEFT know petl's methods; remove the finder; load the plugins."""
    for name in REGISTERING:
        importlib.import_module(name)
    if any(isinstance(finder, PeftFinder) for finder in sys.meta_path):
        # a new list: other threads may be iterating over the old one, and would skip an entry
        sys.meta_path = [other for other in sys.meta_path if not isinstance(other, PeftFinder)]

    load_plugins()


class PeftFinder(importlib.abc.MetaPathFinder):
    """Finds `peft` as the other finders do, with a loader that registers the methods at its end.

    Finding a module does not import it (transformers only tests whether PEFT is installed), so the
    finder stays until methods are registered.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
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

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Delegate to PEFT's loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute PEFT, then register all methods."""
        # restore PEFT's own loader, so that inspect and importlib.resources find its files
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        with without_import_noise():
            self.loader.exec_module(module)
        register_all()
