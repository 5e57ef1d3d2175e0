"""MoLA against slow loops written from its equations (shared/methods/mola.md), and its counts.

Shapes: I in, O out, R rank of one expert, E experts, K picked, P router width, T tokens.
"""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import petl
from petl import testing
from petl.testing import Case

I, O = 12, 10


class Block(nn.Module):
    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width_in, width_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Stack(nn.Module):
    """Linear layers one above the other: the simplest model with a depth."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(i, o) for i, o in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def wrap_stack(*widths: int, **fields):
    """A wrapped stack whose tensors are all random, so that each of them matters."""
    model = petl.wrap(Stack(*widths), "mola", **{"r": 2, **fields})
    with torch.no_grad():
        for parameter in testing.trainable(model).values():
            parameter.normal_(std=0.5)
    return model


def adapter_of(model, layer: int = 0, name: str = "default"):
    return model.base_model.model.layers[layer].fc.adapters[name]


def double(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of an adapter as float64 leaves."""
    return {n: p.detach().double().requires_grad_() for n, p in module.named_parameters()}


def softmax(logit_E: Tensor) -> Tensor:
    powers = [math.e**x for x in logit_E]
    return torch.stack([p / sum(powers) for p in powers])


def picks(prob_E: Tensor, k: int) -> list[int]:
    return sorted(range(len(prob_E)), key=lambda e: -float(prob_E[e]))[:k]


def experts_by_loop(x_TI, prob_TE, A, B, *, r: int, k: int, scale: float) -> Tensor:
    """The update of each token, [T, O]: equation 2, one token and one expert at a time."""
    updates = []
    for x, prob in zip(x_TI, prob_TE, strict=True):
        chosen = picks(prob, k)
        update = torch.zeros(B.shape[0], dtype=x.dtype)
        for e in chosen:
            gate = prob[e] / sum(prob[i] for i in chosen)
            A_e, B_e = A[e * r : (e + 1) * r], B[:, e * r : (e + 1) * r]
            update = update + scale * gate * (B_e @ (A_e @ x))
        updates.append(update)
    return torch.stack(updates)


def balance_by_loop(prob_TE: Tensor, k: int) -> Tensor:
    """N sum_e f_e P_e, with f counted and P averaged by a loop."""
    T, E = prob_TE.shape
    count = [0] * E
    for prob in prob_TE:
        for e in picks(prob, k):
            count[e] += 1
    f = [count[e] / (T * k) for e in range(E)]
    return E * sum(f[e] * sum(prob_TE[:, e]) / T for e in range(E))


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
    """Llama-2-7B without weights."""
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


@pytest.mark.parametrize(("fields", "count"), PUBLISHED, ids=str)
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
        ("24682", [2, 4, 6, 8]),  # longer than the model: sampled
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
    """All within +-bound, near both ends, with the mean and variance of a uniform draw."""
    n = values.numel()
    assert float(values.abs().max()) <= bound
    assert float(values.max()) > 0.95 * bound
    assert float(values.min()) < -0.95 * bound
    assert abs(float(values.mean())) < 5 * bound / math.sqrt(3 * n)
    assert float(values.var()) == pytest.approx(bound**2 / 3, rel=0.1)


def test_start_is_uniform_for_A_and_router_and_zero_for_B():
    model = petl.wrap(Stack(100, 80), "mola", num_experts=8, r=8)
    adapter = adapter_of(model)
    assert_uniform(adapter.lora_A, 1 / math.sqrt(100))
    assert_uniform(adapter.router, 1 / math.sqrt(100))
    assert torch.count_nonzero(adapter.lora_B) == 0


def test_recurrent_start_is_kaiming_for_the_projector_and_torchs_for_the_gru():
    fields = {"router_type": "recurrent", "router_hidden_size": 40, "num_experts": 12}
    model = petl.wrap(Stack(100, 80), "mola", **fields)
    assert_uniform(adapter_of(model).router_proj, 1 / math.sqrt(100))
    assert_uniform(adapter_of(model).router, 1 / math.sqrt(40))
    for name, tensor in model.base_model.petl_mola_pools["default"].named_parameters():
        if "weight" in name:
            assert_uniform(tensor, 1 / math.sqrt(40))


