"""Conformance test of methods outside petl; run by tests/testing/test_catalog.py."""

import my_methods  # noqa: F401  registers them
import pytest

from petl import testing

MODELS = {"plain": ("llama", "gpt2"), "shared": ("bert", "t5")}
CASES = [testing.Case(name, model) for name, models in MODELS.items() for model in models]


@pytest.mark.parametrize(("case", "check"), testing.params(CASES, slow=False))
def test_contract(case, check):
    testing.run(check, case)
