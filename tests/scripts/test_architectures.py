"""Types of models: a slice of each kind trains, saves and loads; all are as docs/models.md says."""

import pytest
from architectures.page import PAGE, page
from architectures.small import Type
from architectures.study import study
from architectures.sweep import read_results

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
)


# by default a few of them, and a router on a state space, on experts and beside images
FEW = ("causal/llama", "causal/gpt2", "encoder-decoder/bart", "speech/canary")
ROUTED = ("causal/gpt_oss", "causal/mamba", "image-text/llava")


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=[] if name in quick else pytest.mark.thorough)
        for method, quick in (("lora", FEW), ("mola", ROUTED))
        for name in SLICE
    ],
)
def test_a_type_trains_saves_loads_and_merges(name, method):
    found = study(Type(*name.split("/")), method)
    assert (found.verdict, found.detail) == ("works", "")
    assert found.coverage == BUILT[name]["methods"][method]["coverage"]
    assert found.merges == (method == "lora")


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT)
def test_each_method_does_on_a_type_what_the_page_says(name):
    told = {method: row["verdict"] for method, row in BUILT[name]["methods"].items()}
    found = {method: study(Type(*name.split("/")), method) for method in told}
    wrong = {m: each.detail for m, each in found.items() if each.verdict != told[m]}
    assert not wrong


def test_the_page_is_that_of_the_results():
    assert PAGE.read_text() == page(RESULTS)
