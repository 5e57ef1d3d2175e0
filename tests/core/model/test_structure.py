from itertools import pairwise

import pytest
import torch
from tiny_families import FAMILIES, Family, K
from torch import Tensor, nn
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    FalconH1Config,
    FalconH1ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

import petl
from petl import testing
from petl.core.model.structure import find_sublayers, norm_names
from petl.errors import InputError

PRE = [name for name, family in FAMILIES.items() if not family.post]
POST = [name for name, family in FAMILIES.items() if family.post]


@pytest.mark.parametrize("name", FAMILIES)
def test_sublayers_have_the_right_ends(name):
    family = FAMILIES[name]
    found = find_sublayers(family.build())
    assert {(s.kind, s.closing, s.source, s.residual) for s in found} == set(family.parts())
    assert {s.width for s in found} == {K}
    decoder = {
        s.closing for s in found if "decoder" in s.closing and name not in ("opt", "opt_post")
    }
    assert {s.closing for s in found if s.causal} == (
        {s.closing for s in found} if family.causal else decoder
    )


def run(
    family: Family, model: nn.Module, *, silent: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """First inputs and outputs of modules in a forward, with the sub-layers' ends at zero."""
    inputs, outputs = {}, {}

    def note(name):
        def hook(module, args, kwargs, out):
            inputs[name] = args[0] if args else next(iter(kwargs.values()), None)
            outputs[name] = out[0] if isinstance(out, tuple) else out

        return hook

    closings = {closing for _, closing, _, _ in family.parts()}
    handles = []
    for name, module in model.named_modules():
        if silent and name in closings:
            handles.append(module.register_forward_hook(lambda m, args, out: torch.zeros_like(out)))
        handles.append(module.register_forward_hook(note(name), with_kwargs=True))
    with torch.no_grad():
        model(**family.batch())
    for handle in handles:
        handle.remove()
    return inputs, outputs


@pytest.mark.parametrize("name", PRE)
def test_zeroed_sublayers_leave_the_residual_stream_unchanged(name):
    family = FAMILIES[name]
    inputs, _ = run(family, family.build(), silent=True)
    for stack in family.stacks:
        streams = [
            inputs[residual] for *_, residual in family.parts() if residual.startswith(stack)
        ]
        for before, after in pairwise(streams):
            torch.testing.assert_close(after.reshape(-1, K), before.reshape(-1, K))  # OPT flattens


@pytest.mark.parametrize("name", POST)
def test_after_a_zeroed_sublayer_a_post_norm_stream_is_normalized(name):
    family = FAMILIES[name]
    model = family.build()
    inputs, _ = run(family, model, silent=True)
    for stack in family.stacks:
        parts = [part for part in family.parts() if part[1].startswith(stack)]
        for (kind, *_, before), (*_, after) in pairwise(parts):
            block = ".".join(before.split(".")[: stack.count(".") + 2])
            norm = model.get_submodule(f"{block}.{family.post[kind]}")
            expected = norm(inputs[before]).reshape(-1, K)
            torch.testing.assert_close(inputs[after].reshape(-1, K), expected)


@pytest.mark.parametrize("name", PRE)
def test_the_input_of_the_source_is_the_normalized_stream(name):
    family = FAMILIES[name]
    inputs, outputs = run(family, family.build(), silent=False)
    for _, _, source, residual in family.parts():
        torch.testing.assert_close(inputs[source], outputs[residual])


def test_a_model_without_blocks_has_no_sublayers():
    assert find_sublayers(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))) == []


def test_a_mixer_beside_a_feed_forward_is_no_feed_forward():
    config = FalconH1Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        mamba_d_ssm=64,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
    )
    found = {s.kind: s.closing for s in find_sublayers(FalconH1ForCausalLM(config))}
    assert found == {
        "attn": "model.layers.0.self_attn.o_proj",
        "ffn": "model.layers.0.feed_forward.down_proj",
    }


def test_norms_are_those_of_the_backbone():
    assert (
        len(norm_names(FAMILIES["t5"].build())) == 12
    )  # 2 + 2 and a last one, 3 + 3 and a last one
    gemma = norm_names(FAMILIES["gemma3"].build())
    assert len(gemma) == 13  # per block four and two inside attention, and the last one
    classifier = ASTForAudioClassification(ASTConfig(**FAMILIES["ast"].settings))
    assert all(name.startswith("audio_spectrogram_transformer.") for name in norm_names(classifier))


ICV = {"mode": "stream", "train": True, "pairs": None, "scale": "plain", "keep_norm": False}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("icv", ICV),
        ("sherl", {"r": 4}),
        ("mola", {"num_experts": [2, 4]}),
    ],
)
def test_a_list_of_blocks_without_attention_can_be_named(name, fields):
    config = MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=3, state_size=4)
    base = MambaForCausalLM(config)
    model = petl.wrap(base, name, blocks="backbone.layers", **fields).train()
    model(input_ids=torch.arange(6)[None]).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_experts_are_counted_in_the_named_list_of_blocks():
    blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(4))
    base = nn.Sequential(blocks)  # a list in a list: the outermost would count
    fields = {"num_experts": [1, 2], "top_k": 1, "target_modules": ["up"]}
    model = petl.wrap(base, "mola", blocks="0", **fields)
    layers = testing.tuner_layers(model).values()
    assert [layer.adapters["default"].num_experts for layer in layers] == [1, 1, 2, 2]


@pytest.mark.parametrize("name", ["icv", "sherl"])
def test_a_list_of_layers_that_are_no_blocks_is_refused(name):
    base = testing.tiny_llama(layers=2)
    base.model.heads = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    fields = (
        {"train": True, "pairs": None, "mode": "stream", "scale": "plain", "keep_norm": False}
        if name == "icv"
        else {}
    )
    with pytest.raises(InputError, match=r"blocks=model\.heads"):
        petl.wrap(base, name, blocks="model.heads", **fields)
