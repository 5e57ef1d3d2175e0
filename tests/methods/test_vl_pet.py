"""VL-PET: outputs against explicit hooks, starts, padding, published counts, refusals."""

from dataclasses import replace

import pytest
import torch
from adapter_fixtures import adapters
from gates_by_hand import VALUES, gate_by_hand, network
from tiny_families import FAMILIES, K
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration

import petl
from petl import testing
from petl.errors import UnsupportedError

CONTRACT = {
    "fields": {"r": 8, "gate_rank": 4},
    "acts_with": {"gate": {"gate_rank": None}},
    "models": ["t5"],
    "lr": 2e-2,
    "starts_at_base": False,
    "refuses": ("both_adapters_can_be_active",),
    "excused": {
        "layers_that_are_never_called_are_refused": "it refuses that model: it has no decoder",
    },
}

GATES = ("large", "middle_x", "middle_y", "small", "none")
READING = ("large", "middle_x", "small")
SHAPES = {
    "large": {
        "gate_down_weight": (5, K),
        "gate_down_bias": (5,),
        "gate_up_weight": (K, 5),
        "gate_up_bias": (K,),
    },
    "middle_x": {"gate_weight": (1, K), "gate_bias": (1,)},
    "middle_y": {"gate_weight": (K,)},
    "small": {"gate_weight": (1, 2 * K), "gate_bias": (1,)},
    "none": {},
}
# values of another width than the encoder's output
NARROW = {name: FAMILIES[name] for name in ("bart", "whisper")} | {
    "t5": replace(FAMILIES["t5"], settings={**FAMILIES["t5"].settings, "d_kv": 4})
}


def encoder_parts(family) -> list[tuple[str, str]]:
    """The closing projection of each sub-layer of the encoder, and what gets its residual."""
    return [(end, residual) for _, end, _, residual in family.parts() if "encoder." in end]


def padded(family) -> dict[str, Tensor]:
    """Two rows, the second with two tokens of padding."""
    batch = family.batch()
    if "input_ids" in batch:
        batch["attention_mask"] = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    return batch


def by_hand(model: nn.Module, name: str, weights, gate: str, factor: float, mask) -> None:
    """An unwrapped model with hooks that compute the paper's formulas at listed modules."""
    family, seen = NARROW[name], {}

    def listen(path: str):
        def hook(module, args):
            seen[path] = args[0]

        return hook

    def close(path: str, residual: str):
        def hook(module, args, y):
            y1 = y + network(weights[path], y)
            return factor * gate_by_hand(gate, weights[path], seen[residual], y1, mask) * y1

        return hook

    def value(path: str):
        return lambda module, args, y: y + network(weights[path], args[0])

    for closing, residual in encoder_parts(family):
        model.get_submodule(residual).register_forward_pre_hook(listen(residual))
        model.get_submodule(closing).register_forward_hook(close(closing, residual))
    for i in range(2):
        path = VALUES[name].format(i)
        model.get_submodule(path).register_forward_hook(value(path))


@torch.no_grad()
def stirred(family, **fields):
    """A wrapped model with large random tensors in its adapters, and norms as they were."""
    torch.manual_seed(0)
    rank = {"gate_rank": 5} if fields.get("gate", "large") == "large" else {}
    model = petl.wrap(family.build(), "vl_pet", **{"r": 6, **rank, **fields}).eval()
    for adapter in adapters(model).values():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.4)
    return model


@pytest.mark.cells(3)
@torch.no_grad()
@pytest.mark.parametrize(
    ("gate", "identity"), [*((gate, False) for gate in GATES), *((gate, True) for gate in READING)]
)
@pytest.mark.parametrize("name", NARROW)
def test_outputs_equal_explicit_hooks(name, gate, identity):
    family = NARROW[name]
    model = stirred(family, gate=gate, identity_gate=identity, scaling=0.7, value_rank=3)
    weights = {path: dict(a.named_parameters()) for path, a in adapters(model).items()}
    values = [VALUES[name].format(i) for i in range(2)]
    assert set(weights) == {*(end for end, _ in encoder_parts(family)), *values}
    batch, base = padded(family), family.build()
    plain = family.outputs(base, **batch)
    doubled = 2 if identity and gate not in ("middle_y", "none") else 1
    by_hand(base, name, weights, gate, 0.7 * doubled, batch.get("attention_mask"))
    expected, out = family.outputs(base, **batch), family.outputs(model, **batch)
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(family.outputs(model, **batch), plain)