def test_init_weights_false_draws_B():
    model = petl.wrap(Stack(16, 16), "mola", init_weights=False)
    assert torch.count_nonzero(adapter_of(model).lora_B) > 0


def test_same_seed_gives_the_same_values():
    def values() -> list[Tensor]:
        torch.manual_seed(3)
        return list(testing.trainable(petl.wrap(Stack(8, 8), "mola")).values())

    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(values(), values(), strict=True))


# The balance loss


def by_layer(model) -> dict[str, list]:
    """The adapted modules of each block of a Llama or BERT."""
    layers: dict[str, list] = {}
    for key, layer in testing.tuner_layers(model).items():
        block = next(part for part in key.split(".") if part.isdigit())
        layers.setdefault(block, []).append(layer)
    return layers


def probabilities(model, batch) -> dict[str, list[Tensor]]:
    """By block, the router probabilities of its modules in a training forward, with their graph."""
    seen: dict = {}
    handles = [
        layer.register_forward_pre_hook(lambda m, args: seen.update({m: args[0]}))
        for layer in testing.tuner_layers(model).values()
    ]
    seen["output"] = model.train()(**batch)
    for handle in handles:
        handle.remove()

    def prob(layer) -> Tensor:
        router = layer.adapters["default"].router
        return (seen[layer].reshape(-1, seen[layer].shape[-1]) @ router.T).softmax(-1)

    blocks = by_layer(model).items()
    return {"output": seen["output"]} | {b: [prob(m) for m in layers] for b, layers in blocks}


def balance_of(prob_TE: Tensor, k: int, keep_T: Tensor) -> Tensor:
    """N sum_e f_e P_e over the tokens to keep, in plain sums."""
    prob_TE = prob_TE[keep_T]
    picked_TE = F.one_hot(prob_TE.topk(k).indices, prob_TE.shape[1]).sum(1)
    f_E = picked_TE.sum(0) / picked_TE.sum()
    return prob_TE.shape[1] * (f_E * prob_TE.mean(0)).sum()


def aux_by_formula(case: Case, model, batch, coef: float):
    """c * sum over layers of the mean over their modules of l, and the model's output."""
    found = probabilities(model, batch)
    output = found.pop("output")
    keep = batch["attention_mask"].flatten().bool()
    layers = [sum(balance_of(p, 2, keep) for p in probs) / len(probs) for probs in found.values()]
    return coef * sum(layers), output


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_training_loss_is_cross_entropy_plus_the_balance_loss(task_type):
    case = Case("mola", "llama", {"task_type": task_type, "router_aux_loss_coef": 0.5})
    model, batch = case.wrap_stirred(), case.batch()
    aux, output = aux_by_formula(case, model, batch, 0.5)
    logits, labels = output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    task = F.cross_entropy(logits, labels)
    torch.testing.assert_close(output.loss, task + aux)
    torch.testing.assert_close(model.base_model.aux_loss(), aux.detach())
    torch.testing.assert_close(model.eval()(**batch).loss, task)


@pytest.mark.parametrize("model_name", ["llama", "bert"])
def test_gradient_is_that_of_cross_entropy_plus_the_balance_loss(model_name):
    fields = {"router_aux_loss_coef": 0.5}
    case = Case("mola", model_name, fields)
    model, batch = case.wrap_stirred(), case.batch()
    found = testing.gradients(model, batch)
    plain = Case("mola", model_name, {"router_aux_loss_coef": 0.0}).wrap_stirred()
    plain.load_state_dict(model.state_dict())
    aux, output = aux_by_formula(case, plain, batch, 0.5)
    (output.loss + aux).backward()
    for name, parameter in testing.trainable(plain).items():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_a_router_of_zeros_gives_the_coefficient_times_the_layers():
    case = Case("mola", "llama", {"router_aux_loss_coef": 0.01})
    model = case.wrap().train()
    for name, parameter in model.named_parameters():
        if name.endswith("router"):
            nn.init.zeros_(parameter)
    model(**case.batch())
    assert float(model.base_model.aux_loss()) == pytest.approx(0.01 * 3, rel=1e-5)


