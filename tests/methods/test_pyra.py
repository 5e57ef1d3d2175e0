"""PYRA: blocks against a loop over tokens, schedules and counts, sizes, refusals, inner methods."""

import copy
import json
import pickle
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2Model,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)

import petl
from petl import testing
from petl.core.registry import refusal
from petl.core.support import Capability
from petl.errors import InputError, UnsupportedError
from petl.experiments.planning.dry_run import takes_mixed_batches
from petl.methods.pyra import merged_sizes, save_inner
from petl.methods.pyra.config import plan_of
from petl.methods.pyra.token_merging import match, merge
from petl.testing.models import image_batch, tiny_llama, tiny_vit
from petl.training.optimizer import groups
from petl.training.runs.settings import TrainConfig

CONTRACT = {
    "models": ("vit",),
    # the last block merges nothing: what is merged there does not reach the class token again
    "fields": {"schedule": [2, 0]},
    "starts_at_base": False,
    "lr": 0.2,
    "excused": {
        "layers_that_are_never_called_are_refused": "its targets are blocks that it chooses"
    },
    "refuses": ("both_adapters_can_be_active",),
    "acts_with": {"inner": {"inner": "lora"}, "schedule": {"schedule": [1, 0]}},
    "idle": {
        "num_tokens": "it refuses images of another size",
        "vector_lr": "it refuses an optimizer with one learning rate",
    },
}
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 6,  # 16 patches
    "num_labels": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
AUDIO = {"num_mel_bins": 16, "max_length": 24, "patch_size": 8}
AUDIO |= {"frequency_stride": 8, "time_stride": 8}  # 6 patches


