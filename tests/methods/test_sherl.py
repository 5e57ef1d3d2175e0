"""SHERL: the fusion and its place against explicit loops, saved memory, counts, refusals."""

import pytest
import torch
from tiny_families import FAMILIES
from torch import Tensor, nn
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

import petl
from petl import testing
from petl.errors import InputError

CONTRACT = {
    # width / 8 is 8 here, where the start of some of these models leaves all scores at 0
    "fields": {"r": 16},
    "lr": 2e-2,
    "starts_at_base": False,
    "refuses": ("both_adapters_can_be_active",),
    "excused": {
        "layer_compiles_whole": "hooks of the model's blocks compute it, not the layer alone",
        "layers_that_are_never_called_are_refused": "it refuses all target_modules that are given",
    },
    "acts_with": {"reduction_factor": {"r": None}, "side_layers": {"side_layers": [0]}},
    "idle": {"encoder_memory": "a decoder has no encoder"},
}


def parts_by_hand(w: dict[str, Tensor], features: list[Tensor]) -> list[Tensor]:
    """a_i z_i of the tiers, then z_g, of the features [K] of one token; the paper's equations."""
    z = []
    for i, feature in enumerate(features):
        u = (w["down_weight"][i] @ feature + w["down_bias"][i]).clamp(min=0)
        gate = torch.sigmoid(w["gate_weight"][i] @ u + w["gate_bias"][i])
        z.append((w["mix_weight"][i] @ u + w["mix_bias"][i] + u) * gate)
    guide, tiers = z[-1], z[:-1]
    e = [tier / (tier.norm() + 1e-6) for tier in tiers]
    a = []
    for i, tier in enumerate(tiers):
        redundancy = sum((e[i] @ other).clamp(min=0) for other in e)
        score = (w["score_weight"][0] @ (tier * guide) + w["score_bias"][0]).clamp(min=0)
        a.append(score / redundancy)
    total = sum(a) + 1e-6
    return [*(weight / total * tier for weight, tier in zip(a, tiers, strict=True)), guide]


def by_hand(w: dict[str, Tensor], features: list[Tensor], last: Tensor) -> Tensor:
    """y of the paper's equations, token by token."""
    out = torch.empty_like(last)
    q = torch.tanh(w["residual_gate"] / 0.1)
    for n in range(last.shape[0]):
        for t in range(last.shape[1]):
            f = sum(parts_by_hand(w, [feature[n, t] for feature in features]))
            out[n, t] = w["up_weight"] @ f.clamp(min=0) + w["up_bias"] + q * last[n, t]
    return out


def first(output):
    return output[0] if isinstance(output, tuple) else output


