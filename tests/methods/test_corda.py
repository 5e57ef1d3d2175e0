"""CorDA's decomposition, calibration, caches, saving and refusals."""

import copy
import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig as PeftCordaConfig
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import petl
from petl.errors import InputError
from petl.methods.corda.covariance import Covariance, collect, scaled
from petl.testing import in_processes, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from petl.testing.models import causal_batch, class_batch, pair_batch

R = 4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def batches(count: int = 6, rows: int = 1) -> list[dict[str, Tensor]]:
    return [causal_batch(rows, seed=n) for n in range(count)]


def wrap(base: nn.Module | None = None, calibration: Any = None, **fields: Any) -> PeftModel:
    defaults = {"r": R, "lora_alpha": R, "target_modules": TARGETS}
    calibration = batches() if calibration is None else calibration
    base = tiny_llama(2) if base is None else base
    return petl.wrap(base, "corda", calibration=calibration, **{**defaults, **fields})


def layers(model: PeftModel) -> dict[str, Any]:
    tuner: Any = model.base_model
    return tuner.layers("default")


def update(layer: Any) -> Tensor:
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return (layer.scaling["default"] * B @ A).detach()


@torch.no_grad()
def stir(model: PeftModel) -> PeftModel:
    torch.manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def moments(base: nn.Module, data: list[dict[str, Tensor]], norm: str) -> dict[str, Tensor]:
    """Step 1 from captured inputs, sample by sample, in float64."""
    inputs: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_hook(
            lambda module, args, out, name=name: inputs.setdefault(name, []).append(args[0])
        )
        for name, module in base.named_modules()
        if name.rpartition(".")[2] in TARGETS
    ]
    with torch.no_grad():
        for batch in data:
            base.eval()(**batch)
    for handle in handles:
        handle.remove()
    found = {}
    for name, seen in inputs.items():
        total, count = 0, 0
        for x, batch in zip(seen, data, strict=True):
            for row, mask in zip(x, batch["attention_mask"], strict=True):
                X = row[mask.bool()].double()
                most = X.max().abs() if norm == "signed_max" else X.abs().max()
                X = X if norm == "none" else X / most
                total, count = total + X.t() @ X, count + 1
        found[name] = total / count
    return found


# The start


@pytest.mark.parametrize("norm", ["signed_max", "abs_max", "none"])
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("alpha", [R, 2 * R])
def test_start_is_that_of_the_equations(mode, alpha, norm):
    base = tiny_llama(2)
    model = wrap(corda_method=mode, lora_alpha=alpha, activation_norm=norm)
    scale = alpha / R
    for key, C in moments(base, batches(), norm).items():
        layer = layers(model)[key]
        W = base.get_submodule(key).weight.detach().double()
        C = C + 0.01 * C.diagonal().mean() * torch.eye(len(C), dtype=torch.float64)
        U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
        part = slice(0, R) if mode == "ipm" else slice(-R, None)
        expected = U[:, part] @ S[part].diag() @ (Vh[part] @ C.inverse())
        gap = (update(layer).double() - expected).abs().max()
        assert gap <= 2e-3 * expected.abs().max()
        B = layer.lora_B["default"].weight.double()
        torch.testing.assert_close(B.norm(dim=0), (S[part] / scale).sqrt(), rtol=2e-3, atol=0)
        values = torch.linalg.svdvals(update(layer).double() @ C)[:R]
        torch.testing.assert_close(values, S[part], rtol=2e-3, atol=1e-5 * float(S[0]))


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_split_weights_add_up_and_the_model_is_unchanged(mode):
    base, batch = tiny_llama(2), causal_batch(3, 50)
    model = wrap(corda_method=mode)
    for key, layer in layers(model).items():
        W = base.get_submodule(key).weight
        torch.testing.assert_close(layer.base_layer.weight + update(layer), W, rtol=0, atol=1e-5)
        assert not torch.equal(layer.base_layer.weight, W)
    found, expected = model.eval()(**batch).logits, base.eval()(**batch).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_peft_finds_the_same_start_where_it_can(mode):
    """PEFT takes one sample at a time and no padding; it divides by the number of samples."""
    reference = pytest.importorskip("peft.tuners.lora.corda", exc_type=ImportError)  # needs attrs
    data = [{"input_ids": torch.randint(3, 96, (1, 12))} for _ in range(6)]
    base: Any = tiny_llama(2)
    config = LoraConfig(
        r=R,
        lora_alpha=2 * R,
        target_modules=TARGETS,
        init_lora_weights="corda",
        corda_config=PeftCordaConfig(corda_method=mode),
    )

    def run() -> None:
        for batch in data:
            base(**batch)

    reference.preprocess_corda(base, config, run_model=run)
    theirs: Any = get_peft_model(base, config)
    ours = layers(wrap(calibration=data, corda_method=mode, lora_alpha=2 * R))
    for key, layer in ours.items():
        other = theirs.get_base_model().get_submodule(key)
        torch.testing.assert_close(update(layer), update(other), rtol=0, atol=2e-5)
        torch.testing.assert_close(
            layer.base_layer.weight, other.base_layer.weight, rtol=0, atol=2e-5
        )


