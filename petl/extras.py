"""Packages that only some settings need."""

from importlib.util import find_spec

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