@pytest.mark.parametrize("gate", GATES)
def test_tensors_have_the_promised_names_and_shapes(gate):
    model = stirred(NARROW["t5"], gate=gate, value_rank=3)
    keys = model.state_dict()
    end = "base_model.model.encoder.block.1.layer.1.DenseReluDense.wo.petl_vl_pet_adapters.default."
    bottleneck = {
        "down_weight": (6, K),
        "down_bias": (6,),
        "up_weight": (K, 6),
        "up_bias": (K,),
    }
    found = {k.removeprefix(end): tuple(t.shape) for k, t in keys.items() if k.startswith(end)}
    assert found == {**bottleneck, **SHAPES[gate]}
    value = "base_model.model.decoder.block.0.layer.1.EncDecAttention.v.petl_vl_pet_adapters."
    found = {k.rpartition(".")[2]: tuple(t.shape) for k, t in keys.items() if k.startswith(value)}
    # 4 heads of width 4
    assert found == {
        "down_weight": (3, K),
        "down_bias": (3,),
        "up_weight": (16, 3),
        "up_bias": (16,),
    }


# Starts


@torch.no_grad()
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_the_identity_gate_starts_exactly_at_the_base(name):
    family = FAMILIES[name]
    fields = {"init_weights": "zero_up", "identity_gate": True}
    model = petl.wrap(family.build(), "vl_pet", **fields).eval()
    batch = padded(family)
    assert torch.equal(family.outputs(model, **batch), family.outputs(family.build(), **batch))


@torch.no_grad()
def test_zero_up_alone_starts_at_exactly_half_of_each_sublayer():
    family = FAMILIES["bart"]
    model = petl.wrap(family.build(), "vl_pet", init_weights="zero_up").eval()
    base, batch = family.build(), padded(family)
    for closing, _ in encoder_parts(family):
        base.get_submodule(closing).register_forward_hook(lambda module, args, y: y * 0.5)
    assert torch.equal(family.outputs(model, **batch), family.outputs(base, **batch))


def test_linear_starts_as_torch_does():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = petl.wrap(FAMILIES["bart"].build(), "vl_pet", r=256, gate="small")
    adapter = adapters(model)["model.encoder.layers.0.fc2"]
    for name, inputs in (("down", K), ("up", 256), ("gate", 2 * K)):
        bound = inputs**-0.5
        weight, bias = getattr(adapter, f"{name}_weight"), getattr(adapter, f"{name}_bias")
        assert 0.8 * bound < weight.abs().max() <= bound
        assert 0 < bias.abs().max() <= bound
    wide = petl.wrap(FAMILIES["bart"].build(), "vl_pet", gate="middle_y", init_weights="zero_up")
    starts = [a.gate_weight for p, a in adapters(wide).items() if "encoder.layers" in p]
    assert torch.cat(starts).std().item() == pytest.approx(0.02, rel=0.2)


# Counts


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("gate", "published"),
    [
        ("small", 2.98),
        *(
            pytest.param(*row, marks=pytest.mark.thorough)
            for row in (("large", 4.16), ("middle_x", 2.98), ("middle_y", 2.98))
        ),
    ],
)
def test_counts_of_bart_base(gate, published):
    """With the projection of image features that the paper trains beside: 1,581,312."""
    config = BartConfig(
        d_model=768,
        encoder_layers=6,
        decoder_layers=6,
        encoder_attention_heads=12,
        decoder_attention_heads=12,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        vocab_size=10,
    )

    def wrapped(**fields) -> nn.Module:
        with torch.device("meta"):
            return petl.wrap(BartForConditionalGeneration(config), "vl_pet", gate=gate, **fields)

    total = count(wrapped())
    values = 6 * (2 * 768 * 96 + 96 + 768)
    assert values == 889_920
    assert count(wrapped(value_rank=0)) == total - values
    assert count(wrapped(train_encoder_norms=False)) == total - 13 * 1536
    if gate == "large":
        assert total - values - 13 * 1536 == 3_559_680
    added = total + 1_581_312
    assert round(100 * added / (139_420_416 + added), 2) == published


def test_null_ranks_are_r_and_zero_leaves_the_decoder_alone():
    family = FAMILIES["t5"]
    widths = {p: a.down_weight.shape[0] for p, a in adapters(stirred(family, r=7)).items()}
    assert set(widths.values()) == {7}
    wrapped = petl.wrap(family.build(), "vl_pet", r=7)
    gated = [a for path, a in adapters(wrapped).items() if path.startswith("encoder")]
    assert {a.gate_down_weight.shape for a in gated} == {(7, K)}
    alone = adapters(stirred(family, value_rank=0))
    assert {path.partition(".")[0] for path in alone} == {"encoder"}


