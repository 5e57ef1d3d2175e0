"""Bounds of config fields: which values pass, and the message for those that do not."""

import math
import re
from dataclasses import dataclass

import pytest

import petl
from petl.core.spec.config import Bounds, check_bounds, config_field
from petl.core.spec.method import LossConfig
from petl.methods.mola import MolaConfig


@dataclass
class Bounded:
    r: int = config_field("an integer", 8, ge=1)
    size: int | None = config_field("an integer or null", None, ge=0, le=9)
    lora_alpha: float = config_field("may have a fraction", 16, gt=0)
    dropout: float = config_field("an interval open above", 0.0, ge=0, lt=1)
    beta: float = config_field("an open interval", 0.5, gt=0, lt=1)
    decay: float = config_field("an upper bound alone", 0.0, lt=1)
    most: float = config_field("an inclusive upper bound alone", 0.0, le=1)
    start: str = config_field("a choice", "zero", choices=("zero", "normal"))
    bits: int = config_field("a choice of integers", 1, choices=(1, 2))
    places: list[str] = config_field("entries are choices", ["ffn"], choices=("attn", "ffn"))
    free: str = config_field("no bounds", "anything")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("r", 0, "r=0 is not at least 1"),
        ("r", 1.0, "r=1.0 is not an integer"),
        ("r", True, "r=True is not an integer"),
        ("r", "8", "r='8' is not an integer"),
        ("r", None, "r=None is not an integer"),
        ("size", 10, "size=10 is not in [0, 9]"),
        ("lora_alpha", 0, "lora_alpha=0 is not above 0"),
        ("lora_alpha", math.nan, "lora_alpha=nan is not a finite number"),
        ("lora_alpha", "16", "lora_alpha='16' is not a number"),
        ("dropout", 1, "dropout=1 is not in [0, 1)"),
        ("beta", 0.0, "beta=0.0 is not in (0, 1)"),
        ("decay", 1, "decay=1 is not below 1"),
        ("most", 2, "most=2 is not at most 1"),
        ("start", "one", "start='one' is not one of zero, normal"),
        ("bits", 3, "bits=3 is not one of 1, 2"),
        ("bits", True, "bits=True is not one of 1, 2"),
        (
            "places",
            ["ffn", "mlp"],
            "places=['ffn', 'mlp'] has 'mlp', which is not one of attn, ffn",
        ),
    ],
)
def test_a_value_out_of_bounds_is_named_with_the_bound(field, value, message):
    with pytest.raises(petl.InputError, match=f"^{re.escape(message)}$"):
        check_bounds(Bounded(**{field: value}))


def test_values_within_bounds_pass():
    check_bounds(Bounded())
    check_bounds(Bounded(r=1, size=None, lora_alpha=0.5, most=1, places=["attn"], free=""))
    check_bounds(Bounded(size=9, dropout=0.999, start="normal", bits=2))


def test_skipped_fields_are_not_checked():
    check_bounds(Bounded(r=0), skip=("r",))


def test_a_reason_ends_the_message():
    with pytest.raises(petl.InputError, match=r"^x=0 is not above 0: it scales the update$"):
        Bounds(gt=0, reason="it scales the update").check("x", 0)


@dataclass
class BoundedMola(MolaConfig):
    extra: int = config_field("an integer", 1, ge=1)


@dataclass
class BoundedLoss(LossConfig):
    weight: float = config_field("factor of the term", 1.0, ge=0)


def test_configs_of_methods_and_losses_check_their_bounds():
    with pytest.raises(petl.InputError, match="extra=0 is not at least 1"):
        BoundedMola(extra=0)
    with pytest.raises(petl.InputError, match="weight=-1 is not at least 0"):
        BoundedLoss(weight=-1)


@pytest.mark.parametrize("inner", ["mola", "lora"])
def test_configs_of_quantized_methods_check_their_bounds(inner):
    with pytest.raises(petl.InputError, match="bits=3 is not one of 1, 2, 4, 8"):
        petl.build_config("binary", inner=inner, bits=3)
    with pytest.raises(petl.InputError, match="save_format='zip' is not one of packed, stacked"):
        petl.build_config("binary", inner=inner, save_format="zip")
