"""Calibration of CorDA's covariances: padding, masks, batches, calibration passes."""

import logging
from typing import Any

import pytest
import torch
from corda_fixtures import TARGETS, batches, layers, moments, update, wrap
from torch import Tensor, nn

from petl.errors import InputError
from petl.methods.corda.covariance import Covariance, collect, scaled
from petl.system import collectives
from petl.testing import tiny_llama, tiny_t5
from petl.testing.models import causal_batch, pair_batch


def test_padded_rows_count_like_unpadded_samples():
    # more tokens than inputs of a layer: the inverse of a covariance of low rank amplifies rounding
    ids = torch.randint(3, 96, (16, 12))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    padded = [{"input_ids": ids * mask, "attention_mask": mask}]
    singles = [{"input_ids": row[kept > 0][None]} for row, kept in zip(ids, mask, strict=True)]
    one, other = layers(wrap(calibration=padded)), layers(wrap(calibration=singles))
    for key, layer in one.items():
        gap = (update(layer) - update(other[key])).abs().max()
        assert gap <= 1e-3 * update(layer).abs().max()


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_size_and_side_of_padding_do_not_matter(side):
    rows = [torch.randint(3, 96, (length,)) for length in (12, 7, 9, 4)]
    longest = max(len(ids) for ids in rows) + 3  # positions where all rows are padding, too
    padded = []
    for ids in rows:
        empty = torch.zeros(longest - len(ids), dtype=ids.dtype)
        padded.append(torch.cat([empty, ids] if side == "left" else [ids, empty]))
    one_batch = {"input_ids": torch.stack(padded), "attention_mask": torch.stack(padded).ne(0)}
    singles = collected([{"input_ids": ids[None]} for ids in rows])
    for key, covariance in collected([one_batch]).items():  # positions are relative in a Llama
        expected = singles[key].matrix
        torch.testing.assert_close(covariance.matrix, expected, rtol=1e-4, atol=1e-5)
        assert covariance.samples == singles[key].samples == 4
        assert int(covariance.tokens) == int(singles[key].tokens) == 32


def test_a_mask_is_used_however_it_is_passed():
    batch = causal_batch(4, 0)
    model: Any = tiny_llama(2)
    key = "model.layers.1.mlp.down_proj"
    layer = {key: model.get_submodule(key)}
    settings = {"norm": "signed_max", "dtype": torch.float32}
    runs = (
        lambda: model(batch["input_ids"], attention_mask=batch["attention_mask"]),
        lambda: model(batch["input_ids"], batch["attention_mask"]),
    )
    named, placed = (collect(model, layer, run, **settings)[key][0] for run in runs)
    assert torch.equal(named.matrix, placed.matrix)
    assert int(named.tokens) == int(batch["attention_mask"].sum())


