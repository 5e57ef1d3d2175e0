"""`petl.drop_tokens`: layers whose attention computes a part of the tokens, in training alone."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    EuroBertConfig,
    EuroBertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import petl
from petl.core.layers.class_swap import original_class
from petl.data.tasks.packing import isolate_packed_texts
from petl.efficiency.tokens import DropTokens
from petl.efficiency.tokens.settings import TokenSettings
from petl.errors import InputError, UnsupportedError

SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
LLAMA4 = {**GROUPED, "head_dim": 8, "intermediate_size_mlp": 48, "moe_layers": []}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**GROUPED), ["q_proj", "v_proj", "down_proj"]),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**GROUPED, head_dim=8), ["q_proj", "up_proj"]),
    "windows": (MistralForCausalLM, MistralConfig(**GROUPED, sliding_window=12), ["k_proj"]),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config(**GROUPED, head_dim=8, sliding_window=12),
        ["q_proj", "o_proj"],
    ),
    "llama4": (
        Llama4ForCausalLM,
        Llama4TextConfig(**LLAMA4, attention_chunk_size=12, attn_temperature_tuning=False),
        ["q_proj", "v_proj"],
    ),
    "neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**SMALL), ["query_key_value"]),
}
BLOCK, KEEP = 4, 0.5


def model_for(name: str, attn: str = "eager", method: str = "lora", **fields):
    cls, config, targets = MODELS[name]
    torch.manual_seed(0)
    base = cls._from_config(copy.deepcopy(config), attn_implementation=attn)
    fields = fields or {"r": 4, "target_modules": targets}
    model = petl.wrap(base, method, **fields)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def batch(tokens: int = 30, left: bool = False):
    torch.manual_seed(1)
    ids = torch.randint(1, 60, (3, tokens))
    mask = torch.ones_like(ids)
    for row, missing in ((1, 7), (2, 14)):
        mask[row, slice(0, missing) if left else slice(tokens - missing, None)] = 0
    ids = torch.where(mask > 0, ids, 0)
    # nothing but padding predicts the first token
    labels = ids.masked_fill(mask.cumsum(1) * mask < 2, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model) -> torch.Tensor:
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat(found)


def layers_of(model) -> nn.ModuleList:
    return next(each for each in model.modules() if isinstance(each, nn.ModuleList))


def attentions(model, numbers) -> dict[int, nn.Module]:
    layers = [layers_of(model)[number] for number in numbers]
    return {
        n: layer.self_attn if hasattr(layer, "self_attn") else layer.attention
        for n, layer in zip(numbers, layers, strict=True)
    }


def kept_by_loop(hidden, mask) -> torch.Tensor:
    """True for the tokens of the first and last block of each row, and of those of largest norm."""
    B, T = mask.shape
    kept = torch.zeros(B, T, dtype=torch.bool)
    count = -(-T // BLOCK)
    for row in range(B):
        scores = {}
        for number in range(count):
            own = [t for t in range(number * BLOCK, min(T, number * BLOCK + BLOCK)) if mask[row, t]]
            if own:
                scores[number] = sum(float(hidden[row, t].detach().norm()) for t in own) / len(own)
        always = {min(scores), max(scores)} | ({count - 1} if T % BLOCK else set())
        rest = sorted({*scores} - always, key=lambda number: -scores[number])
        wanted = max(-(-count * KEEP // 1), 2 + (T % BLOCK > 0))
        for number in [*always, *rest][: int(wanted)]:
            kept[row, number * BLOCK : number * BLOCK + BLOCK] = True
    return kept


def dense(model, inputs, numbers):
    """Loss of a model whose attention sees all tokens, but for keys and outputs of dropped ones."""
    model = copy.deepcopy(model)
    mask = inputs["attention_mask"]
    kept: dict[int, torch.Tensor] = {}

    def choose(number):
        def hook(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            kept[number] = kept_by_loop(hidden, mask)

        return hook

    def masked(number, module):
        own = original_class(module).forward

        def forward(*args, **kwargs):
            lowest = torch.finfo(torch.float32).min
            hidden_keys = ~kept[number][:, None, None, :]
            # a token attends to itself, so that no row of a dropped query is empty
            itself = torch.eye(mask.shape[1], dtype=torch.bool)
            given = kwargs["attention_mask"]
            kwargs["attention_mask"] = given.masked_fill(hidden_keys & ~itself, lowest)
            out, weights = own(module, *args, **kwargs)
            return out * kept[number][..., None], weights

        return forward

    for number, module in attentions(model, numbers).items():
        layers_of(model)[number].register_forward_pre_hook(choose(number), with_kwargs=True)
        module.forward = masked(number, module)
    output = model(**inputs)
    output.loss.backward()
    return output.logits.detach(), output.loss.detach(), gradients(model), kept


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("tokens", [30, 32])
@pytest.mark.parametrize("name", MODELS)
def test_dropped_tokens_are_no_keys_and_have_no_output(name, tokens, left):
    compare_with_dense(model_for(name), batch(tokens, left))


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("adapter", {"r": 4}),
        ("adapter", {"r": 4, "placement": "parallel", "gate": "middle_y"}),
        ("adapter", {"r": 4, "placement": "parallel_residual", "locations": ["ffn"]}),
        ("binary", {"r": 4, "inner": "lora"}),
        ("binary", {"r": 4, "inner": "mos"}),
        ("compacter", {"r": 4, "placement": "parallel"}),
    ],
)
def test_other_adapters_compute_the_kept_tokens_alone(method, fields):
    compare_with_dense(model_for("llama", method=method, **fields), batch())


def compare_with_dense(model, inputs):
    logits, loss, wanted, kept = dense(model, inputs, [1, 2, 3])
    assert all(0.3 < each.float().mean() < 0.75 for each in kept.values())
    plain = model(**inputs).loss
    assert petl.drop_tokens(model, block=BLOCK, keep=KEEP, layers=[3, 1, 2]) == 3
    output = model(**inputs)
    output.loss.backward()
    real = inputs["attention_mask"] > 0
    torch.testing.assert_close(output.logits[real], logits[real], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(output.loss, loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradients(model), wanted, atol=1e-5, rtol=1e-3)
    assert abs(plain - loss) > 1e-4


@pytest.mark.parametrize("name", ["llama", "qwen3", "windows"])
def test_sdpa_computes_what_eager_attention_does(name):
    losses = []
    for attn in ("eager", "sdpa"):
        model = model_for(name, attn)
        petl.drop_tokens(model, block=BLOCK, keep=KEEP)
        given = (batch(), {**batch(), "attention_mask": None})
        losses.append([float(model(**inputs).loss.detach()) for inputs in given])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("scorer", ["norm", "oracle"])
def test_all_blocks_kept_change_nothing(scorer):
    model, inputs = model_for("llama"), batch()
    expected = model(**inputs)
    petl.drop_tokens(model, block=BLOCK, keep=1.0, scorer=scorer, layers="all")
    torch.testing.assert_close(model(**inputs).logits, expected.logits, atol=0, rtol=0)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_attention_at_all_positions_is_that_without_them(name, left):
    model, inputs = model_for(name), batch(left=left)
    expected = model(**inputs)
    expected.loss.backward()
    wanted = gradients(model)
    petl.drop_tokens(model, block=BLOCK, keep=KEEP, scorer="oracle", layers="all")
    counts = []

    def widen(module, args, kwargs):
        counts.append(kwargs["kept_tokens"].shape[1])
        return args, {**kwargs, "kept_tokens": torch.arange(30).expand(3, -1)}

    for layer in layers_of(model):
        layer.register_forward_pre_hook(widen, with_kwargs=True)
    output = model(**inputs)
    output.loss.backward()
    assert len(counts) == 4
    assert max(counts) < 30  # what was chosen, before
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients(model), wanted, atol=1e-5, rtol=1e-4)


def test_only_training_passes_leave_tokens_out():
    model, inputs = model_for("llama"), batch()
    model.eval()
    expected, written = model(**inputs).logits, model.generate(**inputs_of(inputs))
    model.train()
    with torch.no_grad():
        trained = model(**inputs).logits
    petl.drop_tokens(model, block=BLOCK, keep=0.2, layers="all")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, trained)
    model.eval()
    assert torch.equal(model(**inputs).logits, expected)
    assert torch.equal(model.generate(**inputs_of(inputs)), written)


def inputs_of(inputs):
    names = ("input_ids", "attention_mask")
    return {**{n: inputs[n][:1] for n in names}, "max_new_tokens": 4, "do_sample": False}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_computes_the_same(reentrant):
    model, inputs = model_for("llama"), batch()
    petl.drop_tokens(model, block=BLOCK, keep=KEEP)
    model(**inputs).loss.backward()
    expected = gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(**inputs).loss.backward()
    torch.testing.assert_close(gradients(model), expected, atol=1e-7, rtol=1e-6)


def test_a_second_call_replaces_the_first_and_copies_keep_it():
    model, inputs = model_for("llama"), batch()
    classes = [type(module) for module in model.modules()]
    petl.drop_tokens(model, block=2, keep=0.2, layers="all", mlp_keep=0.5)
    petl.drop_tokens(model, block=BLOCK, keep=KEEP)
    other = model_for("llama")
    petl.drop_tokens(other, block=BLOCK, keep=KEEP)
    assert model(**inputs).loss == other(**inputs).loss == copy.deepcopy(model)(**inputs).loss
    DropTokens(TokenSettings()).undo(model)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("keep", [0.5, 0.1])
def test_an_mlp_keeps_channels_for_backward(keep):
    """The gradient is that of a product whose other channels are constants, and 0 to `down`."""
    model, inputs = model_for("llama"), batch()
    reference = copy.deepcopy(model)
    plain = model(**inputs).loss
    for layer in reference.get_base_model().model.layers[2:]:
        layer.mlp.forward = constant_channels(layer.mlp, keep)
    wanted = reference(**inputs).loss
    wanted.backward()
    for layer in reference.get_base_model().model.layers[2:]:
        layer.mlp.down_proj.lora_A["default"].weight.grad[:, ~layer.mlp.kept] = 0
    petl.drop_tokens(model, keep=1.0, mlp_keep=keep)
    loss = model(**inputs).loss
    loss.backward()
    assert loss == plain == wanted
    torch.testing.assert_close(gradients(model), gradients(reference), atol=1e-7, rtol=1e-5)


def test_all_channels_kept_are_the_whole_gradient_in_float64():
    model = model_for("llama").double()
    inputs = batch()
    plain = model(**inputs)
    plain.loss.backward()
    wanted = gradients(model)
    petl.drop_tokens(model, keep=1.0, mlp_keep=0.99, layers="all")  # 48 of 48, rounded up
    output = model(**inputs)
    output.loss.backward()
    assert torch.equal(output.logits, plain.logits)
    torch.testing.assert_close(gradients(model), wanted, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_inputs_of_an_mlp_that_keeps_channels_are_computed_again(name, trained):
    model, inputs = model_for(name, r=4, target_modules=["gate_proj", "up_proj"]), batch()
    layers = model.get_base_model().model.layers
    for norm_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or (trained and "layernorm" in norm_name))
    model(**inputs).loss.backward()
    wanted = gradients(model)
    petl.drop_tokens(model, keep=1.0, mlp_keep=0.99)
    given, kept = {}, set()
    for number, layer in enumerate(layers):
        keep_input = lambda _, args, n=number: given.update({n: args[0]})  # noqa: E731
        layer.mlp.register_forward_pre_hook(keep_input)
    pack = lambda x: [kept.add(x.data_ptr()), x][1]  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(**inputs).loss
    assert [given[number].data_ptr() in kept for number in range(4)] == [
        True,
        True,
        trained,
        trained,
    ]
    loss.backward()
    torch.testing.assert_close(gradients(model), wanted, atol=1e-7, rtol=1e-6)
    weight = layers[3].mlp.gate_proj.lora_A["default"].weight
    (first,) = torch.autograd.grad(model.eval()(**inputs).loss, weight, create_graph=True)
    first.square().sum().backward()  # outside of training second derivatives are there


def test_other_mlps_recompute_and_those_with_fewer_channels_stay():
    model, inputs = model_for("llama"), batch()
    petl.drop_tokens(model, keep=KEEP, block=BLOCK, mlp_keep=0.5)
    model(**inputs).loss.backward()
    expected = gradients(model)
    assert petl.recompute_mlp(model) == 2
    model(**inputs).loss.backward()
    torch.testing.assert_close(gradients(model), expected, atol=1e-7, rtol=1e-6)


def constant_channels(mlp, keep):
    def forward(x):
        a, up = mlp.act_fn(mlp.gate_proj(x)), mlp.up_proj(x)
        norms = a.detach().flatten(0, 1).norm(dim=0) + up.detach().flatten(0, 1).norm(dim=0)
        product = a * up
        kept = torch.zeros_like(norms, dtype=torch.bool)
        for channel in sorted(range(len(norms)), key=lambda c: -norms[c])[: -int(-keep * 48 // 1)]:
            kept[channel] = True
        mlp.kept = kept
        return mlp.down_proj(torch.where(kept, product, product.detach()))

    return forward


def test_an_attention_that_counts_its_tokens_is_refused():
    with pytest.raises(UnsupportedError, match="attn_temperature_tuning"):
        petl.drop_tokens(Llama4ForCausalLM(Llama4TextConfig(**LLAMA4)))


def bidirectional(name: str):
    tiny = {**SMALL, "num_hidden_layers": 2}
    if name == "modernbert":
        special = dict.fromkeys(("cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id"), 1)
        return ModernBertForMaskedLM(ModernBertConfig(**tiny, **special))
    if name == "eurobert":
        return EuroBertForMaskedLM(EuroBertConfig(**tiny))
    config = Gemma2Config(**{**GROUPED, "num_hidden_layers": 2}, head_dim=8)
    config.use_bidirectional_attention = True
    return Gemma2ForCausalLM(config)


@pytest.mark.parametrize("name", ["modernbert", "eurobert", "gemma2"])
def test_a_model_whose_tokens_attend_to_later_ones_is_refused(name):
    model = bidirectional(name)
    for wrap in (lambda: model, lambda: petl.wrap(model, "lora", r=2, target_modules="all-linear")):
        with pytest.raises(UnsupportedError, match="later ones"):
            petl.drop_tokens(wrap())


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("left", [False, True])
def test_positions_of_padding_are_no_second_text(left, attn):
    model, inputs = model_for("llama", attn), batch(left=left)
    mask = inputs["attention_mask"]
    # as generate() has them: padding is at 1, wherever it stands
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    whole = model(**inputs).loss
    petl.drop_tokens(model, block=BLOCK, keep=KEEP)
    part = model(**inputs).loss
    assert abs(part - whole) > 1e-4
    # rotary attention depends on distances alone
    torch.testing.assert_close(
        model(**inputs, position_ids=positions).loss, part, atol=1e-5, rtol=1e-5
    )


def test_rows_of_several_texts_are_refused():
    model = model_for("llama")
    isolate_packed_texts(model.get_base_model())
    ids = batch()["input_ids"][:1]
    several = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    several["position_ids"] = torch.cat([torch.arange(12), torch.arange(18)])[None]
    single = {**several, "position_ids": torch.arange(30)[None]}
    before = model(**single).loss
    petl.drop_tokens(model, block=BLOCK, keep=KEEP)
    with pytest.raises(UnsupportedError):
        model(**several)
    assert model(**single).loss != before
    assert model.eval()(**several).loss > 0


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("mola", {"target_modules": ["q_proj"], "num_experts": 2}),
        ("adapter", {"gate": "middle_x"}),
        ("adapter", {"gate": "large"}),
        ("adapter", {"placement": "parallel_residual"}),
        ("compacter", {"placement": "parallel_residual"}),
    ],
)
def test_adapters_that_read_other_positions_are_refused(method, fields):
    model = model_for("llama", method=method, **fields)
    with pytest.raises(UnsupportedError, match="other positions"):
        petl.drop_tokens(model)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep": 0.0}, "keep=0"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"block": 0}, "block=0"),
        ({"block": 10**30}, "out of range"),
        ({"layers": "upper"}, "second_half"),
        ({"layers": [4]}, "0 to 3"),
        ({"layers": []}, "layers"),
        ({"layers": 3}, "layers=3"),
        ({"scorer": "median"}, "oracle"),
        ({"scorer": "predictor"}, "train-predictors"),
        ({"predictor": "none.safetensors"}, "scorer=norm with predictor=none"),
        ({"predictor": "none.safetensors", "scorer": "oracle"}, "go together"),
        ({"always_last": -1}, "always_last"),
        ({"mlp_keep": 0.0}, "mlp_keep"),
    ],
)
def test_values_that_are_not_allowed_change_nothing(settings, words):
    model = model_for("llama")
    classes = [type(module) for module in model.modules()]
    with pytest.raises(InputError, match=words):
        petl.drop_tokens(model, **settings)
    assert [type(module) for module in model.modules()] == classes


def test_an_mlp_of_another_form_is_refused_before_anything_changes():
    model = model_for("neox")
    classes = [type(module) for module in model.modules()]
    with pytest.raises(UnsupportedError):
        petl.drop_tokens(model, mlp_keep=0.5)
    assert [type(module) for module in model.modules()] == classes
