"""The settings of leaving tokens out, without torch."""

from collections.abc import Iterable
from dataclasses import dataclass

from petl.system.values import Rule, bounded, field, integer, one_of

SCORERS = ("norm", "predictor", "oracle")
LAYERS = Rule(
    "second_half, all, or a list of numbers from 0",
    lambda value: (
        value in ("second_half", "all")
        or (not isinstance(value, str) and bool(value) and all(number >= 0 for number in value))
    ),
)


@dataclass(kw_only=True)
class TokenSettings:
    """The settings under `tokens`, and the arguments of `petl.drop_tokens`."""

    block: int = field(64, integer(1), "tokens that are scored and kept together")
    layers: str | list[int] = field("second_half", LAYERS, "second_half, all, or numbers from 0")
    keep: float = field(0.4, bounded(gt=0, le=1), "share of the blocks of tokens that are kept")
    scorer: str = field("norm", one_of(*SCORERS), "norm, predictor or oracle")
    predictor: str | None = field(None, text="file that `petl train-predictors` has written")
    mlp_keep: float = field(1.0, bounded(gt=0, le=1), "share of MLP channels kept for backward")
    always_first: int = field(1, integer(0), "blocks at the start of a row that are always kept")
    always_last: int = field(1, integer(0), "blocks at the end of a row that are always kept")


def layers_setting(layers: str | Iterable[int]) -> str | list[int]:
    """Return the argument `layers` of a function as a setting has it: a collection is a list."""
    return layers if isinstance(layers, str) or not isinstance(layers, Iterable) else [*layers]
