"""MoLA's experts and routing: against loops written from its equations, counts, errors.

Shapes: I in, O out, R rank of one expert, E experts, K picked, T tokens.
"""

import math

import pytest
import torch
from mola_fixtures import (
    I,
    O,
    Stack,
    adapter_of,
    balance_by_loop,
    double,
    experts_by_loop,
    softmax,
    wrap_stack,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import petl
from petl import testing
from petl.testing import Case

CONTRACT = {
    "acts_with": {
        (
            "router_hidden_size",
            "router_layers",
            "router_heads",
            "router_embedding",
            "router_lookahead",
        ): {"router_type": "pregated"},
    },
}


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(("E", "k"), [(2, 2), (4, 2), (5, 1), (3, 3)])
def test_layer_equals_the_loop_over_tokens_and_experts(E, k, use_rslora):
    r, alpha, coef = 3, 5, 0.7
    fields = {"num_experts": E, "top_k": k, "r": r, "lora_alpha": alpha, "use_rslora": use_rslora}
    model = wrap_stack(I, O, **fields, router_aux_loss_coef=coef).train()
    fc, adapter = model.base_model.model.layers[0].fc, adapter_of(model)
    x = torch.randn(7, I, requires_grad=True)
    weight = torch.randn(7, O)
    y = model(x)
    (y * weight).sum().backward()

    scale = alpha / math.sqrt(r) if use_rslora else alpha / r
    tensors, x_TI = double(adapter), x.detach().double().requires_grad_()
    prob_TE = torch.stack([softmax(tensors["router"] @ row) for row in x_TI])
    base = x_TI @ fc.base_layer.weight.double().T + fc.base_layer.bias.double()
    A, B = tensors["lora_A"], tensors["lora_B"]
    expected = base + experts_by_loop(x_TI, prob_TE, A, B, r=r, k=k, scale=scale)
    balance = balance_by_loop(prob_TE, k)
    ((expected * weight.double()).sum() + coef * balance).backward()

    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    aux = petl.lifecycle(model).aux_loss()
    torch.testing.assert_close(aux.double(), coef * balance, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(x.grad.double(), x_TI.grad, atol=1e-4, rtol=1e-4)
    for name, parameter in adapter.named_parameters():
        found, wanted = parameter.grad.double(), tensors[name].grad
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize(("k", "use_rslora"), [(1, False), (2, True), (3, False)])
def test_every_module_of_a_llama_equals_the_loop(k, use_rslora):
    fields = {"num_experts": [3, 5, 4], "top_k": k, "r": 2, "use_rslora": use_rslora}
    case = Case("mola", "llama", fields)
    model = case.wrap_stirred()
    seen = {}
    for key, layer in testing.tuner_layers(model).items():
        layer.register_forward_hook(lambda m, x, y, key=key: seen.update({key: (m, x[0], y)}))
    testing.logits(model, case.batch(rows=2))
    scale = 16 / math.sqrt(2) if use_rslora else 16 / 2
    assert len(seen) == 21
    for layer, x, y in seen.values():
        base, tensors = layer.base_layer, double(layer.adapters["default"])
        x_TI = x.flatten(0, 1).double()
        prob_TE = torch.stack([softmax(tensors["router"] @ row) for row in x_TI])
        A, B = tensors["lora_A"], tensors["lora_B"]
        update = experts_by_loop(x_TI, prob_TE, A, B, r=2, k=k, scale=scale)
        expected = x_TI @ base.weight.double().T + update
        torch.testing.assert_close(y.flatten(0, 1).double(), expected, atol=1e-4, rtol=1e-4)


# Counts and shapes


def llama_2_7b() -> LlamaForCausalLM:
    """Llama-2-7B on the meta device."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(intermediate_size=11008, num_key_value_heads=32))


PUBLISHED = [
    ({"num_experts": "2468"}, 105_635_840),
    ({"num_experts": "8642"}, 105_635_840),
    ({"num_experts": "8228"}, 105_635_840),
    ({"num_experts": "2882"}, 105_635_840),
    ({"num_experts": "5555"}, 105_635_840),
    ({"num_experts": 8}, 169_017_344),
    ({"num_experts": "4444"}, 84_508_672),
    ({"num_experts": "2356"}, 84_508_672),
    ({"num_experts": 5, "router_type": "recurrent", "router_hidden_size": 16}, 118_180_960),
    ({"num_experts": 5, "router_type": "recurrent", "router_hidden_size": 32}, 136_422_592),
    ({"num_experts": 5, "router_type": "recurrent", "router_hidden_size": 128}, 245_936_896),
]


@pytest.mark.parametrize(
    ("fields", "count"),
    [*PUBLISHED[:1], *(pytest.param(*row, marks=pytest.mark.thorough) for row in PUBLISHED[1:])],
    ids=str,
)
def test_trainable_parameters_of_llama_2_7b_are_the_published_number(fields, count):
    base = llama_2_7b()
    with torch.device("meta"):
        model = petl.wrap(base, "mola", r=8, **fields)
    assert sum(p.numel() for p in testing.trainable(model).values()) == count


def test_a_meta_model_is_wrapped_on_the_meta_device():
    with torch.device("meta"):
        base = Stack(8, 8, 8)
    model = petl.wrap(base, "mola", router_type="recurrent")
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("num_experts", "experts"),
    [
        (5, [5, 5, 5, 5]),
        ("5", [5, 5, 5, 5]),
        ("2468", [2, 4, 6, 8]),
        (2468, [2, 4, 6, 8]),
        ("10,2,2,2", [10, 2, 2, 2]),
        ("3,12", [3, 3, 12, 12]),
        ([2, 3], [2, 2, 3, 3]),
        ([2, 3, 4], [2, 2, 3, 4]),  # floor(j 3 / 4) = 0, 0, 1, 2
        ([7, 2, 9, 3], [7, 2, 9, 3]),
        ("24682", [2, 4, 6, 8]),  # longer than the model: entries are sampled
        ("triangle", [8, 6, 4, 2]),
        ("inverted_triangle", [2, 4, 6, 8]),
        ("hourglass", [8, 2, 2, 8]),
        ("diamond", [2, 8, 8, 2]),
        ("rectangle", [5, 5, 5, 5]),
    ],
    ids=str,
)
def test_experts_of_each_layer_follow_the_pattern(num_experts, experts):
    model = petl.wrap(Stack(8, 8, 8, 8, 8), "mola", num_experts=num_experts, r=3)
    for layer, E in enumerate(experts):
        shapes = {n: tuple(p.shape) for n, p in adapter_of(model, layer).named_parameters()}
        assert shapes == {"lora_A": (3 * E, 8), "lora_B": (8, 3 * E), "router": (E, 8)}


def test_a_string_pattern_longer_than_the_model_is_sampled():
    model = petl.wrap(Stack(8, 8, 8), "mola", num_experts="2468")
    assert [adapter_of(model, j).num_experts for j in range(2)] == [2, 6]


def test_groups_of_layers_share_an_entry():
    model = petl.wrap(Stack(*[8] * 9), "mola", num_experts="2468")
    assert [adapter_of(model, j).num_experts for j in range(8)] == [2, 2, 4, 4, 6, 6, 8, 8]


def test_recurrent_tensors_have_the_names_and_shapes_of_the_spec():
    fields = {"num_experts": 3, "r": 2, "router_type": "recurrent", "router_hidden_size": 5}
    model = petl.wrap(Stack(8, 6), "mola", **fields)
    shapes = {n: tuple(p.shape) for n, p in adapter_of(model).named_parameters()}
    expected = {"lora_A": (6, 8), "lora_B": (6, 6), "router": (3, 5), "router_proj": (5, 8)}
    assert shapes == expected
    pool = {n: tuple(p.shape) for n, p in model.base_model.petl_mola_pools.named_parameters()}
    weights = {"default.gru_weight_ih": (15, 5), "default.gru_weight_hh": (15, 5)}
    assert pool == {**weights, "default.gru_bias_ih": (15,), "default.gru_bias_hh": (15,)}


def assert_uniform(values: Tensor, bound: float) -> None:
    """True if all values are within +-bound, near both ends, with a uniform mean and variance."""
    n = values.numel()
    assert float(values.abs().max()) <= bound
    assert float(values.max()) > 0.95 * bound
    assert float(values.min()) < -0.95 * bound
    assert abs(float(values.mean())) < 5 * bound / math.sqrt(3 * n)
    assert float(values.var()) == pytest.approx(bound**2 / 3, rel=0.1)


def test_initialization_is_uniform_for_A_and_router_and_zero_for_B():
    model = petl.wrap(Stack(100, 80), "mola", num_experts=8, r=8)
    adapter = adapter_of(model)
    assert_uniform(adapter.lora_A, 1 / math.sqrt(100))
    assert_uniform(adapter.router, 1 / math.sqrt(100))
    assert torch.count_nonzero(adapter.lora_B) == 0


def test_recurrent_initialization_is_kaiming_for_the_projector_and_torchs_for_the_gru():
    fields = {"router_type": "recurrent", "router_hidden_size": 40, "num_experts": 12}
    model = petl.wrap(Stack(100, 80), "mola", **fields)
    assert_uniform(adapter_of(model).router_proj, 1 / math.sqrt(100))
    assert_uniform(adapter_of(model).router, 1 / math.sqrt(40))
    for name, tensor in model.base_model.petl_mola_pools["default"].named_parameters():
        if "weight" in name:
            assert_uniform(tensor, 1 / math.sqrt(40))


def test_init_weights_false_initializes_B_randomly():
    model = petl.wrap(Stack(16, 16), "mola", init_weights=False)
    assert torch.count_nonzero(adapter_of(model).lora_B) > 0


# Routing


def test_unselected_experts_get_gradients_of_zero():
    model = wrap_stack(I, O, num_experts=4, top_k=1, r=2, router_aux_loss_coef=0.0).train()
    adapter = adapter_of(model)
    x = torch.randn(1, I)  # one token: three of four experts are unused
    model(x).sum().backward()
    used = int((adapter.router @ x[0]).argmax())
    for e in range(4):
        own = slice(2 * e, 2 * e + 2)
        for gradient in (adapter.lora_A.grad[own], adapter.lora_B.grad[:, own]):
            assert bool(gradient.any()) == (e == used)


def test_router_uses_exactly_top_k_experts():
    model = wrap_stack(I, O, num_experts=6, top_k=3, r=2)
    adapter = adapter_of(model)
    x = torch.randn(1, I)
    full = model(x)
    changed = []
    for e in range(6):
        saved = adapter.lora_B.detach().clone()
        with torch.no_grad():
            adapter.lora_B[:, 2 * e : 2 * e + 2] = 0
        changed.append(not torch.allclose(model(x), full))
        with torch.no_grad():
            adapter.lora_B.copy_(saved)
    assert sum(changed) == 3


@pytest.mark.parametrize("called", [False, True])
def test_dropout_applies_to_the_experts_and_not_the_router(called):
    fields = {"num_experts": 4, "router_aux_loss_coef": 1.0}
    model = wrap_stack(I, O, **fields, lora_dropout=0.5).train()
    plain = wrap_stack(I, O, **fields).train()
    for each in (model, plain) if called else ():  # a base layer with hooks runs by itself
        each.base_model.model.layers[0].fc.base_layer.register_forward_hook(lambda *_: None)
    x = torch.randn(50, I)
    first, balance = model(x), model.base_model.aux_loss()
    second = model(x)
    assert not torch.allclose(first, second)
    assert torch.equal(model.base_model.aux_loss(), balance)
    plain.load_state_dict(model.state_dict())
    plain(x)
    torch.testing.assert_close(plain.base_model.aux_loss(), balance)
    assert torch.equal(model.eval()(x), plain.eval()(x))


def test_dropout_keeps_the_expected_output():
    model = wrap_stack(I, O, num_experts=4, lora_dropout=0.5)
    x = torch.randn(1, I)
    expected = model.eval()(x)
    mean = model.train()(x.expand(20_000, I)).mean(0)
    torch.testing.assert_close(mean, expected[0], atol=0.1, rtol=0.05)


def test_router_computes_in_float32_on_a_half_precision_base():
    model = wrap_stack(I, O, num_experts=4)
    adapter = adapter_of(model)
    x = torch.randn(3, I, dtype=torch.bfloat16)
    logits = adapter.route(x)[0]
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, x.float() @ adapter.router.T)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(adapter.route(x.float())[0], logits)


class CountProducts(TorchDispatchMode):
    """Counts matrix products and operations that force a host-device sync."""

    PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_addmm_activation", "linear")
    WAITS = ("nonzero", "_local_scalar_dense", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.products = self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.products += name in self.PRODUCTS
        self.waits += name in self.WAITS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("router_type", ["linear", "recurrent"])
def test_matrix_products_do_not_depend_on_the_number_of_experts_and_nothing_syncs(router_type):
    counts = []
    for E in (2, 8, 16):
        model = wrap_stack(I, O, O, num_experts=E, router_type=router_type).train()
        with CountProducts() as counter:
            model(torch.randn(9, I))
        assert counter.waits == 0
        counts.append(counter.products)
    assert counts[0] > 0
    assert counts == [counts[0]] * 3


def test_adapters_may_differ_in_experts_and_rank():
    model = wrap_stack(I, O, num_experts=3, r=2)
    model.add_adapter("other", petl.build_config("mola", num_experts=6, r=5, top_k=4))
    assert tuple(adapter_of(model).lora_A.shape) == (6, I)
    assert tuple(adapter_of(model, name="other").lora_A.shape) == (30, I)


# Errors


def test_a_target_outside_every_module_list_raises():
    class WithHead(Stack):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.fc = nn.Linear(8, 8)

    with pytest.raises(petl.InputError):
        petl.wrap(WithHead(), "mola", target_modules=["fc"])
    # one number of experts depends on no index
    model = petl.wrap(WithHead(), "mola", target_modules=["fc"], num_experts=3)
    assert model.base_model.placed["default"]["fc"].num_experts == 3


@pytest.mark.parametrize("router_type", ["linear", "recurrent"])
def test_any_linear_layer_is_adapted_with_one_number_of_experts(router_type, tmp_path):
    def base() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    fields = {"num_experts": 3, "router_type": router_type}
    model = petl.wrap(base(), "mola", **fields)
    assert set(model.base_model.placed["default"]) == {"0", "2"}
    x = torch.randn(5, 6)
    model.train()(x).sum().backward()
    # each module is a layer of its own: no mean over two modules
    adapters = model.base_model.placed["default"].values()
    assert [adapter.info.settings["layer_weight"] for adapter in adapters] == [1, 1]
    assert len(model.base_model.context.terms) == 2
    testing.stir(model).eval().save_pretrained(tmp_path)
    assert torch.allclose(petl.load(base(), tmp_path)(x), model(x), atol=1e-6)


@pytest.mark.parametrize("target", ["lm_head", "classifier"])
def test_heads_are_adapted_with_one_number_of_experts(target):
    base = testing.tiny_llama(1) if target == "lm_head" else testing.tiny_bert(1)
    batch = testing.TINY_MODELS["llama" if target == "lm_head" else "bert"].batch()
    model = petl.wrap(base, "mola", num_experts=4, target_modules=[target])
    gradients = testing.gradients(model, batch)
    assert [name for name in gradients if ".router" in name]


def test_the_config_file_holds_num_experts_as_given():
    for given in (5, "2468", "diamond", [2, 3]):
        assert petl.build_config("mola", num_experts=given).to_dict()["num_experts"] == given
    assert petl.build_config("mola", num_experts=(2, 3)).to_dict()["num_experts"] == [2, 3]


@pytest.mark.parametrize("router_type", ["linear", "pregated"])
def test_in_evaluation_no_gradient_balances_the_experts(router_type):
    found = []
    for coefficient in (0.0, 0.5):
        torch.manual_seed(0)
        fields = {"r": 2, "num_experts": 4, "router_type": router_type}
        model = petl.wrap(testing.tiny_llama(), "mola", router_aux_loss_coef=coefficient, **fields)
        ids = torch.arange(12).view(2, 6)
        testing.stir(model).train()(input_ids=ids)  # sets the scale of the balance loss
        model.eval()(input_ids=ids).logits.square().mean().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0]
    assert all(torch.equal(found[0][name], gradient) for name, gradient in found[1].items())
