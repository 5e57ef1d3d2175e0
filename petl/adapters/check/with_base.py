"""Rules that compare an adapter with its base model, which `petl.adapters.check.loaded` loads."""

import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import TYPE_CHECKING

from petl.adapters.check.findings import Found, NotCheckedError
from petl.adapters.check.folder import CONFIG, FINGERPRINT, WEIGHTS, Subject

if TYPE_CHECKING:
    from petl.adapters.check.loaded import Loaded

NO_BASE = "no base given: --base FOLDER"
LEAST_EFFECT = 1e-6  # of the norm of the outputs
LARGEST_LOSS = 0.05  # share of the update's norm that merging may round off
SIBLING = re.compile(
    r"[-_.](bnb|4bit|8bit|gptq|awq|gguf|fp8|instruct|chat|it|hf|unsloth)\b.*", re.I
)


def loaded(subject: Subject) -> "Loaded":
    """Return the base model, and what becomes of it with the adapter.

    Raises:
        NotCheckedError: no base was given, or the class of model is not known.
    """
    if subject.base is None:
        raise NotCheckedError(NO_BASE)
    # imports torch
    from petl.adapters.check.loaded import load

    return subject.kept.get("loaded") or subject.kept.setdefault("loaded", load(subject))


def misfit(subject: Subject) -> Iterator[Found]:
    """Tensors that are not those which base and config require."""
    if reason := loaded(subject).misfit:
        yield Found(reason, WEIGHTS)


def other_weights(subject: Subject) -> Iterator[Found]:
    """Weights that differ where the adapter changes them."""
    if not loaded(subject).trained_on and not loaded(subject).misfit:
        raise NotCheckedError(f"no {FINGERPRINT} (not written by petl)")
    if reason := loaded(subject).adapted_differ:
        yield Found(f"below the adapter, {reason}", str(subject.base))


def others_differ(subject: Subject) -> Iterator[Found]:
    """Weights that differ elsewhere."""
    if loaded(subject).others_differ and not loaded(subject).adapted_differ:
        yield Found(loaded(subject).others_differ, str(subject.base))


def other_name(subject: Subject) -> Iterator[Found]:
    """A sibling of the base that the config names: quantized, instructed, ..."""
    named = PurePath(str(subject.config.get("base_model_name_or_path") or "")).name
    given = PurePath(str(subject.base or "")).name
    if named and given and named != given and SIBLING.sub("", named) == SIBLING.sub("", given):
        yield Found(f"it was trained on {named}, and --base is {given}", CONFIG)


def same_head(subject: Subject) -> Iterator[Found]:
    """Trained copies that equal the base's modules."""
    if names := loaded(subject).untrained_copies:
        yield Found(f"{len(names)} tensors of modules_to_save equal the base's", names[0])


def effect(subject: Subject) -> Iterator[Found]:
    """Outputs with the adapter that are those without it."""
    found, rows = loaded(subject).effect
    if not found > LEAST_EFFECT:
        what = f"the outputs change by {found:.0e} of their norm on {rows}: no effect"
        yield Found(what, WEIGHTS)


def rounded_off(subject: Subject) -> Iterator[Found]:
    """An update of which merging into this base rounds off more than 5 %."""
    lost, what = loaded(subject).lost
    if lost > LARGEST_LOSS:
        what = f"merging into {what} loses {100 * lost:.0f} % of the update's norm"
        yield Found(what, str(subject.base))


def merges(subject: Subject) -> Iterator[Found]:
    """What merging loses, or why it cannot be done."""
    lost, what = loaded(subject).lost
    if loaded(subject).no_merge:
        yield Found(f"it cannot be merged: {loaded(subject).no_merge}", CONFIG)
    elif what and lost <= LARGEST_LOSS:
        yield Found(f"merging into {what} loses {100 * lost:.1f} % of the update's norm")
