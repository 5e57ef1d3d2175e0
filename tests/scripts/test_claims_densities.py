"""The claims on the density loss: what their contenders differ in, and trials of tiny size."""

import math
import shutil
from dataclasses import replace
from typing import Any

import pytest
from claims import page, running
from claims.catalog import CLAIMS, WORDS
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from petl.adapters.export import saved_adapter
from petl.training.compose import compose

pytest_plugins = ["training_fixtures", "claims_fixtures"]

RELU, SWIGLU = CLAIMS["density-relu"], CLAIMS["density-swiglu"]
SEEDS = (0, 1)
SHORT = ("train.epochs=null", "train.steps=2", "train.batch_size=4")


def resolved(claim, words, folder):
    (contender,) = (each for each in claim.contenders if each.words == words)
    placed = running.Placed(contender.words, folder, claim.setting.stands_for)
    overrides = running.settings_in(folder, claim.setting.overrides)
    cfg: Any = OmegaConf.to_container(compose([*placed.overrides, *running.PLAIN, *overrides]))
    return cfg


@pytest.mark.parametrize(
    ("name", "plain", "sparse", "threshold"),
    [
        ("density", "without", "sparse-", 0.01),
        ("density-relu", "relu", "sparse-relu-", 0.0),
        ("density-relu", "gelu", "sparse-gelu-", 0.01),
        ("density-swiglu", "without", "sparse-gates-", 0.1),
    ],
)
def test_contenders_of_a_model_differ_in_weight_and_eps_alone(
    name, plain, sparse, threshold, tmp_path
):
    claim, words = CLAIMS[name], WORDS[name]
    without = resolved(claim, words[plain], tmp_path)
    assert without["loss"]["weight"] == 0
    found = {key: resolved(claim, words[key], tmp_path) for key in words if key.startswith(sparse)}
    for key, each in found.items():
        eps = float(key.removeprefix(sparse))
        assert each["loss"] == without["loss"] | {"weight": 1.0, "eps": eps}
        assert each["loss"]["threshold"] == threshold
        assert each | {"loss": None} == without | {"loss": None}
    assert f"{sparse}1e-7" in found  # the paper's


@pytest.mark.thorough
def test_twins_are_pretrained_and_compared(images_package, tmp_path, made):
    setting = replace(RELU.setting, rates=(1e-3,), seeds=SEEDS)
    setting = replace(setting, overrides=(*setting.overrides, *SHORT))
    claim = replace(RELU, setting=setting)
    found = running.try_claim(claim, tmp_path, "the command")
    assert len(made) == 6 * len(SEEDS)
    data = running.data_folder(claim, tmp_path)
    relu, gelu = (
        AutoModelForImageClassification.from_pretrained(data / name).config.to_diff_dict()
        for name in ("relu", "gelu")
    )
    assert (relu.pop("hidden_act"), gelu.pop("hidden_act")) == ("relu", "gelu")
    assert relu == gelu
    density = {}
    for contender in claim.contenders:
        run = running.folder_of(claim, contender, tmp_path)
        after = [running.scores(run / f"seed-{seed}")["after"] for seed in SEEDS]
        density[contender.words] = [each["density"] for each in after]
        assert [*found.contenders[contender.words].scores.values()] == density[contender.words]
        assert all(0 < value < 1 for value in density[contender.words])
    # a ratio of ratios: what is left with ReLU over what is left with GELU
    (twins,) = (each for each in claim.statements if each.than)
    relu, relu_dense, gelu, gelu_dense = (density[words] for words, _ in twins.signs)
    ratios = [(relu[i] / relu_dense[i]) / (gelu[i] / gelu_dense[i]) for i, _ in enumerate(SEEDS)]
    estimate = found.estimates[twins.key]
    assert estimate.mean == pytest.approx(sum(map(math.log, ratios)) / len(ratios))
    assert all(map(found.is_complete, claim.statements))
    text = "\n".join(page.section(claim, found))
    assert "active neurons: below 1 times" in text


@pytest.mark.thorough
def test_gates_of_a_decoder_are_counted_beside_what_perplexity_needs(tiny, tmp_path, made):
    own = f"{tiny.folder}/llama"

    def write(folder):
        # random MLPs that are large enough for the perplexity to need them
        shutil.copytree(own, folder / "llama")
        model = AutoModelForCausalLM.from_pretrained(own)
        for name, weight in model.named_parameters():
            if "mlp" in name:
                weight.data.mul_(20)
        model.save_pretrained(folder / "llama")

    setting = replace(
        SWIGLU.setting,
        overrides=(*(w.replace(own, "{data}/llama") for w in tiny.complete), *SHORT),
        rates=(1e-2,),
        seeds=SEEDS,
        write_files=write,
    )
    claim = replace(SWIGLU, setting=setting)
    found = running.try_claim(claim, tmp_path, "the command")
    assert len(made) == 3 * len(SEEDS)
    for contender in claim.contenders:
        row = found.contenders[contender.words]
        for seed in SEEDS:
            run = running.folder_of(claim, contender, tmp_path) / f"seed-{seed}"
            after = running.scores(run)["after"]
            assert row.scores[str(seed)] == after["density"]
            assert "ppl_1_sparsity" not in after
            assert 0 < row.measured["neurons_at_ppl_1"][str(seed)] <= 1
    # a run whose loss reports the sparsity has it from `petl eval`, on the same 20 test rows
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("ppl_sparsity: false", "ppl_sparsity: true"))
    reported = saved_adapter.score(saved_adapter.find(run))["ppl_1_sparsity"]
    assert row.measured["neurons_at_ppl_1"][str(seed)] == pytest.approx(1 - reported)
    assert all(map(found.is_complete, claim.statements))
    assert "not tried" not in "".join(row[1] for row in page.summary(claim, found).rows)
