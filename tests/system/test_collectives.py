"""Collective operations of several processes."""

import pytest
import torch

from petl.errors import InputError
from petl.system import collectives as distributed
from petl.testing import in_processes


def test_a_single_process_is_a_group_of_one():
    assert (distributed.num_processes(), distributed.number()) == (1, 0)
    assert distributed.gathered("a") == ["a"]
    assert distributed.made_by(0, lambda: 5) == 5
    assert distributed.shared_out([lambda: 1, lambda: 2]) == [1, 2]
    assert float(distributed.summed(torch.tensor(3.0))) == 3.0


@pytest.mark.thorough
def test_results_of_one_process_reach_all():
    for rank, found in enumerate(in_processes(2, _batched)):
        assert found == {
            "here": (2, rank),
            "gathered": [0, 1],
            "summed": 3.0,
            "made": "by 1",
            "error": "no such thing",
            "shared out": [0, 1, 0],
            "one failed": "no such thing",
        }


def _batched():
    rank = distributed.number()
    found = {
        "here": (distributed.num_processes(), rank),
        "gathered": distributed.gathered(rank),
        "summed": float(distributed.summed(torch.tensor(rank + 1.0))),
        "made": distributed.made_by(1, lambda: f"by {distributed.number()}"),
    }
    with pytest.raises(InputError) as refused:  # on both, so that neither waits for the other
        distributed.made_by(0, _refuse)
    found["error"] = str(refused.value)
    found["shared out"] = distributed.shared_out([distributed.number] * 3)
    with pytest.raises(InputError) as refused:
        distributed.shared_out([distributed.number, _refuse, distributed.number])
    return {**found, "one failed": str(refused.value)}


def _refuse():
    raise InputError("no such thing")
