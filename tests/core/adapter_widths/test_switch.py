"""The first k components of an adapter alone, against the method's equation written out."""

import math

import pytest
import torch
from torch.nn import functional as F

import petl
from petl import testing
from petl.errors import InputError, UnsupportedError

CASES = {
    "lora": ("lora", {"r": 6, "lora_alpha": 5}),
    "rslora": ("rslora", {"r": 6, "lora_alpha": 5}),
    "lora by pattern": ("lora", {"r": 6, "rank_pattern": {"q_proj": 3}, "lora_alpha": 5}),
    "mola": ("mola", {"r": 6, "num_experts": 3, "lora_alpha": 5}),
    "adapter": ("adapter", {"r": 6}),
    "compacter": ("compacter", {"r": 12, "phm_dim": 2}),
    "compacter of full terms": ("compacter", {"r": 12, "phm_dim": 2, "factorized_phm": False}),
    "low-rank adapter": ("compacter", {"r": 12, "projection": "lowrank", "phm_rank": 2}),
}


def wrapped(case, **more):
    name, fields = CASES[case]
    model = petl.wrap(testing.tiny_llama(), name, task_type="CAUSAL_LM", **fields, **more)
    return testing.stir(model).eval()


def adapted(model):
    """The first layer with an adapter, and the adapter."""
    layer = next(m for m in model.modules() if hasattr(m, "base_layer"))
    return layer, None if hasattr(layer, "lora_A") else layer.adapters["default"]


def of_lora(layer, x, k, scale):
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    r, k = len(A), min(k, len(A))
    root = math.sqrt if layer.use_rslora["default"] else float
    s = 5 / root(r if scale == "full" else k)
    return layer.base_layer(x) + s * sum(torch.outer(x @ A[i], B[:, i]) for i in range(k))


def of_mola(adapter, y, x, k, scale):
    E, R = adapter.num_experts, adapter.rank
    A, B = adapter.lora_A.view(E, R, -1), adapter.lora_B.view(-1, E, R)
    out = []
    for token, start in zip(x, y, strict=True):
        value, picked = (adapter.router @ token).topk(2)
        gate = value.softmax(0)
        update = sum(
            g * (B[:, e, :k] @ (A[e, :k] @ token)) for g, e in zip(gate, picked, strict=True)
        )
        out.append(start + 5 / (R if scale == "full" else k) * update)
    return torch.stack(out)


def of_adapter(adapter, y, k):
    D, d, U = adapter.down_weight[:k], adapter.down_bias[:k], adapter.up_weight[:, :k]
    return y + F.gelu(y @ D.t() + d) @ U.t() + adapter.up_bias


