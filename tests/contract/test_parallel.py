"""Every method of petl on two processes of one gloo group: the adapter of one process.

The processes have unequal shares of the rows, and of the tokens in them. One pair of processes
serves all methods. Plain data parallelism is checked for each method in
tests/contract/test_contract.py too.
"""

import logging
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import adaptable, models_of
from kept_processes import in_processes
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import petl
from petl import testing
from petl.core.model.structure import blocks
from petl.core.registry import refusal
from petl.core.support import Capability
from petl.methods import losses
from petl.system.collectives import to_full
from petl.testing import Case, TinyModel, tiny_llama
from petl.testing.models import Batch, causal_batch
from petl.testing.parallel import by_peft, full_state
from petl.testing.training import rows_of, train

PROCESSES, ROWS, LR = 2, 5, 1e-3
LLAMA = TinyModel("llama", partial(tiny_llama, 2), causal_batch, "CAUSAL_LM", True, True)
TARGETS = {"target_modules": ["q_proj", "down_proj"]}
GROWTH = {"rank_step": 1, "top_h": 2, "tinit": 0, "deltaT": 1}  # of two modules in every step
FIELDS: dict[str, dict[str, Any]] = {
    "adapter": {"r": 8},
    "binary": {"r": 4, "bneck_dropout": 0.0, "save_format": "latent"},
    "compacter": {"r": 8},
    "corda": {"r": 4, "lora_alpha": 4, **TARGETS},
    "icv": {"train": True, "pairs": None, "scale": "plain", "keep_norm": False, "strength": 1.0},
    "dkvb": {"codebooks": 8, "pairs": 8, "key_dim": 4},
    "increlora": {"orth_reg_weight": 1.0, "target_r": 3, "max_r": 4, **GROWTH, **TARGETS},
    "mola": {"router_aux_loss_coef": 0.5, "num_experts": 4, **TARGETS},
    "mos": {"r": 3, "equivalent_rank": 3, **TARGETS},
    "pela": {"compression": 1.2, **TARGETS},
    "pyra": {"schedule": [2, 0]},
    "polyhistor": {"r": 8, "tasks": ["only"]},
    "sparse": {"selection_algorithm": "none", **TARGETS},
    "vl_pet": {"r": 8},
}
# methods that change something after the second step
IN_THREE_STEPS = ("dsee", "increlora", "pst", "sparse")
# exchanged are entries after the first step and after the third
CYCLE = {"total_step": 9, "reselection_steps": 2, "selection_accumulation_steps": 1, **TARGETS}
CASES = {
    name: Case(
        name, LLAMA if name in adaptable("llama") else models_of(name)[0], FIELDS.get(name, {})
    )
    for name in petl.list_methods()
    if petl.method(name).by == "petl"
}
CASES["lora"] = CASES["lora with density"] = Case("lora", LLAMA, {"r": 4, **TARGETS})
CASES["lora with distill"] = CASES["lora"]
CASES["lora on experts"] = Case("lora", "qwen3_moe", {"r": 4, "target_modules": "block-linear"})
CASES["adapter beside blocks"] = Case(
    "adapter", LLAMA, {"r": 8, "locations": ["block"], "placement": "parallel"}
)
CASES["mola with checkpointing"] = CASES["mola"]
CASES["mola with a recurrent router"] = Case(
    "mola", LLAMA, {**FIELDS["mola"], "router_type": "recurrent"}
)
CASES["mola with a pregated router"] = Case(
    "mola",
    LLAMA,
    {**FIELDS["mola"], "router_type": "pregated", "router_hidden_size": 8, "router_lookahead": 1},
)
CASES["pst with saved masks"] = Case("pst", LLAMA, {"save_mask": True, **TARGETS})
CASES["dsee that prunes"] = Case(
    "dsee",
    LLAMA,
    {
        "r": 4,
        "num_sparse": 16,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "prune_modules": ["o_proj", "down_proj"],
        "prune_ratio": 0.3,
        "target_prune_ratio": 0.2,
        "prune_heads": 2,
        "prune_step": 2,  # of three
    },
)
CASES["pyra beside lora"] = Case(
    "pyra",
    "vit",
    {"schedule": [2, 0], "inner": "lora", "r": 4, "target_modules": ["q_proj", "fc2"]},
)
# each process has rows of one of the two tasks
CASES["polyhistor with two tasks"] = Case(
    "polyhistor",
    replace(LLAMA, make_batch=lambda rows, seed: of_two_tasks(causal_batch(rows, seed))),
    {"r": 8, "tasks": ["a", "b"]},
)
CASES["vl_pet with a gate of rows"] = Case("vl_pet", "t5", {"r": 8, "gate": "small"})
CASES["sparse that reselects"] = Case("sparse", LLAMA, CYCLE)
CASES["sparse by sm3"] = Case("sparse", LLAMA, {"selection_algorithm": "sm3", **CYCLE})
# Of other kinds of models, which are sharded only.
ALL = {"increlora": {"top_h": 99}}  # modules grow at once
OTHERS = {
    f"{name} on {kind}": Case(
        name, kind, {**FIELDS[name], "target_modules": "block-linear", **ALL.get(name, {})}
    )
    for kind in ("bert", "t5", "vit")
    for name in ("corda", "increlora", "mola")
}
# a side network in each stack, and one in an encoder
OTHERS |= {f"sherl on {kind}": Case("sherl", kind) for kind in ("bert", "t5")}
# the cases that are sharded in the default run, too
FEW = ["lora", "mola", "mos", "adapter", "increlora", "sparse that reselects", "pyra beside lora"]