def test_conv1d_layers_are_decomposed_as_they_compute():
    base, batch = tiny_gpt2(), causal_batch(3, 50)
    targets = ["c_attn", "c_fc", "c_proj"]
    model = wrap(tiny_gpt2(), target_modules=targets, r=3)
    found, expected = model.eval()(**batch).logits, base.eval()(**batch).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    layer = layers(model)["transformer.h.0.mlp.c_fc"]
    assert layer.lora_A["default"].weight.shape == (3, 64)
    assert layer.lora_B["default"].weight.shape == (96, 3)


def test_half_precision_base_is_decomposed_in_float32(caplog):
    caplog.set_level(logging.INFO)
    base = tiny_llama(2).bfloat16()
    model = wrap(copy.deepcopy(base))
    for key, layer in layers(model).items():
        W = base.get_submodule(key).weight.float()
        assert layer.lora_A["default"].weight.dtype == torch.float32
        assert layer.base_layer.weight.dtype == torch.bfloat16
        gap = (layer.base_layer.weight.float() + update(layer) - W).abs().max()
        assert gap <= 5e-3 * W.abs().max()  # the rounding of the residual
    assert "W_res + s B A is W up to" in caplog.text


def test_counts_are_the_published_ones():
    with torch.device("meta"):
        llama = LlamaForCausalLM(
            LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=1)
        )
        bert = BertModel(BertConfig())
    for base, r, expected in ((llama, 128, 319_815_680 // 32), (bert, 8, 1_327_104)):
        model = petl.wrap(base, "corda", r=r, target_modules="block-linear")
        assert model.get_nb_trainable_parameters()[0] == expected


def test_each_layer_may_have_its_own_rank_and_alpha():
    base = tiny_llama(2)
    patterns = {"rank_pattern": {"down_proj": 9}, "alpha_pattern": {"up_proj": 20}}
    model = wrap(use_rslora=True, **patterns)
    for key, layer in layers(model).items():
        rank = 9 if "down_proj" in key else R
        alpha = 20 if "up_proj" in key else R
        assert layer.lora_A["default"].weight.shape[0] == rank
        assert layer.scaling["default"] == pytest.approx(alpha / math.sqrt(rank))
        W = base.get_submodule(key).weight
        torch.testing.assert_close(layer.base_layer.weight + update(layer), W, rtol=0, atol=1e-5)


# Calibration


def test_padded_rows_count_as_the_single_samples_they_are():
    ids = torch.randint(3, 96, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    padded = [{"input_ids": ids * mask, "attention_mask": mask}]
    singles = [{"input_ids": ids[:1]}, {"input_ids": ids[1:, :7]}]
    one, other = layers(wrap(calibration=padded)), layers(wrap(calibration=singles))
    for key, layer in one.items():
        gap = (update(layer) - update(other[key])).abs().max()
        assert gap <= 1e-3 * update(layer).abs().max()


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_size_and_side_of_padding_do_not_matter(side):
    data = batches(4)
    ids = torch.cat([batch["input_ids"] for batch in data])
    empty = torch.zeros(4, 3, dtype=ids.dtype)
    parts = (empty, ids) if side == "left" else (ids, empty)
    mask = torch.cat([torch.zeros_like(p) if p is empty else torch.ones_like(p) for p in parts], 1)
    found = collected(data), collected([{"input_ids": torch.cat(parts, 1), "attention_mask": mask}])
    # positions differ on the left: look at what the first layer reads, which has none yet
    key = "model.layers.0.self_attn.q_proj"
    torch.testing.assert_close(found[0][key].matrix, found[1][key].matrix)
    assert found[0][key].samples == found[1][key].samples == 4
    assert int(found[0][key].tokens) == int(found[1][key].tokens) == 40


def collected(data: list[dict[str, Tensor]], **options: Any) -> dict[str, Covariance]:
    model: Any = tiny_llama(2)
    keys = {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in TARGETS}

    def run() -> None:
        for batch in data:
            model(**batch)

    settings = {"norm": "signed_max", "dtype": torch.float32, **options}
    return {key: found[0] for key, found in collect(model, keys, run, **settings).items()}


def test_encoder_decoder_layers_see_their_own_tokens():
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


def test_samples_whose_maximum_is_zero_or_negative_are_scaled_by_what_there_is():
    x = torch.tensor([[[-4.0, -2.0]], [[-4.0, 0.0]], [[0.0, 0.0]], [[2.0, -8.0]]])
    found = scaled(x, None, "signed_max")
    assert found[:, 0].tolist() == [[-2.0, -1.0], [-1.0, 0.0], [0.0, 0.0], [1.0, -4.0]]
    found = scaled(x, None, "abs_max")
    assert found[:, 0].tolist() == [[-1.0, -0.5], [-1.0, 0.0], [0.0, 0.0], [0.25, -1.0]]
    masked = scaled(torch.tensor([[[9.0], [2.0]]]), torch.tensor([[0, 1]]), "signed_max")
    assert masked.flatten().tolist() == [0.0, 1.0]


def test_a_memory_bound_makes_more_passes_and_no_difference():
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
    with pytest.raises(InputError, match=r"max_covariance_bytes=100 is below the \d+ bytes"):
        wrap(max_covariance_bytes=100)


def test_layers_that_read_one_tensor_share_a_covariance(monkeypatch):
    counted = []
    add = Covariance.add
    monkeypatch.setattr(Covariance, "add", lambda *args: (counted.append(1), add(*args))[1])
    wrap(calibration=batches(1))
    assert len(counted) == 2 * 4  # qkv, o, gate and up, down


@pytest.mark.parametrize("kind", ["generator", "function", "batches"])
def test_calibration_may_be_batches_once_or_often_or_a_function(kind):
    base: Any = tiny_llama(2)

    def run() -> None:
        for batch in batches():
            base(**batch)

    given = {"generator": iter(batches()), "function": run, "batches": batches()}[kind]
    found = layers(wrap(base, calibration=given))
    for key, layer in layers(wrap()).items():
        torch.testing.assert_close(update(layer), update(found[key]), rtol=1e-4, atol=1e-6)


def test_collecting_leaves_the_model_as_it_was():
    base: Any = tiny_llama(2)
    base.config.use_cache = True
    base.train()
    base.model.layers[1].eval()
    modes = {n: m.training for n, m in base.named_modules()}
    norm = base.model.layers[1].input_layernorm.weight.data
    norm[0] = torch.nan
    with pytest.raises(InputError, match=r"inputs of model.layers.1.self_attn.q_proj are not"):
        wrap(base)
    assert {n: m.training for n, m in base.named_modules()} == modes
    assert base.config.use_cache
    for module in base.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    norm[0] = 1.0
    before = set(base.state_dict())
    model = wrap(base)
    for module in model.get_base_model().modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not hasattr(module, "eigens")
        assert not hasattr(module, "covariance_matrix")
    after = {k.replace("base_layer.", "") for k in model.get_base_model().state_dict()}
    assert {k for k in after if "lora_" not in k} == before
    for name, module in model.get_base_model().named_modules():
        if name in modes and name not in layers(model):
            assert module.training == modes[name], name


def test_too_few_tokens_are_warned_of_once(caplog):
    wrap(calibration=batches(1))
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "mlp.down_proj saw 10 tokens and is 96 wide" in warnings[0].getMessage()
    caplog.clear()
    wrap(calibration=batches(12))
    assert not caplog.records


# CorDA++


def test_the_best_of_several_covariances_is_used():
    base, data = tiny_llama(2), batches(6)
    keys = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"]
    singles = [moments(base, data[n::3], "signed_max") for n in range(3)]
    found = layers(wrap(calibration=data, num_covariance_rounds=3, covariance_dtype="float64"))
    for key in keys:
        W = base.get_submodule(key).weight.detach().double()
        merits, updates = [], []
        for C in (single[key] for single in singles):
            C = C + 0.01 * C.diagonal().mean() * torch.eye(len(C), dtype=torch.float64)
            values = torch.linalg.eigvalsh(C)
            pi = math.sqrt(len(W) * values[-1]) / values[0]
            U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
            merits.append(math.log(pi) * float(S.sum() / S[0]))
            updates.append(U[:, :R] @ S[:R].diag() @ Vh[:R] @ C.inverse())
        best = updates[merits.index(min(merits))]
        torch.testing.assert_close(update(found[key]).double(), best, rtol=0, atol=1e-3)


def test_a_rank_budget_is_spread_greedily_at_one_scale():
    base, data = tiny_llama(2), batches(12)
    budget = 6000
    model = wrap(calibration=data, corda_method="kpm", rank_budget=budget, lora_alpha=2 * R)
    spectra, logs, cost = {}, {}, {}
    for key, C in moments(base, data, "signed_max").items():
        W = base.get_submodule(key).weight.detach().double()
        C = C + 0.01 * C.diagonal().mean() * torch.eye(len(C), dtype=torch.float64)
        values = torch.linalg.eigvalsh(C)
        logs[key] = math.log(math.sqrt(len(W) * values[-1]) / values[0])
        spectra[key] = torch.linalg.svdvals(W @ C).tolist()
        cost[key] = sum(W.shape)
    ranks = dict.fromkeys(spectra, 1)
    while sum(ranks[k] * cost[k] for k in ranks) <= budget:

        def next_one(key):
            S, r = spectra[key], ranks[key]
            return logs[key] * S[-r] / sum(S[: len(S) - r])

        ranks[min(ranks, key=next_one)] += 1
    found = {key: len(layer.lora_A["default"].weight) for key, layer in layers(model).items()}
    assert found == ranks
    assert len(set(ranks.values())) > 1
    assert {layer.scaling["default"] for layer in layers(model).values()} == {2.0}
    for key, layer in layers(model).items():
        W = base.get_submodule(key).weight
        torch.testing.assert_close(layer.base_layer.weight + update(layer), W, rtol=0, atol=1e-5)


# Caches


@pytest.mark.parametrize("kind", ["covariance_cache", "factors_cache"])
def test_a_cached_start_needs_no_forward_and_is_bit_equal(tmp_path, kind, caplog):
    caplog.set_level(logging.INFO)
    first = layers(wrap(**{kind: str(tmp_path)}))
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    base = tiny_llama(2)
    base.register_forward_pre_hook(lambda module, args: pytest.fail("the model was run"))
    for calibration in (batches(), ()):
        options = {"calibration": calibration} if calibration else {}
        fields = {"r": R, "lora_alpha": R, "target_modules": TARGETS, kind: str(tmp_path)}
        second = layers(petl.wrap(copy.deepcopy(base), "corda", **options, **fields))
        for key, layer in first.items():
            for name in ("lora_A", "lora_B"):
                one, other = (getattr(x, name)["default"].weight for x in (layer, second[key]))
                assert torch.equal(one, other)
    assert "no covariances" not in caplog.text


def test_factors_of_another_mode_or_rank_are_not_taken(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    wrap(factors_cache=str(tmp_path))
    wrap(factors_cache=str(tmp_path), corda_method="kpm")
    assert "the closest differ in corda_method" in caplog.text
    wrap(factors_cache=str(tmp_path), r=3)
    assert "the closest differ in ranks" in caplog.text
    assert len(list(tmp_path.glob("factors-*.safetensors"))) == 3
    kept = load_file(next(tmp_path.glob("*.safetensors")))
    key = "model.layers.0.mlp.down_proj"
    assert kept[f"{key}.spectrum"].shape == (64,)  # all of them, to look at


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"calibration": batches(5)}, "calibration"),
        ({"activation_norm": "none"}, "activation_norm"),
        ({"damp": 0.02}, "damp"),
        ({"target_modules": ["q_proj"]}, "targets"),
        ({"base": tiny_llama(2).bfloat16()}, "weights, dtype"),
    ],
)
def test_covariances_of_other_content_are_not_taken(tmp_path, caplog, change, field):
    caplog.set_level(logging.INFO)
    wrap(covariance_cache=str(tmp_path))
    wrap(**{"covariance_cache": str(tmp_path), **change})
    assert f"the closest differ in {field}; working them out anew" in caplog.text
    assert len(list(tmp_path.glob("covariances-*.safetensors"))) == 2