def test_the_balance_loss_is_off_in_eval_mode_and_at_coefficient_zero():
    case = Case("mola", "llama", {"router_aux_loss_coef": 0.0})
    model = case.wrap().train()
    model(**case.batch())
    assert float(model.base_model.aux_loss()) == 0.0
    assert not petl.lifecycle(model).has_aux
    evaluated = Case("mola", "llama").wrap()
    evaluated(**case.batch())
    assert float(evaluated.base_model.aux_loss()) == 0.0


def test_padding_is_left_out_of_the_balance_loss():
    case = Case("mola", "llama", {"router_aux_loss_coef": 1.0})
    model, batch = case.wrap_stirred().train(), case.batch()
    model(**batch)
    expected = model.base_model.aux_loss()
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    longer = {name: F.pad(tensor, (0, 6), value=fill[name]) for name, tensor in batch.items()}
    model(**longer)
    torch.testing.assert_close(model.base_model.aux_loss(), expected)


def aux_gradients(model, batch) -> dict[str, Tensor]:
    """Gradients of the auxiliary loss alone: the task loss is multiplied by zero."""
    return testing.gradients(model, batch, weight=0.0)


@pytest.mark.parametrize("model_name", ["llama", "gpt2", "t5"])
def test_the_balance_loss_takes_its_share_of_the_items_in_the_batch(model_name):
    """Trainer sums micro-batch losses over all items: the terms of all must add up to one."""
    case = Case("mola", model_name, {"router_aux_loss_coef": 0.5})
    model, batch = case.wrap_stirred(), case.batch()
    items, total = case.tiny.items(batch), 100
    full = aux_gradients(model, batch)
    aux = petl.lifecycle(model).aux_loss()
    batch["num_items_in_batch"] = torch.tensor(total)
    task = model.eval()(**batch).loss
    shown = model.train()(**batch).loss - task
    torch.testing.assert_close(shown, aux * items / total, atol=1e-6, rtol=1e-4)
    for name, gradient in aux_gradients(model, batch).items():
        wanted = full[name] * items / total
        torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-4)


def test_the_balance_loss_does_not_grow_from_step_to_step():
    case = Case("mola", "llama")
    model, batch = case.wrap().train(), case.batch()
    values = []
    for _ in range(3):
        model(**batch).loss.backward()
        values.append(float(model.base_model.aux_loss()))
    assert values[0] > 0
    assert values == [values[0]] * 3


def test_balance_gradient_is_zero_where_all_experts_are_picked():
    model = wrap_stack(I, O, num_experts=2, top_k=2, router_aux_loss_coef=1.0).train()
    (model(torch.randn(5, I)) * 0).sum().backward()
    assert float(model.base_model.aux_loss()) == pytest.approx(1.0)
    torch.testing.assert_close(adapter_of(model).router.grad, torch.zeros(2, I))


def test_log_figures_are_host_numbers_apart_from_the_task_loss():
    case = Case("mola", "llama", {"router_aux_loss_coef": 0.5})
    model, batch = case.wrap_stirred().train(), case.batch()
    loss = model(**batch).loss
    figures = petl.lifecycle(model).metrics()
    task = model.eval()(**batch).loss
    assert figures["aux_loss"] == pytest.approx(float(loss.detach() - task), abs=1e-5)
    assert 1.0 <= figures["expert_load_max"] <= 8.0
    assert all(type(value) is float for value in figures.values())


# Routing


