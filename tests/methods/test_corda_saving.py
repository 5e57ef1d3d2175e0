"""CorDA adapters after initialization: caches, saving, unloading, several processes."""

import copy
import json
import logging
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_python
from corda_fixtures import TARGETS, R, batches, layers, stir, update, wrap
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn

import petl
from petl.errors import InputError
from petl.testing import in_processes, tiny_llama
from petl.testing.models import causal_batch

# Caches


@pytest.mark.parametrize("kind", ["covariance_cache", "factors_cache"])
def test_a_cached_initialization_needs_no_forward_and_is_bit_exact(tmp_path, kind, caplog):
    caplog.set_level(logging.INFO)
    first = layers(wrap(**{kind: str(tmp_path)}))
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    base = tiny_llama(2)
    base.register_forward_pre_hook(lambda module, args: pytest.fail("the model was run"))
    for calibration in (batches(), ()):
        options = {"calibration": calibration} if calibration else {}
        fields = {"r": R, "lora_alpha": R, "target_modules": TARGETS, kind: str(tmp_path)}
        second = layers(petl.wrap(copy.deepcopy(base), "corda", **options, **fields))
        for key, layer in first.items():
            for name in ("lora_A", "lora_B"):
                one, other = (getattr(x, name)["default"].weight for x in (layer, second[key]))
                assert torch.equal(one, other)
    assert "no covariances" not in caplog.text


@pytest.mark.thorough
def test_cached_factors_of_another_mode_rank_or_base_are_not_used(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    wrap(factors_cache=str(tmp_path))
    wrap(factors_cache=str(tmp_path), corda_method="kpm")
    assert "the closest differ in corda_method" in caplog.text
    wrap(factors_cache=str(tmp_path), r=3)
    assert "the closest differ in ranks" in caplog.text
    wrap(edited(), factors_cache=str(tmp_path))
    assert len(list(tmp_path.glob("factors-*.safetensors"))) == 4
    kept = load_file(next(tmp_path.glob("*.safetensors")))
    key = "model.layers.0.mlp.down_proj"
    assert kept[f"{key}.spectrum"].shape == (64,)  # the complete spectrum, for analysis


def edited() -> nn.Module:
    """The model with one weight entry changed, of some ten thousand."""
    model: Any = tiny_llama(2)
    model.model.layers[1].mlp.up_proj.weight.data[17, 23] += 0.1
    return model


def reconfigured() -> nn.Module:
    """The model with the same weights and another config."""
    model: Any = tiny_llama(2)
    model.config.rms_norm_eps = 0.5
    return model


@pytest.mark.cells(3)
@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"base": edited()}, "weights"),
        ({"base": reconfigured()}, "config"),
        ({"calibration": [{**b, "position_ids": None} for b in batches()]}, "calibration"),
        ({"calibration_data": {"seed": 4}}, "calibration_data"),
        ({"calibration": batches(5)}, "calibration"),
        ({"activation_norm": "none"}, "activation_norm"),
        ({"damp": 0.02}, "damp"),
        ({"target_modules": ["q_proj"]}, "targets"),
        ({"base": tiny_llama(2).bfloat16()}, "weights, dtype"),
    ],
)
def test_cached_covariances_of_other_content_are_not_used(tmp_path, caplog, change, field):
    caplog.set_level(logging.INFO)
    wrap(covariance_cache=str(tmp_path))
    wrap(**{"covariance_cache": str(tmp_path), **change})
    assert f"the closest differ in {field}; computing them again" in caplog.text
    assert len(list(tmp_path.glob("covariances-*.safetensors"))) == 2


def test_unusable_caches_raise(tmp_path):
    fields = {"r": R, "target_modules": TARGETS, "covariance_cache": str(tmp_path)}
    with pytest.raises(InputError):
        petl.wrap(tiny_llama(2), "corda", **fields)
    with pytest.raises(InputError):
        petl.wrap(tiny_llama(2), "corda", calibration=lambda: None, **fields)
    for count in (5, 6):
        wrap(calibration=batches(count), covariance_cache=str(tmp_path))
    with pytest.raises(InputError, match="2 files"):
        petl.wrap(tiny_llama(2), "corda", **fields)
    (tmp_path / "a").write_text("")
    with pytest.raises(InputError):
        wrap(covariance_cache=str(tmp_path / "a" / "b"))
    assert not list(tmp_path.glob(".unfinished*"))


