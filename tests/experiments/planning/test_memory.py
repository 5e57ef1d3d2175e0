"""The plan of weights that are quantized or sharded equals what is really stored."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from kept_processes import in_processes
from peft import PeftModel
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import petl
from petl import testing
from petl.core.model.structure import blocks
from petl.data.base import read_data
from petl.data.models.loading import load_base
from petl.data.models.sources import PACKAGES
from petl.errors import InputError
from petl.experiments.planning.memory import Storage, weight_bytes
from petl.experiments.planning.plan import plan_run
from petl.system.collectives import to_local
from petl.training.compose import compose
from petl.training.runs.config import method_fields

pytest_plugins = ["training_fixtures"]
LACKING = any(find_spec(package) is None for package in PACKAGES.values())
installed = pytest.mark.skipif(LACKING, reason="pip install 'petl-peft[quantized]'")
SHARDED = "+launch=fsdp"


def loaded(overrides: list[str]) -> PeftModel:
    """The model of a run, really there."""
    cfg = compose(overrides)
    task = read_data(cfg.data).task
    fields = method_fields(cfg.method, task.peft_task_type, total_steps=4)
    return petl.wrap(load_base(cfg.model, task), **fields)


def parts(tensor: Any) -> list[Tensor]:
    """The plain tensors that a weight consists of, those that are about its scales included."""
    if hasattr(tensor, "__tensor_flatten__"):
        return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    found, state = [tensor.data], getattr(tensor, "quant_state", None)
    while state is not None:
        found += [value for value in vars(state).values() if isinstance(value, Tensor)]
        state = state.state2
    scales = getattr(tensor, "SCB", None)
    return found if scales is None else [*found, scales]


def bytes_of(model: PeftModel) -> int:
    tensors = [part for t in (*model.parameters(), *model.buffers()) for part in parts(t)]
    return sum(t.nbytes for t in {t.data_ptr(): t for t in tensors}.values())


@installed
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", PACKAGES)
@pytest.mark.parametrize("task", ["steady", "complete"])
def test_quantized_weights_take_the_planned_bytes(tiny, task, kind, dtype):
    common = [*getattr(tiny, task), "+method=lora", f"model.dtype={dtype}"]
    quantized = [*common, f"model.quantization={kind}"]
    planned = plan_run(compose(quantized)).memory
    dense = plan_run(compose(common)).memory
    assert planned.weights == pytest.approx(bytes_of(loaded(quantized)), rel=0.02)
    assert planned.weights < 0.9 * dense.weights
    assert planned.unfolded == 32 * 48 * torch.tensor([], dtype=getattr(torch, dtype)).itemsize
    assert dense.unfolded == 0


@pytest.mark.thorough
def test_one_process_has_a_shard_of_the_planned_size(tiny):
    common = [*tiny.steady, "+method=lora"]
    planned = plan_run(compose([*common, SHARDED])).memory
    first, second = in_processes(2, bytes_of_share, common)
    assert planned.weights == max(first, second)
    whole = plan_run(compose(common)).memory
    assert planned.weights < 0.6 * whole.weights
    assert planned.optimizer < 0.6 * whole.optimizer


def bytes_of_share(overrides: list[str]) -> int:
    model = loaded(overrides)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for _, block in list(blocks(model)):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return sum(to_local(t).nbytes for t in (*model.parameters(), *model.buffers()))


def test_two_blocks_and_the_outer_parameters_are_gathered_together():
    model = testing.Case("lora", "llama", {"r": 4}).wrap()  # of three blocks
    llama = model.get_base_model().model
    apart = [*llama.layers[0].parameters(), llama.embed_tokens.weight]  # smaller than a block
    every, away = (sum(p.nbytes for p in some) for some in (model.parameters(), apart))
    kept, unfolded = weight_bytes(model, Storage(processes=2, sharded=True))
    assert unfolded == every - away
    assert kept == pytest.approx(every / 2, rel=0.01)
    stays = Storage(processes=2, sharded=True, reshards=False)
    assert weight_bytes(model, stays) == (kept, every)


@pytest.mark.thorough
def test_each_process_has_its_part_of_the_examples(tiny, monkeypatch):
    common = [*tiny.steady, "+method=lora", "train.batch_size=8"]
    alone = plan_run(compose(common))
    monkeypatch.setenv("WORLD_SIZE", "4")
    ddp, fsdp = (plan_run(compose([*common, *more])) for more in ([], [SHARDED]))
    assert (alone.memory.rows, ddp.memory.rows, fsdp.memory.rows) == (8, 2, 2)
    assert ddp.memory.weights == alone.memory.weights
    assert fsdp.memory.weights < 0.3 * alone.memory.weights
    assert any("one process of 4" in note for note in fsdp.notes)
    assert not any("processes" in note for note in alone.notes)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["+method=adalora", "train.steps=2000"], "launch it with ddp"),
        (["+method=lora", "method.init_lora_weights=pissa"], "unsharded, unquantized"),
    ],
)
def test_methods_that_cannot_be_sharded_are_not_planned(tiny, more, said):
    with pytest.raises(InputError, match=f"launch=fsdp is not possible with method .*{said}"):
        plan_run(compose([*tiny.steady, *more, SHARDED]))
