"""The section of gathered neurons: its products are those of all rows, and it has a table."""

import pytest
import torch
from bench.gathered import DENSITIES, PRODUCTS, Down, differing, drawn, measure
from bench.records import Result
from bench.report import tables


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_products_are_sums_over_the_active_neurons_of_each_token(name, tokens):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(10, 4, generator=generator)
    x = drawn(tokens, 10, 0.3, generator)
    expected = torch.zeros(tokens, 4)
    for t in range(tokens):
        for neuron in range(10):
            if x[t, neuron] != 0:
                expected[t] += x[t, neuron] * rows[neuron]
    torch.testing.assert_close(PRODUCTS[name](x, rows), expected)


@pytest.mark.parametrize("name", PRODUCTS)
def test_rows_of_inactive_neurons_are_not_read(name):
    x = drawn(2, 10, 0.3, torch.Generator().manual_seed(0))
    rows = torch.ones(10, 4)
    rows[(x == 0).all(0)] = torch.nan
    assert PRODUCTS[name](x, rows).isfinite().all()


@pytest.mark.thorough
def test_a_record_for_each_density_and_number_of_tokens():
    found = measure(2, [Down("tiny", 8, 20, 2)])
    assert [record.failed for record in found] == [""] * 2 * len(DENSITIES)
    one, eight = tables(Result({}, found)).values()
    assert [row[0] for row in one.rows] == [f"density {each:g}" for each in DENSITIES]
    assert "rows active in any token" in one.columns
    read = {record.shape[-1]: record.facts["read"] for record in found[2::5]}
    assert read["1"] == 0.25
    assert read["8"] > 0.5
    assert len(eight.rows) == len(DENSITIES)


def test_results_that_differ_are_named():
    whole = [torch.tensor([1.0, 100.0])]
    assert differing(whole, {"same": [whole[0] + 1e-4]}) == ""
    found = differing(whole, {"same": whole, "other": [whole[0] + 1]})
    assert found == "differs, relative to the largest value: other by 0.01"