def test_caches_that_cannot_serve_are_refused(tmp_path):
    fields = {"r": R, "target_modules": TARGETS, "covariance_cache": str(tmp_path)}
    with pytest.raises(InputError, match="caches hold nothing that fits, needs calibration data"):
        petl.wrap(tiny_llama(2), "corda", **fields)
    with pytest.raises(InputError, match="not a function that runs the model"):
        petl.wrap(tiny_llama(2), "corda", calibration=lambda: None, **fields)
    for count in (5, 6):
        wrap(calibration=batches(count), covariance_cache=str(tmp_path))
    with pytest.raises(InputError, match=r"2 files in .* fit, of different calibration data"):
        petl.wrap(tiny_llama(2), "corda", **fields)
    (tmp_path / "a").write_text("")
    with pytest.raises(InputError, match="cannot be written to"):
        wrap(covariance_cache=str(tmp_path / "a" / "b"))
    assert not list(tmp_path.glob(".unfinished*"))


def test_a_damaged_cache_file_is_passed_over(tmp_path, caplog):
    wrap(factors_cache=str(tmp_path))
    file = next(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    wrap(factors_cache=str(tmp_path))
    assert "is passed over" in caplog.text


# Saving


def load_stock(folder: Path, base: nn.Module | None = None) -> PeftModel:
    return PeftModel.from_pretrained(tiny_llama(2) if base is None else base, folder)


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True, "rank_pattern": {"down_proj": 9}}])
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_saves_as_a_plain_lora_on_the_original_base(tmp_path, mode, fields):
    batch = causal_batch(3, 50)
    model = stir(wrap(corda_method=mode, **fields)).eval()
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    loaded = load_stock(tmp_path)
    config: Any = loaded.peft_config["default"]
    assert type(config) is LoraConfig
    assert (config.peft_type, config.r, config.init_lora_weights) == ("LORA", 2 * R, True)
    text = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not {"corda_method", "calibration_data", "damp"} & set(text)
    assert {file.name for file in tmp_path.iterdir()} <= {
        *("adapter_config.json", "adapter_model.safetensors", "README.md")
    }
    torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    for key, module in tiny_llama(2).named_modules():
        if key.rpartition(".")[2] in TARGETS:
            base: Any = loaded.get_base_model().get_submodule(key)
            assert torch.equal(base.base_layer.weight, module.weight)
    with loaded.disable_adapter():
        assert torch.equal(loaded(**batch).logits, tiny_llama(2).eval()(**batch).logits)


