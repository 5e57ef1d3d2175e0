"""Checks of several processes that train one adapter."""

from typing import Any

import torch
from peft import get_peft_model_state_dict
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from petl.core.lifecycle import lifecycle
from petl.core.model.structure import blocks
from petl.core.registry import refusal
from petl.distributed.launch import DeepSpeed, make_accelerator
from petl.errors import UnsupportedError
from petl.testing.case import Case, difference, trainable
from petl.testing.catalog import check, on_llama
from petl.testing.models import Batch
from petl.testing.processes import in_processes
from petl.testing.training import rows_of, train
from petl.training.optimizer import make_engine

PROCESSES, STEPS, LR = 2, 3, 1e-3
ZERO_STAGES, PADDING = (1, 2), 16  # of a share of ZeRO's, numbers
EPS = 1e-5  # of AdamW: a gradient below it may be all rounding, and is to make no whole step
State = dict[str, Tensor]


@check()
def two_processes_equal_one(case: Case) -> None:
    """Two gloo processes end with the adapter of one process on the same global batch.

    Buffers that are about the rows of one process (`Adapter.of_own_rows`) are left out.
    """
    model = case.wrap_stirred().train()
    train(model, case.batch(), steps=STEPS, lr=LR, eps=EPS)
    _compare(case, _train_share, get_peft_model_state_dict(model))


@check(slow=True)
def sharded_processes_equal_one(case: Case) -> None:
    """So do two processes of which each has a part of every tensor (FSDP2)."""
    reason = refusal(case.config(), "fsdp")
    if reason:  # by `train.py` and `petl plan`, before training
        raise UnsupportedError(reason)
    model = case.wrap_stirred().train()
    train(model, case.batch(), steps=STEPS, lr=LR, eps=EPS)
    _compare(case, _train_shards, {n: p.detach() for n, p in trainable(model).items()})


@check(on_llama, slow=True, package="deepspeed")
def zero_processes_equal_one(case: Case) -> None:
    """So do two processes of which each has a share of the optimizer's state (DeepSpeed's ZeRO)."""
    reason = refusal(case.config(), "deepspeed")
    if reason:  # by `train.py`, before training
        raise UnsupportedError(reason)
    model = case.wrap_stirred().train()
    train(model, case.batch(), steps=STEPS, lr=LR, eps=EPS)
    expected = get_peft_model_state_dict(model)
    _compare(case, _train_zero, {f"{s}: {n}": t for s in ZERO_STAGES for n, t in expected.items()})


def _compare(case: Case, train_in_process: Any, expected: State) -> None:
    """Both processes must find what one process did, but for a tenth of an optimizer step."""
    own = getattr(getattr(case.promises.tuner, "adapter_cls", None), "of_own_rows", ())
    ranks = in_processes(PROCESSES, train_in_process, case, imports=case.imports)
    for rank, (size, found) in enumerate(ranks):
        assert size == PROCESSES, f"rank {rank} sees {size} processes"
        assert set(found) == set(expected)
        apart = [n for n, t in ranks[0][1].items() if not torch.equal(found[n], t)]
        assert not apart, f"ranks 0 and {rank} differ in {apart}"
        for name, tensor in expected.items():
            if name.rpartition(".")[2] in own:
                continue
            gap = difference(found[name].float(), tensor.float())
            assert gap <= LR / 10, f"rank {rank}: {name} differs from one process by {gap:.2e}"


def _train_share(case: Case) -> tuple[int, State]:
    """World size and adapter after training on every n-th row of the batch."""
    model: Any = case.wrap_stirred().train()
    _train_on_share(case, DistributedDataParallel(model))
    return distributed.get_world_size(), get_peft_model_state_dict(model)


def _train_shards(case: Case) -> tuple[int, State]:
    """World size and trained tensors, put together, of a model that is cut up block by block."""
    size = distributed.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    model: Any = case.wrap_stirred().train()
    for _, block in list(blocks(model)):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    whole = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    assert not whole, f"{whole} are not cut up"
    _train_on_share(case, model)
    shares: dict[str, Any] = {**trainable(model)}
    return size, {name: share.full_tensor().detach() for name, share in shares.items()}


def _train_zero(case: Case) -> tuple[int, State]:
    """World size and, by stage of ZeRO and name, the tensors of the adapter after training."""
    found = {f"{s}: {n}": t for s in ZERO_STAGES for n, t in _train_stage(case, s).items()}
    return distributed.get_world_size(), found


def _train_stage(case: Case, stage: int) -> State:
    accelerator = make_accelerator(DeepSpeed("deepspeed", stage), "no")
    model: Any = case.wrap_stirred().train()
    life = lifecycle(model)
    share, weight = _share_of(case)
    life.prepare([share])
    optimizer = AdamW(trainable(model).values(), lr=LR, weight_decay=0.0, eps=EPS)
    engine = make_engine(model, optimizer, None, accelerator)
    for step in range(1, STEPS + 1):
        with engine.passes(last=True):
            engine.backward(engine.wrapped(**share).loss * weight)
        engine.step()
        life.after_step(step, optimizer)
    trained = sum(tensor.numel() for tensor in trainable(model).values())
    held = sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.dim())
    most = 2 * (trained / distributed.get_world_size() + PADDING)  # AdamW has two moments
    assert held <= most, f"a process holds {held} numbers of state, more than {most}"
    engine.release()
    return get_peft_model_state_dict(model)


def _train_on_share(case: Case, model: nn.Module) -> None:
    share, weight = _share_of(case)
    train(model, share, steps=STEPS, lr=LR, weight=weight, eps=EPS)


def _share_of(case: Case) -> tuple[Batch, float]:
    """This process's rows of the batch, and the weight of their loss: gradients are averaged."""
    rank, size = distributed.get_rank(), distributed.get_world_size()
    batch = case.batch()
    share = rows_of(batch, list(range(rank, len(batch["labels"]), size)))
    return share, case.tiny.items(share) * size / case.tiny.items(batch)
