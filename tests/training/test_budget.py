"""`train.budget` chooses the largest size that it leaves room for."""

from typing import Any

import pytest
import torch
from training_fixtures import Tiny, llama_config, train
from transformers import LlamaForCausalLM

import petl
from petl.core.parameters import adapter_parameters, trainable
from petl.core.registry import without_data
from petl.experiments.planning.plan import plan_run
from petl.methods.increlora import growth_finished
from petl.system.settings.command_line import preset_of
from petl.training.budget import largest, resized, within_budget
from petl.training.compose import compose
from petl.training.runs.config import method_fields

pytest_plugins = ["training_fixtures"]

# in + out of q, k, v, o, gate, up, down: what a rank costs LoRA in one layer
LORA_RANK = 2 * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 48))
SIZED = (
    "lora",
    "mola",
    "increlora",
    "adapter",
    "compacter",
    "binary",
    "sparse",
    "corda",
    "dora",
    "dsee",
    "pst",
)


def base() -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(llama_config())


def fields(name: str) -> dict:
    return method_fields({"name": name, **preset_of(name)}, "CAUSAL_LM", total_steps=1000)


@pytest.mark.parametrize("budget", [9, 10, 137, 1000, 12345])
@pytest.mark.parametrize(
    "count",
    [
        lambda n: n,
        lambda n: 7 * n + 2,
        lambda n: 3 * n * n + n,
        lambda n: 5 * n if n <= 6 else None,  # the method refuses larger ones
        lambda n: None if n == 2 else 4 * n,  # and sometimes a small one
        lambda n: 100 * (n // 3) + n,
    ],
)
def test_the_largest_size_is_that_of_trying_all(count, budget):
    fits = [n for n in range(1, 20_000) if (found := count(n)) is not None and found <= budget]
    assert largest(count, budget) == max(fits)


@pytest.mark.cells(2)
@pytest.mark.parametrize("name", SIZED)
def test_the_budget_is_spent_but_for_less_than_a_rank(name):
    budget = 10 * LORA_RANK
    chosen = within_budget(fields(name), base, budget)
    used = adapter_parameters(petl.wrap(base(), **without_data(chosen)[0]))
    assert used <= budget
    size = next(chosen[key] for key in ("phm_rank", "target_r", "r") if chosen.get(key))
    above = resized(fields(name), size + 1)
    assert adapter_parameters(petl.wrap(base(), **without_data(above)[0])) > budget


@pytest.mark.parametrize("budget", [9, 50, 5000])
@pytest.mark.parametrize(
    "count", [lambda n: min(5 * n, 60), lambda n: 3 * min(n, 700), lambda n: 4 * min(n, 2)]
)
def test_of_sizes_with_equal_counts_the_smallest_is_taken(count, budget):
    tried: list[int] = []

    def counted(size):
        tried.append(size)
        return count(size)

    most = max(found for n in range(1, 20_000) if (found := count(n)) <= budget)
    assert largest(counted, budget) == next(n for n in range(1, 20_000) if count(n) == most)
    assert len(tried) < 60


@pytest.mark.cells(1)
@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_the_scaling_of_loha_and_lokr_stays(name):
    chosen = within_budget(fields(name), base, 5000)
    assert chosen["r"] < 32  # from half the width of a factor on, LoKr's is a full matrix
    before = fields(name)
    assert chosen["alpha"] / chosen["r"] == before["alpha"] / before["r"]


def test_reflections_of_hra_are_counted_in_pairs():
    pair = 2 * (6 * 32 + 48)  # a reflection has as many numbers as the input of its module
    chosen = within_budget(fields("hra"), base, 2 * 3 * pair + pair)  # two layers want 2 at once
    assert chosen["r"] == 6


def test_lora_gets_the_rank_of_the_count_by_hand_and_keeps_its_scaling():
    chosen = within_budget(fields("lora"), base, 5 * LORA_RANK + 1)
    assert chosen["r"] == 5
    assert chosen["lora_alpha"] / 5 == fields("lora")["lora_alpha"] / fields("lora")["r"]


def test_increlora_is_counted_by_the_ranks_that_it_will_have():
    model = petl.wrap(base(), **fields("increlora") | {"target_r": 5})
    # a component has a column, a row and a number of its own; 14 modules
    assert adapter_parameters(model) == 5 * (LORA_RANK + 14)
    assert sum(p.numel() for _, p in trainable(model)) > adapter_parameters(model)


def test_increlora_grows_up_to_the_budget_and_not_above_it():
    budget = 5 * LORA_RANK + 200
    chosen = within_budget(fields("increlora"), base, budget)
    assert (chosen["target_r"], chosen["parameter_budget"]) == (5, budget)
    model = petl.wrap(LlamaForCausalLM(llama_config()), **chosen)
    assert adapter_parameters(model) == budget  # what is planned: at most that
    tuner: Any = model.base_model
    for step in range(1000):
        tuner.update_and_allocate(step)
    assert growth_finished(model)
    smallest = min(sum(layer.shape) + 1 for layer in tuner.placed["default"].values())
    assert budget - smallest < adapter_parameters(model) <= budget


@pytest.mark.thorough
def test_a_trained_head_is_not_part_of_the_budget(tiny: Tiny):
    chosen = ["+method=lora", "train.budget=2000"]
    with_head = plan_run(compose([*tiny.steady, *chosen, "method.modules_to_save=null"]))
    adapter = sum(group.parameters for group in with_head.groups if group.role == "adapter")
    assert 1000 < adapter <= 2000
    assert any(group.role == "head" for group in with_head.groups)


@pytest.mark.thorough
def test_a_run_notes_the_parameters_of_its_adapter(tiny: Tiny, tmp_path):
    run = train([*tiny.steady, "+method=lora", "train.budget=2000"], tmp_path / "run")
    tensors = {k: t for k, t in run.adapter.items() if "lora_" in k}
    assert run.scores["adapter_parameters"] == sum(t.numel() for t in tensors.values()) <= 2000
