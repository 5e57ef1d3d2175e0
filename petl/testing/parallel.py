"""Checks of several processes that train one adapter."""

from typing import Any

import torch
from peft import get_peft_model_state_dict
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from petl.testing.case import Case, difference
from petl.testing.catalog import check, own
from petl.testing.processes import in_processes
from petl.testing.training import rows_of, train

PROCESSES, STEPS, LR = 2, 3, 1e-3


@check(own)
def two_processes_equal_one(case: Case) -> None:
    """Two gloo processes end with the adapter of one process on the same global batch."""
    model = case.wrap_stirred().train()
    train(model, case.batch(), steps=STEPS, lr=LR)
    expected = get_peft_model_state_dict(model)
    ranks = in_processes(PROCESSES, _train_share, case, imports=case.imports)
    for rank, (size, found) in enumerate(ranks):
        assert size == PROCESSES, f"rank {rank} sees {size} processes"
        assert set(found) == set(expected)
        apart = [n for n, t in ranks[0][1].items() if not torch.equal(found[n], t)]
        assert not apart, f"ranks 0 and {rank} differ in {apart}"
        for name, tensor in expected.items():
            gap = difference(found[name].float(), tensor.float())
            assert gap <= LR / 10, f"rank {rank}: {name} differs from one process by {gap:.2e}"


def _train_share(case: Case) -> tuple[int, dict[str, Tensor]]:
    """World size and adapter after training on every n-th row of the batch."""
    rank, size = distributed.get_rank(), distributed.get_world_size()
    batch = case.batch()
    share = rows_of(batch, list(range(rank, len(batch["labels"]), size)))
    model: Any = DistributedDataParallel(case.wrap_stirred().train())
    weight = case.tiny.items(share) * size / case.tiny.items(batch)  # DDP takes the mean
    train(model, share, steps=STEPS, lr=LR, weight=weight)
    return size, get_peft_model_state_dict(model.module)
