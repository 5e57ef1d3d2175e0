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


@pytest.mark.parametrize(
    ("make", "words"),
    [(lambda: BoundedMola(extra=0), "extra=0 .*1"), (lambda: BoundedLoss(weight=-1), "weight=-1")],
)
def test_configs_of_methods_and_losses_check_their_bounds(make, words):
    with pytest.raises(petl.InputError, match=words):
        make()
