"""MoLA's pre-gated router against loops written from its equations, and where it runs.

Shapes: B rows, T tokens, E experts, K picked, P router width, H width of the embedding.
"""

import copy
import json
import math

import pytest
import torch
from mola_fixtures import balance_by_loop, double, experts_by_loop, softmax
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import petl
from petl import testing
from petl.methods.mola.pregate import PreGate
from petl.methods.mola.routes import ROUTES, RouterCacheLayer
from petl.methods.mola.tokens import tokens_of
from petl.testing import Case

P, HEADS = 8, 2
PREGATED = {"router_type": "pregated", "router_hidden_size": P, "num_experts": 4, "r": 2}


def wrapped(**fields):
    return Case("mola", "llama", {**PREGATED, **fields}).wrap_stirred().eval()


def router_of(model) -> PreGate:
    return model.base_model.petl_mola_pools["default"]


def plain_ids(rows: int = 3, length: int = 9) -> Tensor:
    return torch.randint(1, 90, (rows, length), generator=torch.Generator().manual_seed(5))


def gates_seen(model, **inputs) -> dict[int, Tensor]:
    """By number of experts, the gates of a forward pass, [B T, E]."""
    model(**inputs)
    return model.base_model.context.state[ROUTES, "default"].by_experts


# The router alone


def rms(z: Tensor, weight: Tensor) -> Tensor:
    return z / math.sqrt(sum(float(x) ** 2 for x in z.detach()) / len(z) + 1e-6) * weight