def build(cls: Any, config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # norms, biases and tokens are constant otherwise
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def vit(**settings: Any) -> Any:
    return build(ViTForImageClassification, ViTConfig(**{**SHAPE, **settings}))


def deit() -> Any:
    return build(DeiTForImageClassificationWithTeacher, DeiTConfig(**SHAPE))


def ast() -> Any:
    return build(ASTForAudioClassification, ASTConfig(**{**SHAPE, **AUDIO}))


def inputs(model: Any, rows: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    audio = "input_values" in model.main_input_name
    shape = (rows, AUDIO["max_length"], AUDIO["num_mel_bins"]) if audio else (rows, 3, 24, 24)
    return {model.main_input_name: torch.randn(shape, generator=generator)}


def vectors(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """The trained tensors of each block, by the block's number."""
    found: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        path, mark, tensor = name.partition(".petl_pyra_adapters.default.")
        if mark:
            found.setdefault(path.rpartition(".")[2], {})[tensor] = parameter
    return found


# The equations as a loop over rows and tokens


@dataclass
class Tokens:
    """One image's tokens, and of how many each is the mean."""

    x: list[Tensor]
    sizes: list[float]


def attend(block: Any, tokens: Tokens, *, counts: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Softmax attention with its residual sum: the tokens, and their keys as means over heads."""
    attention, heads = block.attention, block.attention.num_attention_heads
    normed = [block.layernorm_before(x) for x in tokens.x]
    q, k, v = (
        [p(h).view(heads, -1) for h in normed]
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    out = []
    for i in range(len(normed)):
        parts = []
        for head in range(heads):
            logits = [
                q[i][head] @ k[j][head] / q[i].shape[1] ** 0.5
                + (torch.tensor(tokens.sizes[j]).log() if counts else 0.0)
                for j in range(len(normed))
            ]
            weights = torch.stack(logits).softmax(0)
            parts.append(sum(w * v[j][head] for j, w in enumerate(weights)))
        out.append(tokens.x[i] + attention.o_proj(torch.cat(parts)))
    keys = [key.mean(0).detach() for key in k]
    return out, keys


def merged(x: list[Tensor], keys: list[Tensor], sizes: list[float], r: int, protected: int, w: Any):
    """Sections "matching" and "correction" of the paper, token by token."""
    T = len(x)
    v = [token * size for token, size in zip(x, sizes, strict=True)]
    pairs = []
    for i in range(2, T, 2):  # token 0 is protected
        partners = [j for j in range(1, T, 2) if protected == 1 or j != 1]
        scores = [float(F.cosine_similarity(keys[i], keys[j], dim=0)) for j in partners]
        best = max(range(len(scores)), key=scores.__getitem__)
        pairs.append((scores[best], i, partners[best]))
    pairs = sorted(pairs, key=lambda pair: -pair[0])[:r]
    sums, new = dict(enumerate(v)), dict(enumerate(sizes))
    S, D = (torch.stack([v[pair[side]] for pair in pairs]) for side in (1, 2))
    if w:
        P = F.layer_norm(S + D, S.shape[-1:], w["norm_weight"], w["norm_bias"])
        Wc = 2 * torch.sigmoid(sum(a * p for a, p in zip(w["weight_a"], P, strict=True)))
        Wt = [2 * torch.sigmoid(p @ w["weight_b"][0]) - 1 for p in P]
        rows = [s + s * Wc * t for s, t in zip(S, Wt, strict=True)]
    else:
        rows = list(S)
    for (_, i, j), row in zip(pairs, rows, strict=True):
        sums[j] = sums[j] + row
        new[j] += new[i]
    gone = {i for _, i, _ in pairs}
    even, odd = [i for i in range(0, T, 2) if i not in gone], [*range(1, T, 2)]
    order = even + odd if protected == 1 else [0, 1, *even[1:], *odd[1:]]
    return [sums[i] / new[i] for i in order], [new[i] for i in order]


def by_hand(layers: Any, x: Tensor, removed: list[int], weights: Any, protected: int, counts: bool):
    """The tokens behind the last block, and their sizes, for one image x [T, C]."""
    tokens = Tokens(list(x), [1.0] * len(x))
    for i, (block, r) in enumerate(zip(layers, removed, strict=True)):
        attended, keys = attend(block, tokens, counts=counts and i > 0)
        sizes = tokens.sizes
        if r:
            attended, sizes = merged(attended, keys, sizes, r, protected, weights.get(str(i)))
        tokens = Tokens([t + block.mlp(block.layernorm_after(t)) for t in attended], sizes)
    return torch.stack(tokens.x), torch.tensor(tokens.sizes)


CASES = [
    (partial(vit, attention_probs_dropout_prob=0.5), [4, 0, 3], {}, 1),  # none in evaluation
    (vit, [5, 3, 1], {"protected_tokens": 2, "proportional_attention": False}, 2),
    (deit, [4, 2, 1], {}, 2),
    (ast, [2, 1, 1], {}, 2),
    (vit, [3, 2, 0], {"reactivate": False}, 1),
]


@pytest.mark.cells(1)
@pytest.mark.parametrize(
    ("make", "schedule", "fields", "protected", "attention"),
    [*((*case, "sdpa") for case in CASES), *((*case, "eager") for case in CASES[:2])],
)
def test_blocks_equal_a_loop_over_tokens(make, schedule, fields, protected, attention):
    base = make()
    base.set_attn_implementation(attention)
    plain = copy.deepcopy(base)
    model = petl.wrap(base, "pyra", schedule=schedule, task_type=None, **fields)
    if fields.get("reactivate", True):  # else it has no parameters
        testing.stir(model)
    encoder = getattr(plain, plain.base_model_prefix)
    embedded = encoder.embeddings(**inputs(plain))
    found = vectors(model)
    weights = {
        i: {n: p.detach().clone().requires_grad_() for n, p in block.items()}
        for i, block in found.items()
    }
    counts = fields.get("proportional_attention", True)
    rows = [by_hand(encoder.layers, x, schedule, weights, protected, counts) for x in embedded]
    expected = encoder.layernorm(torch.stack([tokens for tokens, _ in rows]))
    backbone = getattr(model.base_model.model, plain.base_model_prefix)
    output = backbone(**inputs(plain)).last_hidden_state
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    sizes = merged_sizes(model)
    torch.testing.assert_close(sizes, torch.stack([size for _, size in rows]))
    assert set(sizes.sum(1).tolist()) == {embedded.shape[1]}
    if not fields.get("reactivate", True):
        assert not found
        return
    assert {int(i) for i in found} == {i for i, r in enumerate(schedule) if r}
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
    (output * direction).sum().backward()
    (expected * direction).sum().backward()
    for i, block in weights.items():
        for name, leaf in block.items():
            grad = found[i][name].grad
            assert leaf.grad.abs().max() > 0
            torch.testing.assert_close(grad, leaf.grad, rtol=1e-3, atol=1e-4)


def test_training_starts_at_plain_merging_to_the_bit():
    fields = {"schedule": [4, 2, 1]}
    trained, plain = (
        petl.wrap(vit(), "pyra", reactivate=reactivate, **fields).eval()
        for reactivate in (True, False)
    )
    batch = inputs(vit())
    assert torch.equal(trained(**batch).logits, plain(**batch).logits)
    assert not torch.equal(trained(**batch).logits, vit()(**batch).logits)


def test_the_class_and_the_distillation_token_stay_first():
    model = deit()
    embedded = model.deit.embeddings(**inputs(model))
    keys = torch.randn(2, 18, 8)
    for protected, r in ((1, 8), (2, 8)):
        matching = match(keys, r, protected)
        assert matching.kept[:, 0].eq(0).all()
        assert protected == 1 or matching.kept[:, 1].eq(1).all()
        tokens, sizes = merge(embedded, None, matching)
        for i in range(protected):
            assert torch.equal(tokens[:, i], embedded[:, i]) or protected == 1
        assert protected == 1 or sizes[:, :2].eq(1).all()
        assert sizes[:, 0].eq(1).all()
        assert tokens.shape[1] == 10


def test_equal_keys_are_merged_in_their_order():
    matching = match(torch.ones(1, 9, 4), 3, 1)
    assert matching.sources.tolist() == [[2, 4, 6]]
    assert matching.kept.tolist() == [[0, 8, 1, 3, 5, 7]]


def test_a_key_of_zero_is_similar_to_none():
    keys = torch.randn(1, 7, 4)
    keys[:, 4] = 0
    assert match(keys, 3, 1).kept.isfinite().all()


def test_sums_are_not_rounded_in_half_precision():
    """197 equal tokens in one group: their mean is the token itself."""
    x = torch.full((1, 4, 2), 1.0, dtype=torch.bfloat16)
    sizes = torch.tensor([[1.0, 196.0, 1.0, 1.0]])
    keys = torch.tensor([[[9.0, 0, 0], [0, 1.0, 0], [0, 1, 0], [0, 0, 1]]])
    tokens, new = merge(x, sizes, match(keys, 1, 1))
    assert new.max() == 197
    assert tokens.dtype == torch.bfloat16
    assert tokens.eq(1).all()


# Schedules and counts

BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}


@pytest.mark.parametrize(
    ("shape", "schedule", "count"),
    [
        (BASE, "low", 27_834),
        (BASE, "high", 27_840),
        (LARGE, "low", 73_918),
        (LARGE, "high", 73_920),
    ],
)
def test_counts_are_those_of_the_paper(shape, schedule, count):
    with torch.device("meta"):
        base = ViTModel(ViTConfig(**shape, intermediate_size=64))
    model = petl.wrap(base, "pyra", schedule=schedule)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_the_high_schedule_leaves_these_tokens():
    with torch.device("meta"):
        base = ViTModel(ViTConfig(**BASE, intermediate_size=64))
    plan = plan_of(petl.build_config("pyra"), base)
    left = [t - r for t, r in zip(plan.tokens, plan.removed, strict=True)]
    assert left == [157, 123, 93, 69, 51, 37, 27, 19, 15, 11, 8, 5]
    assert plan.tokens[0] == 197


def test_a_block_cannot_remove_more_than_half_of_its_tokens():
    plan = plan_of(petl.build_config("pyra", schedule=[99, 99, 99]), vit())
    assert plan.removed == [8, 4, 2]
    assert plan_of(petl.build_config("pyra", schedule=[99, 0, 99]), deit()).removed == [8, 0, 4]


# An inner method


@pytest.mark.cells(1)
@pytest.mark.parametrize(
    ("inner", "fields"),
    [
        ("lora", {"r": 4, "target_modules": ["q_proj", "v_proj"]}),
        ("adapter", {"r": 4}),
        ("compacter", {"r": 8, "phm_dim": 2}),
        ("mos", {"r": 2, "equivalent_rank": 2}),
    ],
)
def test_an_inner_method_is_switched_counted_and_saved_with_it(inner, fields, tmp_path):
    both = {"inner": inner, "schedule": [4, 2, 0], **fields}
    alone = petl.wrap(vit(), inner, **fields)
    model = petl.wrap(vit(), "pyra", **both)
    count, own = (len(testing.trainable(m)) for m in (model, alone))
    assert count == own + 8
    assert isinstance(model.active_peft_config, petl.get(inner))
    batch = inputs(vit())
    testing.stir(model)
    first = model.eval()(**batch).logits
    model.add_adapter("second", petl.build_config("pyra", **both))
    model.set_adapter("second")
    assert not any("default" in name.split(".") for name in testing.trainable(model))
    assert len(testing.trainable(model)) == count
    testing.stir(model, "second", seed=4)
    assert not torch.equal(model(**batch).logits, first)
    model.set_adapter("default")
    assert torch.equal(model(**batch).logits, first)
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, vit()(**batch).logits)
    model.save_pretrained(tmp_path)
    loaded = petl.load(vit(), tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, first)
    save_inner(tmp_path, tmp_path / "inner")
    by_peft = PeftModel.from_pretrained(vit(), tmp_path / "inner").eval()
    assert type(by_peft.active_peft_config) is petl.get(inner)
    for name, tensor in get_peft_model_state_dict(by_peft).items():
        assert torch.equal(tensor, get_peft_model_state_dict(loaded)[name])
    kept = load_file(tmp_path / "inner" / "adapter_model.safetensors")
    assert len(get_peft_model_state_dict(loaded)) > len(kept)
    assert len(kept) == len(get_peft_model_state_dict(by_peft)) > 0
    with pytest.raises(InputError):
        save_inner(tmp_path, tmp_path / "inner")
    model.delete_adapter("second")
    assert not [key for key in model.state_dict() if "second" in key.split(".")]
    config = model.active_peft_config
    assert pickle.loads(pickle.dumps(config)) == config
    plain = model.unload()
    assert torch.equal(plain(**batch).logits, vit()(**batch).logits)
    assert type(plain.vit.layers[0].attention) is type(vit().vit.layers[0].attention)


@pytest.mark.parametrize(
    ("inner", "fields"),
    [
        ("pst", {"total_step": 2, "initial_warmup": 0.0, "final_warmup": 0.0}),
        ("sparse", {"total_step": 2, "reselection_steps": 2, "selection_accumulation_steps": 1}),
        ("dsee", {"target_prune_ratio": 0.5, "prune_step": 1}),
    ],
)
def test_an_inner_method_that_changes_while_it_trains_does_so_beside_it(inner, fields, tmp_path):
    both = {"inner": inner, "schedule": [4, 2, 0], **fields}
    model, batch = petl.wrap(vit(), "pyra", **both).train(), inputs(vit())
    optimizer = torch.optim.AdamW(testing.trainable(model).values(), lr=0.01)
    lifecycle = petl.lifecycle(model)
    lifecycle.attach_optimizer(optimizer, total_steps=2)
    before = {k: t.clone() for k, t in model.state_dict().items() if not t.is_floating_point()}
    for step in (1, 2):
        model(**batch).logits.square().mean().backward()
        optimizer.step()
        lifecycle.after_step(step, optimizer)
        optimizer.zero_grad()
    # pruned entries, positions or masks
    assert any(not torch.equal(t, before[k]) for k, t in model.state_dict().items() if k in before)
    first = model.eval()(**batch).logits
    model.add_adapter("second", petl.build_config("pyra", **both))
    model.set_adapter("second")
    model.set_adapter("default")
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    torch.testing.assert_close(petl.load(vit(), tmp_path)(**batch).logits, first)


def test_keys_are_those_of_the_inner_adapter():
    """With a LoRA on the key projection, the adapted keys decide what is merged."""
    fields = {"inner": "lora", "r": 4, "target_modules": ["k_proj"], "schedule": [6, 0, 0]}
    model = petl.wrap(vit(), "pyra", **fields).eval()
    batch, found = inputs(vit()), []
    block = model.base_model.model.vit.layers[0]
    block.layernorm_after.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    model(**batch)
    with torch.no_grad():
        for name, parameter in testing.trainable(model).items():
            if "lora_B" in name:
                parameter.normal_(std=10)
    model(**batch)
    # of the first block, whose inputs are the same, other tokens are merged
    before, after = ({tuple(t) for t in x[0].round(decimals=3).tolist()} for x in found)
    assert before != after


# Around the method


def test_a_mean_over_tokens_can_be_weighted():
    model = petl.wrap(vit(), "pyra", schedule=[5, 2, 0], reactivate=False).eval()
    assert merged_sizes(model) is None
    model(**inputs(vit(), rows=3))
    assert merged_sizes(model).shape == (3, 10)
    assert merged_sizes(model).sum(1).eq(17).all()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_an_evaluation_before_backward_changes_no_recomputation(use_reentrant):
    """Sizes of one forward pass are not read by the recomputation of another."""
    model = testing.stir(petl.wrap(vit(), "pyra", schedule=[6, 3, 1])).train()
    model.enable_input_require_grads()
    first, second = ({"pixel_values": torch.randn(2, 3, 24, 24)} for _ in range(2))

    def gradients(between) -> dict[str, Tensor]:
        model.zero_grad()
        loss = model(**first).logits.square().sum()
        between()
        loss.backward()
        return {n: p.grad.clone() for n, p in testing.trainable(model).items()}

    expected = gradients(lambda: None)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})

    def another() -> None:
        model(**second)  # its own backward never comes
        with torch.no_grad():
            model(**second)

    for between in (lambda: None, another):
        for name, grad in gradients(between).items():
            torch.testing.assert_close(grad, expected[name])


def test_hidden_states_and_attentions_are_recorded():
    model = petl.wrap(vit(attn_implementation="eager"), "pyra", schedule=[4, 2, 0]).eval()
    out = model(**inputs(vit()), output_hidden_states=True, output_attentions=True)
    assert [h.shape[1] for h in out.hidden_states] == [17, 13, 11, 11]
    assert [a.shape[-1] for a in out.attentions] == [17, 13, 11]


def test_the_vectors_have_a_learning_rate_of_their_own():
    fields = {"inner": "lora", "r": 2, "target_modules": ["q_proj"], "schedule": [4, 2, 1]}
    model = petl.wrap(vit(), "pyra", vector_lr=1e-4, **fields)
    mine = {id(p) for block in vectors(model).values() for p in block.values()}
    rates = {}
    for group in groups(model, TrainConfig(lr=1e-3)):
        for parameter in group["params"]:
            rates[id(parameter)] = group["lr"]
    assert {rate for key, rate in rates.items() if key in mine} == {1e-4}
    assert {rate for key, rate in rates.items() if key not in mine} == {1e-3}
    life = petl.lifecycle(model)
    life.attach_optimizer(torch.optim.SGD(groups(model, TrainConfig(lr=1e-3))))
    alike = torch.optim.SGD(testing.trainable(model).values(), lr=1e-3)
    with pytest.raises(InputError):
        life.attach_optimizer(alike)


def test_other_models_are_refused_by_the_name_of_their_class():
    small = {**SHAPE, "num_hidden_layers": 2}
    others = {
        "LlamaForCausalLM": tiny_llama(),
        "Dinov2Model": Dinov2Model(Dinov2Config(**small)),
        "SwinModel": SwinModel(SwinConfig(embed_dim=16, depths=[2, 2], num_heads=[2, 2])),
        "ViTForMaskedImageModeling": ViTForMaskedImageModeling(ViTConfig(**small)),
    }
    for name, model in others.items():
        with pytest.raises(InputError, match=name):
            petl.wrap(model, "pyra", schedule=[1, 1])


def test_a_block_with_another_forward_is_refused_by_the_name_of_its_class():
    class ScaledLayer(type(vit().vit.layers[0])):  # ty: ignore[unsupported-base]
        def forward(self, hidden_states, attention_mask=None, **kwargs):
            return 2 * super().forward(hidden_states, attention_mask, **kwargs)

    model = vit()
    for block in model.vit.layers:
        block.__class__ = ScaledLayer
    with pytest.raises(InputError, match="ScaledLayer"):
        petl.wrap(model, "pyra", schedule=[1, 1, 1])


def test_an_adapter_does_not_load_onto_another_image_size_or_depth(tmp_path):
    petl.wrap(vit(), "pyra", schedule=[4, 2, 1]).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["num_tokens"], saved["schedule"]) == (17, [4, 2, 1])
    others = [({"patch_size": 8}, "17 tokens .*10"), ({"num_hidden_layers": 4}, "4 blocks")]
    for change, words in [*others, ({"hidden_size": 64}, None)]:
        with pytest.raises(InputError, match=words):
            petl.load(vit(**change), tmp_path)


def test_calls_that_would_compute_something_else_are_refused():
    model = petl.wrap(vit(), "pyra", schedule=[4, 2, 1]).eval()
    model.add_adapter("second", petl.build_config("pyra", schedule=[4, 2, 1]))
    large = {"pixel_values": torch.randn(1, 3, 30, 30), "interpolate_pos_encoding": True}
    masked = torch.tensor([[1] * 16 + [0]] * 2)
    second_block = model.base_model.model.vit.layers[1]
    for words, call in {
        "26 tokens": lambda: model(**large),
        "attention_mask": lambda: model(**inputs(vit()), attention_mask=masked),
        r"layers\.0": lambda: second_block(torch.randn(1, 13, 32)),
        "one adapter at a time": lambda: model.base_model.set_adapter(["default", "second"]),
        "tokens, not weights": model.merge_and_unload,
        "numbers of tokens": lambda: model(**inputs(vit()), adapter_names=["default", "second"]),
    }.items():
        with pytest.raises(InputError, match=words):
            call()


@pytest.mark.parametrize("inner", [None, "lora", "mos"])
def test_merging_of_weights_and_mixed_batches_are_refused_beside_any_inner_method(inner):
    targets = {"target_modules": ["q_proj"]} if inner == "lora" else {}
    small = {"r": 2, "equivalent_rank": 2} if inner == "mos" else {}
    fields = {"schedule": [4, 2, 1], "inner": inner, **targets, **small}
    config = petl.build_config("pyra", **fields)
    assert "merges tokens, not weights" in refusal(config, Capability.MERGE)
    assert "merges tokens, not weights" in refusal(config, Capability.LORA_EXPORT)
    assert "other numbers of tokens" in refusal(config, Capability.MIXED_BATCH)
    model = petl.wrap(vit(), config)
    assert not takes_mixed_batches(model)


def test_the_tiny_model_of_the_contract_merges():
    model = petl.wrap(tiny_vit(), "pyra", schedule=[2, 0]).eval()
    model(pixel_values=image_batch(2, 0)["pixel_values"])
    assert merged_sizes(model).shape == (2, 3)


def test_an_inner_adapter_is_written_of_pyra_with_one_only(tmp_path):
    petl.wrap(vit(), "pyra", schedule=[4, 2, 0]).save_pretrained(tmp_path / "alone")
    with pytest.raises(UnsupportedError):
        save_inner(tmp_path / "alone", tmp_path / "out")
    petl.wrap(vit(), "lora", target_modules=["q_proj"]).save_pretrained(tmp_path / "lora")
    with pytest.raises(InputError):
        save_inner(tmp_path / "lora", tmp_path / "out")
    assert not (tmp_path / "out").exists()
