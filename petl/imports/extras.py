"""Packages that only some settings need."""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from petl.errors import InputError


def need_extra(extra: str, module: str, setting: str) -> None:
    """Refuse `setting` unless the package that it needs is there; nothing is imported.

    Raises:
        InputError: `module` is not installed; the message holds the line that installs it.
    """
    spec = find_spec(module)
    if spec is None or spec.origin is None:  # None: a folder of that name in the working directory
        raise InputError(
            f"{setting} needs the package {module}, which is not installed; run: "
            f"pip install -e '.[{extra}]'"
        )


def optional(module: str, extra: str) -> ModuleType:
    """The module of a package that petl installs only with the extra of this name.

    Raises:
        InputError: it is not installed; the message holds the line that installs it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise InputError(
            f"{package} is not installed ({error}); run: pip install 'petl[{extra}]'"
        ) from error
