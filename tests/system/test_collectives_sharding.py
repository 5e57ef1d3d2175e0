"""Sharded tensors on two processes, with rows that do not divide evenly."""

import torch
from kept_processes import in_processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from petl.system.collectives import to_full, to_local, to_shards

WHOLE = torch.arange(6.0).view(3, 2)


def test_a_tensor_is_sharded_changed_and_gathered():
    first, second = in_processes(2, shares)
    assert first["cut"].tolist() == [[0.0, 1.0], [2.0, 3.0]]
    assert second["cut"].tolist() == [[4.0, 5.0]]
    for found in (first, second):
        assert torch.equal(found["full"], WHOLE + torch.tensor([[1.0], [1.0], [2.0]]))
        assert found["other shape"].shape == (4,)


def shares() -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (2,))
    like = distribute_tensor(torch.zeros(3, 2), mesh, [Shard(0)])
    made = to_shards(WHOLE.clone(), like)
    kept = to_local(made).clone()
    to_local(made).add_(mesh.get_rank() + 1)
    return {"cut": kept, "full": to_full(made), "other shape": to_shards(torch.zeros(4), like)}


def test_an_unsharded_tensor_is_returned_unchanged():
    tensor = torch.zeros(2)
    assert to_full(tensor) is to_local(tensor) is to_shards(tensor, torch.ones(2)) is tensor