def test_an_untrained_adapter_saves_as_nothing(tmp_path):
    wrap().save_pretrained(tmp_path)
    batch = causal_batch(3, 50)
    expected = tiny_llama(2).eval()(**batch).logits
    torch.testing.assert_close(load_stock(tmp_path)(**batch).logits, expected, rtol=0, atol=1e-5)


def test_peft_loads_the_file_without_petl(tmp_path):
    stir(wrap()).save_pretrained(tmp_path)
    code = (
        "import sys; from peft import PeftConfig; "
        f"config = PeftConfig.from_pretrained({str(tmp_path)!r}); "
        "assert type(config).__name__ == 'LoraConfig' and 'petl' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_exported_adapters_combine(tmp_path):
    batch = causal_batch(3, 50)
    for name, mode in (("one", "ipm"), ("two", "kpm")):
        stir(wrap(corda_method=mode)).save_pretrained(tmp_path / name)
    model: Any = load_stock(tmp_path / "one")
    single = model(**batch).logits
    model.load_adapter(tmp_path / "two", "two")
    model.base_model.set_adapter(["default", "two"])
    assert not torch.allclose(model(**batch).logits, single, atol=1e-3)


def test_a_saved_state_goes_back_into_the_model_it_came_from(tmp_path):
    model = stir(wrap())
    model.save_pretrained(tmp_path)
    other = wrap()
    other.load_adapter(tmp_path, "default", is_trainable=True)
    for key, layer in layers(model).items():
        assert torch.equal(update(layer), update(layers(other)[key]))
    with pytest.raises(InputError, match="does not hold the start of this model"):
        wrap(corda_method="kpm").load_adapter(tmp_path, "default")
    plain = get_peft_model(tiny_llama(2), LoraConfig(r=R, target_modules=TARGETS))
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="does not hold the start of this model"):
        other.load_adapter(tmp_path / "plain", "default")


