"""Dropout of an adapter acts while it trains, and never in evaluation."""

from dataclasses import fields, replace

import pytest
import torch
from contract_cases import OWN, models_of, own

import petl

WITH_DROPOUT = [
    (name, field.name)
    for name in OWN
    for field in fields(petl.method(name).config_cls)
    if field.name.endswith("_dropout")
]


@pytest.mark.cells(2)
@pytest.mark.parametrize(("name", "field"), WITH_DROPOUT)
def test_dropout_acts_in_training_alone(name, field):
    case = own(name, models_of(name)[0])
    with_dropout, without = (
        replace(case, fields={**case.fields, field: p}).wrap_stirred() for p in (0.5, 0.0)
    )
    batch = case.batch()
    for with_gradients in (True, False):
        with torch.set_grad_enabled(with_gradients):
            assert torch.equal(with_dropout.eval()(**batch).logits, without.eval()(**batch).logits)
            trained = with_dropout.train()(**batch).logits
            assert not torch.allclose(trained, without.train()(**batch).logits, atol=1e-3)
