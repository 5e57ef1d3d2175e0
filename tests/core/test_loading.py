"""Loading is strict: missing and unexpected tensors are errors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import petl
from petl import testing
from petl.testing import Case

MAPS = Path("/proc/self/maps")
CASE = Case("mola", "bert")  # a head is saved with it


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    CASE.wrap_stirred().save_pretrained(tmp_path)
    return tmp_path


def edit(folder: Path, change) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_loaded_tensors_equal_the_saved_ones(saved):
    model = CASE.wrap_stirred()
    loaded = petl.load(CASE.base(), saved, adapter_name="again")
    assert list(loaded.peft_config) == ["again"]
    batch = CASE.batch()
    assert torch.equal(testing.logits(loaded, batch), testing.logits(model, batch))
    assert not testing.trainable(loaded)
    assert testing.trainable(petl.load(CASE.base(), saved, is_trainable=True))


@pytest.mark.skipif(not MAPS.exists(), reason="lists the mappings of a process, on Linux")
def test_tensors_of_low_memory_stay_in_the_file_until_they_are_written(saved):
    file = saved / "adapter_model.safetensors"
    expected, before = load_file(file), file.read_bytes()
    loaded = petl.load(CASE.base(), saved, low_cpu_mem_usage=True)
    own = {n: p for n, p in loaded.named_parameters() if "petl_mola_adapters" in n}
    assert own
    assert all(path_mapped_at(p.data_ptr()) == str(file) for p in own.values())
    assert not any(
        path_mapped_at(p.data_ptr()) == str(file)
        for n, p in petl.load(CASE.base(), saved).named_parameters()
        if "petl_mola_adapters" in n
    )
    batch = CASE.batch()
    # up to rounding: tensors in a file have another alignment, and products other kernels
    torch.testing.assert_close(
        testing.logits(loaded, batch), testing.logits(petl.load(CASE.base(), saved), batch)
    )
    # saved over its own file, then changed
    loaded.save_pretrained(saved)
    assert file.read_bytes() == before
    for name, parameter in own.items():
        key = name.replace(".default", "")
        assert torch.equal(parameter, expected[key])
        with torch.no_grad():
            parameter.add_(1)
        assert torch.equal(parameter, expected[key] + 1)
    assert file.read_bytes() == before


def path_mapped_at(address: int) -> str:
    """Return the path of the file that is mapped at an address of this process, or ""."""
    for line in MAPS.read_text().splitlines():
        span, _, _, _, _, *path = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in span.split("-"))
        if start <= address < end:
            return path[0] if path else ""
    return ""


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query.petl_mola_adapters.router"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("base_model.model.classifier.weight"), r"classifier\.weight"),
        (lambda tensors: tensors.pop(QUERY), "1 missing .*query.*router"),
        (lambda tensors: tensors.update(stranger=torch.zeros(2)), "stranger"),
    ],
)
def test_tensors_that_are_missing_or_not_expected_are_named(saved, change, words):
    edit(saved, change)
    with pytest.raises(petl.InputError, match=words):
        petl.load(CASE.base(), saved)


@pytest.mark.parametrize(
    ("setting", "words"), [({"r": 4}, "r=4, not 8"), ({"peft_type": "PETL_NONE"}, "PETL_NONE")]
)
def test_a_config_of_another_adapter_is_an_error(saved, setting, words):
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, **setting}))
    with pytest.raises(petl.InputError, match=words):
        petl.load(CASE.base(), saved)


def test_a_truncated_file_is_an_error(saved):
    file = saved / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(petl.InputError, match="cannot be read"):
        petl.load(CASE.base(), saved)


def test_a_missing_weight_file_is_an_error(saved):
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(petl.InputError):
        petl.load(CASE.base(), saved)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '"x"'])
def test_a_config_that_cannot_be_read_is_an_error(saved, text):
    (saved / "adapter_config.json").write_text(text)
    with pytest.raises(petl.InputError, match=r"adapter_config\.json"):
        petl.load(CASE.base(), saved)


@pytest.mark.parametrize("change", [{"r": 0}, {"router_type": "none"}, {"num_experts": "x"}])
def test_a_config_with_a_bad_value_is_an_error(saved, change):
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(petl.InputError):
        petl.load(CASE.base(), saved)


def test_adapters_of_peft_load_strictly(tmp_path):
    case = Case("lora", "llama", {"target_modules": ["q_proj"]})
    case.wrap_stirred().save_pretrained(tmp_path)
    petl.load(case.base(), tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop(next(iter(tensors))))
    with pytest.raises(petl.InputError, match=r"q_proj\.lora_A"):
        petl.load(case.base(), tmp_path)


def test_a_base_with_an_adapter_is_refused(saved):
    base = CASE.base()
    petl.wrap(base, "mola", task_type="SEQ_CLS")
    with pytest.raises(petl.InputError, match="an adapter already"):
        petl.load(base, saved)


def test_loading_another_adapter_does_not_change_the_first(saved):
    model, batch = CASE.wrap_stirred(), CASE.batch()
    expected = testing.logits(model, batch)
    testing.stir(model, seed=5)
    first = testing.logits(model.train(), batch)
    trainable = set(testing.trainable(model))
    assert petl.load(model, saved, adapter_name="second") is model
    assert not any(module.training for module in model.modules())  # as PEFT's load_adapter
    assert model.active_adapters == ["default"]
    assert set(testing.trainable(model)) == trainable
    assert torch.equal(testing.logits(model, batch), first)
    model.set_adapter("second")
    assert torch.equal(testing.logits(model, batch), expected)
    petl.load(model.train(), saved, adapter_name="third", is_trainable=True)
    assert model.training
    assert {name for n in testing.trainable(model) for name in n.split(".")} >= {"second", "third"}


def test_an_adapter_that_fails_to_load_leaves_the_others_unchanged(saved):
    model, batch = CASE.wrap_stirred(), CASE.batch()
    expected, before = testing.logits(model, batch), list(model.state_dict())
    edit(saved, lambda tensors: tensors.update(stranger=torch.zeros(2)))
    model.train()
    with pytest.raises(petl.InputError):
        petl.load(model, saved, adapter_name="second")
    assert list(model.state_dict()) == before
    assert list(model.peft_config) == ["default"]
    assert all(module.training for module in model.modules())
    assert torch.equal(testing.logits(model, batch), expected)


def test_another_adapter_of_the_same_name_or_another_method_is_refused(saved, tmp_path_factory):
    model = CASE.wrap_stirred()
    other = tmp_path_factory.mktemp("other")
    Case("lora", "bert").wrap_stirred().save_pretrained(other)
    for folder, name, words in (
        (saved, "default", "'default'"),
        (other, "second", "LORA .*PETL_MOLA"),
    ):
        with pytest.raises(petl.InputError, match=words):
            petl.load(model, folder, adapter_name=name)


@pytest.mark.parametrize("first", ["plain", "pissa"])
def test_no_adapter_is_loaded_beside_one_that_changes_the_base_weights(first, tmp_path):
    for name, start in (("plain", True), ("pissa", "pissa")):
        fields = {"target_modules": ["q_proj"], "init_lora_weights": start}
        Case("lora", "llama", fields).wrap_stirred().save_pretrained(tmp_path / name)
    second = {"plain": "pissa", "pissa": "plain"}[first]
    model = petl.load(testing.tiny_llama(), tmp_path / first, adapter_name=first)
    batch = testing.TINY_MODELS["llama"].batch()
    expected = testing.logits(model, batch)
    with pytest.raises(petl.InputError):
        petl.load(model, tmp_path / second, adapter_name=second)
    assert list(model.peft_config) == [first]
    assert torch.equal(testing.logits(model, batch), expected)


def test_further_adapters_of_peft_load_strictly(tmp_path):
    case = Case("lora", "llama", {"target_modules": ["q_proj"]})
    model, batch = case.wrap_stirred(), case.batch()
    model.save_pretrained(tmp_path)
    expected = testing.logits(model, batch)
    petl.load(model, tmp_path, adapter_name="second")
    model.set_adapter("second")
    assert torch.equal(testing.logits(model, batch), expected)
    edit(tmp_path, lambda tensors: tensors.pop(next(iter(tensors))))
    with pytest.raises(petl.InputError):
        petl.load(model, tmp_path, adapter_name="third")
    assert list(model.peft_config) == ["default", "second"]


def test_an_adapter_that_cannot_adapt_a_quantized_base_is_refused(tmp_path):
    case = Case("pst", "llama")
    case.wrap().save_pretrained(tmp_path)
    base = case.base()
    base.is_loaded_in_4bit = True  # as transformers' loader sets it
    with pytest.raises(petl.InputError, match=r"4bit.*bf16"):
        petl.load(base, tmp_path)


@pytest.mark.parametrize(
    "path", ["./nope", "/nope/x", "~/nope", "a/b/c", "nope/", "-1", "a..b", "a--b", "", "a" * 5000]
)
def test_a_folder_that_is_missing_is_not_asked_for_on_the_hub(monkeypatch, path):
    monkeypatch.setattr("petl.system.files.hub.reachable", None)
    with pytest.raises(petl.InputError, match="the folder of an adapter"):
        petl.load(CASE.base(), path)


def test_a_mistyped_folder_is_looked_up_once_while_the_hub_is_away(monkeypatch):
    asked = []
    monkeypatch.setattr("petl.system.files.hub.reachable", lambda *args: bool(asked.append(args)))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(petl.InputError, match="runs/lora"):
        petl.load(CASE.base(), "runs/lora")
    assert len(asked) == 1


def test_an_adapter_of_another_family_is_refused_in_a_few_lines(saved):
    with pytest.raises(petl.InputError) as refused:
        petl.load(testing.tiny_llama(), saved)
    assert str(refused.value).count("\n") < 3
    assert len(str(refused.value)) < 1000