def of_two_tasks(batch: Batch) -> Batch:
    return {**batch, "task_ids": torch.arange(len(batch["labels"])) % 2}


# Candidates come from the rows of the first process, so all processes need the same rows; a mean
# over the positions of each process, padding included, is that of all for equal rows only.
SAME_ROWS = {"sparse that reselects", "lora with distill"}
# A statistic of each process's own rows, which differs from that of all rows.
LOCAL = ".ema"  # of IncreLoRA: the score sums absolute values, so it does not add up
COUNTS = ".uses"  # of DKVB: how often a process's rows have picked a key


def wrapped(name: str) -> PeftModel:
    model = (CASES | OTHERS)[name].wrap_stirred().train()
    if "density" in name:
        losses.attach(model, losses.build_loss("density", eps=1e-2))
    if "distill" in name:
        losses.attach(model, losses.build_loss("distill", feature_weight=30.0, logit_weight=1.0))
    if "checkpointing" in name:
        base: Any = model.get_base_model()
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def trained_on(
    name: str, model: nn.Module, inner: PeftModel, rank: int, processes: int
) -> nn.Module:
    """Train `model` on every n-th row, with auxiliary terms as in petl's loop, and return it."""
    tiny = (CASES | OTHERS)[name].tiny
    batch = tiny.batch(ROWS)
    share, weight = batch, 1.0
    if name not in SAME_ROWS:
        share = rows_of(batch, list(range(rank, ROWS, processes)))
        weight = tiny.items(share) * processes / tiny.items(batch)
    petl.lifecycle(inner).aux_weight = weight
    steps = 3 if name.startswith(IN_THREE_STEPS) else 2
    train(model, share, steps=steps, lr=LR, micro=[(share, weight)])
    return model


@cache
def by_one_process(name: str) -> PeftModel:
    model = wrapped(name)
    trained_on(name, model, model, 0, 1)
    return model


# In each process


def train_all(folder: str) -> dict[str, Any]:
    """Return the adapters by type of parallelism and case; sharded ones are also saved."""
    found: dict[str, Any] = {"ddp": {}, "refused": refused()}
    rank = distributed.get_rank()
    for name in CASES:
        model = wrapped(name)
        trained_on(name, DistributedDataParallel(model), model, rank, PROCESSES)
        found["ddp"][name] = get_peft_model_state_dict(model)
    found["fsdp"] = train_all_sharded(FEW, folder)
    return found


def train_all_sharded(names: list[str], folder: str) -> dict[str, dict[str, Tensor]]:
    return {name: train_sharded(name, distributed.get_rank(), Path(folder)) for name in names}


def train_sharded(name: str, rank: int, folder: Path) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    model = wrapped(name)
    for _, block in list(blocks(model)):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    trained_on(name, model, model, rank, PROCESSES)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    tensors = get_model_state_dict(model, options=whole)  # gathered for the first process alone
    assert bool(tensors) == (rank == 0)
    if rank == 0:
        model.save_pretrained(str(folder / name), state_dict=tensors)
    return values(model)


