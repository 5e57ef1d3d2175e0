"""Rules that compare an adapter with its base model, which `petl.adapters.check.loaded` loads."""

import re
from collections.abc import Iterator
from pathlib import PurePath

from petl.adapters.check.findings import Found, NotCheckedError
from petl.adapters.check.folder import CONFIG, WEIGHTS, Subject

LEAST_EFFECT = 1e-6  # of the norm of the outputs
LARGEST_LOSS = 0.05  # share of the update's norm that merging may round off
SIBLING = re.compile(
    r"[-_.](bnb|4bit|8bit|gptq|awq|gguf|fp8|instruct|chat|it|hf|unsloth)\b.*", re.I
)


def misfit(subject: Subject) -> Iterator[Found]:
    """Tensors that are not those which base and config require."""
    if reason := subject.loaded.misfit:
        yield Found(reason, WEIGHTS, "give the base that it was trained on")


def other_weights(subject: Subject) -> Iterator[Found]:
    """Weights that differ where the adapter changes them."""
    if not subject.loaded.trained_on and not subject.loaded.misfit:
        raise NotCheckedError("no fingerprint of the base (not written by petl)")
    if reason := subject.loaded.adapted_differ:
        yield Found(
            f"below the adapter, {reason}", str(subject.base), "use the base of the training"
        )


def others_differ(subject: Subject) -> Iterator[Found]:
    """Weights that differ elsewhere."""
    if subject.loaded.others_differ and not subject.loaded.adapted_differ:
        yield Found(subject.loaded.others_differ, str(subject.base))


def other_name(subject: Subject) -> Iterator[Found]:
    """A sibling of the base that the config names: quantized, instructed, ..."""
    named = PurePath(str(subject.config.get("base_model_name_or_path") or "")).name
    given = PurePath(str(subject.base or "")).name
    if named and given and named != given and SIBLING.sub("", named) == SIBLING.sub("", given):
        yield Found(f"it was trained on {named}, and --base is {given}", CONFIG)


def same_head(subject: Subject) -> Iterator[Found]:
    """Trained copies that equal the base's modules."""
    if names := subject.loaded.untrained_copies:
        yield Found(f"{len(names)} tensors of modules_to_save equal the base's", names[0])


def effect(subject: Subject) -> Iterator[Found]:
    """Outputs with the adapter that are those without it."""
    found, rows = subject.loaded.effect
    if not found > LEAST_EFFECT:
        what = f"the outputs change by {found:.0e} of their norm on {rows}: no effect"
        yield Found(what, WEIGHTS, "train it: the loss must reach these layers")


def rounded_off(subject: Subject) -> Iterator[Found]:
    """An update of which merging into this base rounds off more than 5 %."""
    lost, what = subject.loaded.lost
    if lost > LARGEST_LOSS:
        yield Found(
            f"merging into {what} loses {100 * lost:.0f} % of the update's norm",
            str(subject.base),
            "petl merge --dtype float32, or keep the adapter unmerged",
        )


def merges(subject: Subject) -> Iterator[Found]:
    """What merging loses, or why it cannot be done."""
    lost, what = subject.loaded.lost
    if subject.loaded.no_merge:
        yield Found(f"it cannot be merged: {subject.loaded.no_merge}", CONFIG, "petl serve")
    elif what and lost <= LARGEST_LOSS:
        yield Found(f"merging into {what} loses {100 * lost:.1f} % of the update's norm")
