"""Optional packages, which only some settings need."""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from petl.errors import InputError


def need_extra(extra: str, module: str, setting: str) -> None:
    """Raise InputError unless the package that `setting` needs is installed; imports nothing.

    Args:
        extra: the extra of petl that installs the package.
        module: its top-level module.
        setting: what needs it, with its value, for the message.

    Raises:
        InputError: `module` is not installed; the message holds the line that installs it.
    """
    spec = find_spec(module)
    # no origin: a namespace package, such as a folder of that name in the working directory
    if spec is None or spec.origin is None:
        raise InputError(
            f"{setting} needs the package {module}, which is not installed; run: "
            f"pip install -e '.[{extra}]'"
        )


def optional(module: str, extra: str) -> ModuleType:
    """Import and return a module of a package that petl installs only with an extra.

    Args:
        module: its full name.
        extra: the extra of petl that installs the package.

    Raises:
        InputError: it is not installed; the message holds the line that installs it.
    """
    try:
        return import_module(module)
    # also raised by a package that is installed but cannot load a library of its own
    except ImportError as error:
        package = module.partition(".")[0]
        raise InputError(
            f"{package} is not installed ({error}); run: pip install 'petl[{extra}]'"
        ) from error