def test_caches_without_batches_need_equal_calibration_settings(tmp_path):
    """Without batches, caches are distinguished by the settings of the data."""
    kept = {"covariance_cache": str(tmp_path), "r": R, "target_modules": TARGETS}
    wrap(covariance_cache=str(tmp_path), calibration_data={"seed": 3})
    petl.wrap(tiny_llama(2), "corda", calibration_data={"seed": 3}, **kept)
    with pytest.raises(InputError):
        petl.wrap(tiny_llama(2), "corda", calibration_data={"seed": 4}, **kept)


def test_covariances_without_samples_are_cached(tmp_path, caplog):
    fields = {"covariance_cache": str(tmp_path), "num_covariance_rounds": 8}
    first = layers(wrap(**fields))  # six samples
    base = tiny_llama(2)
    base.register_forward_pre_hook(lambda module, args: pytest.fail("the model was run"))
    for key, layer in layers(wrap(base, **fields)).items():
        assert torch.equal(update(layer), update(first[key]))
    assert "is skipped" not in caplog.text


@pytest.mark.parametrize(("cut", "said"), [(True, "is skipped"), (False, "is damaged")])
@pytest.mark.parametrize("kind", ["factors", "covariance"])
def test_a_damaged_cache_file_is_made_again(kind, cut, said, tmp_path, caplog):
    fields = {f"{kind}_cache": str(tmp_path)}
    first = layers(wrap(**fields))
    file = next(tmp_path.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-2] ^= 1  # of a value's exponent
    file.write_bytes(content[:100] if cut else content)
    for key, layer in layers(wrap(**fields)).items():
        assert torch.equal(update(layer), update(first[key]))
    assert said in caplog.text


# Saving


def load_stock(folder: Path, base: nn.Module | None = None) -> PeftModel:
    return PeftModel.from_pretrained(tiny_llama(2) if base is None else base, folder)


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True, "rank_pattern": {"down_proj": 9}}])
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_saves_as_a_plain_lora_on_the_original_base(tmp_path, mode, fields):
    batch = causal_batch(3, 50)
    model = stir(wrap(corda_method=mode, **fields)).eval()
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    loaded = load_stock(tmp_path)
    config: Any = loaded.peft_config["default"]
    assert type(config) is LoraConfig
    assert (config.peft_type, config.r, config.init_lora_weights) == ("LORA", 2 * R, True)
    text = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not {"corda_method", "calibration_data", "damp"} & set(text)
    assert {file.name for file in tmp_path.iterdir()} <= {
        *("adapter_config.json", "adapter_model.safetensors", "README.md"),
        "base_fingerprint.json",
    }
    torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    for key, module in tiny_llama(2).named_modules():
        if key.rpartition(".")[2] in TARGETS:
            base: Any = loaded.get_base_model().get_submodule(key)
            assert torch.equal(base.base_layer.weight, module.weight)
    with loaded.disable_adapter():
        assert torch.equal(loaded(**batch).logits, tiny_llama(2).eval()(**batch).logits)


def test_an_untrained_adapter_saves_a_zero_update(tmp_path):
    wrap().save_pretrained(tmp_path)
    batch = causal_batch(3, 50)
    expected = tiny_llama(2).eval()(**batch).logits
    torch.testing.assert_close(load_stock(tmp_path)(**batch).logits, expected, rtol=0, atol=1e-5)


STOCK = """
import sys
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

base, folder = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
assert type(model.active_peft_config) is LoraConfig
with torch.no_grad():
    save_file({"logits": model(**load_file(f"{base}/batch")).logits}, f"{base}/found")
assert "petl" not in sys.modules
"""


def test_peft_alone_loads_the_file_and_computes_the_same(tmp_path):
    batch, base = causal_batch(3, 50), tmp_path / "base"
    tiny_llama(2).save_pretrained(base)
    save_file(batch, base / "batch")
    model = stir(wrap(use_rslora=True, rank_pattern={"down_proj": 9}, corda_method="kpm")).eval()
    model.save_pretrained(tmp_path / "adapter")
    line = [warm_python.python(), "-c", STOCK, str(base), str(tmp_path / "adapter")]
    subprocess.run(line, check=True, cwd=tmp_path)
    found = load_file(base / "found")["logits"]
    torch.testing.assert_close(found, model(**batch).logits, rtol=1e-4, atol=1e-4)