def test_trainer_resumes(tmp_path):
    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {name: tensor[0] for name, tensor in causal_batch(1, index).items()}

    def trainer(model: PeftModel) -> Trainer:
        args = TrainingArguments(
            str(tmp_path),
            max_steps=4,
            save_steps=2,
            learning_rate=1e-3,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        return Trainer(model, args, train_dataset=Rows(), callbacks=[petl.Callback()])

    whole = wrap()
    trainer(whole).train()
    other = wrap()
    trainer(other).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for key, layer in layers(whole).items():
        assert torch.equal(update(layer), update(layers(other)[key]))


# One adapter on a residual base


def test_merging_gives_the_adapted_model():
    batch = causal_batch(3, 50)
    model = stir(wrap()).eval()
    expected = model(**batch).logits
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(**batch).logits, expected, rtol=1e-4, atol=1e-4)


def test_without_its_adapter_the_model_is_the_residual_until_it_is_taken_out(caplog):
    caplog.set_level(logging.INFO)
    batch, base = causal_batch(3, 50), tiny_llama(2).eval()
    model = stir(wrap()).eval()
    expected = base(**batch).logits
    with model.disable_adapter():
        assert not torch.allclose(model(**batch).logits, expected, atol=1e-3)
    assert "has the residual weights, not W" in caplog.text
    torch.testing.assert_close(model.unload()(**batch).logits, expected, rtol=0, atol=1e-5)
    model = stir(wrap()).eval()
    model.merge_adapter()
    torch.testing.assert_close(model.unload()(**batch).logits, expected, rtol=0, atol=1e-5)
    model = stir(wrap()).eval()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    model.delete_adapter("default")
    torch.testing.assert_close(model.base_model.model(**batch).logits, expected, rtol=0, atol=1e-5)


