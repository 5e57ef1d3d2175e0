"""Checks of training one adapter in several processes."""

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from petl.core.lifecycle import lifecycle
from petl.core.model.structure import blocks
from petl.core.registry import refusal
from petl.core.support import Capability
from petl.errors import UnsupportedError
from petl.testing.case import Case, assert_close, logits, trainable
from petl.testing.catalog import check, on_llama
from petl.testing.models import Batch
from petl.testing.processes import in_processes
from petl.testing.training import rows_of, train
from petl.training.distributed.launch import DeepSpeed, make_accelerator
from petl.training.optimizer import make_engine

PROCESSES, STEPS, LR = 2, 3, 1e-3
ZERO_STAGES, PADDING = (1, 2), 16  # numbers by which ZeRO pads a shard
# of AdamW: a gradient below it may be nothing but rounding, and must not cause a full step
EPS = 1e-5
State = dict[str, Tensor]


@check(of=Capability.DDP)
def two_processes_equal_one(case: Case) -> None:
    """Two processes (DDP) end with the adapter of one process on the same global batch.

    Buffers with statistics of one process's rows (`Adapter.of_own_rows`) are not compared.
    """
    model = case.wrap_stirred().train()
    train(model, case.batch(), steps=STEPS, lr=LR, eps=EPS)
    _compare(case, _train_ddp, get_peft_model_state_dict(model))


@check(slow=True, of=Capability.FSDP)
def sharded_processes_equal_one(case: Case) -> None:
    """Two processes with sharded tensors (FSDP2) end with the adapter of one process."""
    reason = refusal(case.config(), Capability.FSDP)
    if reason:  # raised by train.py and `petl plan`, not by the method itself
        raise UnsupportedError(reason)
    model = case.wrap_stirred().train()
    train(model, case.batch(), steps=STEPS, lr=LR, eps=EPS)
    _compare(case, _train_fsdp, {n: p.detach() for n, p in trainable(model).items()})


@check(on_llama, slow=True, of=Capability.FSDP1)
def fsdp1_processes_equal_one(case: Case) -> None:
    """Two processes in FSDP1, by block and by PEFT's policy, end with the adapter of one."""
    model = case.wrap_stirred().train()
    train(model, case.batch(), steps=STEPS, lr=LR, eps=EPS)
    expected = {n: p.detach() for n, p in trainable(model).items()}
    _compare(case, _train_fsdp1, {f"{p}: {n}": t for p in POLICIES for n, t in expected.items()})


@check(on_llama, slow=True, package="deepspeed", of=Capability.ZERO)
def zero_processes_equal_one(case: Case) -> None:
    """Two processes with a sharded optimizer (DeepSpeed ZeRO) end with the adapter of one."""
    reason = refusal(case.config(), Capability.ZERO)
    if reason:  # raised by train.py, not by the method itself
        raise UnsupportedError(reason)
    model = case.wrap_stirred().train()
    train(model, case.batch(), steps=STEPS, lr=LR, eps=EPS)
    expected = get_peft_model_state_dict(model)
    _compare(case, _train_zero, {f"{s}: {n}": t for s in ZERO_STAGES for n, t in expected.items()})


def _compare(
    case: Case, train_in_process: Callable[[Case], tuple[int, State]], expected: State
) -> None:
    """Compare the tensors of all processes with each other, exactly, and with one process.

    A tenth of an optimizer step (`LR`) is allowed for another order of summation.
    """
    own = getattr(case.promises.adapter_cls, "of_own_rows", ())
    ranks = in_processes(PROCESSES, train_in_process, case, imports=case.imports)
    for rank, (size, state) in enumerate(ranks):
        assert size == PROCESSES, f"rank {rank} has a group of {size} processes, not {PROCESSES}"
        assert set(state) == set(expected), f"rank {rank}: {sorted(set(state) ^ set(expected))}"
        apart = [n for n, t in ranks[0][1].items() if not torch.equal(state[n], t)]
        assert not apart, f"ranks 0 and {rank} differ in {apart}"
        for name, tensor in expected.items():
            # statistics of one process's rows
            if name.rpartition(".")[2] in own:
                continue
            what = f"{name} of rank {rank} and of a single process"
            assert_close(state[name].float(), tensor.float(), LR / 10, what)


def _train_ddp(case: Case) -> tuple[int, State]:
    """Return world size and adapter after training on every n-th row of the batch."""
    model = case.wrap_stirred().train()
    _train_on_own_rows(case, DistributedDataParallel(model))
    return distributed.get_world_size(), get_peft_model_state_dict(model)


