"""DSEE against its equations, its counts, and its promises about positions, masks and heads."""

import logging
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import petl
from petl import testing
from petl.core.lifecycle import lifecycle
from petl.errors import InputError, UnsupportedError
from petl.methods.dsee import adapter as dsee_adapter
from petl.methods.dsee import prune_base
from petl.ops.masks import pack_mask, unpack_mask
from petl.testing import Case
from petl.testing.case import gradients, logits, stir, trainable, tuner_layers
from petl.testing.training import train
from petl.training.optimizer import groups
from petl.training.runs.settings import TrainConfig

CONTRACT = {
    "fields": {"r": 8, "num_sparse": 16},
    "acts_with": {
        "prune_modules": {"prune_ratio": 0.5, "prune_modules": ["o_proj"]},
        "prune_ratio": {"prune_modules": ["o_proj"], "prune_step": 2},
        "target_prune_ratio": {"prune_step": 2},
        "prune_mode": {"target_prune_ratio": 0.5, "prune_step": 2},
        "prune_step": {"target_prune_ratio": 0.5, "prune_step": 2},
        "prune_heads": {"prune_modules": ["o_proj"], "prune_step": 2, "prune_heads": 2},
    },
    "idle": {"only_masked": "the method fills it in"},
}
PRUNES = {
    "r": 4,
    "num_sparse": 16,
    "prune_modules": ["o_proj", "down_proj"],
    "prune_ratio": 0.3,
    "target_prune_ratio": 0.2,
}


