"""Gates of bottleneck adapters and the location `value`: hooks by hand, starts, refusals."""

import pytest
import torch
from adapter_fixtures import adapters, listen
from gates_by_hand import VALUES, gate_by_hand, network
from tiny_families import FAMILIES, K
from torch import Tensor, nn
from torch.nn import functional as F

import petl
from petl import testing
from petl.errors import InputError, UnsupportedError

GATES = ("large", "middle_x", "middle_y", "small")


def by_hand(model: nn.Module, family, weights, gate: str, placement: str, mask=None) -> None:
    """An unwrapped model with hooks: 2 g (y + 0.5 f(h)), g of the residual stream."""
    seen: dict[str, Tensor] = {}

    def close(path: str, residual: str):
        def hook(module, args, y):
            w, x = weights[path], seen[residual]
            y1 = y + 0.5 * network(w, y if placement == "sequential" else x, F.gelu)
            g = gate_by_hand(gate, w, x, y1, mask, F.gelu)
            return (1 if gate == "middle_y" else 2) * g * y1

        return hook

    for _, closing, _, residual in family.parts():
        if closing in weights:
            module = model.get_submodule(residual)
            module.register_forward_pre_hook(listen(seen, residual), with_kwargs=True)
            model.get_submodule(closing).register_forward_hook(close(closing, residual))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "gate", "placement"),
    [
        *(("llama", gate, "sequential") for gate in GATES[:3]),
        *(("bert", gate, "parallel_residual") for gate in GATES),
        ("vit", "small", "sequential"),
        ("mixtral", "large", "sequential"),
        ("phi", "large", "sequential"),
        ("dinov2", "middle_x", "parallel_residual"),
        ("wav2vec2", "large", "sequential"),
    ],
)
def test_families_equal_explicit_hooks(name, gate, placement):
    family = FAMILIES[name]
    fields = {"r": 4, "placement": placement, "scaling": 0.5, "gate": gate}
    model = petl.wrap(family.build(), "adapter", **fields).eval()
    base, batch = family.build(), family.batch()
    mask = None
    if name == "bert":
        batch["attention_mask"] = mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    plain = family.outputs(base, **batch)
    # zero_up with a doubled gate of zero logits: the base model's outputs
    assert torch.equal(family.outputs(model, **batch), plain)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.normal_(std=0.4)
    weights = {path: dict(a.named_parameters()) for path, a in adapters(model).items()}
    assert all("gate_weight" in w or "gate_up_weight" in w for w in weights.values())
    by_hand(base, family, weights, gate, placement, mask)
    expected = family.outputs(base, **batch)
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(family.outputs(model, **batch), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_value_is_parallel_to_the_values_of_cross_attention(name):
    family = FAMILIES[name]
    fields = {"r": 4, "locations": ["ffn", "value"], "scaling": 0.5, "layers_to_transform": [1]}
    model = petl.wrap(family.build(), "adapter", gate="middle_y", **fields).eval()
    base, batch = family.build(), family.batch()
    assert torch.equal(family.outputs(model, **batch), family.outputs(base, **batch))
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.normal_(std=0.4)
    weights = {path: dict(a.named_parameters()) for path, a in adapters(model).items()}
    value = VALUES[name].format(1)
    assert set(weights[value]) == {"down_weight", "down_bias", "up_weight", "up_bias"}
    by_hand(
        base, family, {k: w for k, w in weights.items() if k != value}, "middle_y", "sequential"
    )
    base.get_submodule(value).register_forward_hook(
        lambda module, args, y: y + 0.5 * network(weights[value], args[0], F.gelu)
    )
    expected = family.outputs(base, **batch)
    torch.testing.assert_close(family.outputs(model, **batch), expected, rtol=1e-4, atol=1e-4)
    ids = {"input_ids": batch["input_ids"], "max_new_tokens": 5, "decoder_start_token_id": 0}
    cached, plain = (model.generate(**ids, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(cached, plain)


def test_gates_and_values_are_saved_and_stay_apart_from_explicit_targets(tmp_path):
    family = FAMILIES["t5"]
    fields = {"r": 4, "gate": "large", "gate_rank": 3, "locations": ["ffn", "value"]}
    model = testing.stir(petl.wrap(family.build(), "adapter", **fields)).eval()
    model.save_pretrained(tmp_path)
    again = petl.load(family.build(), tmp_path).eval()
    batch = family.batch()
    assert torch.equal(family.outputs(again, **batch), family.outputs(model, **batch))
    # named without the location, a value projection has a sequential adapter as any projection
    plain = petl.wrap(family.build(), "adapter", r=4, target_modules=["EncDecAttention.v"])
    assert {a.placement for a in adapters(plain).values()} == {"sequential"}


@torch.no_grad()
@pytest.mark.parametrize("gate", GATES)
def test_rows_of_several_adapters_equal_each_alone(gate):
    family, config = FAMILIES["bert"], {"r": 4, "gate": gate}
    model = petl.wrap(family.build(), "adapter", **config).eval()
    model.add_adapter("other", petl.build_config("adapter", **config))
    batch, alone = family.batch(rows=4), {}
    batch["attention_mask"] = (torch.arange(6) < torch.tensor([[6], [4], [3], [5]])).long()
    for name in ("default", "other"):
        model.set_adapter(name)
        testing.stir(model, name, seed=len(name))
        alone[name] = family.outputs(model, **batch)
    names = ["other", "default", "other", "default"]
    mixed = family.outputs(model, adapter_names=names, **batch)
    for i, name in enumerate(names):
        torch.testing.assert_close(mixed[i], alone[name][i], rtol=1e-4, atol=1e-5)


def test_saved_activations_are_those_of_the_equation():
    """Of a site, backward keeps y, y1, the gate and two activations of each bottleneck."""
    D, E, N = 4, 3, 10
    model = petl.wrap(FAMILIES["bert"].build(), "adapter", r=D, gate="large", gate_rank=E)
    adapter = next(iter(adapters(model).values()))
    x, y = (torch.randn(1, N, K, requires_grad=True) for _ in range(2))
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // 4
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        adapter(x, y)
    weights = {p.untyped_storage().data_ptr() for p in adapter.parameters()}
    kept = sum(n for at, n in sizes.items() if at not in weights and n != x.numel())
    wide = sum(1 for at, n in sizes.items() if at not in weights and n == x.numel())
    assert wide <= 4  # x, y, y1, gate
    assert kept <= N * (2 * D + 2 * E)


def test_merging_a_gate_and_masks_of_other_tokens_are_refused():
    model = petl.wrap(FAMILIES["bert"].build(), "adapter", gate="small")
    with pytest.raises(UnsupportedError):
        model.merge_adapter()
    # a mask of other tokens than those of the layers
    wave = FAMILIES["wav2vec2"]
    model = petl.wrap(wave.build(), "adapter", gate="small").eval()
    with pytest.raises(InputError):
        wave.outputs(model, **wave.batch(), attention_mask=torch.ones(2, 400))