def _train_fsdp(case: Case) -> tuple[int, State]:
    """Return world size and gathered trained tensors of a model that is sharded by block."""
    size = distributed.get_world_size()
    # FSDP2 works on the CPU with gloo
    mesh = init_device_mesh("cpu", (size,))
    model = case.wrap_stirred().train()
    # inner modules first, then the rest of the model
    for _, block in list(blocks(model)):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    unsharded = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    assert not unsharded, f"{unsharded} are not sharded"
    _train_on_own_rows(case, model)
    shards: dict[str, Any] = {**trainable(model)}
    return size, {name: shard.full_tensor().detach() for name, shard in shards.items()}


def _train_fsdp1(case: Case) -> tuple[int, State]:
    """Return world size and, by policy and name, the adapter's tensors after training."""
    state = {f"{p}: {n}": t for p in POLICIES for n, t in _train_by_policy(case, p).items()}
    return distributed.get_world_size(), state


def _train_by_policy(case: Case, policy: str) -> State:
    model = case.wrap_stirred().train()
    names = [*trainable(model)]
    sharded = POLICIES[policy](model)
    logits(sharded, _own_rows(case)[0])  # it is refused at the first forward pass
    _train_on_own_rows(case, sharded)
    state = full_state(sharded)
    return {name: state[name] for name in names}


def by_block(model: PeftModel) -> FullyShardedDataParallel:
    """Shard a model with FSDP1, each block by itself."""
    return _in_fsdp1(model, ModuleWrapPolicy({type(block) for _, block in blocks(model)}))


def by_peft(model: PeftModel) -> FullyShardedDataParallel:
    """Shard a model with FSDP1 by PEFT's policy: blocks, and each layer that trains."""
    return _in_fsdp1(model, fsdp_auto_wrap_policy(model))


def _in_fsdp1(model: PeftModel, policy: Callable[..., bool]) -> FullyShardedDataParallel:
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=cpu
    )


POLICIES = {"by block": by_block, "by PEFT's policy": by_peft}


def full_state(sharded: FullyShardedDataParallel) -> State:
    """Return the whole state dict of a model in FSDP1, in all processes."""
    with FullyShardedDataParallel.state_dict_type(sharded, StateDictType.FULL_STATE_DICT):
        return sharded.state_dict()


def _train_zero(case: Case) -> tuple[int, State]:
    """Return world size and, by stage of ZeRO and name, the adapter's tensors after training."""
    state = {f"{s}: {n}": t for s in ZERO_STAGES for n, t in _train_stage(case, s).items()}
    return distributed.get_world_size(), state


def _train_stage(case: Case, stage: int) -> State:
    # "no" mixed precision
    accelerator = make_accelerator(DeepSpeed("deepspeed", stage), "no")
    model = case.wrap_stirred().train()
    hooks = lifecycle(model)
    rows, weight = _own_rows(case)
    hooks.prepare([rows])
    optimizer = AdamW(trainable(model).values(), lr=LR, weight_decay=0.0, eps=EPS)
    engine = make_engine(model, optimizer, None, accelerator)
    for step in range(1, STEPS + 1):
        with engine.passes(last=True):
            engine.backward(engine.wrapped(**rows).loss * weight)
        engine.step()
        hooks.after_step(step, optimizer)
    trained = sum(tensor.numel() for tensor in trainable(model).values())
    size = sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.dim())
    max_size = 2 * (trained / distributed.get_world_size() + PADDING)  # AdamW has two moments
    assert size <= max_size, (
        f"the optimizer of a process holds {size} numbers of state: at most {max_size:.0f} are "
        "allowed if it is sharded"
    )
    engine.release()
    return get_peft_model_state_dict(model)


def _train_on_own_rows(case: Case, model: nn.Module) -> None:
    rows, weight = _own_rows(case)
    train(model, rows, steps=STEPS, lr=LR, micro=[(rows, weight)], eps=EPS)


def _own_rows(case: Case) -> tuple[Batch, float]:
    """Return this process's rows of the batch, and the weight of their loss.

    The weight is the fraction of the items, times the processes: gradients are averaged.
    """
    rank, size = distributed.get_rank(), distributed.get_world_size()
    batch = case.batch()
    rows = rows_of(batch, list(range(rank, len(batch["labels"]), size)))
    return rows, case.tiny.items(rows) * size / case.tiny.items(batch)
