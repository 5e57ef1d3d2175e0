"""The strength of an adapter: its outputs are those of the base plus s times the update, by layer.

A method names the tensors in which its update is linear (`Method.strength_tensors`), which are
multiplied by s, or the field of its config with the strength (`Method.strength_field`). What else
an adapter has, such as a trained head, stays as it is.
"""

import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn

from petl.core.registry import method_of
from petl.core.spec.facts import facts_of
from petl.core.types import Record
from petl.errors import InputError, UnsupportedError

OF_BODY = re.compile("embed|norm|^(wte|wpe|ln_.*)$", re.IGNORECASE)  # modules that are no head
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)


def why_no_strength(config: PeftConfig) -> str:
    """Return why an adapter of this config has no strength; "": it has one."""
    if config.is_prompt_learning or config.is_adaption_prompt:
        return "what it adds to the input, or to attention, is no update of a layer"
    # before the general reason, which says less
    facts, entry = facts_of(config), method_of(config)
    if facts.use_dora:
        return "DoRA divides by a norm of base and update together"
    if facts.trains_biases:
        return f"it trains biases of the base (bias={facts.bias}), which are no update to multiply"
    if facts.trainable_token_indices:
        return "it has rows of an embedding"
    body = next((name for name in facts.modules_to_save or () if OF_BODY.search(name)), None)
    if body:
        return f"it trains {body} as a whole, which is no update to multiply"
    named = entry is not None and (entry.strength_field or _patterns(config))
    return "" if named else "there is no tensor in which its update is linear"


def require_strength(config: PeftConfig, tensors: Iterable[str] = ()) -> None:
    """Raise UnsupportedError, with the reason, for an adapter without a strength.

    Args:
        tensors: names of those that it has.
    """
    embedding = next((name for name in tensors if "lora_embedding_" in name), None)
    of_embedding = f"{embedding} is of an embedding, whose factors are not those of a linear layer"
    reason = why_no_strength(config) or (of_embedding if embedding else "")
    if reason:
        entry = method_of(config)
        name = entry.name if entry else config.peft_type
        raise UnsupportedError(f"an adapter of {name} has no strength: {reason}")


def default_strengths(config: PeftConfig) -> Sequence[float]:
    """Return the strengths that are tried where none are given."""
    entry = method_of(config)
    return entry.strengths if entry is not None and entry.strengths else STRENGTHS


def strength_of(config: PeftConfig) -> float:
    """Return the strength of an adapter as it is: 1, or what its config has."""
    entry = method_of(config)
    return getattr(config, entry.strength_field) if entry and entry.strength_field else 1.0


def is_scaled(config: PeftConfig, name: str) -> bool:
    """Return True for a tensor that is multiplied by the strength, by its name in file or model."""
    patterns = _patterns(config)
    return any(fnmatchcase(part, each) for part in name.split(".") for each in patterns)


def _patterns(config: PeftConfig) -> Sequence[str]:
    """Return those of the names of tensors that are multiplied by the strength."""
    entry = method_of(config)
    named = () if entry is None else entry.strength_tensors
    return named if isinstance(named, tuple) else named(config)


def at_strength_in_file(
    config: PeftConfig, tensors: Mapping[str, Tensor], strength: float
) -> tuple[dict[str, Tensor], Record]:
    """Return an adapter's tensors with a strength in them, and the fields of its config with it.

    Raises:
        UnsupportedError: it has none, or has an adapter of an embedding.
    """
    require_strength(config, tensors)
    entry = method_of(config)
    if entry and entry.strength_field:
        return dict(tensors), {entry.strength_field: strength}
    return {n: strength * t if is_scaled(config, n) else t for n, t in tensors.items()}, {}


@contextmanager
def at_strength(model: PeftModel, strength: float) -> Generator[None]:
    """Inside the block the active adapter of a model has a strength; it is exactly restored.

    Raises:
        UnsupportedError: the adapter has none.
    """
    config = model.active_peft_config
    name = model.active_adapter
    keys = (key for key, _ in model.named_parameters() if name in key.split("."))
    require_strength(config, keys)
    entry = method_of(config)
    if entry and entry.strength_field:
        given = getattr(config, entry.strength_field)
        setattr(config, entry.strength_field, strength)
        try:
            yield
        finally:
            setattr(config, entry.strength_field, given)
        return
    # values are kept: multiplying back would round
    tensors = _scaled(model)
    kept = [tensor.detach().clone() for tensor in tensors]
    with torch.no_grad():
        for tensor in tensors:
            tensor.mul_(strength)
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, kept, strict=True):
                tensor.copy_(value)


def _scaled(model: PeftModel) -> list[nn.Parameter]:
    """Return the tensors of the active adapter that are multiplied by its strength."""
    config, name = model.active_peft_config, model.active_adapter
    return [
        tensor
        for key, tensor in model.named_parameters()
        if is_scaled(config, key) and name in key.split(".")
    ]


def scores_by_strength(
    model: PeftModel, score: Callable[[], float], strengths: Iterable[float] | None = None
) -> dict[float, float]:
    """Return `score()` with the active adapter at each strength, which is restored.

    Args:
        strengths: None: those of the method.

    Raises:
        UnsupportedError: the active adapter has no strength.
    """
    config = model.active_peft_config
    require_strength(config)
    found = {}
    for strength in default_strengths(config) if strengths is None else strengths:
        with at_strength(model, strength):
            found[strength] = score()
    return found


def best_strength(scores: Mapping[float, float], *, higher_is_better: bool) -> float:
    """Return the strength of the best score, the smallest of equal ones; NaN is the worst.

    Raises:
        InputError: there is no score.
    """
    sign = -1.0 if higher_is_better else 1.0
    known = {strength: sign * score for strength, score in scores.items() if score == score}
    if not known:
        raise InputError(
            f"no strength of {list(scores)} has a score; give method.strength a number"
        )
    return min(known, key=lambda strength: (known[strength], abs(strength)))


def choose_strength(
    model: PeftModel,
    score: Callable[[], float],
    strengths: Iterable[float] | None = None,
    *,
    higher_is_better: bool = False,
) -> dict[float, float]:
    """Give the active adapter the best of `strengths`, and return the scores.

    Args:
        model: its active adapter has a strength.
        score: computes a score on rows that were not trained on, such as the loss.
        strengths: to try; None: those of the method.
        higher_is_better: False for a loss.
    """
    scores = scores_by_strength(model, score, strengths)
    best = best_strength(scores, higher_is_better=higher_is_better)
    config = model.active_peft_config
    entry = method_of(config)
    if entry and entry.strength_field:
        setattr(config, entry.strength_field, best)
    else:
        with torch.no_grad():
            for tensor in _scaled(model):
                tensor.mul_(best)
    return scores