def test_a_saved_state_loads_into_its_own_model_only(tmp_path):
    model = stir(wrap())
    model.save_pretrained(tmp_path)
    other = wrap()
    other.load_adapter(tmp_path, "default", is_trainable=True)
    for key, layer in layers(model).items():
        assert torch.equal(update(layer), update(layers(other)[key]))
    with pytest.raises(InputError):
        wrap(corda_method="kpm").load_adapter(tmp_path, "default")
    for rank in (R, 1):  # of rank 1: shorter than the factors of this model
        plain = get_peft_model(tiny_llama(2), LoraConfig(r=rank, target_modules=TARGETS))
        plain.save_pretrained(tmp_path / "plain")
        with pytest.raises(InputError):
            other.load_adapter(tmp_path / "plain", "default")


# One adapter on a residual base


def test_disabling_gives_the_residual_and_unloading_the_pretrained_model(caplog):
    caplog.set_level(logging.INFO)
    batch, base = causal_batch(3, 50), tiny_llama(2).eval()
    model = stir(wrap()).eval()
    expected = base(**batch).logits
    with model.disable_adapter():
        assert not torch.allclose(model(**batch).logits, expected, atol=1e-3)
    assert "computes with the residual weights" in caplog.text
    torch.testing.assert_close(model.unload()(**batch).logits, expected, rtol=0, atol=1e-5)
    model = stir(wrap()).eval()
    model.merge_adapter()
    torch.testing.assert_close(model.unload()(**batch).logits, expected, rtol=0, atol=1e-5)
    model = stir(wrap()).eval()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    model.delete_adapter("default")
    torch.testing.assert_close(model.base_model.model(**batch).logits, expected, rtol=0, atol=1e-5)


def test_a_second_adapter_raises():
    model = wrap()
    for config in (petl.build_config("corda", r=R), LoraConfig(r=R)):
        with pytest.raises(ValueError):  # noqa: PT011 - of petl, and of PEFT
            model.add_adapter("second", config)
        assert list(model.peft_config) == ["default"]
    with pytest.raises(InputError, match=r"petl\.wrap"):
        get_peft_model(tiny_llama(2), petl.build_config("corda", r=R, target_modules=TARGETS))


# Processes


SPLITS = {
    "halves": lambda rank: batches(8)[rank::2],
    "all with one": lambda rank: batches(8)[: 8 * (1 - rank)],
}


@pytest.mark.thorough
def test_two_processes_equal_one_however_the_samples_are_split(tmp_path):
    expected = state(wrap(calibration=batches(8)))
    first, second = in_processes(2, _wrap_shares, str(tmp_path))
    for split in SPLITS:
        for name, tensor in expected.items():
            one, other = first[split][name], second[split][name]
            assert torch.equal(one, other), f"{split}: {name}"
            if "base_layer" in name:
                torch.testing.assert_close(one, tensor, rtol=0, atol=1e-4)
    assert first["error"] == second["error"]
    assert "cannot be written to" in first["error"]
    assert first["rounds"] == second["rounds"] == [4, 4]


def state(model: PeftModel) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items() if "_proj" in k}


def _wrap_shares(folder: str) -> dict[str, Any]:
    rank = distributed.get_rank()
    found: dict[str, Any] = {
        name: state(wrap(calibration=split(rank))) for name, split in SPLITS.items()
    }
    file = Path(folder) / "file"
    file.touch()
    with pytest.raises(InputError) as refused:  # in both processes, although only one writes
        wrap(calibration=SPLITS["halves"](rank), covariance_cache=str(file / "cache"))
    fields = {"num_covariance_rounds": 2, "covariance_cache": folder}
    wrap(calibration=SPLITS["halves"](rank), **fields)
    kept = load_file(next(Path(folder).glob("*.safetensors")))
    key = "model.layers.0.mlp.down_proj"
    rounds = [int(kept[f"{key}.{number}.samples"]) for number in range(2)]
    return {**found, "error": str(refused.value), "rounds": rounds}