def layer_of(out: int, into: int, **fields: Any) -> tuple[Any, PeftModel]:
    """One linear layer in a model, with an adapter."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(into, out)})
    wrapped = petl.wrap(model, "dsee", target_modules=["linear"], **fields)
    return wrapped.get_submodule("base_model.model.linear"), wrapped


def adapters(model: nn.Module, name: str = "default") -> dict[str, Any]:
    """The adapters by the path of their module."""
    found = [layer.adapters[name] for layer in tuner_layers(model).values()]
    return {adapter.info.key: adapter for adapter in found}


def keep_of(adapter: Any) -> torch.Tensor:
    return unpack_mask(adapter.mask, adapter.shape[::-1])


def dense_update(adapter: Any) -> torch.Tensor:
    """D of the equation, entry by entry."""
    if not adapter.is_target:
        return torch.zeros(adapter.shape[::-1])
    D = (adapter.lora_B @ adapter.lora_A).detach()
    for value, position in zip(adapter.values.detach(), adapter.indices.tolist(), strict=True):
        D[position // D.shape[1], position % D.shape[1]] += value
    return adapter.scale * D


def dense_model(case: Case, model: PeftModel) -> nn.Module:
    """A plain model with the weights m W + D."""
    plain = case.base()
    for key, adapter in adapters(model).items():
        module: Any = plain.get_submodule(key)
        stored, is_conv = module.weight.detach(), not isinstance(module, nn.Linear)
        W = stored.t() if is_conv else stored
        new = W * keep_of(adapter) + dense_update(adapter)
        module.weight.data = new.t().contiguous() if is_conv else new
    return plain


# Structure, counts, start


def on_meta(cls: Any, config: Any) -> Any:
    with torch.device("meta"):
        return cls(config)


@pytest.mark.parametrize(("entries", "count"), [(16, 590_208), (64, 591_360)])
def test_counts_on_bert_base(entries, count):
    model = petl.wrap(on_meta(BertModel, BertConfig()), "dsee", num_sparse=entries)
    assert sum(p.numel() for p in trainable(model).values()) == count
    headed = on_meta(BertForSequenceClassification, BertConfig())
    headed = petl.wrap(headed, "dsee", num_sparse=entries, task_type="SEQ_CLS")
    assert sum(p.numel() for p in trainable(headed).values()) == count + 1538


@pytest.mark.thorough
def test_count_on_llama_2_7b():
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    model = petl.wrap(on_meta(LlamaForCausalLM, config), "dsee")
    assert sum(p.numel() for p in trainable(model).values()) == 8_392_704


def test_tensors_have_their_names_shapes_and_start():
    layer, model = layer_of(300, 201, num_sparse=40)
    state = {
        key.removeprefix("base_model.model.linear.petl_dsee_adapters.default."): tensor
        for key, tensor in model.state_dict().items()
        if "petl_dsee_" in key
    }
    assert {name: (t.dtype, tuple(t.shape)) for name, t in state.items()} == {
        "lora_A": (torch.float32, (16, 201)),
        "lora_B": (torch.float32, (300, 16)),
        "values": (torch.float32, (40,)),
        "indices": (torch.int32, (40,)),
        "mask": (torch.uint8, (7538,)),
    }
    assert trainable(model).keys() == {
        f"base_model.model.linear.petl_dsee_adapters.default.{name}"
        for name in ("lora_A", "lora_B", "values")
    }
    assert abs(float(state["lora_A"].std()) - 0.02) < 0.002
    assert not state["lora_B"].any()
    assert not state["values"].any()
    assert (state["indices"].diff() > 0).all()
    assert keep_of(layer.adapters["default"]).all()
    assert state["mask"][-1] == 0b1111  # 60,300 entries: half of the last byte
    small = layer_of(300, 201, init_weights=False)[0].adapters["default"]
    for name in ("lora_A", "lora_B", "values"):
        assert abs(float(getattr(small, name).detach().std()) - 0.02) < 0.006


def test_only_masked_modules_have_a_mask_alone():
    model = Case("dsee", "llama", PRUNES).wrap()
    found = {key.rpartition(".")[2]: adapter for key, adapter in adapters(model).items()}
    assert found.keys() == {"q_proj", "v_proj", "o_proj", "down_proj"}
    assert set(found["o_proj"].state_dict()) == {"mask"}
    assert set(found["q_proj"].state_dict()) == {"lora_A", "lora_B", "values", "indices", "mask"}
    config: Any = model.active_peft_config
    assert config.only_masked == [
        key for key in adapters(model) if key.endswith(("o_proj", "down_proj"))
    ]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("mlp-linear", {"gate_proj", "up_proj", "down_proj"}),
        (r".*\.(k|o)_proj", {"k_proj", "o_proj"}),
        (["k_proj"], {"k_proj"}),
    ],
)
def test_prune_modules_are_given_as_targets_are(given, names):
    fields = {"r": 2, "num_sparse": 0, "prune_modules": given, "layers_to_transform": [1]}
    model = Case("dsee", "llama", fields).wrap()
    found = adapters(model)
    assert all(key.startswith("model.layers.1.") for key in found)
    masked = {key.rpartition(".")[2] for key, a in found.items() if not a.is_target}
    assert masked == names
    targets = {key.rpartition(".")[2] for key, a in found.items() if a.is_target}
    assert targets == {"q_proj", "v_proj"}


# Positions


def test_magnitude_takes_the_largest_weights():
    layer, _ = layer_of(9, 7, num_sparse=10, sparse_init="magnitude", r=2)
    W = layer.base_layer.weight.detach().flatten()
    order = sorted(range(63), key=lambda i: -abs(float(W[i])))
    assert layer.adapters["default"].indices.tolist() == sorted(order[:10])


@pytest.mark.parametrize("init", ["grebsmo", "random"])
def test_positions_repeat_and_depend_on_seed_and_path(init):
    fields = {"sparse_init": init, "r": 2, "num_sparse": 30}

    def positions(**more: Any) -> dict[str, list[int]]:
        model = Case("dsee", "llama", {**fields, **more}).wrap()
        return {key: adapter.indices.tolist() for key, adapter in adapters(model).items()}

    first = positions()
    assert positions() == first
    assert positions(target_modules=["v_proj"]).items() <= first.items()
    assert positions(init_seed=1) != first


def test_outliers_beside_a_low_rank_weight_are_found():
    generator = torch.Generator().manual_seed(3)
    W = torch.randn(64, 3, generator=generator) @ torch.randn(3, 64, generator=generator)
    at = torch.randperm(64 * 64, generator=generator)[:16]
    W.view(-1)[at] += 6.0
    model = nn.ModuleDict({"linear": nn.Linear(64, 64)})
    model["linear"].weight.data = W
    wrapped = petl.wrap(model, "dsee", target_modules=["linear"], num_sparse=16, decomp_rank=3)
    (adapter,) = adapters(wrapped).values()
    assert len(set(adapter.indices.tolist()) & set(at.tolist())) >= 14


def test_loading_takes_the_saved_positions_and_computes_none(tmp_path, monkeypatch):
    case = Case("dsee", "llama", PRUNES)
    model = case.wrap_stirred()
    for adapter in adapters(model).values():
        if adapter.is_target:
            adapter.start(torch.arange(16) * 3)
    model.save_pretrained(tmp_path)

    def refuse(*args: Any) -> None:
        raise AssertionError("positions are computed again")

    monkeypatch.setattr("petl.methods.dsee.method.positions_of", refuse)
    for is_trainable in (False, True):
        loaded = petl.load(case.base(), tmp_path, is_trainable=is_trainable)
        assert torch.equal(logits(loaded, case.batch()), logits(model, case.batch()))


def test_config_of_a_file_starts_anew_by_wrap_and_is_refused_without_a_file(tmp_path):
    case = Case("dsee", "llama", PRUNES)
    case.wrap().save_pretrained(tmp_path)
    config = petl.get("dsee").from_pretrained(tmp_path)
    again = petl.wrap(case.base(), config)
    for key, adapter in adapters(case.wrap()).items():
        assert adapter.is_target == adapters(again)[key].is_target
        if adapter.is_target:
            assert torch.equal(adapter.indices, adapters(again)[key].indices)
    bare = get_peft_model(case.base(), petl.get("dsee").from_pretrained(tmp_path))
    with pytest.raises(InputError):
        bare(**case.batch())


# Products


@pytest.mark.parametrize("model", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("is_pruned", [False, True])
def test_logits_and_gradients_are_those_of_dense_weights(model, is_pruned):
    targets = {"gpt2": "c_attn", "bert": "query", "t5": "q"}[model]
    others = {"gpt2": "c_fc", "bert": "intermediate.dense", "t5": "wo"}[model]
    fields = {**PRUNES, "target_modules": [targets], "prune_modules": [others]}
    case = Case("dsee", model, fields).without_head()
    wrapped = case.wrap_stirred()
    if is_pruned:
        prune_base(wrapped)
    plain, batch = dense_model(case, wrapped), case.batch()
    torch.testing.assert_close(logits(wrapped, batch), logits(plain, batch), rtol=1e-4, atol=1e-5)
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    wanted, found = gradients(plain, batch), gradients(wrapped, batch)
    for key, adapter in adapters(wrapped).items():
        if not adapter.is_target:
            continue
        G = wanted[f"{key}.weight"].t() if model == "gpt2" else wanted[f"{key}.weight"]
        expected = {
            "lora_A": adapter.scale * adapter.lora_B.t() @ G,
            "lora_B": adapter.scale * G @ adapter.lora_A.t(),
            "values": adapter.scale * G.flatten()[adapter.indices.long()],
        }
        for name, gradient in expected.items():
            full = f"base_model.model.{key}.petl_dsee_adapters.default.{name}"
            torch.testing.assert_close(found[full], gradient, rtol=1e-3, atol=1e-5, msg=full)


def test_both_parts_have_the_factor_alpha_over_r():
    layer, _ = layer_of(6, 5, r=4, lora_alpha=12, num_sparse=3)
    adapter = layer.adapters["default"]
    with torch.no_grad():
        adapter.values.fill_(1.0)
    x = torch.eye(5)
    change = (layer(x) - F.linear(x, layer.base_layer.weight, layer.base_layer.bias)).t()
    expected = torch.zeros(30).index_fill_(0, adapter.indices.long(), 3.0).view(6, 5)
    torch.testing.assert_close(change, expected)


def test_hooks_of_the_base_layer_run_while_pruned():
    layer, model = layer_of(6, 5, r=2, num_sparse=3, target_prune_ratio=0.5, prune_mode="weight")
    stir(model)
    x = torch.randn(3, 5)
    prune_base(model)
    expected = layer(x)
    seen = []
    layer.base_layer.register_forward_hook(lambda module, args, y: seen.append(y))
    torch.testing.assert_close(layer(x), expected)
    assert len(seen) == 1


def test_masked_weight_is_computed_once_and_again_after_a_change(monkeypatch):
    layer, model = layer_of(6, 5, r=2, num_sparse=3, target_prune_ratio=0.5, prune_mode="weight")
    made = []
    masked = dsee_adapter.masked_weight
    monkeypatch.setattr(dsee_adapter, "masked_weight", lambda *a: made.append(1) or masked(*a))
    x = torch.randn(3, 5)
    layer(x)
    assert not made
    prune_base(model)
    first = layer(x)
    layer(x)
    assert len(made) == 1
    with torch.no_grad():
        layer.base_layer.weight.mul_(2)
    assert not torch.equal(layer(x), first)
    assert len(made) == 2


def test_training_goes_on_after_an_evaluation_in_inference_mode():
    layer, model = layer_of(6, 5, r=2, num_sparse=3, target_prune_ratio=0.5, prune_mode="weight")
    prune_base(model)
    x = torch.randn(3, 5)
    with torch.inference_mode():
        expected = layer(x)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, expected)


@pytest.mark.thorough
@pytest.mark.parametrize("is_pruned", [False, True])
def test_compiled_layer_computes_the_same(is_pruned):
    layer, model = layer_of(16, 24, r=2, num_sparse=5, target_prune_ratio=0.5)
    stir(model)
    model.train()
    if is_pruned:
        prune_base(model)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, found = torch.randn(5, 24), []
    for each in (layer, compiled):
        model.zero_grad()
        y = each(x)
        y.square().sum().backward()
        grads = [p.grad.clone() for p in layer.adapters["default"].parameters()]
        found.append([y.detach(), *grads])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


# Pruning


def scores_of(mode: str, adapter: Any, W: torch.Tensor) -> torch.Tensor:
    D = dense_update(adapter)
    return {"delta": D, "weight": W, "weight+delta": W + D}[mode].abs()


@pytest.mark.parametrize("mode", ["delta", "weight", "weight+delta"])
def test_smallest_scores_of_each_group_are_pruned(mode):
    case = Case("dsee", "llama", {**PRUNES, "prune_mode": mode, "task_type": None})
    model = case.wrap_stirred()
    before = {name: t.clone() for name, t in model.named_parameters()}
    figures = prune_base(model)
    assert all(torch.equal(t, before[name]) for name, t in model.named_parameters())
    weights = dict(case.base().named_parameters())
    for is_target, ratio in ((True, 0.2), (False, 0.3)):
        group = {k: a for k, a in adapters(model).items() if a.is_target == is_target}
        modes = dict.fromkeys(group, mode if is_target else "weight")
        scores = torch.cat(
            [
                scores_of(modes[k], a, weights[f"{k}.weight"].detach()).flatten()
                for k, a in group.items()
            ]
        )
        keep = torch.cat([keep_of(a).flatten() for a in group.values()])
        count = round(ratio * len(scores))
        assert int((~keep).sum()) == count == sum(a.pruned for a in group.values())
        assert scores[~keep].max() <= scores[keep].min()
        name = "target_sparsity" if is_target else "prune_modules_sparsity"
        assert figures[name] == count / len(scores)
    everything = adapters(model).values()
    zeros, size = sum(a.pruned for a in everything), sum(a.size for a in everything)
    assert figures["sparsity"] == zeros / size
    packed = sum(4 * (a.size - a.pruned) + a.size // 8 for a in everything)
    packed += sum(4 * t.numel() for t in trainable(model).values())
    packed += sum(4 * 16 for a in everything if a.is_target)
    assert figures["packed_bytes"] == packed
    assert figures["dense_bytes"] == 4 * size


def test_random_pruning_repeats_and_has_its_number():
    masks = []
    for _ in range(2):
        model = Case("dsee", "llama", {**PRUNES, "prune_mode": "random"}).wrap()
        prune_base(model)
        group = [a for a in adapters(model).values() if a.is_target]
        assert sum(a.pruned for a in group) == round(0.2 * sum(a.size for a in group))
        masks.append([a.mask for a in group])
    assert all(torch.equal(one, other) for one, other in zip(*masks, strict=True))


def test_pruning_again_only_adds_zeros():
    case = Case("dsee", "llama", PRUNES)
    model = case.wrap_stirred()
    first = prune_base(model)
    masks = {key: keep_of(adapter) for key, adapter in adapters(model).items()}
    stir(model, seed=9)
    assert prune_base(model) == first
    assert all(torch.equal(keep_of(a), masks[key]) for key, a in adapters(model).items())
    model.active_peft_config.target_prune_ratio = 0.5
    assert prune_base(model)["target_sparsity"] == pytest.approx(0.5, abs=1e-4)
    for key, adapter in adapters(model).items():
        assert not (keep_of(adapter) & ~masks[key]).any()


def test_update_of_zeros_is_warned_about(caplog):
    model = Case("dsee", "llama", PRUNES).wrap()
    with caplog.at_level(logging.WARNING):
        prune_base(model)
    assert "the update is 0 everywhere" in caplog.text


# Heads


def head_scores(model: PeftModel, prefix: str, names: tuple[str, str], heads: int) -> list[float]:
    """Sums of |B A + S| over the rows of each head, by a loop; `heads` of the second projection."""
    found = adapters(model)
    scores = [0.0] * heads
    for name in names:
        D = dense_update(found[f"{prefix}.{name}"]).abs()
        rows = len(D) // heads
        for row in range(len(D)):
            scores[row // rows] += float(D[row].sum())
    return scores


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_heads_of_smallest_score_are_pruned_and_the_model_equals_one_without_their_columns(kind):
    names = {
        "bert": ("attention.self.{}", ("query", "value"), "key", "attention.output.dense"),
        "llama": ("self_attn.{}_proj", ("q", "v"), "k", "self_attn.o_proj"),
    }[kind]
    form, scored, other, output = names
    query, value, key = (form.format(n) for n in (*scored, other))
    fields = {
        "r": 4,
        "num_sparse": 16,
        "target_modules": [n.rpartition(".")[2] for n in (query, value)],
        "prune_modules": [n if n == output else n.rpartition(".")[2] for n in (key, output)],
    }
    base: Any = Case("dsee", kind).base()
    heads = base.config.num_attention_heads
    groups = getattr(base.config, "num_key_value_heads", None) or heads
    gone = heads // groups
    assert (gone > 1) == (kind == "llama")  # heads that share keys go together
    case = Case("dsee", kind, {**fields, "prune_heads": gone}).without_head()
    model = case.wrap_stirred()
    prune_base(model)
    found, plain = adapters(model), dense_model(case, model)
    prefixes = [k.removesuffix(f".{query}") for k in found if k.endswith(query)]
    for prefix in prefixes:
        scores = head_scores(model, prefix, (query, value), groups)
        smallest = min(range(groups), key=scores.__getitem__)
        for name, axis in ((query, 0), (key, 0), (value, 0), (output, 1)):
            keep = keep_of(found[f"{prefix}.{name}"])
            width = keep.shape[axis] // groups
            expected = torch.ones_like(keep)
            expected.narrow(axis, smallest * width, width).fill_(False)
            assert torch.equal(keep, expected), name
        # the update of a pruned head has no effect: with any rows there, the output is the same
        for name in (query, value):
            weight = plain.get_submodule(f"{prefix}.{name}").weight.data
            width = len(weight) // groups
            weight[smallest * width : (smallest + 1) * width] = 1.0
    batch = case.batch()
    torch.testing.assert_close(logits(model, batch), logits(plain, batch), rtol=1e-4, atol=1e-5)
    masks = {k: a.mask.clone() for k, a in found.items()}
    stir(model, seed=7)  # other scores
    prune_base(model)
    assert all(torch.equal(a.mask, masks[k]) for k, a in found.items())


# In a run, in files, merged


def test_forty_steps_leave_masks_and_positions_as_they_are():
    case = Case("dsee", "llama", PRUNES)
    model = case.wrap().train()
    train(model, case.batch(), steps=5, lr=1e-2)
    prune_base(model)
    before = {k: t.clone() for k, t in model.named_buffers()}
    losses = train(model, case.batch(), steps=40, lr=1e-2).losses
    assert losses[-1] < losses[0]
    assert all(torch.equal(t, before[k]) for k, t in model.named_buffers())


@pytest.mark.parametrize(("step", "due"), [(3, 3), (0.5, 4), (0.01, 1)])
def test_lifecycle_prunes_after_the_step(step, due):
    case = Case("dsee", "llama", {**PRUNES, "prune_step": step})
    model = case.wrap_stirred().train()
    life = lifecycle(model)
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    life.attach_optimizer(optimizer, total_steps=8)
    assert model.base_model.series() == {}
    for number in range(1, 9):
        life.after_step(number, optimizer)
        assert bool(adapters(model).popitem()[1].pruned) == (number >= due)
    assert model.base_model.series()["sparsity"] == pytest.approx(0.2625, abs=1e-4)


def test_masks_are_in_the_file_once_there_are_zeros(tmp_path):
    case = Case("dsee", "llama", PRUNES)
    model, batch = case.wrap_stirred(), case.batch()
    model.save_pretrained(tmp_path / "before")
    names = {k.rpartition(".")[2] for k in load_file(tmp_path / "before/adapter_model.safetensors")}
    assert names == {"lora_A", "lora_B", "values", "indices"}
    prune_base(model)
    model.save_pretrained(tmp_path / "after")
    tensors = load_file(tmp_path / "after/adapter_model.safetensors")
    assert sum(k.endswith(".mask") for k in tensors) == len(adapters(model))
    loaded = petl.load(case.base(), tmp_path / "after")
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert all(a.pruned == adapters(model)[k].pruned for k, a in adapters(loaded).items())
    # a file without masks onto an adapter that has some: ones
    unpruned = petl.load(case.base(), tmp_path / "before")
    loaded.load_adapter(str(tmp_path / "before"), "default")
    assert torch.equal(logits(loaded, batch), logits(unpruned, batch))


def test_damaged_files_are_refused(tmp_path):
    case = Case("dsee", "llama", PRUNES)

    def saved(change: Any) -> Any:
        model = case.wrap_stirred()
        prune_base(model)
        change(next(a for a in adapters(model).values() if a.is_target))
        model.save_pretrained(tmp_path)
        return tmp_path

    for change, message in (
        (lambda a: a.indices[0].fill_(-1), "index -1"),
        (lambda a: a.indices[0].copy_(a.indices[1]), "twice"),
    ):
        with pytest.raises(InputError, match=message):
            petl.load(case.base(), saved(change))
    file = saved(lambda a: None) / "adapter_model.safetensors"
    tensors = load_file(file)
    lacking = dict(tensors)
    del lacking[next(k for k in lacking if k.endswith(".mask"))]
    save_file(lacking, file)
    with pytest.raises(InputError, match="1 missing"):
        petl.load(case.base(), tmp_path)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merging_unmerging_and_disabling_while_pruned(kind):
    fields = {**PRUNES}
    if kind == "gpt2":
        fields |= {"target_modules": ["c_attn"], "prune_modules": ["c_fc", "attn.c_proj"]}
    case = Case("dsee", kind, fields)
    base, batch = case.base().to(torch.bfloat16), case.batch()
    plain = logits(base, batch)
    model = case.wrap_stirred(base)
    assert all(p.dtype == torch.float32 for p in trainable(model).values())
    prune_base(model)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    expected = logits(model, batch)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), plain)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, batch), expected, rtol=0.1, atol=0.1)
    with pytest.raises(InputError):
        prune_base(model)
    changed = {k: layer.get_delta_weight("default") for k, layer in tuner_layers(model).items()}
    model.unmerge_adapter()
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    for key, layer in tuner_layers(model).items():
        assert torch.equal(layer.get_delta_weight("default"), changed[key])
    zeros = {k: a.pruned for k, a in adapters(model).items() if not a.is_target}
    merged = model.merge_and_unload()
    for key, count in zeros.items():
        assert int((merged.get_submodule(key).weight == 0).sum()) >= count


def test_several_adapters_switch_and_are_refused_together_once_one_prunes():
    case = Case("dsee", "llama", PRUNES)
    model, batch = case.wrap_stirred(), case.batch()
    model.add_adapter("second", case.config())
    tuner = model.base_model
    tuner.set_adapter("second")
    stir(model, "second", seed=5)
    tuner.set_adapter(["default", "second"])
    with pytest.raises(UnsupportedError):
        prune_base(model)
    tuner.set_adapter("second")
    rows = ["default", "second"] * 2
    mixed = logits(model, batch, adapter_names=rows)
    expected = logits(model, batch)
    torch.testing.assert_close(mixed[1::2], expected[1::2], rtol=1e-4, atol=1e-5)
    prune_base(model)
    assert not torch.equal(logits(model, batch), expected)
    for refused in (
        lambda: tuner.set_adapter(["default", "second"]),
        lambda: model.merge_adapter(["default", "second"]),
        lambda: logits(model, batch, adapter_names=rows),
    ):
        with pytest.raises(UnsupportedError):
            refused()
    tuner.set_adapter("default")
    torch.testing.assert_close(logits(model, batch)[::2], mixed[::2], rtol=1e-4, atol=1e-5)


class PrunedCase(Case):
    """A case whose stirred adapter prunes."""

    def wrap_stirred(self, base: nn.Module | None = None) -> PeftModel:
        model = super().wrap_stirred(base)
        prune_base(model)
        return model


DEPENDS_ON_MASKS = (
    "autocast_computes_the_same",
    "copies_are_the_same_and_apart",
    "disabled_adapters_give_the_base_model",
    "merging_and_unmerging_change_nothing",
    "merged_model_computes_the_same",
    "unloading_gives_the_plain_model",
    "every_trainable_tensor_gets_a_gradient",
    "accumulated_gradients_add_up",
    "two_forwards_before_one_backward",
    "training_forward_leaves_nothing_behind",
    "resumed_training_equals_a_straight_run",
)


@pytest.mark.cells(3)
@pytest.mark.parametrize("check", DEPENDS_ON_MASKS)
def test_contract_holds_while_weights_are_pruned(check):
    testing.run(check, PrunedCase("dsee", "llama", PRUNES))


def test_lora_plus_and_decay_know_its_tensors():
    model = Case("dsee", "bert", CONTRACT["fields"]).wrap()
    found = groups(model, TrainConfig(lr=1e-3, loraplus_ratio=4.0, weight_decay=0.1))
    by_name = {id(p): n for n, p in model.named_parameters()}
    of = {by_name[id(p)]: (g["lr"], g["weight_decay"]) for g in found for p in g["params"]}
    own = {n.rpartition(".")[2]: pair for n, pair in of.items() if "petl_dsee_" in n}
    assert own == {"lora_A": (1e-3, 0.1), "lora_B": (4e-3, 0.1), "values": (1e-3, 0.1)}


# Refusals


def test_step_to_prune_must_be_in_the_run(caplog):
    def attach(total: int | None, **fields: Any) -> None:
        model = Case("dsee", "llama", {**PRUNES, **fields}).wrap()
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
        lifecycle(model).attach_optimizer(optimizer, total_steps=total)

    with pytest.raises(InputError, match=r"prune_step=9 .* 8"):
        attach(8, prune_step=9)
    with pytest.raises(InputError):
        attach(None, prune_step=0.5)
    attach(None, prune_step=9)
    with caplog.at_level(logging.WARNING):
        attach(8)
    assert "nothing is pruned in this training" in caplog.text


def test_quantised_base_is_not_pruned():
    model = Case("dsee", "llama", PRUNES).wrap_stirred()
    model.base_model.model.is_loaded_in_4bit = True  # as transformers' loader sets it
    with pytest.raises(UnsupportedError):
        prune_base(model)
    base: Any = Case("dsee", "llama").base()
    base.is_loaded_in_8bit = True
    with pytest.raises(UnsupportedError):
        petl.wrap(base, "dsee", **PRUNES, prune_step=3)


def test_pictures_show_the_pruned_shares():
    model = Case("dsee", "llama", PRUNES).wrap_stirred()
    assert "pruned_weights" not in {m.name for m in lifecycle(model).heat_maps()}
    prune_base(model)
    maps = {m.name: m for m in lifecycle(model).heat_maps()}
    assert {"pruned_weights", "weight_change"} <= set(maps)
    found = maps["pruned_weights"]
    for row, cells in zip(found.rows, found.cells, strict=True):
        for layer, value in enumerate(cells):
            adapter = adapters(model)[f"model.layers.{layer}.{row}"]
            assert value == pytest.approx(100 * float((~keep_of(adapter)).float().mean()), rel=1e-4)


def test_masks_of_bits_match_the_contract():
    layer, model = layer_of(3, 5, r=1, num_sparse=2, target_prune_ratio=0.4, prune_mode="weight")
    prune_base(model)
    adapter = layer.adapters["default"]
    keep = keep_of(adapter)
    assert int((~keep).sum()) == 6
    bits = [int(b) for b in keep.flatten()]
    expected = [sum(b << k for k, b in enumerate(bits[i : i + 8])) for i in (0, 8)]
    assert adapter.mask.tolist() == expected
    assert torch.equal(pack_mask(keep), adapter.mask)