def test_layers_to_transform_and_exclude_modules_choose_some():
    family = FAMILIES["bart"]
    chosen = adapters(stirred(family, layers_to_transform=[1], exclude_modules=["fc2"]))
    assert set(chosen) == {
        "model.encoder.layers.1.self_attn.out_proj",
        "model.decoder.layers.1.encoder_attn.v_proj",
    }


# Norms


@pytest.mark.parametrize(("name", "expected"), [("bart", 5), ("t5", 5)])
def test_norms_of_the_encoder_train_and_come_back(name, expected, tmp_path):
    family = FAMILIES[name]
    model = stirred(family)
    norms = {n for n, p in model.named_parameters() if p.requires_grad and "norm" in n}
    modules = {n.partition(".modules_to_save")[0] for n in norms}
    assert len(modules) == expected
    assert all("encoder." in n for n in modules)
    testing.stir(model)
    batch = padded(family)
    with torch.no_grad():  # torch may choose another kernel for attention with gradients
        out, plain = family.outputs(model, **batch), family.outputs(family.build(), **batch)
        with model.disable_adapter():
            assert torch.equal(family.outputs(model, **batch), plain)
        model.save_pretrained(tmp_path)
        again = petl.load(family.build(), tmp_path).eval()
        assert torch.equal(family.outputs(again, **batch), out)


# The gate of a row


@torch.no_grad()
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_padding_does_not_change_small_also_in_generation(name):
    family = FAMILIES[name]
    model = stirred(family, gate="small")
    ids = family.batch()["input_ids"]
    padded_ids = torch.cat([ids, torch.full((2, 5), 7)], 1)
    mask = torch.cat([torch.ones(2, 6), torch.zeros(2, 5)], 1).long()
    start = {"decoder_input_ids": ids.flip(0)}
    short = family.outputs(model, input_ids=ids, **start)
    long = family.outputs(model, input_ids=padded_ids, attention_mask=mask, **start)
    torch.testing.assert_close(long, short, rtol=1e-4, atol=1e-5)
    # without the mask, padding counts as tokens
    assert (family.outputs(model, input_ids=padded_ids, **start) - short).abs().max() > 1e-3
    # generation calls the encoder itself
    encoder = model.base_model.model.get_encoder()
    alone = encoder(ids).last_hidden_state
    for args, kwargs in (((padded_ids,), {"attention_mask": mask}), ((padded_ids, mask), {})):
        states = encoder(*args, **kwargs).last_hidden_state[:, :6]
        torch.testing.assert_close(states, alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("gate", ["small", "large"])
def test_mixed_batches_equal_each_adapter_alone(gate):
    family = FAMILIES["t5"]
    model = stirred(family, gate=gate)
    model.add_adapter("other", model.peft_config["default"])
    for name in ("default", "other"):  # norms too
        model.set_adapter(name)
        testing.stir(model, name, seed=len(name))
    batch = {k: torch.cat([v, v.flip(0)]) for k, v in padded(family).items()}
    names = ["other", "default", "default", "other"]
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = family.outputs(model, **batch)
    with pytest.raises(UnsupportedError):
        model.base_model.set_adapter(["default", "other"])
    mixed = family.outputs(model, adapter_names=names, **batch)
    for i, name in enumerate(names):
        torch.testing.assert_close(mixed[i], alone[name][i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_small_recomputes_with_the_mask_of_its_forward_pass(reentrant):
    """An evaluation between forward and backward pass has another mask."""
    family, results = FAMILIES["bart"], []
    batch = padded(family)
    for checkpoints in (False, True):
        model = stirred(family, gate="small").train()
        for module in model.modules():
            for name in ("dropout", "activation_dropout"):  # numbers, in BART
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        if checkpoints:
            model.enable_input_require_grads()
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        out = family.outputs(model, **batch)
        with torch.no_grad():
            family.outputs(model, **{**batch, "attention_mask": torch.ones(2, 6)})
        out.square().sum().backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    plain, recomputed = results
    for name, grad in plain.items():
        torch.testing.assert_close(recomputed[name], grad, rtol=1e-3, atol=1e-3)


# Refusals


def test_targets_may_be_values_of_cross_attention_alone():
    only = petl.wrap(FAMILIES["t5"].build(), "vl_pet", target_modules=["EncDecAttention.v"])
    assert set(adapters(only)) == {VALUES["t5"].format(i) for i in range(2)}