def turned(z: Tensor, position: int) -> Tensor:
    """Rotary in halves: entries j and j + D / 2 turn together."""
    D, out = len(z), z.clone()
    for j in range(D // 2):
        angle = position * 10_000 ** (-2 * j / D)
        a, b = z[j], z[j + D // 2]
        out[j] = a * math.cos(angle) - b * math.sin(angle)
        out[j + D // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def logits_by_loop(router: PreGate, table: Tensor, ids: list[int], blocks: int) -> Tensor:
    """The router's logits of one row, [T, E] in float64, token by token."""
    w = {name.removeprefix("pregate_"): tensor for name, tensor in double(router).items()}
    if "in" in w:
        z = [w["in"] @ table[i].double() for i in ids]
    else:
        z = [w["embedding"][i] for i in ids]
    D = P // HEADS
    for i in range(blocks):

        def linear(name: str, x: Tensor, i: int = i) -> Tensor:
            return w[f"{i}_{name}_weight"] @ x + w[f"{i}_{name}_bias"]

        x = [rms(token, w[f"{i}_norm_1"]) for token in z]
        q, k, v = ([linear(name, token) for token in x] for name in "qkv")
        for t in range(len(ids)):
            heads = []
            for h in range(HEADS):
                own = slice(h * D, (h + 1) * D)
                query = turned(q[t][own], t)
                scores = [query @ turned(k[s][own], s) / math.sqrt(D) for s in range(t + 1)]
                weights = softmax(torch.stack(scores))
                heads.append(sum(weights[s] * v[s][own] for s in range(t + 1)))
            z[t] = z[t] + linear("o", torch.cat(heads))
        for t in range(len(ids)):
            up = linear("up", rms(z[t], w[f"{i}_norm_2"]))
            z[t] = z[t] + linear("down", up * torch.sigmoid(up))
    return torch.stack([w["out_weight"] @ rms(x, w["norm"]) + w["out_bias"] for x in z])


@pytest.mark.parametrize(("blocks", "embedding"), [(0, "projected"), (1, "own"), (2, "projected")])
def test_logits_equal_the_loop_over_tokens(blocks, embedding):
    model = wrapped(router_layers=blocks, router_embedding=embedding)
    base, ids = model.get_base_model(), plain_ids(2, 5)
    tokens = tokens_of(base, {"input_ids": ids}, 0, reads_embedding=True)
    found, _ = router_of(model)(tokens, None)
    table = base.get_input_embeddings().weight
    for row in range(2):
        expected = logits_by_loop(router_of(model), table, ids[row].tolist(), blocks)
        torch.testing.assert_close(found[row].double(), expected, atol=1e-5, rtol=1e-4)


def test_the_router_is_causal():
    model, ids = wrapped(), plain_ids()
    before = gates_seen(model, input_ids=ids)[4].unflatten(0, ids.shape)
    ids[:, 5] = (ids[:, 5] + 1) % 90
    after = gates_seen(model, input_ids=ids)[4].unflatten(0, ids.shape)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_parameters_are_those_of_the_specification():
    """P H + 4 (P^2 + P) + 2 (P^2 + P) + 3 P + E P + E = 62,536, and V P in place of P H."""
    fields = {"router_type": "pregated", "num_experts": 8, "router_hidden_size": 64}
    config = LlamaConfig(
        hidden_size=576, intermediate_size=64, num_hidden_layers=2, num_attention_heads=9
    )
    for embedding, expected in (("projected", 62_536), ("own", 62_536 + 64 * (32_000 - 576))):
        with torch.device("meta"):
            model = petl.wrap(
                LlamaForCausalLM(config), "mola", **fields, router_embedding=embedding
            )
        assert sum(p.numel() for p in router_of(model).parameters()) == expected
    assert not any(name.endswith(".router") for name in testing.trainable(model))


def test_tensors_have_the_names_and_shapes_of_the_contract():
    found = {
        name: tuple(t.shape) for name, t in router_of(wrapped(router_layers=2)).named_parameters()
    }
    H = testing.tiny_llama().config.hidden_size
    expected = {
        "pregate_in": (P, H),
        "pregate_norm": (P,),
        "pregate_out_weight": (4, P),
        "pregate_out_bias": (4,),
    }
    for i in range(2):
        expected |= {f"pregate_{i}_norm_1": (P,), f"pregate_{i}_norm_2": (P,)}
        for name in ("q", "k", "v", "o", "up", "down"):
            expected |= {f"pregate_{i}_{name}_weight": (P, P), f"pregate_{i}_{name}_bias": (P,)}
    assert found == expected


def test_an_own_table_starts_as_the_first_columns_of_the_bases():
    base = testing.tiny_llama()
    table = base.get_input_embeddings().weight.detach().clone()
    model = petl.wrap(base, "mola", **PREGATED, router_embedding="own")
    assert torch.equal(router_of(model).pregate_embedding, table[:, :P])


# In the model


def test_every_linear_layer_equals_the_loop_with_a_prefix_of_the_same_logits():
    model = wrapped(num_experts=[2, 4, 3])
    base, ids = model.get_base_model(), plain_ids(2, 5)
    table = base.get_input_embeddings().weight
    logits = torch.cat(
        [logits_by_loop(router_of(model), table, row, 1) for row in ids.tolist()]
    ).detach()
    seen = {}
    for key, layer in testing.tuner_layers(model).items():
        layer.register_forward_hook(lambda m, x, y, key=key: seen.update({key: (m, x[0], y)}))
    model(input_ids=ids)
    assert len(seen) == 21
    for layer, x, y in seen.values():
        adapter = layer.adapters["default"]
        tensors, x_TI = double(adapter), x.flatten(0, 1).double()
        prob_TE = torch.stack([softmax(row[: adapter.num_experts]) for row in logits])
        A, B = tensors["lora_A"], tensors["lora_B"]
        update = experts_by_loop(x_TI, prob_TE, A, B, r=2, k=2, scale=8)
        expected = x_TI @ layer.base_layer.weight.double().T + update
        torch.testing.assert_close(y.flatten(0, 1).double(), expected, atol=1e-4, rtol=1e-4)


def test_with_logits_that_are_fixed_it_is_a_lora_of_the_picked_experts():
    model = wrapped(num_experts=4, top_k=2)
    router, ids = router_of(model), plain_ids()
    with torch.no_grad():
        router.pregate_out_weight.zero_()
        router.pregate_out_bias.copy_(torch.tensor([0.3, -1.0, 1.1, 0.2]))
    found = model(input_ids=ids).logits
    gate = torch.tensor([0.3, 1.1]).softmax(0)
    plain = copy.deepcopy(model).unload()
    with torch.no_grad():
        for key, layer in testing.tuner_layers(model).items():
            adapter = layer.adapters["default"]
            weight = plain.get_submodule(key.removeprefix("base_model.model.")).weight
            for e, g in zip((0, 2), gate, strict=True):
                A_e, B_e = adapter.lora_A[2 * e : 2 * e + 2], adapter.lora_B[:, 2 * e : 2 * e + 2]
                weight += 16 / 2 * g * B_e @ A_e
    torch.testing.assert_close(found, plain(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_one_expert_leaves_the_router_without_a_gradient():
    model = wrapped(num_experts=1, top_k=1, router_aux_loss_coef=0.0).train()
    ids = plain_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in router_of(model).named_parameters():
        assert float(parameter.grad.abs().max()) < 1e-7, name


# The balance loss


def test_the_balance_loss_is_counted_once_over_tokens_that_are_no_padding():
    model = wrapped(num_experts=[2, 4, 3], router_aux_loss_coef=0.5).train()
    batch = Case("mola", "llama").batch()
    output = model(**batch)
    base, mask = model.get_base_model(), batch["attention_mask"].bool()
    tokens = tokens_of(base, batch, 0, reads_embedding=True)
    logits, _ = router_of(model)(tokens, None)
    prob_TE = logits.softmax(-1)[mask].double()
    expected = 0.5 * float(balance_by_loop(prob_TE, 2))
    assert float(model.base_model.aux_loss()) == pytest.approx(expected, rel=1e-5)
    labels = batch["labels"][:, 1:].flatten()
    task = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels)
    assert float(output.loss) == pytest.approx(float(task) + expected, rel=1e-5)


def test_uniform_logits_have_the_coefficient_as_balance_loss():
    model = wrapped(router_aux_loss_coef=0.01).train()
    with torch.no_grad():
        router_of(model).pregate_out_weight.zero_()
        router_of(model).pregate_out_bias.zero_()
    model(**Case("mola", "llama").batch())
    assert float(model.base_model.aux_loss()) == pytest.approx(0.01, rel=1e-5)
    assert set(petl.lifecycle(model).metrics()) >= {"aux_loss", "expert_load_max"}
    assert [m.name for m in model.base_model.heat_maps()] == ["expert_load"]


def test_the_gradient_of_the_router_is_that_of_task_and_balance_loss():
    fields = {"router_aux_loss_coef": 0.5}
    model, batch = wrapped(**fields), Case("mola", "llama").batch()
    found = testing.gradients(model, batch)
    plain = wrapped(router_aux_loss_coef=0.0)
    plain.load_state_dict(model.state_dict())
    task = testing.gradients(plain, batch)
    plain.zero_grad()
    router, mask = router_of(plain), batch["attention_mask"].bool()
    tokens = tokens_of(plain.get_base_model(), batch, 0, reads_embedding=True)
    prob = router(tokens, None)[0].softmax(-1)[mask]
    picked = F.one_hot(prob.topk(2).indices, 4).sum(1).float()
    (0.5 * 4 * (picked.mean(0) / 2 * prob.mean(0)).sum()).backward()
    for name, parameter in router.named_parameters():
        key = f"base_model.petl_mola_pools.default.{name}"
        torch.testing.assert_close(found[key], task[key] + parameter.grad, atol=1e-6, rtol=1e-3)


# With a cache


def token_by_token(model, ids, mask, cache, start=0) -> Tensor:
    logits = [
        model(
            input_ids=ids[:, t : t + 1],
            attention_mask=mask[:, : t + 1],
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, t : t + 1],
            cache=cache,
            use_cache=True,
        ).logits
        for t in range(start, ids.shape[1])
    ]
    return torch.cat(logits, 1)


CACHED = [
    {},
    {"router_lookahead": 1},
    {"router_layers": 2, "router_embedding": "own"},
    {"router_layers": 0, "router_lookahead": 1},
]


@pytest.mark.parametrize("fields", CACHED, ids=str)
@torch.no_grad()
def test_token_by_token_equals_the_whole_pass_after_a_crop_and_with_left_padding(fields):
    model, ids = wrapped(**fields), plain_ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cache, shown = DynamicCache(config=model.config), mask.bool()
    whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    found = token_by_token(model, ids, mask, cache)
    torch.testing.assert_close(found[shown], whole[shown], atol=1e-5, rtol=1e-4)
    cache.crop(-4)
    found = token_by_token(model, ids, mask, cache, start=ids.shape[1] - 4)
    torch.testing.assert_close(found, whole[:, -4:], atol=1e-5, rtol=1e-4)
    # rows without the padding on their left
    alone = model(input_ids=ids[:1, 3:], use_cache=False).logits
    torch.testing.assert_close(whole[:1, 3:], alone, atol=1e-5, rtol=1e-4)


def test_positions_are_counted_without_padding_between_prompt_and_answer():
    model, ids = wrapped(), plain_ids(2)
    mask = torch.ones_like(ids)
    mask[:, 3:6] = 0
    apart = gates_seen(model, input_ids=ids, attention_mask=mask)[4].unflatten(0, ids.shape)
    text = ids[mask.bool()].view(2, -1)
    together = gates_seen(model, input_ids=text)[4].unflatten(0, text.shape)
    torch.testing.assert_close(apart[mask.bool()].view(together.shape), together)


@pytest.mark.parametrize("fields", CACHED[:2], ids=str)
@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_generation_with_a_cache_that_generate_makes_equals_that_without(fields, beams):
    model, ids = wrapped(**fields), plain_ids(3, 5)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 8, "num_beams": beams}
    inputs |= {"do_sample": False, "pad_token_id": 0}
    cached = model.generate(**inputs, use_cache=True, return_dict_in_generate=True)
    assert torch.equal(cached.sequences, model.generate(**inputs, use_cache=False))


@torch.no_grad()
def test_a_cache_that_the_model_made_is_continued():
    model, ids = wrapped(), plain_ids()
    first = model(input_ids=ids[:, :6], use_cache=True)
    assert sum(isinstance(layer, RouterCacheLayer) for layer in first.cache.layers) == 1
    rest = model(input_ids=ids[:, 6:], cache=first.cache, use_cache=True).logits
    whole = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(rest, whole[:, 6:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_cache_that_the_router_has_not_seen_is_refused():
    model, ids = wrapped(), plain_ids()
    with model.disable_adapter():
        cache = model(input_ids=ids, use_cache=True).cache
    with pytest.raises(petl.InputError, match="9 tokens"):
        model(input_ids=ids[:, :1], cache=cache)


# Other inputs


@torch.no_grad()
def test_embeddings_in_place_of_ids():
    model, ids = wrapped(), plain_ids()
    embedded = model.get_base_model().get_input_embeddings()(ids)
    expected = model(input_ids=ids).logits
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, expected)
    with pytest.raises(petl.InputError):
        wrapped(router_embedding="own")(inputs_embeds=embedded)


@torch.no_grad()
def test_a_tree_mask_routes_each_draft_as_its_own_row():
    """Two drafts of two tokens after a prompt, in one pass, against each draft by itself."""
    model, ids, drafts = wrapped(), plain_ids(1, 5), plain_ids(2, 2) + 1
    expected = torch.cat(
        [model(input_ids=torch.cat([ids, draft[None]], 1)).logits[:, 5:] for draft in drafts], 1
    )
    whole = torch.cat([ids, drafts.flatten()[None]], 1)
    allowed = torch.ones(9, 9).tril().bool()
    allowed[7:, 5:7] = False
    found = model(
        input_ids=whole,
        attention_mask=torch.zeros(1, 1, 9, 9).masked_fill(~allowed, torch.finfo().min),
        position_ids=torch.tensor([[*range(5), 5, 6, 5, 6]]),
    ).logits[:, 5:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(NotImplementedError):
        wrapped(router_lookahead=1)(input_ids=ids, attention_mask=torch.zeros(1, 1, 5, 5))


@pytest.mark.parametrize("lookahead", [0, 1])
@torch.no_grad()
def test_packed_texts_are_routed_apart(lookahead):
    model, ids = wrapped(router_lookahead=lookahead), plain_ids(1, 9)
    positions = torch.tensor([[*range(4), *range(5)]])
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    for text in (slice(0, 4), slice(4, 9)):
        alone = model(input_ids=ids[:, text]).logits
        torch.testing.assert_close(packed[:, text], alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_lookahead_uses_the_gates_of_the_token_before():
    plain, ahead = wrapped(), wrapped(router_lookahead=1)
    ahead.load_state_dict(plain.state_dict())
    ids = plain_ids()
    mask = torch.ones_like(ids)
    mask[2, :3] = 0
    with torch.enable_grad():
        first = gates_seen(plain, input_ids=ids, attention_mask=mask)[4].unflatten(0, ids.shape)
        found = gates_seen(ahead, input_ids=ids, attention_mask=mask)[4].unflatten(0, ids.shape)
    bias = router_of(ahead).pregate_out_bias
    b = torch.zeros(4).scatter(0, bias.topk(2).indices, bias.topk(2).values.softmax(0))
    torch.testing.assert_close(found[:2, 1:], first[:2, :-1])
    torch.testing.assert_close(found[2, 4:], first[2, 3:-1])
    for gate in (found[0, 0], found[1, 0], found[2, 3]):
        torch.testing.assert_close(gate, b)


@torch.no_grad()
def test_two_active_adapters_add_the_updates_of_their_own_routers():
    model, ids = wrapped(layers_to_transform=[0], target_modules=["down_proj"]), plain_ids()
    other = {**PREGATED, "layers_to_transform": [0], "target_modules": ["down_proj"]}
    model.add_adapter("other", petl.build_config("mola", **{**other, "num_experts": 3}))
    model.set_adapter("other")
    testing.stir(model, "other", seed=9)
    layer, outputs = next(iter(testing.tuner_layers(model).values())), []
    layer.register_forward_hook(lambda module, x, y: outputs.append(y))
    for names in ("default", "other", ["default", "other"]):
        model.base_model.set_adapter(names)
        model(input_ids=ids)
    with model.disable_adapter():
        model(input_ids=ids)
    first, second, both, base = outputs
    torch.testing.assert_close(both, first + second - base, atol=1e-5, rtol=1e-4)
    assert float((first - second).abs().max()) > 1e-2


# Refusals, files, the contract


def test_a_linear_checkpoint_is_refused_by_the_missing_tensors(tmp_path):
    Case("mola", "llama", {"num_experts": 4}).wrap_stirred().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "router_type": "pregated"}))
    with pytest.raises(petl.InputError, match="pregate_"):
        petl.load(testing.tiny_llama(), tmp_path)


@torch.no_grad()
def test_rows_of_a_mixed_batch_have_the_router_of_their_adapter():
    model, ids = wrapped(), plain_ids(4, 6)
    other = petl.build_config("mola", **{**PREGATED, "router_hidden_size": 12, "num_experts": 3})
    model.add_adapter("other", other)
    model.set_adapter("other")
    testing.stir(model, "other", seed=9)
    names = ["other", "default", "__base__", "other"]
    mixed = model.generate(input_ids=ids, adapter_names=names, max_new_tokens=6, do_sample=False)
    for row, name in enumerate(names):
        inputs = {"input_ids": ids[row : row + 1], "max_new_tokens": 6, "do_sample": False}
        if name == "__base__":
            with model.disable_adapter():
                expected = model.generate(**inputs)
        else:
            model.set_adapter(name)
            expected = model.generate(**inputs)
        length = expected.shape[1]
        assert torch.equal(mixed[row, :length], expected[0])


# both call a layer by itself, which the router has not run for
ALONE = ("layer_compiles_whole", "both_adapters_can_be_active")
CASES = [
    Case("mola", "llama", PREGATED, refuses=ALONE, name="mola_pregated"),
    Case("mola", "bert", {**PREGATED, "router_lookahead": 1}, refuses=ALONE, name="mola_pregated"),
]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("case", "check"),
    [(case, check) for case in CASES for check in testing.checks(case, slow=False)],
    ids=str,
)
def test_pregated_router_passes_the_contract_tests(case, check):
    testing.run(check, case)


@pytest.mark.slow
def test_pregated_router_compiles_without_a_graph_break():
    testing.run("model_compiles_whole", CASES[0])
