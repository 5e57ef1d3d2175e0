"""The Hugging Face hub, asked once and briefly: is this name there, and is there a network?"""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from typing import Literal

from datasets import config as datasets_config
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,  # of whichever HTTP library the hub's client uses
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from petl.errors import InputError, first_line

TIMEOUT = 10.0  # seconds; a network that answers no sooner counts as none
logger = logging.getLogger(__name__)


@cache
def reachable(kind: Literal["model", "dataset"], name: str, revision: str | None = None) -> bool:
    """Whether the hub answers and has `name`; False when there is no network, or it is not wanted.

    Raises:
        InputError: the hub answers that it has no such name or revision, or that it is gated.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    folder = "datasets/" if kind == "dataset" else ""
    try:
        HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=TIMEOUT)
    except HFValidationError as error:
        raise InputError(
            f"{name!r} is no name of a {kind} on the hub: it reads OWNER/NAME"
        ) from error
    except GatedRepoError as error:
        raise InputError(
            f"the {kind} {name} is gated: ask for access at {constants.ENDPOINT}/{folder}{name}, "
            "then run: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"the {kind} {name} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"the hub has no {kind} {name!r}, or only for those who may see it (hf auth login)"
        ) from error
    except (HTTPError, OSError) as error:
        logger.warning(
            "the hub does not answer (%s); looking in the local cache", first_line(error)
        )
        return False
    return True


@contextmanager
def offline(switch: bool) -> Generator[None]:
    """Inside the block, does what HF_HUB_OFFLINE=1 does, if `switch` is on.

    `datasets` has no argument for it, and asks a hub that does not answer for half a minute.
    """
    places = (constants, datasets_config) if switch else ()
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def not_to_be_had(kind: Literal["model", "dataset"], name: str) -> InputError:
    """The error for a name that is not in the cache while the hub cannot be asked."""
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub does not answer"
    instead = "model=path model.path=FOLDER" if kind == "model" else "data=files data.train=FILE"
    return InputError(
        f"the {kind} {name} is not in the local cache and {reason}: go online once, "
        f"or use {instead}"
    )
