"""Masks: exact numbers, ties, bits."""

import numpy as np
import pytest
import torch

from petl.ops import masks
from petl.ops.masks import all_kept, count_kept, keep_largest, pack_mask, packed_size, unpack_mask


@pytest.mark.parametrize("entries", [1, 7, 8, 9, 64, 65, 1001])
def test_bits_are_those_of_numpy_with_low_bits_first(entries):
    keep = torch.rand(entries, generator=torch.Generator().manual_seed(entries)) < 0.5
    packed = pack_mask(keep)
    expected = np.packbits(keep.numpy(), bitorder="little")
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_size(entries)
    assert np.array_equal(packed.numpy(), expected)
    assert torch.equal(unpack_mask(packed, (entries,)), keep)
    assert int(count_kept(packed)) == int(keep.sum())
    assert torch.equal(all_kept(entries), pack_mask(torch.ones_like(keep)))


def by_loop(scores: list[float], pruned: int) -> list[bool]:
    """Prune the smallest, of equal ones the first."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    keep = [True] * len(scores)
    for index in order[:pruned]:
        keep[index] = False
    return keep


@pytest.mark.parametrize("path", ["_on_host", "_on_device"])
@pytest.mark.parametrize("values", [3, 10**6])  # 3: most scores are equal
def test_exactly_the_smallest_are_pruned_and_of_equal_ones_the_first(path, values, monkeypatch):
    if path == "_on_device":
        monkeypatch.setattr(masks, "_on_host", masks._on_device)
    generator = torch.Generator().manual_seed(values)
    scores = torch.randint(values, (13, 9), generator=generator).float()
    for pruned in (0, 1, 40, 58, 59, 60, 100, 116, 117):
        keep = keep_largest(scores, pruned)
        assert keep.shape == scores.shape
        assert keep.flatten().tolist() == by_loop(scores.flatten().tolist(), pruned), pruned


@pytest.mark.parametrize("path", ["_on_host", "_on_device"])
def test_scores_that_are_not_numbers_are_kept(path, monkeypatch):
    if path == "_on_device":
        monkeypatch.setattr(masks, "_on_host", masks._on_device)
    scores = torch.tensor([0.3, torch.nan, 0.1, torch.nan, 0.2])
    assert keep_largest(scores, 2).tolist() == [True, True, False, True, False]


@pytest.mark.parametrize("values", [3, 10**6])  # 3: most scores are equal
def test_smallest_of_a_group_are_pruned_over_all_its_matrices(values):
    generator = torch.Generator().manual_seed(values)
    shapes = ((13, 9), (5,), (7, 6))
    scores = [torch.randint(values, s, generator=generator).float() / 7 for s in shapes]
    before = [torch.rand(s, generator=generator) > 0.2 for s in shapes]
    kept = [i for i, keep in enumerate(torch.cat([k.flatten() for k in before])) if keep]
    flat = torch.cat([s.flatten() for s in scores]).tolist()
    for count in (0, 1, 40, 100, len(kept)):
        packed = masks.prune_smallest([pack_mask(k) for k in before], lambda i: scores[i], count)
        found = [unpack_mask(p, s) for p, s in zip(packed, shapes, strict=True)]
        survivors = {i for i, keep in enumerate(torch.cat([f.flatten() for f in found])) if keep}
        assert survivors == set(kept) - set(sorted(kept, key=lambda i: (flat[i], i))[:count])


def test_nan_in_a_group_is_the_largest_and_too_many_to_prune_are_an_error():
    scores = torch.tensor([0.3, torch.nan, 0.1])
    packed = masks.prune_smallest([all_kept(3)], lambda i: scores, 2)
    assert unpack_mask(packed[0], (3,)).tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r"rank 4 .*3 entries"):
        masks.prune_smallest([all_kept(3)], lambda i: scores, 4)
