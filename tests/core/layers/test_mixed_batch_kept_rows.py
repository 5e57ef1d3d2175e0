"""Stacked weights are kept between calls of `generate`, and are right after every change."""

import copy
import pickle

import pytest
import torch
from peft.utils.hotswap import hotswap_adapter

import petl
from petl import testing

NAMES = ["default", "b", "c", "b"]
METHODS = {
    "lora": {"target_modules": "all-linear"},
    "mos": {"r": 3, "equivalent_rank": 2},
    "mola": {"r": 2, "num_experts": 4},
    "adapter": {},
}


def model_of(method: str):
    model = petl.wrap(testing.tiny_llama(2), method, task_type="CAUSAL_LM", **METHODS[method])
    for name in ("b", "c"):
        model.add_adapter(name, copy.deepcopy(model.peft_config["default"]))
    petl.fuse_lora(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # updates that are not zero, of each adapter
        for name, parameter in model.named_parameters():
            if any(f".{each}" in name for each in ("default", "b", "c")):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def generated(model, names=NAMES) -> torch.Tensor:
    """Logits of four tokens after a prompt of five, by row."""
    ids = torch.randint(3, 60, (len(names), 5), generator=torch.Generator().manual_seed(0))
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        adapter_names=names,
        max_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    return torch.stack(found.logits, 1)


def one_by_one(model, names=NAMES) -> torch.Tensor:
    """The same, each row with its adapter for the whole batch."""
    found = []
    for row, name in enumerate(names):
        found.append(generated(model, [name] * len(names))[row])
    return torch.stack(found)


@pytest.mark.parametrize("method", METHODS)
def test_the_second_call_stacks_nothing_and_changes_are_seen(method):
    model = model_of(method)
    first = generated(model)
    rows = model.base_model.kept_rows.rows
    assert rows == NAMES
    kept = dict(rows._cache)
    assert kept
    torch.testing.assert_close(generated(model), first, atol=0, rtol=0)
    assert model.base_model.kept_rows.rows is rows
    assert all(
        rows._cache[layer].prepared.batched is kept[layer].prepared.batched for layer in kept
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".b." in name or name.endswith(".b"):
                parameter.mul_(-2)
    changed = generated(model)
    assert model.base_model.kept_rows.rows is not rows
    assert not torch.allclose(changed[1], first[1], atol=1e-3)
    torch.testing.assert_close(changed[[0, 2]], first[[0, 2]])
    torch.testing.assert_close(changed, one_by_one(model), atol=1e-4, rtol=1e-4)


def test_other_rows_scales_and_modes_forget_what_is_kept():
    model = model_of("lora")
    kept = model.base_model.kept_rows
    generated(model)
    rows = kept.rows
    other = generated(model, NAMES[::-1])
    assert kept.rows == NAMES[::-1]
    assert kept.rows is not rows
    torch.testing.assert_close(other, one_by_one(model, NAMES[::-1]), atol=1e-4, rtol=1e-4)
    generated(model, NAMES[::-1])  # kept again: the scale is all that changes until the next call
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling["b"] *= -3
    scaled = generated(model, NAMES[::-1])
    assert not torch.allclose(scaled[0], other[0], atol=1e-3)
    torch.testing.assert_close(scaled, one_by_one(model, NAMES[::-1]), atol=1e-4, rtol=1e-4)
    model.train()
    assert kept.rows is None
    model.eval()
    generated(model)
    model.delete_adapter("c")
    assert kept.rows is None


def test_a_hotswapped_adapter_is_seen(tmp_path):
    model, other = model_of("lora"), model_of("lora")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-2)  # its adapters alone are saved
    other.save_pretrained(tmp_path, selected_adapters=["b"])
    generated(model)
    hotswap_adapter(model, str(tmp_path / "b"), "b")
    torch.testing.assert_close(generated(model), one_by_one(model), atol=1e-4, rtol=1e-4)


def test_nothing_is_kept_of_a_forward_pass_nor_in_copies():
    model = model_of("lora")
    ids = torch.randint(3, 60, (4, 5))
    with torch.no_grad():
        model(input_ids=ids, adapter_names=NAMES)
    assert model.base_model.kept_rows.rows is None
    generated(model)
    assert copy.deepcopy(model).base_model.kept_rows.rows is None
    assert pickle.loads(pickle.dumps(model.base_model.kept_rows)).rows is None


def test_tensors_that_do_not_count_writes_are_not_kept():
    model = model_of("lora")
    with torch.inference_mode():
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.lora_A["b"].weight = torch.nn.Parameter(
                    module.lora_A["b"].weight.clone(), requires_grad=False
                )
    found = generated(model)
    assert model.base_model.kept_rows.rows is None
    torch.testing.assert_close(found, one_by_one(model), atol=1e-4, rtol=1e-4)
