"""Rules that compare an adapter with its base model, which `petl.adapters.check.loaded` loads."""

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING

from petl.adapters.check.findings import Found, NotCheckedError
from petl.adapters.check.folder import (
    CONFIG,
    FINGERPRINT,
    WEIGHTS,
    BaseConfig,
    Subject,
    module_of,
)
from petl.adapters.check.weights import Stored
from petl.errors import InputError

if TYPE_CHECKING:
    from petl.adapters.check.loaded import Loaded

NO_BASE = "no base given: --base FOLDER"
WRAPPED = re.compile(r"(^|\.)language_model\.")  # the part for text of a model of several
LEAST_EFFECT = 1e-6  # of the norm of the outputs
LARGEST_LOSS = 0.05  # share of the update's norm that merging may round off
SIBLING = re.compile(
    r"[-_.](bnb|4bit|8bit|gptq|awq|gguf|fp8|instruct|chat|it|hf|unsloth)\b.*", re.I
)


def loaded(subject: Subject) -> "Loaded":
    """Return the base model, and what becomes of it with the adapter.

    Raises:
        NotCheckedError: no base was given, or the class of model is not known.
        InputError: the base cannot be opened.
    """
    if subject.base is None:
        raise NotCheckedError(NO_BASE)
    # imports torch
    from petl.adapters.check.loaded import load

    return subject.kept.get("loaded") or subject.kept.setdefault("loaded", load(subject))


def misfit(subject: Subject) -> Iterator[Found]:
    """Tensors that are not those which base and config require."""
    if subject.base is None:
        # imports torch, which takes seconds: only where names or shapes are not the base's
        if subject.base_folder is None or not looks_foreign(subject):
            raise NotCheckedError(NO_BASE)
        from petl.adapters.check.loaded import misfit_of

        reason = misfit_of(subject, subject.base_folder)
    else:
        reason = loaded(subject).misfit
    if reason:
        yield Found(reason, WEIGHTS)


def looks_foreign(subject: Subject) -> bool:
    """Return True if a LoRA may have other modules or shapes than the base on this machine.

    Names in files may differ from those of a model's modules: only the model can tell.
    """
    if subject.kind != "LORA":
        return False
    every = {module_of(path): parts for path, parts in subject.pairs.items()}
    pairs = {path: parts for path, parts in every.items() if not subject.is_stacked(path)}
    try:
        tensors = subject.base_tensors
    except InputError:  # of a dtype that numpy does not have
        tensors = {}
    if not tensors:
        return _unlike_config(pairs, subject.of_base)
    modules = {name.rpartition(".")[0] for name in tensors}
    weights = {path: tensors.get(f"{path}.weight") for path in pairs}
    return not modules >= {*pairs} or any(_unlike(pairs[p], weights[p]) for p in pairs)


def _unlike_config(pairs: Mapping[str, Mapping[str, Stored]], config: BaseConfig) -> bool:
    """Whether no A has the width of the config, or a path leads through a wrapper."""
    width = config.get("hidden_size")
    factors = [parts["lora_A"] for parts in pairs.values() if "lora_A" in parts]
    widths = {size for factor in factors for size in factor.shape[-1:]}
    return (width is not None and width not in widths) or any(map(WRAPPED.search, pairs))


def _unlike(parts: Mapping[str, Stored], weight: Stored | None) -> bool:
    """Whether the factors of a module have other sizes than its weight, where all are matrices."""
    given = [parts.get("lora_A"), parts.get("lora_B"), weight]
    shapes = [each.shape for each in given if each and each.is_float and len(each.shape) == 2]
    # layers of GPT-2, and embeddings, have the other order
    return len(shapes) == 3 and sorted((shapes[0][1], shapes[1][0])) != sorted(shapes[2])


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
    found = loaded(subject).effect
    if not found.fault and found.change <= LEAST_EFFECT:
        what = f"the outputs change by {found.change:.0e} of their norm on {found.inputs}"
        yield Found(f"{what}: no effect", WEIGHTS)


def unusable(subject: Subject) -> Iterator[Found]:
    """Outputs with the adapter that are NaN, or the same whatever the input."""
    found = loaded(subject).effect
    if found.fault:
        yield Found(f"the outputs with the adapter {found.fault} on {found.inputs}", WEIGHTS)


def rows_used(subject: Subject) -> Iterator[Found]:
    """On how many rows of the file of data outputs were compared, and why not on others."""
    if subject.rows is not None:
        found = loaded(subject).effect
        why = [f"; without line {line}: {reason}" for line, reason in found.left_out.items()]
        more = f" (and {len(why) - 1} more)" if len(why) > 1 else ""
        yield Found(f"outputs were compared on {found.inputs}{''.join(why[:1])}{more}")


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