def test_no_other_adapter_fits_beside_it():
    model = wrap()
    with pytest.raises(InputError, match="no other fits beside it"):
        model.add_adapter("second", petl.build_config("corda", r=R))
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("second", LoraConfig(r=R))
    with pytest.raises(InputError, match=r"use petl.wrap\(model, 'corda'"):
        get_peft_model(tiny_llama(2), petl.build_config("corda", r=R, target_modules=TARGETS))


class Quantised(nn.Linear):
    """A linear layer whose weight is codes."""

    def __init__(self) -> None:
        super().__init__(64, 64, bias=False)
        codes = torch.zeros(64, 64, dtype=torch.uint8)
        self.weight = nn.Parameter(codes, requires_grad=False)


def quantised() -> nn.Module:
    model: Any = tiny_llama(2)
    model.model.layers[0].self_attn.q_proj = Quantised()
    return model


class Idle(nn.Module):
    """A network with a layer that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"corda_method": "ipa"}, "corda_method must be 'ipm' or 'kpm', not 'ipa'"),
        ({"activation_norm": "max"}, "activation_norm='max' is not one of signed_max"),
        ({"covariance_dtype": "bfloat16"}, "covariance_dtype='bfloat16'"),
        ({"damp": 0.0}, "damp=0.0 is not a number above 0"),
        ({"num_covariance_rounds": 0}, "num_covariance_rounds=0 is below 1"),
        ({"rank_budget": 100}, "it needs corda_method='kpm'"),
        ({"rank_budget": 100, "corda_method": "kpm", "rank_pattern": {"q_proj": 2}}, "leave out"),
        ({"r": 33}, r"r=33 is above 32, the smaller side of model.layers.0.self_attn.k_proj"),
        ({"use_dora": True}, "use_dora=True does not go with CorDA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' does not go with CorDA"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens is Embedding; CorDA decomposes"),
        ({"calibration": []}, "hold no batch"),
        ({"base": quantised()}, "corda: decompose in float32/16, then quantise the residual"),
    ],
)
def test_refuses_what_it_cannot_do(fields, message):
    with pytest.raises(InputError, match=message):
        wrap(**fields)


def test_layers_that_the_data_never_reach_are_named():
    with pytest.raises(InputError, match="never reach idle; leave them out"):
        wrap(Idle(), [{"x": torch.randn(4, 8)}], target_modules=["used", "idle"], r=2)
    with pytest.raises(InputError, match="'corda' needs calibration data"):
        petl.wrap(tiny_llama(2), "corda", r=R, target_modules=TARGETS)


def test_layers_that_see_nothing_but_zeros_are_named():
    with pytest.raises(InputError, match="used: the mean second moment of the inputs is 0"):
        wrap(Idle(), [{"x": torch.zeros(4, 8)}], target_modules=["used"], r=2)


def test_weights_that_are_not_finite_are_named():
    base: Any = tiny_llama(2)
    base.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(InputError, match=r"weight of model.layers.0.mlp.up_proj is not finite"):
        wrap(base)


def test_tied_weights_are_refused():
    base: Any = tiny_llama(2)
    base.lm_head.weight = base.model.embed_tokens.weight
    with pytest.raises(InputError, match=r"lm_head shares its weight with model.embed_tokens"):
        wrap(base, target_modules=["lm_head"])


# Processes


def test_two_processes_with_half_of_the_samples_equal_one_with_all():
    expected = state(wrap(calibration=batches(8)))
    first, second = in_processes(2, _wrap_share)
    for name, tensor in expected.items():
        assert torch.equal(first[name], second[name]), name
        gap = (first[name] - tensor).abs().max()
        if "base_layer" in name:
            assert gap <= 1e-4, name


def state(model: PeftModel) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items() if "_proj" in k}


def _wrap_share() -> dict[str, Tensor]:
    rank = distributed.get_rank()
    return state(wrap(calibration=batches(8)[rank::2]))


def test_other_families_start_at_their_base():
    for build, batch, targets in (
        (tiny_bert, class_batch(4, 0), ["query", "key", "value", "dense"]),
        (tiny_t5, pair_batch(4, 0), ["q", "k", "v", "o", "wi", "wo"]),
    ):
        expected = build().eval()(**batch).logits
        model = wrap(build(), [batch], target_modules=targets, r=3)
        torch.testing.assert_close(model.eval()(**batch).logits, expected, rtol=0, atol=1e-4)
