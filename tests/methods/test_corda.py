"""CorDA's start against its equations, calibration, ranks, and what it refuses."""

import copy
import logging
import math
from typing import Any

import pytest
import torch
from corda_fixtures import TARGETS, R, batches, layers, moments, update, wrap
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig as PeftCordaConfig
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import petl
from petl.errors import InputError
from petl.methods.corda.covariance import Covariance, collect, scaled
from petl.testing import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from petl.testing.models import causal_batch, class_batch, pair_batch

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


@pytest.mark.parametrize("fields", [{}, {"target_modules": "all-linear"}], ids=["none", "all"])
def test_every_linear_layer_of_the_blocks_is_adapted_if_none_or_all_are_named(fields):
    found = layers(petl.wrap(tiny_llama(2), "corda", r=R, calibration=batches(), **fields))
    assert {key.rpartition(".")[2] for key in found} == set(TARGETS)
    assert len(found) == 14


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


def test_other_families_start_at_their_base():
    for build, batch, targets in (
        (tiny_bert, class_batch(4, 0), ["query", "key", "value", "dense"]),
        (tiny_t5, pair_batch(4, 0), ["q", "k", "v", "o", "wi", "wo"]),
    ):
        expected = build().eval()(**batch).logits
        model = wrap(build(), [batch], target_modules=targets, r=3)
        torch.testing.assert_close(model.eval()(**batch).logits, expected, rtol=0, atol=1e-4)


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


def test_a_mask_counts_however_it_is_passed():
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
    """A network that hands its layer half of the rows, and a summary to another."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.pooler = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.second(x[:, ::2]).sum(1) + self.pooler(x[:, 0])


def test_layers_whose_padding_cannot_be_told_are_named(caplog):
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    x, whole = torch.randn(2, 4, 8), torch.ones_like(mask)
    fields = {"target_modules": ["second", "pooler"], "r": 2}
    wrap(EverySecond(), [{"x": x, "attention_mask": whole}], **fields)
    assert "padding counts" not in caplog.text
    wrap(EverySecond(), [{"x": x, "attention_mask": mask}], **fields)
    assert "1 layers, such as second, see other rows than attention_mask has" in caplog.text


def test_products_are_in_float32_under_the_caller_s_autocast():
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


# Refusals


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
