"""Checks of a drafter's fields and vocabulary, which may be those of somebody else's file."""

from torch import nn

from petl.core.types import base_of
from petl.errors import InputError


def check_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise InputError unless a field is an integer from `low` to `high`; None: no upper bound."""
    # True is an int, too
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):
        allowed = f"{low} or more" if high is None else f"from {low} to {high}"
        raise InputError(f"{name}={value!r} is no integer {allowed}")


def check_count(name: str, value: object, high: int) -> None:
    """Raise InputError unless a field is "auto" or an integer from 1 to `high`."""
    if value != "auto":
        try:
            check_integer(name, value, 1, high)
        except InputError as error:
            raise InputError(f"{error}, and not 'auto'") from error


def check_bool(name: str, value: object) -> None:
    """Raise InputError unless a field is True or False."""
    if not isinstance(value, bool):
        raise InputError(f"{name}={value!r} is neither True nor False")


def vocabulary_of(model: nn.Module | None) -> int:
    """Return the number of tokens of a model.

    Raises:
        InputError: there is no model.
    """
    if model is None:
        raise InputError(f"model={model}: this drafter needs the model that it drafts for")
    # not the tokenizer's number: heads are often filled up to a round number of rows
    return base_of(model).config.get_text_config().vocab_size


def check_vocabulary(what: str, size: int, model: nn.Module) -> None:
    """Raise InputError unless a drafter of a vocabulary of this size, 0: any, fits a model."""
    own = vocabulary_of(model)
    if size not in (0, own):
        raise InputError(
            f"{what} has a vocabulary of {size} tokens and {type(model).__name__} one of {own}: "
            "it belongs to another model"
        )