def train_all_in_fsdp1(folder: str) -> dict[str, dict[str, Any]]:
    """Return tensors, or why it is refused, of each case in FSDP1; rank 0 saves the adapters."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("petl").addHandler(handler)
    found: dict[str, Any] = {name: train_in_fsdp1(name, Path(folder)) for name in CASES | OTHERS}
    return {**found, "messages": messages}


def train_in_fsdp1(name: str, folder: Path) -> dict[str, Tensor] | str:
    rank, model = distributed.get_rank(), wrapped(name)
    names, sharded = [*values(model)], by_peft(model)
    try:
        testing.logits(sharded, (CASES | OTHERS)[name].tiny.batch(ROWS))
    except petl.InputError as error:
        return str(error)
    trained_on(name, sharded, model, rank, PROCESSES)
    tensors = full_state(sharded)
    if rank == 0:
        model.save_pretrained(str(folder / name), state_dict=tensors)
    return {key: tensors[key] for key in names if key in tensors}  # some buffers are not saved


def values(model: nn.Module) -> dict[str, Tensor]:
    """Return all tensors that training may change, gathered."""
    tensors = {**testing.trainable(model), **dict(model.named_buffers())}
    return {name: to_full(tensor).detach() for name, tensor in tensors.items()}


# Here


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Return the folder of the saved adapters, and the results of each process."""
    folder = tmp_path_factory.mktemp("sharded")
    return folder, in_processes(PROCESSES, train_all, str(folder))


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Return the same of the other cases, which are sharded only."""
    folder = tmp_path_factory.mktemp("others")
    names = [name for name in CASES | OTHERS if name not in FEW]
    found = in_processes(PROCESSES, train_all_sharded, names, str(folder))
    return folder, [{"fsdp": each} for each in found]


@pytest.fixture(scope="module")
def in_fsdp1(tmp_path_factory):
    """Return the same of all cases in FSDP1."""
    folder = tmp_path_factory.mktemp("fsdp1")
    return folder, in_processes(PROCESSES, train_all_in_fsdp1, str(folder))


@pytest.fixture
def sharded(request, name):
    return request.getfixturevalue("both" if name in FEW else "others")


SHARDED = [
    name if name in FEW else pytest.param(name, marks=pytest.mark.thorough)
    for name in CASES | OTHERS
]


def assert_equal_to_one(ranks: list[dict[str, Tensor]], expected: dict[str, Tensor]):
    assert all(rank.keys() == expected.keys() for rank in ranks)
    for key, tensor in expected.items():
        if key.endswith(COUNTS):
            continue
        assert all(torch.equal(rank[key], ranks[0][key]) for rank in ranks), key
        if not key.endswith(LOCAL):
            torch.testing.assert_close(ranks[0][key], tensor, atol=LR / 10, rtol=0)


@pytest.mark.cells(11)
@pytest.mark.parametrize("name", CASES)
def test_data_parallel_training_equals_one_process(both, name):
    _, ranks = both
    expected = get_peft_model_state_dict(by_one_process(name))
    assert_equal_to_one([rank["ddp"][name] for rank in ranks], expected)


@pytest.mark.parametrize("name", SHARDED)
def test_fully_sharded_training_equals_one_process(sharded, name):
    _, ranks = sharded
    expected = values(by_one_process(name))
    assert_equal_to_one([rank["fsdp"][name] for rank in ranks], expected)


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_adapter_is_saved_gathered(sharded, name):
    folder, _ = sharded
    case = (CASES | OTHERS)[name]
    loaded = petl.load(case.base(), folder / name)
    batch = case.batch(ROWS)
    found, expected = (testing.logits(m, batch) for m in (loaded, by_one_process(name)))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def is_refused_in_fsdp1(case: Case) -> bool:
    on_experts = case.method == "lora" and case.tiny.name == "qwen3_moe"  # known once it is wrapped
    return on_experts or bool(refusal(case.config(), Capability.FSDP1))


REFUSED_IN_FSDP1 = [name for name, case in (CASES | OTHERS).items() if is_refused_in_fsdp1(case)]
TRAINED_IN_FSDP1 = [name for name in CASES | OTHERS if name not in REFUSED_IN_FSDP1]


@pytest.mark.thorough
@pytest.mark.parametrize("name", TRAINED_IN_FSDP1)
def test_training_in_fsdp1_equals_one_process_and_is_saved(in_fsdp1, name):
    folder, ranks = in_fsdp1
    tensors = [rank[name] for rank in ranks]
    expected = {k: t for k, t in values(by_one_process(name)).items() if k in tensors[0]}
    assert expected.keys() >= testing.trainable(by_one_process(name)).keys()
    assert_equal_to_one(tensors, expected)
    test_a_sharded_adapter_is_saved_gathered((folder, ranks), name)


@pytest.mark.thorough
@pytest.mark.parametrize("name", REFUSED_IN_FSDP1)
def test_fsdp1_is_refused_with_the_reason_of_the_table(in_fsdp1, name):
    config = wrapped(name).peft_config["default"]
    reason = refusal(config, Capability.FSDP1)
    assert reason
    assert all(reason in rank[name] for rank in in_fsdp1[1])


@pytest.mark.thorough
def test_parts_that_are_empty_in_a_process_do_not_count_as_untrained(in_fsdp1):
    assert not any("got no gradient" in each for rank in in_fsdp1[1] for each in rank["messages"])


def test_sparse_refuses_to_reselect_parameters_ignored_by_sharding(both):
    _, ranks = both
    assert all("let FSDP2 shard them" in rank["refused"] for rank in ranks)


def refused() -> str:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    model = Case("sparse", LLAMA, {"total_step": 9, **TARGETS}).wrap_stirred().train()
    ours = {p for n, p in model.named_parameters() if n.endswith(".values")}
    fully_shard(model, mesh=mesh, ignored_params=ours)  # nothing averages their gradients
    with pytest.raises(petl.InputError) as error:
        train(model, LLAMA.batch(), steps=3, lr=LR)
    return str(error.value)