def test_unselected_experts_get_gradients_of_zero():
    model = wrap_stack(I, O, num_experts=4, top_k=1, r=2, router_aux_loss_coef=0.0).train()
    adapter = adapter_of(model)
    x = torch.randn(1, I)  # one token: three of four experts go unused
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


def test_dropout_touches_the_experts_and_not_the_router():
    fields = {"num_experts": 4, "router_aux_loss_coef": 1.0}
    model = wrap_stack(I, O, **fields, lora_dropout=0.5).train()
    x = torch.randn(50, I)
    first, balance = model(x), model.base_model.aux_loss()
    second = model(x)
    assert not torch.allclose(first, second)
    assert torch.equal(model.base_model.aux_loss(), balance)
    plain = wrap_stack(I, O, **fields).train()
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


def test_router_works_in_float32_on_a_half_precision_base():
    model = wrap_stack(I, O, num_experts=4)
    adapter = adapter_of(model)
    x = torch.randn(3, I, dtype=torch.bfloat16)
    logits = adapter.logits(x)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, x.float() @ adapter.router.T)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(adapter.logits(x.float()), logits)


class CountProducts(TorchDispatchMode):
    """Counts matrix products, and operations that wait for the device."""

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
def test_products_do_not_depend_on_the_number_of_experts_and_nothing_waits(router_type):
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


# The recurrent router

RECURRENT = {"router_type": "recurrent", "router_hidden_size": 5}


def gru_by_equations(z: Tensor, h: Tensor, gru: dict[str, Tensor]) -> Tensor:
    """The state after one layer, [T, P], from the equations of the spec."""
    W_ir, W_iz, W_in = gru["gru_weight_ih"].chunk(3)
    W_hr, W_hz, W_hn = gru["gru_weight_hh"].chunk(3)
    b_ir, b_iz, b_in = gru["gru_bias_ih"].chunk(3)
    b_hr, b_hz, b_hn = gru["gru_bias_hh"].chunk(3)
    r = torch.sigmoid(z @ W_ir.T + b_ir + h @ W_hr.T + b_hr)
    u = torch.sigmoid(z @ W_iz.T + b_iz + h @ W_hz.T + b_hz)
    n = torch.tanh(z @ W_in.T + b_in + r * (h @ W_hn.T + b_hn))
    return (1 - u) * n + u * h


def gru_by_torch(z: Tensor, h: Tensor, gru: dict[str, Tensor]) -> Tensor:
    cell = nn.GRUCell(z.shape[1], z.shape[1]).to(z.dtype)
    weights = {name.removeprefix("gru_"): tensor for name, tensor in gru.items()}
    return torch.func.functional_call(cell, weights, (z, h))


def stack_by_loop(model, x: Tensor, cell, *, k: int, r: int):
    """The output of a recurrent stack over depth, with its float64 leaves by layer."""
    gru = double(model.base_model.petl_mola_pools["default"])
    h = torch.zeros(len(x), 5, dtype=torch.float64)
    leaves = []
    for layer, block in enumerate(model.base_model.model.layers):
        tensors = double(adapter_of(model, layer))
        h = cell(x @ tensors["router_proj"].T, h, gru)
        prob_TE = torch.stack([softmax(tensors["router"] @ row) for row in h])
        base = x @ block.fc.base_layer.weight.double().T + block.fc.base_layer.bias.double()
        A, B = tensors["lora_A"], tensors["lora_B"]
        x = base + experts_by_loop(x, prob_TE, A, B, r=r, k=k, scale=16 / r)
        leaves.append(tensors)
    return x, leaves, gru


