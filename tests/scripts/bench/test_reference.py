"""Each method of petl equals its dense reference, and differences are detected."""

from dataclasses import replace

import pytest
from bench.contenders import contenders
from bench.reference import DENSE, check, mola
from bench.shapes import Bench
from tiny_shapes import TINY

# those of images are measured by another section, on a model of their own
CHECKED = [row for row in contenders() if (row.is_own or row.theirs) and not row.elsewhere]


@pytest.mark.cells(10)
@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("row", CHECKED, ids=lambda row: row.name)
def test_a_step_equals_its_dense_reference(row, name):
    bench = Bench(replace(TINY[name], layers=4))  # MoS draws its rows from four layers
    assert check(bench, row.wrap(bench), row.tolerance) == ""


def test_a_difference_is_detected_and_named(monkeypatch):
    monkeypatch.setitem(DENSE, "MolaAdapter", lambda *args: 1e-3 + mola(*args))
    bench = Bench(TINY["llama"])
    model = next(row for row in CHECKED if row.method == "mola").wrap(bench)
    assert check(bench, model, 1e-5).startswith("the loss is off by ")


def test_a_check_leaves_the_model_unchanged():
    bench = Bench(TINY["llama"])
    model = next(row for row in CHECKED if row.method == "density").wrap(bench)
    check(bench, model, 1e-3)
    assert not any("forward" in vars(module) for module in model.modules())
    assert model.activation_density.config.weight == 1.0


def test_a_method_without_a_reference_is_a_lookup_error(monkeypatch):
    monkeypatch.delitem(DENSE, "MolaAdapter")
    bench = Bench(TINY["llama"])
    model = next(row for row in CHECKED if row.method == "mola").wrap(bench)
    with pytest.raises(LookupError, match="MolaAdapter"):
        check(bench, model, 1e-5)
