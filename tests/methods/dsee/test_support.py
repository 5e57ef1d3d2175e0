"""Positions beside a low-rank part of a matrix."""

import pytest
import torch

from petl.methods.dsee.support import greedy_positions


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