@pytest.mark.parametrize("cell", [gru_by_equations, gru_by_torch])
def test_recurrent_router_equals_a_gru_over_depth(cell):
    fields = {**RECURRENT, "num_experts": 4, "router_aux_loss_coef": 0.0}
    model = wrap_stack(I, O, 9, 8, **fields).train()
    x = torch.randn(6, I)
    y = model(x)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    expected, leaves, gru = stack_by_loop(model, x.double(), cell, k=2, r=2)
    (expected * weight.double()).sum().backward()
    torch.testing.assert_close(y.double(), expected, atol=1e-3, rtol=1e-4)
    pairs = [(adapter_of(model, j), tensors) for j, tensors in enumerate(leaves)]
    for module, tensors in [*pairs, (model.base_model.petl_mola_pools["default"], gru)]:
        for name, parameter in module.named_parameters():
            found, wanted = parameter.grad.double(), tensors[name].grad
            allowed = 1e-4 * float(wanted.abs().max()) + 1e-6
            torch.testing.assert_close(found, wanted, atol=allowed, rtol=1e-3)


def test_gru_cells_of_the_spec_and_of_torch_are_one():
    z, h = torch.randn(2, 3, 5, dtype=torch.float64)
    gru = double(wrap_stack(I, O, **RECURRENT).base_model.petl_mola_pools["default"])
    difference = gru_by_equations(z, h, gru) - gru_by_torch(z, h, gru)
    assert float(difference.abs().max()) < 1e-6


@pytest.mark.parametrize("mode", [True, False])
def test_a_second_forward_equals_the_first(mode):
    model = wrap_stack(I, O, 9, **RECURRENT, num_experts=4).train(mode)
    x = torch.randn(6, I)
    first = model(x)
    with torch.no_grad():  # an evaluation in between leaves nothing behind either
        model(torch.randn(3, I))
    assert torch.equal(model(x), first)


def test_gradient_reaches_the_first_projector_through_the_state_alone():
    fields = {**RECURRENT, "num_experts": 4, "router_aux_loss_coef": 0.0}
    model = wrap_stack(I, O, 9, **fields)
    adapter_of(model, 0).lora_B.data.zero_()  # layer 0's own gates do nothing now
    model.train()(torch.randn(6, I)).sum().backward()
    assert float(adapter_of(model, 0).router.grad.abs().max()) == 0
    assert float(adapter_of(model, 0).router_proj.grad.abs().max()) > 1e-4


def test_state_comes_from_the_nearest_lower_layer_that_is_adapted():
    fields = {**RECURRENT, "num_experts": 4, "router_aux_loss_coef": 0.0}
    model = wrap_stack(O, O, O, O, **fields, layers_to_transform=[0, 2])
    gru = double(model.base_model.petl_mola_pools["default"])
    x = torch.randn(6, O)
    layers = model.base_model.model.layers
    first, second = adapter_of(model, 0), adapter_of(model, 2)
    middle = layers[1](layers[0](x))
    zero = torch.zeros(6, 5, dtype=torch.float64)
    below = gru_by_equations((x @ first.router_proj.T).double(), zero, gru)
    h = gru_by_equations((middle @ second.router_proj.T).double(), below, gru)
    model(x)
    found = state_of(model, 2)
    torch.testing.assert_close(found.double(), h, atol=1e-5, rtol=1e-5)


def state_of(model, layer: int) -> Tensor:
    """The router state that a layer left in the last forward."""
    states = {key[-1]: h for key, h in model.base_model.context.state.items()}
    return states[layer]


def test_each_kind_of_module_is_a_chain_of_its_own():
    """Changing what the query routers see leaves the state of the down projections alone."""
    case = Case("mola", "llama", {**RECURRENT, "target_modules": ["q_proj", "down_proj"]})
    model = case.wrap_stirred()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # no effect on activations: states alone may change
                parameter.zero_()
    model(**case.batch())
    before = dict(model.base_model.context.state)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name and name.endswith("router_proj"):
                parameter.mul_(2)
    model(**case.batch())
    after = model.base_model.context.state
    changed = {key for key, h in after.items() if not torch.equal(h, before[key])}
    assert changed == {key for key in after if "q_proj" in str(key)}
    assert changed