def collect(model: nn.Module, stack: str, sides: list[int], store: dict) -> None:
    """Hooks that store the features of a stack of a plain model."""
    blocks = model.get_submodule(stack)

    def start(module, args):
        store[stack] = [args[0]]

    blocks[0].register_forward_pre_hook(start)
    for i in sides:
        blocks[i].register_forward_hook(lambda m, a, out: store[stack].append(first(out)))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "stack", "fields"),
    [
        ("llama", "model.layers", {"side_layers": [1, 2]}),
        ("bert", "bert.encoder.layer", {"late_layers": 2}),
        ("vit", "vit.layers", {"reduction_factor": 16}),
    ],
)
def test_a_stack_equals_explicit_loops(name, stack, fields):
    build = getattr(testing, f"tiny_{name}")
    model = testing.stir(petl.wrap(build(layers=4), "sherl", **fields).eval())
    late = 4 - fields.get("late_layers", 1)
    (adapter,) = model.base_model.placed["default"].values()
    base, store = build(layers=4), {}
    collect(base, stack, fields.get("side_layers", range(late)), store)

    def feed(module, args):
        return (by_hand(dict(adapter.named_parameters()), store[stack], args[0]), *args[1:])

    batch = testing.TINY_MODELS[name].batch()
    plain = base(**batch).logits
    base.get_submodule(stack)[late].register_forward_pre_hook(feed)
    expected = base(**batch).logits
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(model(**batch).logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("reads_encoder", [True, False])
def test_late_blocks_of_a_decoder_see_the_memory(reads_encoder):
    fields = {"late_layers": 2, "encoder_memory": reads_encoder}
    model = testing.stir(petl.wrap(testing.tiny_t5(layers=4), "sherl", **fields).eval())
    placed = model.base_model.placed["default"]
    assert set(placed) == {"decoder.block.2", *(["encoder.block.3"] if reads_encoder else [])}
    base, store = testing.tiny_t5(layers=4), {}
    collect(base, "decoder.block", [0, 1], store)
    collect(base, "encoder.block", [0, 1, 2, 3], store)
    weights = {path: dict(adapter.named_parameters()) for path, adapter in placed.items()}

    def memory(module, args, output):
        w = weights["encoder.block.3"]
        y = by_hand(w, store["encoder.block"], first(output))
        scale = (y.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
        store["memory"] = y * scale * w["norm_weight"]

    def feed(module, args):
        x = args[0]
        if module is base.decoder.block[2]:
            x = by_hand(weights["decoder.block.2"], store["decoder.block"], x)
        seen = store.get("memory", args[3])  # T5 passes the encoder's output as the fourth
        return (x, *args[1:3], seen, *args[4:])

    if reads_encoder:
        base.encoder.block[3].register_forward_hook(memory)
    for i in (2, 3):
        base.decoder.block[i].register_forward_pre_hook(feed)
    batch = testing.TINY_MODELS["t5"].batch()
    expected = base(**batch).logits
    torch.testing.assert_close(model(**batch).logits, expected, atol=1e-4, rtol=1e-4)


def saved_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Bytes that autograd keeps of one training forward, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.train()(**batch).loss
    loss.backward()
    return sum(storages.values())


def test_saved_bytes_do_not_depend_on_depth_or_on_inputs_that_require_gradients():
    batch = testing.TINY_MODELS["llama"].batch()
    found = []
    for layers, hooked in ((4, False), (10, False), (10, True)):
        model = petl.wrap(testing.tiny_llama(layers), "sherl", side_layers=[0, 1])
        if hooked:
            model.enable_input_require_grads()
        found.append(saved_bytes(model, batch))
    # caches of positions and other small tensors aside
    assert max(found) <= 1.02 * min(found), found
    lora = petl.wrap(testing.tiny_llama(10), "lora", target_modules="block-linear")
    assert max(found) < 0.5 * saved_bytes(lora, batch)


@pytest.mark.thorough
def test_counts_of_minilm_and_t5_base():
    def count(model: nn.Module, **fields) -> int:
        wrapped = petl.wrap(model, "sherl", **fields)
        return sum(p.numel() for p in wrapped.parameters() if p.requires_grad)

    with torch.device("meta"):
        bert = BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=8,
            vocab_size=10,
        )  # fmt: skip
        assert count(BertModel(bert)) == 157_970
        assert count(BertModel(bert), late_layers=2) == 134_786
        t5 = T5Config(d_model=768, d_kv=2, d_ff=4, num_layers=12, num_heads=2, vocab_size=10)
        sides = {"side_layers": [1, 2, 3, 5, 6, 7, 9, 10, 11], "train_final_norm": True}
        for factor, expected in ((8, 1_907_236), (4, 4_511_812), (2, 11_822_212)):
            model = T5ForConditionalGeneration(t5)
            assert count(model, reduction_factor=factor, **sides) == expected


def test_tiers_of_zeros_give_no_nan():
    model = petl.wrap(testing.tiny_llama(), "sherl", side_layers=[0, 1])
    (adapter,) = model.base_model.placed["default"].values()
    with torch.no_grad():
        for name in ("down_weight", "down_bias", "mix_bias"):
            getattr(adapter, name).zero_()
    model.train()(**testing.TINY_MODELS["llama"].batch()).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


def test_cached_generation_with_beams_equals_uncached():
    family = FAMILIES["t5"]
    model = testing.stir(petl.wrap(family.build(), "sherl")).eval()
    settings = {"max_new_tokens": 6, "num_beams": 3, "decoder_start_token_id": 2}
    ids = family.batch()["input_ids"]
    cached, plain = (
        model.generate(input_ids=ids, use_cache=use, **settings) for use in (True, False)
    )
    assert torch.equal(cached, plain)


def test_unloading_restores_a_norm_that_trained():
    tiny = testing.TINY_MODELS["llama"]
    batch = tiny.batch()
    model = petl.wrap(tiny.base(), "sherl", train_final_norm=True).eval()
    testing.stir(model)
    assert not torch.equal(model.base_model.model.model.norm.weight, tiny.base().model.norm.weight)
    plain = model.unload()
    assert torch.equal(testing.logits(plain, batch), testing.logits(tiny.base(), batch))


@pytest.mark.thorough
@torch.no_grad()
def test_adapters_with_other_plans_share_the_block_that_holds_them():
    family = FAMILIES["t5"]
    batch = family.batch()
    plans = {"one": {"side_layers": [0]}, "all": {}, "alone": {"encoder_memory": False}}

    def add(model: nn.Module | None, name: str):
        torch.manual_seed(3)
        if model is None:
            return petl.wrap(family.build(), "sherl", adapter_name=name, **plans[name]).eval()
        model.add_adapter(name, petl.build_config("sherl", **plans[name]))
        return model

    expected = {name: testing.logits(add(None, name), batch) for name in plans}
    model = None
    for name in plans:
        model = add(model, name)
    for name in (*plans, "one"):
        model.set_adapter(name)
        assert torch.equal(testing.logits(model, batch), expected[name]), name
    model.delete_adapter("all")
    plans["all"] = plans["one"]  # another plan under the name of a deleted adapter
    add(model, "all").set_adapter("all")
    assert torch.equal(testing.logits(model, batch), expected["one"])


@torch.no_grad()
def test_outputs_of_an_encoder_that_has_not_run_raise():
    family = FAMILIES["t5"]
    model, batch = petl.wrap(family.build(), "sherl").eval(), family.batch()
    known = {
        "encoder_outputs": model.get_encoder()(batch["input_ids"]),
        "decoder_input_ids": batch["input_ids"],
    }
    assert model(**known).logits.isfinite().all()
    with model.disable_adapter():  # its pass of the encoder has no memory
        model(**batch)
    with pytest.raises(InputError):
        model(**known)
    rows = len(batch["input_ids"])
    model.get_encoder()(batch["input_ids"][:1].expand(rows + 1, -1))
    with pytest.raises(InputError, match=f"{rows} rows.* {rows + 1} rows"):
        model(**known)


@pytest.mark.thorough
def test_it_starts_as_linear_layers_of_torch_do():
    drawn: dict[str, list[Tensor]] = {}
    for seed in range(16):
        torch.manual_seed(seed)
        (adapter,) = petl.wrap(testing.tiny_llama(), "sherl").base_model.placed["default"].values()
        for name, parameter in adapter.named_parameters():
            drawn.setdefault(name, []).append(parameter.detach().flatten())
    assert not torch.cat(drawn.pop("residual_gate")).any()
    for name, parts in drawn.items():
        values, bound = torch.cat(parts), (64 if name.startswith("down") else 8) ** -0.5
        assert values.abs().max() <= bound, name
        # a uniform distribution; the bounds are three standard deviations of 16 values
        assert abs(values.mean()) < 0.45 * bound, name
        assert abs(values.abs().mean() - bound / 2) < 0.25 * bound, name


def test_scores_below_zero_leave_the_guide_alone():
    model, batch = petl.wrap(testing.tiny_llama(), "sherl"), testing.TINY_MODELS["llama"].batch()
    (adapter,) = model.base_model.placed["default"].values()
    with torch.no_grad():
        adapter.score_bias.fill_(-9)
    model(**batch).loss.backward()
    of_tiers = adapter.down_weight.grad.abs().amax((1, 2))
    assert not of_tiers[:-1].any()
    assert of_tiers[-1] > 0
    assert not adapter.score_weight.grad.any()
    logits = testing.logits(model, batch)
    with torch.no_grad():
        adapter.mix_weight[:-1].normal_()
    assert torch.equal(testing.logits(model, batch), logits)


@pytest.mark.thorough
def test_the_heat_map_shows_the_parts_of_the_sum_without_padding():
    model = testing.stir(
        petl.wrap(testing.tiny_bert(layers=4), "sherl", side_layers=[0, 2]).train()
    )
    assert petl.lifecycle(model).heat_maps() == []
    base, store = testing.tiny_bert(layers=4), {}
    collect(base, "bert.encoder.layer", [0, 2], store)
    batch = testing.TINY_MODELS["bert"].batch()
    mask = torch.ones_like(batch["input_ids"])
    mask[0, 2:] = 0
    batch["attention_mask"] = mask
    base(**batch)
    model(**batch)
    (adapter,) = model.base_model.placed["default"].values()
    sizes = torch.zeros(3)
    for n, t in mask.nonzero().tolist():
        parts = parts_by_hand(
            dict(adapter.named_parameters()), [x[n, t] for x in store["bert.encoder.layer"]]
        )
        sizes += torch.stack([part.detach().norm() for part in parts])
    model.eval()(**batch)  # which is no training
    (shown,) = petl.lifecycle(model).heat_maps()
    assert (shown.rows, shown.columns) == (["bert.encoder.layer"], ["input", "0", "2"])
    expected = (100 * sizes / sizes.sum()).tolist()
    assert shown.cells[0] == pytest.approx(expected, rel=1e-4)
    model.add_adapter("other", petl.build_config("sherl", side_layers=[1]))
    model.set_adapter("other")  # which has not been trained
    assert petl.lifecycle(model).heat_maps() == []


@pytest.mark.thorough
def test_an_encoder_shorter_than_the_blocks_that_are_read_raises():
    config = testing.tiny_t5().config
    config.num_layers, config.num_decoder_layers = 2, 4
    with pytest.raises(InputError):
        petl.wrap(T5ForConditionalGeneration(config), "sherl", side_layers=[2])
    petl.wrap(T5ForConditionalGeneration(config), "sherl", side_layers=[2], encoder_memory=False)


def test_models_that_leave_out_blocks_are_refused_for_training(tmp_path):
    petl.wrap(FAMILIES["bart"].build(), "sherl").save_pretrained(tmp_path)
    model = FAMILIES["bart"].build()
    model.config.decoder_layerdrop = 0.5
    with pytest.raises(InputError):
        petl.wrap(model, "sherl")
    petl.load(model, tmp_path)  # in evaluation all blocks run


def test_models_that_do_not_fit_raise(tmp_path):
    t5 = testing.tiny_t5()
    nameless = type("Nameless", (type(t5.decoder.block[0]),), {})
    nameless.forward = lambda self, x, memory=None: x
    for block in t5.decoder.block:
        block.__class__ = nameless
    with pytest.raises(InputError, match="x, memory"):
        petl.wrap(t5, "sherl")
    petl.wrap(testing.tiny_llama(), "sherl").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="late_layers=1"):
        petl.load(testing.tiny_llama(4), tmp_path)
