"""Paths that settings name, checked before a file is opened."""

import os
from collections.abc import Collection
from pathlib import Path

from petl.errors import InputError, did_you_mean


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
