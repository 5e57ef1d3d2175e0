"""Positions beside a low-rank part, and products with single entries, against dense ones."""

import pytest
import torch

from petl.ops.support import add_entries, greedy_positions, largest_positions


def planted(seed: int) -> tuple[torch.Tensor, set[int]]:
    """A rank-3 matrix 64 x 64 with 16 outliers."""
    generator = torch.Generator().manual_seed(seed)
    low_rank = torch.randn(64, 3, generator=generator) @ torch.randn(3, 64, generator=generator)
    at = torch.randperm(64 * 64, generator=generator)[:16]
    matrix = low_rank + 0.01 * torch.randn(64, 64, generator=generator)
    signs = torch.randint(2, (16,), generator=generator).mul(2).sub(1)
    matrix.view(-1)[at] += 6.0 * signs
    return matrix, set(at.tolist())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_outliers_are_found_and_the_same_each_time(seed):
    matrix, planted_at = planted(seed)
    found = [greedy_positions(matrix, 16, 3, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*found)
    assert torch.equal(found[0], found[0].sort().values)
    assert len(planted_at & set(found[0].tolist())) >= 14


def test_largest_positions_are_those_of_sorting():
    matrix = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    order = sorted(range(63), key=lambda i: -abs(float(matrix.view(-1)[i])))
    assert largest_positions(matrix, 10).tolist() == sorted(order[:10])
    assert largest_positions(matrix, 0).tolist() == []


def test_entries_add_what_a_dense_matrix_adds():
    generator = torch.Generator().manual_seed(0)
    O, I, scale = 6, 5, 0.7
    positions = torch.tensor([0, 3, 8, 9, 27, 29], dtype=torch.int32)  # rows with several entries
    x = torch.randn(2, 4, I, generator=generator, dtype=torch.float64, requires_grad=True)
    values = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    base = torch.randn(O, I, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, 4, O, generator=generator, dtype=torch.float64)
    y = add_entries(x @ base.t(), x, values, positions, scale)
    found = torch.autograd.grad((y * weights).sum(), [x, values])
    dense = torch.zeros(O * I, dtype=torch.float64)
    dense = dense.index_put((positions.long(),), values).view(O, I)
    expected = x @ (base + scale * dense).t()
    torch.testing.assert_close(y, expected)
    for one, other in zip(
        found, torch.autograd.grad((expected * weights).sum(), [x, values]), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
