"""What processes do together."""

import pytest
import torch

from petl.core.distributed import collectives
from petl.errors import InputError
from petl.testing import in_processes


def test_alone_a_process_is_a_group_of_one():
    assert (collectives.num_processes(), collectives.number()) == (1, 0)
    assert collectives.gathered("a") == ["a"]
    assert collectives.made_by(0, lambda: 5) == 5
    assert collectives.shared_out([lambda: 1, lambda: 2]) == [1, 2]
    assert float(collectives.summed(torch.tensor(3.0))) == 3.0


def test_several_share_what_one_makes():
    for rank, found in enumerate(in_processes(2, _together)):
        assert found == {
            "here": (2, rank),
            "gathered": [0, 1],
            "summed": 3.0,
            "made": "by 1",
            "error": "no such thing",
            "shared out": [0, 1, 0],
            "one failed": "no such thing",
        }


def _together():
    rank = collectives.number()
    found = {
        "here": (collectives.num_processes(), rank),
        "gathered": collectives.gathered(rank),
        "summed": float(collectives.summed(torch.tensor(rank + 1.0))),
        "made": collectives.made_by(1, lambda: f"by {collectives.number()}"),
    }
    with pytest.raises(InputError) as refused:  # on both, so that neither waits for the other
        collectives.made_by(0, _refuse)
    found["error"] = str(refused.value)
    found["shared out"] = collectives.shared_out([collectives.number] * 3)
    with pytest.raises(InputError) as refused:
        collectives.shared_out([collectives.number, _refuse, collectives.number])
    return {**found, "one failed": str(refused.value)}


def _refuse():
    raise InputError("no such thing")
