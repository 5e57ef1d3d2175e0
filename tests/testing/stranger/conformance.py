"""What a stranger writes to check methods of their own; run by tests/testing/test_catalog.py."""

import my_methods  # noqa: F401  registers them
import pytest

from petl import testing

MODELS = {"plain": ("llama", "gpt2"), "shared": ("bert", "t5")}
CASES = [testing.Case(name, model) for name, models in MODELS.items() for model in models]
PARAMS = [(case, check) for case in CASES for check in testing.checks(case, slow=False)]


@pytest.mark.parametrize(("case", "check"), PARAMS, ids=str)
def test_contract(case, check):
    testing.run(check, case)
