"""A narrowed adapter: what it computes, its files, and the scale of widths that were trained."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import petl
from petl import testing
from petl.core.adapter_widths import record
from petl.core.adapter_widths.record import Nested
from petl.errors import InputError

CASES = {
    "lora": ("lora", {"r": 8}),
    "lora by pattern": (
        "lora",
        {
            "r": 8,
            "lora_alpha": 10,
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, "v_proj": 6},
            "alpha_pattern": {"v_proj": 5, "k_proj": 7},
        },
    ),
    "rslora": ("rslora", {"r": 8}),
    "dora": ("dora", {"r": 8}),
    "lora with a bias": ("lora", {"r": 8, "lora_bias": True}),
    "lora of an embedding": ("lora", {"r": 8, "target_modules": ["embed_tokens", "q_proj"]}),
    "mola": ("mola", {"r": 8, "num_experts": 3, "rank_pattern": {"q_proj": 2}}),
    "mola of rslora": ("mola", {"r": 8, "num_experts": 3, "use_rslora": True}),
    "recurrent mola": ("mola", {"r": 8, "num_experts": 3, "router_type": "recurrent"}),
    "adapter": ("adapter", {"r": 8}),
    "adapter by factor": ("adapter", {"reduction_factor": 8}),
    "gated adapter": (
        "adapter",
        {"r": 8, "gate": "large", "placement": "parallel_residual"},
    ),
    "compacter": ("compacter", {"r": 16}),
}


def wrapped(case, **more):
    name, fields = CASES[case]
    model = petl.wrap(testing.tiny_llama(), name, task_type="CAUSAL_LM", **fields, **more)
    return testing.stir(model, more.get("adapter_name", "default")).eval()


def outputs(model):
    return testing.logits(model, testing.TINY_MODELS["llama"].batch())


def loaded(folder, **more):
    return petl.load(testing.tiny_llama(), folder, **more)


@pytest.mark.cells(3)
@pytest.mark.parametrize("scale", ["full", "width"])
@pytest.mark.parametrize("case", CASES)
def test_a_narrowed_adapter_is_the_width(case, scale, tmp_path):
    model = wrapped(case)
    full = outputs(model)
    with petl.at_width(model, 4, scale):
        expected = outputs(model)
    assert not torch.allclose(expected, full, atol=1e-3)
    petl.narrow(model, 4, tmp_path / "narrow", scale)
    torch.testing.assert_close(outputs(loaded(tmp_path / "narrow")), expected)
    # PEFT alone reads it too
    peft = PeftModel.from_pretrained(testing.tiny_llama(), tmp_path / "narrow").eval()
    torch.testing.assert_close(outputs(peft), expected)
    assert torch.equal(outputs(model), full)


@pytest.mark.parametrize("scale", ["full", "width"])
def test_a_narrowed_adapter_narrowed_again_is_the_smaller_one(scale, tmp_path):
    model = wrapped("lora by pattern")
    record.remember(model, "default", Nested((1, 3, 5, 8), scale))
    petl.narrow(model, 5, tmp_path / "five")
    petl.narrow(loaded(tmp_path / "five"), 3, tmp_path / "three")
    petl.narrow(model, 3, tmp_path / "at once")
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("three", "at once"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    torch.testing.assert_close(
        outputs(loaded(tmp_path / "three")), outputs(loaded(tmp_path / "at once"))
    )
    assert json.loads((tmp_path / "three" / "nested.json").read_text())["widths"] == [1, 3]


def test_the_config_of_a_narrowed_lora_has_its_rank_and_scale(tmp_path):
    petl.narrow(wrapped("lora by pattern"), 4, tmp_path / "narrow")
    config = json.loads((tmp_path / "narrow" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 5)
    assert config["rank_pattern"] == {"q_proj": 2, "v_proj": 4}
    scales = {"q_proj": 10 / 2, "k_proj": 7 / 8, "v_proj": 5 / 6, "o_proj": 10 / 8}
    model = loaded(tmp_path / "narrow")
    for name, scale in scales.items():
        layer = model.get_submodule(f"base_model.model.model.layers.1.self_attn.{name}")
        assert layer.scaling["default"] == pytest.approx(scale)


def test_a_head_is_copied(tmp_path):
    model = petl.wrap(testing.tiny_bert(), "lora", r=4, task_type="SEQ_CLS")
    testing.stir(model).eval()
    batch = testing.TINY_MODELS["bert"].batch()
    with petl.at_width(model, 3):
        expected = testing.logits(model, batch)
    petl.narrow(model, 3, tmp_path / "narrow")
    found = testing.logits(petl.load(testing.tiny_bert(), tmp_path / "narrow"), batch)
    torch.testing.assert_close(found, expected)


def test_the_active_adapter_is_narrowed_whatever_its_name(tmp_path):
    model = wrapped("mola", adapter_name="first")
    model.add_adapter("second", model.peft_config["first"])
    model.set_adapter("second")
    testing.stir(model, "second", seed=5).eval()
    with petl.at_width(model, 4):
        expected = outputs(model)
    petl.narrow(model, 4, tmp_path / "narrow")
    torch.testing.assert_close(outputs(loaded(tmp_path / "narrow")), expected)


# What is served is what was trained: the scale that nested.json has


@pytest.mark.parametrize("scale", ["full", "width"])
def test_a_loaded_adapter_has_the_scale_that_it_was_trained_with(scale, tmp_path):
    model = wrapped("lora")
    record.remember(model, "default", Nested((2, 4, 8), scale))
    with petl.at_width(model, 4, scale):
        expected = outputs(model)
    with petl.at_width(model, 4):  # the same without being told
        assert torch.equal(outputs(model), expected)
    model.save_pretrained(tmp_path / "first")
    again = loaded(tmp_path / "first")
    with petl.at_width(again, 4):
        torch.testing.assert_close(outputs(again), expected)
    # it is saved with it once more, and narrowed with it
    again.save_pretrained(tmp_path / "second")
    petl.narrow(loaded(tmp_path / "second"), 4, tmp_path / "narrow")
    torch.testing.assert_close(outputs(loaded(tmp_path / "narrow")), expected)
    # beside another adapter
    petl.load(again, tmp_path / "second", adapter_name="other")
    again.set_adapter("other")
    with petl.at_width(again, 4):
        torch.testing.assert_close(outputs(again), expected)


def test_a_later_adapter_of_the_name_is_not_nested(tmp_path):
    model = wrapped("lora", adapter_name="first")
    record.remember(model, "first", Nested((4, 8), "width"))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "first" / "nested.json").is_file()
    config = petl.build_config("lora", r=8, target_modules=["q_proj"])
    model.delete_adapter("first")
    model.add_adapter("first", config)
    assert record.nested_of(model, "first") is None
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "first" / "nested.json").exists()


@pytest.mark.parametrize(
    "content",
    [
        {"widths": [4, 2], "scale": "full"},
        {"widths": [0, 2], "scale": "full"},
        {"widths": [], "scale": "full"},
        {"widths": [2, 4], "scale": "half"},
        {"widths": [2, 4]},
        {"widths": "2", "scale": "full"},
    ],
)
def test_a_file_with_other_content_is_refused(content, tmp_path):
    wrapped("lora").save_pretrained(tmp_path)
    (tmp_path / "nested.json").write_text(json.dumps(content))
    for read in (loaded, lambda folder: petl.deltas.narrow_folder(folder, 2, tmp_path / "narrow")):
        with pytest.raises(InputError, match=r"nested\.json"):
            read(tmp_path)


def test_a_compressed_adapter_is_narrowed_to_a_plain_one(tmp_path):
    wrapped("lora").save_pretrained(tmp_path / "first")
    petl.deltas.compress_adapter(tmp_path / "first", tmp_path / "small", density=1.0)
    petl.deltas.narrow_folder(tmp_path / "small", 4, tmp_path / "narrow")
    model = loaded(tmp_path / "small")
    with petl.at_width(model, 4):
        expected = outputs(model)
    torch.testing.assert_close(outputs(loaded(tmp_path / "narrow")), expected)
    assert "compressed" not in (tmp_path / "narrow" / "README.md").read_text().lower()
