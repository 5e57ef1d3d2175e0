"""Every method of petl on two processes of one gloo group: the adapter of one process.

The processes have unequal shares of the rows, and of the tokens in them. One pair of processes
serves all methods. Plain data parallelism is checked for each method in tests/test_contract.py too.
"""

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import petl
from petl import losses, testing
from petl.testing import Case, TinyModel, tiny_llama
from petl.testing.models import causal_batch
from petl.testing.training import rows_of, train

PROCESSES, ROWS, STEPS, LR = 2, 5, 3, 1e-3
LLAMA = TinyModel("llama", partial(tiny_llama, 2), causal_batch, "CAUSAL_LM", True, True)
TARGETS = {"target_modules": ["q_proj", "down_proj"]}
FIELDS: dict[str, dict[str, Any]] = {
    "adapter": {"r": 8},
    "binary": {"r": 4, "bneck_dropout": 0.0, "save_format": "latent"},
    "compacter": {"r": 8},
    "corda": {"r": 4, "lora_alpha": 4, **TARGETS},
    "increlora": {"orth_reg_weight": 1.0, **TARGETS},
    "mola": {"router_aux_loss_coef": 0.5, "num_experts": 4, **TARGETS},
    "mos": {"r": 3, "equivalent_rank": 3, **TARGETS},
    "sparse": {"selection_algorithm": "none", **TARGETS},
}
CASES = {
    name: Case(name, LLAMA, FIELDS.get(name, {}))
    for name in petl.list_methods()
    if petl.method(name).by == "petl"
}
CASES["lora"] = CASES["lora with density"] = Case("lora", LLAMA, {"r": 4, **TARGETS})
CASES["mola with checkpointing"] = CASES["mola"]
CASES["mola with a recurrent router"] = Case(
    "mola", LLAMA, {**FIELDS["mola"], "router_type": "recurrent"}
)
# Figures of each process's own rows, which are not the figures of all of them.
LOCAL = {"increlora": ".ema"}  # the score sums absolute values, so it does not add up


def wrapped(name: str) -> PeftModel:
    model = CASES[name].wrap_stirred().train()
    if "density" in name:
        losses.attach(model, losses.build_loss("density", eps=1e-2))
    if "checkpointing" in name:
        base: Any = model.get_base_model()
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def trained_on(model: nn.Module, inner: PeftModel, rank: int, processes: int) -> nn.Module:
    """`model`, after training on every n-th row; its terms count as in petl's loop."""
    batch = LLAMA.batch(ROWS)
    share = rows_of(batch, list(range(rank, ROWS, processes)))
    weight = LLAMA.items(share) * processes / LLAMA.items(batch)
    petl.lifecycle(inner).aux_weight = weight
    train(model, share, steps=STEPS, lr=LR, weight=weight)
    return model


@cache
def by_one_process(name: str) -> PeftModel:
    model = wrapped(name)
    trained_on(model, model, 0, 1)
    return model


# In each process


def train_all(folder: str) -> dict[str, dict[str, dict[str, Tensor]]]:
    """By kind of parallelism and case, the adapter; sharded ones are saved as well."""
    found: dict[str, dict[str, dict[str, Tensor]]] = {"ddp": {}, "fsdp": {}}
    rank = distributed.get_rank()
    for name in CASES:
        model = wrapped(name)
        trained_on(DistributedDataParallel(model), model, rank, PROCESSES)
        found["ddp"][name] = get_peft_model_state_dict(model)
        found["fsdp"][name] = train_sharded(name, rank, Path(folder))
    return found


def train_sharded(name: str, rank: int, folder: Path) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    model = wrapped(name)
    base: Any = model.get_base_model()
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    trained_on(model, model, rank, PROCESSES)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    tensors = get_model_state_dict(model, options=whole)  # gathered for the first process alone
    assert bool(tensors) == (rank == 0)
    if rank == 0:
        model.save_pretrained(str(folder / name), state_dict=tensors)
    return {n: p.full_tensor().detach() for n, p in testing.trainable(model).items()}


# Here


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folder of the saved adapters, and what each process found."""
    folder = tmp_path_factory.mktemp("sharded")
    return folder, testing.in_processes(PROCESSES, train_all, str(folder))


def assert_equal_to_one(ranks: list[dict[str, Tensor]], expected: dict[str, Tensor], name: str):
    assert all(rank.keys() == expected.keys() for rank in ranks)
    for key, tensor in expected.items():
        assert all(torch.equal(rank[key], ranks[0][key]) for rank in ranks), key
        if not key.endswith(LOCAL.get(name, "-")):
            torch.testing.assert_close(ranks[0][key], tensor, atol=LR / 10, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_data_parallel_training_equals_one_process(both, name):
    _, ranks = both
    expected = get_peft_model_state_dict(by_one_process(name))
    assert_equal_to_one([rank["ddp"][name] for rank in ranks], expected, name)


@pytest.mark.parametrize("name", CASES)
def test_fully_sharded_training_equals_one_process(both, name):
    _, ranks = both
    expected = {n: p.detach() for n, p in testing.trainable(by_one_process(name)).items()}
    assert_equal_to_one([rank["fsdp"][name] for rank in ranks], expected, name)


@pytest.mark.parametrize("name", CASES)
def test_a_sharded_adapter_is_saved_whole(both, name):
    folder, _ = both
    loaded = petl.load(CASES[name].base(), folder / name)
    batch = LLAMA.batch(ROWS)
    found, expected = (testing.logits(m, batch) for m in (loaded, by_one_process(name)))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_sparse_refuses_to_reselect_in_a_sharded_model():
    for said in testing.in_processes(PROCESSES, refused):
        assert "train with DDP, or use selection_algorithm='none'" in said


def refused() -> str:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    model = Case("sparse", LLAMA, {"total_step": 9, **TARGETS}).wrap_stirred().train()
    ours = {p for n, p in model.named_parameters() if n.endswith(".values")}
    fully_shard(model, mesh=mesh, ignored_params=ours)  # nothing averages their gradients
    with pytest.raises(petl.InputError) as error:
        train(model, LLAMA.batch(), steps=3, lr=LR)
    return str(error.value)
