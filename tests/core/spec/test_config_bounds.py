"""Bounds of config fields: which values pass, and the message for those that do not."""

from dataclasses import dataclass

import pytest

import petl
from petl.core.losses import LossConfig
from petl.core.spec.config import config_field
from petl.methods.mola import MolaConfig


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