def of_compacter(adapter, y, k):
    """With the matrices of the whole adapter, of which the units of each block are taken."""
    N, D = (2, 12) if adapter.config.projection == "phm" else (1, 12)
    sides = {}
    for side in ("down", "up"):
        if N == 1:
            sides[side] = getattr(adapter, f"{side}_left") @ getattr(adapter, f"{side}_right")
            continue
        weight = getattr(adapter, f"{side}_weight", None)
        if weight is None:
            weight = getattr(adapter, f"{side}_left") @ getattr(adapter, f"{side}_right")
        sides[side] = sum(torch.kron(adapter.rule(side)[n], weight[n]) for n in range(N))
    units = [block * D // N + i for block in range(N) for i in range(k // N)]
    inner = y @ sides["down"][:, units] + adapter.down_bias[units]
    return y + F.gelu(inner, approximate="tanh") @ sides["up"][units] + adapter.up_bias


def written_out(layer, adapter, x, k, scale):
    if adapter is None:
        return of_lora(layer, x, k, scale)
    y = layer.base_layer(x)
    if adapter.config.method == "mola":
        return of_mola(adapter, y, x, k, scale)
    return (of_adapter if adapter.config.method == "adapter" else of_compacter)(adapter, y, k)


@pytest.mark.parametrize("scale", ["full", "width"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_layer_computes_with_the_first_k_components(case, scale):
    model = wrapped(case)
    layer, adapter = adapted(model)
    x = torch.randn(4, layer.in_features)
    before = layer(x)
    for k in (2, 4):
        with petl.at_width(model, k, scale):
            found = layer(x)
        torch.testing.assert_close(found, written_out(layer, adapter, x, k, scale))
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("case", CASES)
def test_the_full_width_is_the_model_itself_also_after_an_error(case):
    model, batch = wrapped(case), testing.TINY_MODELS["llama"].batch()
    full = testing.logits(model, batch)
    with petl.at_width(model, 12 if "ompacter" in case or "low" in case else 6, "width"):
        assert torch.equal(testing.logits(model, batch), full)
    with petl.at_width(model, 2):
        assert not torch.equal(testing.logits(model, batch), full)
    with pytest.raises(ValueError, match="input_ids"), petl.at_width(model, 2):
        model()
    assert torch.equal(testing.logits(model, batch), full)


@pytest.mark.parametrize("case", ["lora", "mola", "adapter", "compacter"])
def test_only_the_first_components_get_a_gradient(case):
    model = wrapped(case).train()
    with petl.at_width(model, 4):
        model(**testing.TINY_MODELS["llama"].batch()).loss.backward()
    layer, adapter = adapted(model)
    part = "up_left" if case == "compacter" else "up_weight" if case == "adapter" else "lora_B"
    tensor = layer.lora_B["default"].weight if adapter is None else getattr(adapter, part)
    grad = tensor.grad
    if case == "mola":
        grad = grad.unflatten(1, (3, 6)).flatten(0, 1)
    columns = grad.abs().amax((0, 2)) if case == "compacter" else grad.abs().amax(0)
    kept = 2 if case == "compacter" else 4  # of each of two blocks
    assert bool((columns[:kept] > 0).all())
    assert not columns[kept:].any()


def test_dora_divides_by_the_norm_of_the_cut_update():
    model = petl.wrap(testing.tiny_llama(), "dora", r=6, lora_alpha=5, task_type="CAUSAL_LM")
    testing.stir(model).eval()
    layer, _ = adapted(model)
    x, k = torch.randn(3, layer.in_features), 2
    A, B = layer.lora_A["default"].weight[:k], layer.lora_B["default"].weight[:, :k]
    weight = layer.base_layer.weight + 5 / 6 * B @ A
    m = layer.lora_magnitude_vector["default"].weight
    with torch.no_grad(), petl.at_width(model, k):
        found = layer(x)
    torch.testing.assert_close(found, x @ (m[:, None] * weight / weight.norm(dim=1)[:, None]).t())


def test_a_fused_layer_computes_at_a_width_too():
    model, batch = wrapped("lora"), testing.TINY_MODELS["llama"].batch()
    with petl.at_width(model, 2):
        expected = testing.logits(model, batch)
    petl.fuse_lora(model)
    with petl.at_width(model, 2):
        torch.testing.assert_close(testing.logits(model, batch), expected)


def test_the_random_state_stays():
    model = wrapped("mola")
    before = torch.get_rng_state()
    with petl.at_width(model, 3):
        pass
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("method", "fields", "reason"),
    [
        ("increlora", {}, "by importance"),
        ("mos", {"r": 2, "equivalent_rank": 2, "shards_per_vector": 2}, "pools"),
        ("binary", {"inner": "lora"}, "one mean and deviation"),
        ("lora", {"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ("adapter", {"block": "conformer", "r": 4}, "conformer"),
        ("sparse", {}, "no order"),
        ("pst", {}, "no order"),
        ("pela", {}, "no order"),
        ("ia3", {}, "no order"),
        ("vera", {}, "no order"),
    ],
)
def test_an_adapter_without_an_order_is_refused_with_the_reason(method, fields, reason):
    base = testing.TINY_MODELS["bert" if method == "adapter" else "llama"].base()
    model = petl.wrap(base, method, **fields)
    with pytest.raises(UnsupportedError, match=reason), petl.at_width(model, 1):
        pass


@pytest.mark.parametrize("k", [0, 7, 2.0, True])
def test_a_width_out_of_range_is_refused(k):
    with pytest.raises(InputError, match=r"1\.\.6"), petl.at_width(wrapped("lora"), k):
        pass


def test_other_wrong_uses_are_refused():
    model = wrapped("lora")
    for other, scale, words in (
        (wrapped("compacter"), "width", "width=3"),
        (model, "half", "half"),
    ):
        with pytest.raises(InputError, match=words), petl.at_width(other, 3, scale):
            pass
    model.merge_adapter()
    with pytest.raises(InputError), petl.at_width(model, 3):
        pass
    model.unmerge_adapter()
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(InputError), petl.at_width(model, 3):
        pass
