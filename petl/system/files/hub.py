"""Availability of names on the Hugging Face Hub, with a short timeout and offline fallback."""

import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP library that the Hub's client uses
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from petl.errors import InputError, RunStopped, first_line
from petl.system.files.paths import is_repository, why_impossible

TIMEOUT = 10.0  # seconds; a slower network counts as absent; assumption
WHY = {  # of an answer of the Hub, by its status
    401: "the token is not valid: make another at https://huggingface.co/settings/tokens, then set "
    "HF_TOKEN or run: hf auth login",
    403: "the token may not do this with {name}: give one with write access to it",
    409: "{name} was changed or created at the same time: try again",
}
logger = logging.getLogger(__name__)


def folder_in_cache(name: str, revision: str | None = None) -> Path | None:
    """Return the folder of a model's revision in the local cache; None if it is not there.

    Its name is the commit, which transformers no longer notes in the config.

    Raises:
        InputError: the name is not valid.
    """
    with answered("model", name, revision):
        file = try_to_load_from_cache(name, "config.json", revision=revision)
    # not str: None, or a mark that the file is known not to exist
    return Path(file).parent if isinstance(file, str) else None


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
    try:
        with answered(kind, name, revision):
            HfApi(token=token).repo_info(name, repo_type=kind, revision=revision, timeout=TIMEOUT)
    except (HTTPError, OSError) as error:
        logger.warning("the Hub does not answer (%s); using the local cache", first_line(error))
        return False
    return True


@contextmanager
def answered(
    kind: Literal["model", "dataset"], name: str, revision: str | None = None
) -> Generator[None]:
    """Turn answers of the Hub about a repository into an InputError; other errors pass.

    Raises:
        InputError: the name is not valid; there is no such repository or revision, or it is gated.
    """
    folder = "datasets/" if kind == "dataset" else ""
    here = kind == "model" and Path(name).is_dir()
    way_out = f"; it is a folder: model=path model.path={name}" if here else ""
    try:
        yield
    except HFValidationError as error:
        raise InputError(
            f"{name!r} is not a valid name of a {kind} on the Hub: give OWNER/NAME{way_out}"
        ) from error
    # before RepositoryNotFoundError, of which it is a subclass
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
            f"hf auth login{way_out}"
        ) from error


@contextmanager
def connected(name: str, revision: str | None = None) -> Generator[None]:
    """Inside the block, turn every error of the Hub about a model into one of a line.

    Raises:
        InputError: as `answered`; the token is not valid, or does not allow what was asked for.
        RunStopped: the Hub does not answer, or answers with another error.
    """
    if constants.HF_HUB_OFFLINE:
        raise InputError("HF_HUB_OFFLINE is set: unset it to reach the Hub")
    try:
        with answered("model", name, revision):
            yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = WHY.get(status, "").format(name=name)
        if reason:
            raise InputError(f"the Hub refuses (status {status}): {reason}") from error
        told = error.server_message or first_line(error)
        raise RunStopped(f"the Hub answers with status {status}: {told}; try again") from error
    except (HTTPError, LocalEntryNotFoundError) as error:
        cause = first_line(error.__cause__ if isinstance(error.__cause__, HTTPError) else error)
        raise RunStopped(
            f"the Hub does not answer at {constants.ENDPOINT} ({cause}): check the network and "
            "try again"
        ) from error


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
    # what cannot be a repository was meant as a folder: no request for it
    if reason or not is_repository(name):
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
    modules: tuple[object, ...] = ()
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
