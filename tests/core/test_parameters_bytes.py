"""Counting the bytes of tensors, and refusing those that exceed the machine's memory."""

import psutil
import pytest
import torch
from torch import nn

import petl
from petl import testing
from petl.core.parameters import LimitedBytes, TooManyBytes, within_memory
from petl.errors import InputError


def test_a_limit_counts_what_is_alive_and_not_what_was_freed():
    with LimitedBytes(4000) as live:
        for _ in range(10):
            torch.zeros(500)  # freed at once
        kept = torch.zeros(500)
        assert live.now == 4 * len(kept)
        with pytest.raises(TooManyBytes):
            torch.zeros(600)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: torch.empty(n, 2),
        lambda n: torch.randn(2, n),
        lambda n: torch.full((n,), 1.0),
        lambda n: torch.zeros(1).new_zeros(n),
        lambda n: torch.empty(n, device="meta"),
        lambda n: nn.Linear(n, n),
    ],
)
def test_a_tensor_beyond_the_memory_is_refused_before_it_is_allocated(make):
    too_much = pytest.raises(InputError, match="a thing")
    with too_much, within_memory("a thing", "make it smaller"):
        make(10**13)


def test_a_size_beyond_the_memory_is_refused_with_both_numbers():
    total = f"{psutil.virtual_memory().total / 1e9:,.0f} GB"
    with pytest.raises(InputError, match=f"8,000 GB.* {total}"):
        petl.wrap(testing.tiny_llama(), "vblora", num_vectors=10**12, vector_length=2)


def test_views_and_copies_of_weights_do_not_count():
    weight = torch.zeros(1000)
    with LimitedBytes(100) as live:
        weight.view(10, 100).clone()
        assert live.now == 0
