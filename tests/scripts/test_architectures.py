"""Types of models: a slice of each kind trains, saves and loads; all are as docs/models.md says."""

from dataclasses import replace

import pytest
import torch
from architectures import study as study_module
from architectures.page import PAGE, page
from architectures.small import Type
from architectures.study import changed_share, study, wrapped
from architectures.sweep import read_results

from petl import testing

RESULTS = read_results()
BUILT = {name: row for name, row in RESULTS.items() if "reason" not in row}
# a decoder, an encoder, both, Conv1D, mixtures of experts (also with modules that transformers
# renames), state spaces, hybrids, images, images and text, sounds (also with batch norms)
SLICE = (
    "causal/llama",
    "causal/gpt2",
    "causal/exaone_moe",
    "causal/gpt_oss",
    "causal/inkling2_text",
    "causal/mamba",
    "causal/jamba",
    "encoder/bert",
    "encoder-decoder/bart",
    "image-text/llava",
    "vision/clip",
    "speech/wav2vec2",
    "speech/canary",
    "speech/granite_speech5_ctc",  # without get_input_embeddings
    "vision/mobilenet_v1",  # without linear layers
)


# by default twelve of them, and a router on a state space, on experts and beside images
LATER = ("causal/inkling2_text", "speech/wav2vec2", "vision/mobilenet_v1")
TWELVE = tuple(name for name in SLICE if name not in LATER)
ROUTED = ("causal/gpt_oss", "causal/mamba", "image-text/llava")


@pytest.mark.cells(2)
@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=[] if name in quick else pytest.mark.thorough)
        for method, quick in (("lora", TWELVE), ("mola", ROUTED))
        for name in SLICE
        if (name, method) != ("vision/mobilenet_v1", "mola")  # adapts linear layers, refused below
    ],
)
def test_a_type_trains_saves_loads_and_merges(name, method):
    found = study(Type(*name.split("/")), method)
    assert (found.verdict, found.detail) == ("works", "")
    assert found.coverage == BUILT[name]["methods"][method]["coverage"]
    assert found.merges == (method == "lora")
    assert not found.silent


@pytest.mark.parametrize("method", ["icv", "sherl"])
def test_blocks_of_a_model_for_images_and_text_are_those_of_its_language_model(method):
    each = Type("image-text", "llava")
    assert study(each, method).verdict == "works"
    base = each.build()
    model = wrapped(base, each.inputs(base), method)
    assert model.active_peft_config.blocks == "model.language_model.layers"
    adapted = [*testing.tuner_layers(model)]
    assert adapted
    assert all("model.language_model.layers." in name for name in adapted)


def test_a_share_that_is_not_that_of_the_weights_is_silent(monkeypatch):
    real = study_module.coverage_of

    def wrong(model):
        found = real(model)
        return found and replace(found, share=0.5 * found.share)

    monkeypatch.setattr(study_module, "coverage_of", wrong)
    found = study(Type("causal", "llama"), "lora")
    assert "merging changes 1.000 of the block weights" in found.silent


def test_the_share_that_changes_is_counted_in_blocks():
    base, merged = (testing.tiny_llama() for _ in range(2))
    layer = merged.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        layer[0, 0] += 1
        merged.model.embed_tokens.weight += 1  # in no block
    blocks = sum(p.numel() for n, p in base.named_parameters() if ".layers." in n and p.dim() > 1)
    assert changed_share(base, merged) == pytest.approx(layer.numel() / blocks)


@pytest.mark.cells(2)
@pytest.mark.parametrize(
    ("name", "method", "reason"),
    [
        # image-shaped states in its encoder
        ("image-text/pp_formulanet", "vl_pet", "gets [1, 4, 4] tokens"),
        ("image-text/pp_formulanet", "sherl", "return [1, 4, 4, 64]"),
        # its blocks halve the number of tokens
        ("speech/granite_speech5_ctc", "sherl", "a side network reads [N, T, K] of one T"),
        ("vision/bit", "lora", "WeightStandardizedConv2d (53)"),
        ("vision/mobilenet_v1", "mola", "lora, for example, adapts Conv2d"),
    ],
)
def test_what_a_method_cannot_adapt_is_refused_with_the_reason(name, method, reason):
    found = study(Type(*name.split("/")), method)
    assert found.verdict == "refused"
    assert reason in found.detail


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT)
def test_each_method_does_on_a_type_what_the_page_says(name):
    told = {method: row["verdict"] for method, row in BUILT[name]["methods"].items()}
    found = {method: study(Type(*name.split("/")), method) for method in told}
    wrong = {m: each.detail for m, each in found.items() if each.verdict != told[m]}
    assert not wrong


def test_the_page_is_that_of_the_results():
    assert PAGE.read_text() == page(RESULTS)
