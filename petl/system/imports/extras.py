"""Optional packages, with the command that installs them."""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from petl.errors import InputError

DISTRIBUTION = "petl-peft"  # the name on the package index, where `petl` is another project


def install_hint(extra: str) -> str:
    """The command that installs an extra of pyproject.toml.

    It is the same for an installed wheel and for a checkout that was installed with `pip install
    -e .`: pip finds the distribution installed, and adds the packages of the extra.
    """
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def need_extra(extra: str, module: str, setting: str) -> None:
    """Raise InputError unless the package that `setting` needs is installed; imports nothing.

    Args:
        extra: the extra of petl that installs the package.
        module: its top-level module.
        setting: what needs it, with its value, for the message.

    Raises:
        InputError: `module` is not installed; the message holds the command that installs it.
    """
    spec = find_spec(module)
    # no origin: a namespace package, such as a folder of that name in the working directory
    if spec is None or spec.origin is None:
        raise InputError(
            f"{setting} needs the package {module}, which is not installed; run: "
            f"{install_hint(extra)}"
        )


def optional(module: str, extra: str) -> ModuleType:
    """Import and return a module of a package that petl installs only with an extra.

    Args:
        module: its full name.
        extra: the extra of petl that installs the package.

    Raises:
        InputError: it is not installed; the message holds the command that installs it.
    """
    try:
        return import_module(module)
    # also raised by a package that is installed but cannot load a library of its own
    except ImportError as error:
        package = module.partition(".")[0]
        raise InputError(
            f"{package} is not installed ({error}); run: {install_hint(extra)}"
        ) from error
