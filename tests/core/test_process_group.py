"""What processes do together."""

import pytest
import torch

from petl.core import processes
from petl.errors import InputError
from petl.testing import in_processes


def test_alone_a_process_is_a_group_of_one():
    assert (processes.num_processes(), processes.number()) == (1, 0)
    assert processes.gathered("a") == ["a"]
    assert processes.made_by(0, lambda: 5) == 5
    assert processes.shared_out([lambda: 1, lambda: 2]) == [1, 2]
    assert float(processes.summed(torch.tensor(3.0))) == 3.0


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
    rank = processes.number()
    found = {
        "here": (processes.num_processes(), rank),
        "gathered": processes.gathered(rank),
        "summed": float(processes.summed(torch.tensor(rank + 1.0))),
        "made": processes.made_by(1, lambda: f"by {processes.number()}"),
    }
    with pytest.raises(InputError) as refused:  # on both, so that neither waits for the other
        processes.made_by(0, _refuse)
    found["error"] = str(refused.value)
    found["shared out"] = processes.shared_out([processes.number] * 3)
    with pytest.raises(InputError) as refused:
        processes.shared_out([processes.number, _refuse, processes.number])
    return {**found, "one failed": str(refused.value)}


def _refuse():
    raise InputError("no such thing")
