"""Availability of names on the Hugging Face Hub, with a short timeout and offline fallback."""

import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,  # of the HTTP library that the Hub's client uses
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from petl.errors import InputError, first_line
from petl.files.paths import why_impossible

TIMEOUT = 10.0  # seconds; a slower network counts as absent; assumption
logger = logging.getLogger(__name__)


class OnHub(NamedTuple):
    """A repository of the Hub, OWNER/NAME, and a branch, tag or commit of it; None: main."""

    name: str
    revision: str | None = None


def is_repository(name: str) -> bool:
    """Return True if a name has the form of a repository on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def origin_of(path: Path) -> OnHub | None:
    """Return repository and commit of a folder in the cache of the Hub; None for other folders."""
    # the layout of huggingface_hub's cache: models--OWNER--NAME/snapshots/COMMIT
    *_, repository, snapshots, commit = ("", "", *path.expanduser().absolute().parts)
    if snapshots != "snapshots" or not repository.startswith("models--"):
        return None
    return OnHub(repository.removeprefix("models--").replace("--", "/"), commit)


@cache
def reachable(
    kind: Literal["model", "dataset"],
    name: str,
    revision: str | None = None,
    token: str | bool | None = None,
) -> bool:
    """True if the Hub answers and has `name`; False without network or with HF_HUB_OFFLINE.

    Raises:
        InputError: the Hub answers that there is no such name or revision, or that it is gated.
    """
    if constants.HF_HUB_OFFLINE:  # read on each call: tests and `offline` change it
        return False
    folder = "datasets/" if kind == "dataset" else ""
    try:
        HfApi(token=token).repo_info(name, repo_type=kind, revision=revision, timeout=TIMEOUT)
    except HFValidationError as error:
        raise InputError(
            f"{name!r} is not a valid name of a {kind} on the Hub: give OWNER/NAME"
        ) from error
    except GatedRepoError as error:
        raise InputError(
            f"the {kind} {name} is gated: request access at {constants.ENDPOINT}/{folder}{name}, "
            "then run: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(
            f"the {kind} {name} has no revision {revision!r}: give a branch, tag or commit"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"the Hub has no {kind} {name!r}, or it is private: check the name, or run: "
            "hf auth login"
        ) from error
    except (HTTPError, OSError) as error:
        logger.warning("the Hub does not answer (%s); using the local cache", first_line(error))
        return False
    return True


def arguments_of(name: str, file: str, where: Mapping[str, Any]) -> dict[str, Any]:
    """Return `where`, arguments of a download, with `local_files_only` if the Hub does not answer.

    Without it, each file is asked for again and again, for half a minute.

    Args:
        name: a folder, which needs no Hub, or the name of a repository.
        file: that the repository must have.

    Raises:
        InputError: it is neither; the Hub answers that there is no such repository; it does not
            answer, and the cache has no such file.
    """
    reason = why_impossible(name)
    if not reason and Path(name).is_dir():
        return dict(where)
    if reason or name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/"):
        reason = reason or "there is no such folder"
        raise InputError(f"{name!r} is not the folder of an adapter: {reason}")
    if reachable("model", name, where.get("revision"), where.get("token")):
        return dict(where)
    inside = f"{where['subfolder']}/{file}" if where.get("subfolder") else file
    version = {key: where.get(key) for key in ("revision", "cache_dir")}
    if not isinstance(try_to_load_from_cache(name, inside, **version), str):
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub does not answer"
        raise InputError(
            f"there is no folder {name!r}, {reason}, and the local cache has no {file} of a "
            "repository of that name: check the path, or go online once"
        )
    return {**where, "local_files_only": True}


@contextmanager
def offline(switch: bool) -> Generator[None]:
    """Inside the block, have the effect of HF_HUB_OFFLINE=1, if `switch` is True.

    `datasets` has no argument for it, and retries for half a minute if the Hub does not answer.
    """
    modules: tuple[Any, ...] = ()
    if switch:
        from datasets import config as datasets_config  # takes a second

        # each module copied the variable when it was imported
        modules = (constants, datasets_config)
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def unavailable(kind: Literal["model", "dataset"], name: str) -> InputError:
    """The error for a name that is not cached while the Hub is not reachable."""
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub does not answer"
    instead = "model=path model.path=FOLDER" if kind == "model" else "data=files data.train=FILE"
    return InputError(
        f"the {kind} {name} is not in the local cache and {reason}: go online once, "
        f"or use {instead}"
    )
