"""Adapter folders of any method: compressed, expanded, pruned."""

import json
import re
import shutil
from functools import partial

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file

import petl
from petl import testing
from petl.adapters import deltas
from petl.adapters.deltas.adapters import amend_card, count_kept, pruned_names, read
from petl.adapters.search import levels_of
from petl.errors import UnsupportedError

WEIGHTS = "adapter_model.safetensors"
FIELDS = {
    "lora": {},
    "mola": {"num_experts": 2},
    "mos": {"r": 3},
    "sparse": {"density": 0.05, "selection_algorithm": "none"},
    "adapter": {},
    "compacter": {"phm_dim": 2},
    "ia3": {},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved adapter of each method, with random values."""
    made = {}

    def folder(name):
        if name not in made:
            torch.manual_seed(0)
            model = testing.stir(petl.wrap(testing.tiny_llama(2), name, **FIELDS[name]))
            made[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(made[name])
        return made[name]

    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(4, 12)[None]).logits


@pytest.mark.cells(2)
@pytest.mark.parametrize("name", FIELDS)
def test_a_compressed_adapter_loads_and_expands(name, folders, tmp_path):
    folder = folders(name)
    found = deltas.compress_adapter(folder, tmp_path / "small", density=0.3, scope="global")
    state = load_file(folder / WEIGHTS)
    coded = sum(t.numel() for t in state.values() if t.is_floating_point())
    assert (found.numel, sum(found.kept.values())) == (coded, int(0.3 * coded + 0.5))
    assert not (tmp_path / "small" / WEIGHTS).exists()
    assert (tmp_path / "small" / "adapter_config.json").read_bytes() == (
        folder / "adapter_config.json"
    ).read_bytes()
    deltas.expand(tmp_path / "small", tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / WEIGHTS)
    start = 1.0 if name == "ia3" else 0.0
    assert {k: (t.shape, t.dtype) for k, t in plain.items()} == {
        k: (t.shape, t.dtype) for k, t in state.items()
    }
    for key, tensor in plain.items():
        if tensor.is_floating_point():
            assert ((tensor - start) != 0).sum() == found.kept[key]
        else:
            assert torch.equal(tensor, state[key])
    loaded = logits(petl.load(testing.tiny_llama(2), tmp_path / "small"))
    theirs = PeftModel.from_pretrained(testing.tiny_llama(2), tmp_path / "plain")
    assert torch.equal(loaded, logits(theirs))
    if all(found.kept.values()):  # a factor that was emptied leaves no effect
        assert not torch.equal(loaded, logits(testing.tiny_llama(2)))


def test_it_is_one_of_several_adapters_and_trains_on(folders, tmp_path):
    deltas.compress_adapter(folders("mola"), tmp_path / "small", density=0.1)
    model = petl.load(testing.tiny_llama(2), folders("mola"))
    expected = logits(petl.load(testing.tiny_llama(2), tmp_path / "small"))
    petl.load(model, tmp_path / "small", adapter_name="small", is_trainable=True)
    model.set_adapter("small")
    assert torch.equal(logits(model), expected)
    model.train()(
        input_ids=torch.arange(4, 12)[None], labels=torch.arange(4, 12)[None]
    ).loss.backward()
    assert any(p.grad is not None for n, p in model.named_parameters() if ".small." in n)


def test_heads_are_not_coded(tmp_path):
    model = petl.wrap(
        testing.tiny_llama(2), "lora", target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    testing.stir(model).save_pretrained(tmp_path / "whole")
    found = deltas.compress_adapter(tmp_path / "whole", tmp_path / "small", exclude=["layers.0"])
    assert [name for name in found.others if "lm_head" in name]
    assert not [name for name in found.kept if "lm_head" in name or "layers.0" in name]
    state = load_file(tmp_path / "whole" / WEIGHTS)
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.others.items())


@pytest.mark.parametrize(
    ("build", "method", "fields", "ending", "count"),
    [
        (testing.tiny_llama, "dora", {}, ".lora_magnitude_vector", 6),
        (testing.tiny_llama, "boft", {"target_modules": ["q_proj"]}, ".boft_s", 3),
        (testing.tiny_llama, "vera", {"target_modules": ["q_proj"]}, "vera_([AB]|lambda_d)", 5),
        (testing.tiny_llama, "randlora", {"target_modules": ["q_proj"]}, "ra_([AB]|gamma)", 11),
        (testing.tiny_llama, "delora", {"target_modules": ["q_proj"]}, "ra_(w_norm|lambda)", 6),
        (testing.tiny_llama, "lora", {"trainable_token_indices": [5, 6]}, "trainable_tokens", 1),
        (testing.tiny_bert, "lora", {"bias": "all"}, ".bias", 19),
    ],
)
def test_weights_in_an_adapter_file_stay_as_they_are(
    build, method, fields, ending, count, tmp_path
):
    for seed in range(2):
        model = testing.stir(petl.wrap(build(), method, **fields), seed=seed)
        model.save_pretrained(tmp_path / str(seed))
    first = load_file(tmp_path / "0" / WEIGHTS)
    whole = {name for name in first if re.search(ending, name) and ".lora_B" not in name}
    assert len(whole) == count
    found = deltas.compress_adapter(tmp_path / "0", tmp_path / "small", density=0.3)
    deltas.prune_adapter(tmp_path / "0", tmp_path / "thin", 0.5)
    folders = [tmp_path / "0", tmp_path / "1"]
    how, first_of = {"level": "tensors"}, {"exclude": ["trainable_tokens"]}
    deltas.combine_adapters(folders, tmp_path / "both", "linear", **how, **first_of)
    if ending == "trainable_tokens":
        with pytest.raises(petl.InputError, match="trainable_tokens"):
            deltas.combine_adapters(folders, tmp_path / "none", "linear", **how)
    for state in (
        found.others,
        load_file(tmp_path / "thin" / WEIGHTS),
        load_file(tmp_path / "both" / WEIGHTS),
    ):
        assert all(torch.equal(state[name], first[name]) for name in whole)
    changed = load_file(tmp_path / "both" / WEIGHTS)
    assert all(not torch.equal(changed[name], first[name]) for name in first.keys() - whole)
    units = levels_of(model, "density")
    assert not [name for unit in units for name in unit.tensors[0] if re.search(ending, f"{name}.")]


@pytest.mark.parametrize(
    ("method", "one", "other"),
    [
        ("lora", {}, {"use_dora": True}),
        ("lora", {"use_dora": True}, {}),
        ("lora", {"bias": "all"}, {}),
        ("vera", {"save_projection": False}, {"projection_prng_key": 5, "save_projection": False}),
        ("fourierft", {}, {"random_loc_seed": 5}),
        ("randlora", {}, {"randlora_alpha": 64}),
        ("oft", {}, {"coft": True}),
        ("hra", {"init_weights": False}, {"apply_GS": True, "init_weights": False}),
        ("mola", {}, {"top_k": 1}),
    ],
)
def test_tensors_that_mean_something_else_are_not_combined(method, one, other, tmp_path):
    for name, fields in (("a", one), ("b", other)):
        model = petl.wrap(testing.tiny_llama(2), method, target_modules=["q_proj"], **fields)
        testing.stir(model).save_pretrained(tmp_path / name)
    key = next(iter(other or one))
    pair = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(petl.InputError, match=f"a has {key}=.* and .*b "):
        deltas.combine_adapters(pair, tmp_path / "out", "linear", level="tensors")


def test_a_file_for_another_model_is_refused(folders, tmp_path):
    deltas.compress_adapter(folders("lora"), tmp_path / "small")
    with pytest.raises(petl.InputError):
        petl.load(testing.tiny_llama(3), tmp_path / "small", other_base=True)


def test_packed_codes_and_full_weights_are_refused(tmp_path):
    norms = {"target_modules": ["input_layernorm"]}
    for name, fields in (("binary", {}), ("ln_tuning", norms), ("pela", {})):
        model = petl.wrap(testing.tiny_llama(2), name, **fields)
        model.save_pretrained(tmp_path / name)
        with pytest.raises(petl.InputError):
            deltas.compress_adapter(tmp_path / name, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_what_was_taken_out_of_the_base_weights_is_refused_until_it_is_converted(tmp_path):
    model = petl.wrap(testing.tiny_llama(2), "lora", init_lora_weights="pissa")
    model.save_pretrained(tmp_path / "start")
    testing.stir(model).save_pretrained(tmp_path / "pissa")
    for write in (deltas.compress_adapter, partial(deltas.prune_adapter, drop=0.5)):
        with pytest.raises(UnsupportedError):
            write(tmp_path / "pissa", tmp_path / "out")
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    deltas.compress_adapter(tmp_path / "converted", tmp_path / "out")


def test_the_config_of_a_random_base_is_kept(folders, tmp_path):
    folder = shutil.copytree(folders("lora"), tmp_path / "lora")
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text("{}")
    deltas.compress_adapter(folder, tmp_path / "small")
    deltas.prune_adapter(folder, tmp_path / "thin", 0.5)
    deltas.combine_adapters([folder, folder], tmp_path / "both", "linear")
    deltas.expand(tmp_path / "small", tmp_path / "plain")
    for name in ("small", "thin", "both", "plain"):
        assert (tmp_path / name / "base" / "config.json").is_file()


def test_of_a_lora_only_b_is_pruned(folders, tmp_path):
    deltas.prune_adapter(folders("lora"), tmp_path / "out", 0.9, seed=4)
    before, after = load_file(folders("lora") / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert set(changed) == {name for name in before if "lora_B" in name}
    expected = deltas.prune({name: before[name] for name in changed}, 0.9, seed=4)
    assert all(torch.equal(after[name], expected[name]) for name in changed)
    with safe_open(tmp_path / "out" / WEIGHTS, "pt") as opened:
        record = json.loads(opened.metadata()["petl_pruned"])
    assert record == {"drop": 0.9, "q": None, "seed": 4}


def test_ia3_is_pruned_around_one(folders, tmp_path):
    found = deltas.prune_adapter(folders("ia3"), tmp_path / "out", 0.5)
    before = load_file(folders("ia3") / WEIGHTS)
    for name, tensor in found.items():
        moved = tensor != 1
        torch.testing.assert_close(tensor[moved] - 1, 2 * (before[name][moved] - 1))
    assert pruned_names(read(folders("sparse")))


def test_a_pruned_adapter_keeps_its_dtypes(tmp_path):
    model = testing.stir(petl.wrap(testing.tiny_llama(2), "ia3")).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    found = deltas.prune_adapter(tmp_path / "half", tmp_path / "out", 0.5)
    before = load_file(tmp_path / "half" / WEIGHTS)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    for name, tensor in found.items():
        moved = tensor != 1
        expected = 2 * (before[name].float()[moved] - 1) + 1
        assert torch.equal(tensor[moved], expected.bfloat16())


def test_scores_of_the_hub_are_no_part_of_the_card_of_a_changed_adapter(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\nmetrics: [accuracy]\nmodel-index: []\n---\n\nText.\n")
    amend_card(card, "Changed.")
    amend_card(card, "Changed.")
    assert card.read_text() == "---\nlicense: mit\n---\n\nText.\n\nChanged."


def test_values_of_ia3_that_have_an_effect_are_those_that_are_not_one(folders):
    material = read(folders("ia3"))
    names = pruned_names(material)
    state = {name: torch.ones_like(material.state[name]) for name in names}
    state[names[0]].view(-1)[:2] = torch.tensor([0.0, 1.5])
    assert count_kept(material, state, names) == 2
