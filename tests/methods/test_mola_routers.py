"""MoLA's balance loss and its recurrent router against their equations.

Shapes: I in, O out, E experts, K picked, P router width, T tokens.
"""

import pytest
import torch
from mola_fixtures import I, O, adapter_of, double, experts_by_loop, softmax, wrap_stack
from torch import Tensor, nn
from torch.nn import functional as F

import petl
from petl import testing
from petl.testing import Case

# The balance loss


def by_layer(model) -> dict[str, list]:
    """Adapted modules of each block of a Llama or BERT."""
    layers: dict[str, list] = {}
    for key, layer in testing.tuner_layers(model).items():
        block = next(part for part in key.split(".") if part.isdigit())
        layers.setdefault(block, []).append(layer)
    return layers


def probabilities(model, batch) -> dict[str, list[Tensor]]:
    """Router probabilities of a training forward by block, with their graph."""
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
    """N sum_e f_e P_e over the unmasked tokens, as explicit sums."""
    prob_TE = prob_TE[keep_T]
    picked_TE = F.one_hot(prob_TE.topk(k).indices, prob_TE.shape[1]).sum(1)
    f_E = picked_TE.sum(0) / picked_TE.sum()
    return prob_TE.shape[1] * (f_E * prob_TE.mean(0)).sum()


def aux_by_formula(case: Case, model, batch, coef: float):
    """c times the sum over layers of the mean of l over their modules, and the model's output."""
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


@pytest.mark.parametrize("model_name", ["llama", "t5"])
def test_padding_is_left_out_of_the_balance_loss(model_name):
    case = Case("mola", model_name, {"router_aux_loss_coef": 1.0})
    model, batch = case.wrap_stirred().train(), case.batch()
    model(**batch)
    expected = model.base_model.aux_loss()
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    added = {name: 3 if name == "labels" and model_name == "t5" else 6 for name in batch}
    longer = {n: F.pad(tensor, (0, added[n]), value=fill[n]) for n, tensor in batch.items()}
    model(**longer)
    torch.testing.assert_close(model.base_model.aux_loss(), expected)


def aux_gradients(model, batch) -> dict[str, Tensor]:
    """Gradients of the auxiliary loss alone: the task loss is multiplied by zero."""
    return testing.gradients(model, batch, weight=0.0)


@pytest.mark.parametrize("model_name", ["llama", "gpt2", "t5"])
def test_the_balance_loss_is_scaled_by_num_items_in_batch(model_name):
    """Trainer sums micro-batch losses over all items: their terms must add up to one term."""
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


def test_logged_metrics_are_floats_separate_from_the_task_loss():
    case = Case("mola", "llama", {"router_aux_loss_coef": 0.5})
    model, batch = case.wrap_stirred().train(), case.batch()
    loss = model(**batch).loss
    figures = petl.lifecycle(model).metrics()
    task = model.eval()(**batch).loss
    assert figures["aux_loss"] == pytest.approx(float(loss.detach() - task), abs=1e-5)
    assert 1.0 <= figures["expert_load_max"] <= 8.0
    assert all(type(value) is float for value in figures.values())


# The recurrent router

RECURRENT = {"router_type": "recurrent", "router_hidden_size": 5}


def gru_by_equations(z: Tensor, h: Tensor, gru: dict[str, Tensor]) -> Tensor:
    """State after one layer, [T, P], written from the equations."""
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
    """Output of a recurrent stack over depth, with its float64 leaves by layer."""
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


def test_the_explicit_gru_cell_equals_torchs():
    z, h = torch.randn(2, 3, 5, dtype=torch.float64)
    gru = double(wrap_stack(I, O, **RECURRENT).base_model.petl_mola_pools["default"])
    difference = gru_by_equations(z, h, gru) - gru_by_torch(z, h, gru)
    assert float(difference.abs().max()) < 1e-6


@pytest.mark.parametrize("mode", [True, False])
def test_a_second_forward_equals_the_first(mode):
    model = wrap_stack(I, O, 9, **RECURRENT, num_experts=4).train(mode)
    x = torch.randn(6, I)
    first = model(x)
    with torch.no_grad():  # an evaluation in between leaves no state
        model(torch.randn(3, I))
    assert torch.equal(model(x), first)


def test_gradient_reaches_the_first_projector_through_the_state_alone():
    fields = {**RECURRENT, "num_experts": 4, "router_aux_loss_coef": 0.0}
    model = wrap_stack(I, O, 9, **fields)
    adapter_of(model, 0).lora_B.data.zero_()  # layer 0's own gates have no effect now
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
    """Router state of a layer in the last forward."""
    states = {key[-1]: h for key, h in model.base_model.context.state.items()}
    return states[layer]


def test_modules_of_each_name_form_a_chain():
    """Changing the query routers' inputs does not change the down projections' states."""
    case = Case("mola", "llama", {**RECURRENT, "target_modules": ["q_proj", "down_proj"]})
    model = case.wrap_stirred()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # no effect on activations: only states may change
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


def test_encoder_and_decoder_are_separate_chains():
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


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("case", "check"),
    [(case, check) for case in RECURRENT_CASES for check in testing.checks(case, slow=False)],
    ids=str,
)
def test_recurrent_router_passes_the_contract_tests(case, check):
    testing.run(check, case)


@pytest.mark.slow
def test_recurrent_router_compiles_without_a_graph_break():
    testing.run("model_compiles_whole", RECURRENT_CASES[0])


def test_reentrant_checkpointing_of_the_recurrent_router_raises():
    case = Case("mola", "llama", RECURRENT)
    model = case.wrap().train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(petl.InputError, match="use_reentrant"):
        model(**case.batch()).loss.backward()