class EverySecond(nn.Module):
    """A network that passes half of the rows to one layer and a summary to another."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.pooler = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.second(x[:, ::2]).sum(1) + self.pooler(x[:, 0])


def test_layers_whose_padding_is_unknown_are_logged(caplog):
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    x, all_ones = torch.randn(2, 4, 8), torch.ones_like(mask)
    fields = {"target_modules": ["second", "pooler"], "r": 2}
    wrap(EverySecond(), [{"x": x, "attention_mask": all_ones}], **fields)
    assert "padding counts" not in caplog.text
    wrap(EverySecond(), [{"x": x, "attention_mask": mask}], **fields)
    assert "1 layers, such as second, have inputs with another number of rows" in caplog.text


def test_products_are_in_float32_under_autocast():
    base: Any = tiny_llama(2).bfloat16()

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            for batch in batches():
                base(**batch)

    key = "model.layers.0.self_attn.q_proj"
    settings = {"norm": "signed_max", "dtype": torch.float32}
    found = collect(base, {key: base.get_submodule(key)}, run, **settings)[key][0].matrix
    expected = moments(base, batches(), "signed_max")[key]
    gap = (found.double() - expected).abs().max()
    assert gap <= 1e-5 * expected.abs().max()  # bfloat16 would be off by 1e-3


def collected(data: list[dict[str, Tensor]], **options: Any) -> dict[str, Covariance]:
    model: Any = tiny_llama(2)
    keys = {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in TARGETS}

    def run() -> None:
        for batch in data:
            model(**batch)

    settings = {"norm": "signed_max", "dtype": torch.float32, **options}
    return {key: found[0] for key, found in collect(model, keys, run, **settings).items()}


def test_encoder_and_decoder_layers_use_their_own_masks():
    model: Any = tiny_t5()
    batch = pair_batch(4, 0)
    names = {
        "encoder": "encoder.block.0.layer.0.SelfAttention.q",
        "decoder": "decoder.block.0.layer.0.SelfAttention.q",
        "cross": "decoder.block.0.layer.1.EncDecAttention.k",
    }
    keys = {name: model.get_submodule(path) for name, path in names.items()}
    found = collect(model, keys, lambda: model(**batch), norm="none", dtype=torch.float32)
    source, target = batch["attention_mask"].sum(), (batch["labels"] != -100).sum()
    assert source != target
    tokens = {name: int(covariances[0].tokens) for name, covariances in found.items()}
    assert tokens == {"encoder": source, "decoder": target, "cross": source}


def test_samples_of_two_processes_are_numbered_in_turn_and_averaged(monkeypatch):
    monkeypatch.setattr(collectives, "num_processes", lambda: 2)
    monkeypatch.setattr(collectives, "number", lambda: 1)
    monkeypatch.setattr(collectives, "summed", lambda tensor: 2 * tensor)  # the other has the same
    model: Any = tiny_llama(1)
    keys = {"q": model.model.layers[0].self_attn.q_proj}
    settings = {"norm": "none", "dtype": torch.float32, "rounds": 4}
    (found,) = collect(model, keys, lambda: model(**causal_batch(5, seed=0)), **settings).values()
    assert [each.samples for each in found] == [0, 3, 0, 2]  # samples 1, 3, 5, 7 and 9
    merged = found[1].over_processes()
    assert (merged.samples, int(merged.tokens)) == (6, 2 * int(found[1].tokens))
    torch.testing.assert_close(merged.matrix, found[1].matrix)


def test_samples_whose_maximum_is_zero_or_negative_are_scaled_by_the_largest_magnitude():
    x = torch.tensor([[[-4.0, -2.0]], [[-4.0, 0.0]], [[0.0, 0.0]], [[2.0, -8.0]]])
    found = scaled(x, None, "signed_max")
    assert found[:, 0].tolist() == [[-2.0, -1.0], [-1.0, 0.0], [0.0, 0.0], [1.0, -4.0]]
    found = scaled(x, None, "abs_max")
    assert found[:, 0].tolist() == [[-1.0, -0.5], [-1.0, 0.0], [0.0, 0.0], [0.25, -1.0]]
    masked = scaled(torch.tensor([[[9.0], [2.0]]]), torch.tensor([[0, 1]]), "signed_max")
    assert masked.flatten().tolist() == [0.0, 1.0]


def test_a_memory_bound_gives_equal_covariances_in_more_passes():
    base = tiny_llama(2)
    passes = []
    base.register_forward_pre_hook(lambda module, args: passes.append(1))
    bound = 96 * 96 * 4
    grouped = layers(wrap(base, max_covariance_bytes=bound))
    # 4 covariances of 64 x 64 or 96 x 96 in each of 2 blocks, of which no two of 96 fit
    assert len(passes) > 3 * len(batches())
    for key, layer in layers(wrap()).items():
        assert torch.equal(layer.lora_A["default"].weight, grouped[key].lora_A["default"].weight)
        assert torch.equal(layer.base_layer.weight, grouped[key].base_layer.weight)


def test_layers_that_read_one_tensor_share_a_covariance(monkeypatch):
    counted = []
    add = Covariance.add
    monkeypatch.setattr(Covariance, "add", lambda *args: (counted.append(1), add(*args))[1])
    wrap(calibration=batches(1))
    assert len(counted) == 2 * 4  # qkv, o, gate and up, down


@pytest.mark.parametrize("kind", ["generator", "function", "batches"])
def test_calibration_may_be_an_iterator_a_list_or_a_function(kind):
    base: Any = tiny_llama(2)

    def run() -> None:
        for batch in batches():
            base(**batch)

    given = {"generator": iter(batches()), "function": run, "batches": batches()}[kind]
    found = layers(wrap(base, calibration=given))
    for key, layer in layers(wrap()).items():
        torch.testing.assert_close(update(layer), update(found[key]), rtol=1e-4, atol=1e-6)


def test_collecting_does_not_change_the_model():
    base: Any = tiny_llama(2)
    base.config.use_cache = True
    base.train()
    base.model.layers[1].eval()
    modes = {n: m.training for n, m in base.named_modules()}
    norm = base.model.layers[1].input_layernorm.weight.data
    norm[0] = torch.nan
    with pytest.raises(InputError):
        wrap(base)
    assert {n: m.training for n, m in base.named_modules()} == modes
    assert base.config.use_cache
    for module in base.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    norm[0] = 1.0
    before = set(base.state_dict())
    model = wrap(base)
    for module in model.get_base_model().model.modules():  # the tuner's context is at the root
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not hasattr(module, "eigens")
        assert not hasattr(module, "covariance_matrix")
    after = {k.replace("base_layer.", "") for k in model.get_base_model().state_dict()}
    assert {k for k in after if "lora_" not in k} == before
    for name, module in model.get_base_model().named_modules():
        if name in modes and name not in layers(model):
            assert module.training == modes[name], name


def test_too_few_tokens_warn_once(caplog):
    wrap(calibration=batches(1))
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert (
        "mlp.down_proj had 10 tokens of calibration data and inputs of width 96"
        in warnings[0].getMessage()
    )
    caplog.clear()
    wrap(calibration=batches(12))
    assert not caplog.records