def test_encoder_and_decoder_are_chains_apart():
    case = Case("mola", "t5", {**RECURRENT, "target_modules": ["q", "wo"]})
    model = case.wrap_stirred()
    model(**case.batch())
    chains = {key[1] for key in model.base_model.context.state}  # stack, and name in its blocks
    assert {stack for stack, _ in chains} == {"encoder.block", "decoder.block"}
    assert ("decoder.block", "layer.1.EncDecAttention.q") in chains


RECURRENT_CASES = [
    Case(
        "mola",
        model,
        RECURRENT,
        refuses=("reentrant_checkpointing_gives_the_same_gradients",),
        name="mola_recurrent",
    )
    for model in ("llama", "t5")
]


@pytest.mark.parametrize(
    ("case", "check"),
    [(case, check) for case in RECURRENT_CASES for check in testing.checks(case, slow=False)],
    ids=str,
)
def test_recurrent_router_keeps_the_contract(case, check):
    testing.run(check, case)


@pytest.mark.slow
def test_recurrent_router_compiles_whole():
    testing.run("model_compiles_whole", RECURRENT_CASES[0])


# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 3}, r"top_k \(3\) exceeds the number of experts \(2\) of layer 0"),
        ({"num_experts": [2, 2, 2, 2, 2]}, "num_experts has 5 entries but the model has 4 layers"),
        ({"num_experts": "triangel"}, "num_experts='triangel' .* did you mean 'triangle'"),
        ({"num_experts": "2,x"}, "num_experts='2,x' is not"),
        ({"num_experts": ""}, "num_experts=''"),
        ({"num_experts": []}, r"num_experts=\[\]"),
        ({"num_experts": "2022"}, "num_experts='2022' has an entry below 1"),
        ({"num_experts": 0}, "num_experts=0 has an entry below 1"),
        ({"num_experts": [4, -1]}, "below 1"),
        ({"num_experts": 2.5}, "num_experts=2.5"),
        ({"r": 0}, "r=0 is not at least 1"),
        ({"top_k": 0}, "top_k=0 is not at least 1"),
        ({"router_hidden_size": 0}, "router_hidden_size=0"),
        ({"lora_alpha": 0}, "lora_alpha=0"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1.0 is not in \[0, 1\)"),
        ({"lora_dropout": -0.1}, "lora_dropout=-0.1"),
        ({"router_aux_loss_coef": -1.0}, "router_aux_loss_coef=-1.0 is negative"),
        ({"router_type": "gru"}, "router_type='gru' is not linear or recurrent"),
        ({"bias": "all"}, "bias='all'"),
        ({"experts": 4}, "no field 'experts'; did you mean 'num_experts'"),
    ],
    ids=str,
)
def test_bad_fields_are_refused_before_the_model_changes(fields, message):
    base = Stack(8, 8, 8, 8, 8)
    keys = set(base.state_dict())
    with pytest.raises(petl.InputError, match=message):
        petl.wrap(base, "mola", **fields)
    assert set(base.state_dict()) == keys
    assert all(p.requires_grad for p in base.parameters())


def test_a_target_outside_every_block_is_refused():
    class WithHead(Stack):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.fc = nn.Linear(8, 8)

    with pytest.raises(petl.InputError, match="cannot infer the layer index of 'fc'"):
        petl.wrap(WithHead(), "mola", target_modules=["fc"])


def test_merging_says_why_it_cannot():
    model = petl.wrap(Stack(8, 8), "mola")
    words = "MoLA adapters depend on the input through the router and cannot be merged"
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match=words):
            merge()


def test_reentrant_checkpointing_of_the_recurrent_router_says_what_to_pass():
    case = Case("mola", "llama", RECURRENT)
    model = case.wrap().train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(petl.InputError, match="use_reentrant"):
        model(**case.batch()).loss.backward()


def test_the_config_file_holds_num_experts_as_given():
    for given in (5, "2468", "diamond", [2, 3]):
        assert petl.build_config("mola", num_experts=given).to_dict()["num_experts"] == given
    assert petl.build_config("mola", num_experts=(2, 3)).to_dict()["num_experts"] == [2, 3]
