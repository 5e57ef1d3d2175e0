"""An adapter on another base model of the same shape is noticed, and nothing else is."""

import copy
import json
import pickle
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import warm_python
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

import petl
from petl import testing
from petl.core.adapter_folder import Folder
from petl.core.fingerprint import (
    FILE,
    SAMPLES,
    VERSION,
    difference,
    fingerprint,
    known_fingerprint,
)
from petl.testing import Case

OTHER = "the base model's weights differ from those that the adapter was trained on"


def altered(base: nn.Module, *names: str) -> nn.Module:
    """The model with slightly other values in these parameters, or in all of them."""
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if not names or name in names:
                parameter += 0.01 * torch.randn_like(parameter)
    return base


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    petl.wrap(testing.tiny_llama(), "mola", task_type="CAUSAL_LM").save_pretrained(tmp_path)
    return tmp_path


# Digests


def test_a_changed_tensor_is_counted_and_named():
    before = fingerprint(testing.tiny_llama())
    names = {name for name, _ in testing.tiny_llama().named_parameters()}
    assert set(before) == names
    assert difference(before, fingerprint(testing.tiny_llama())) == ""
    changed = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
    after = fingerprint(altered(testing.tiny_llama(), *changed))
    assert {name for name in names if before[name] != after[name]} == set(changed)
    expected = f"{OTHER}: 2 of {len(names)} tensors, such as {changed[0]}"
    assert difference(before, after) == expected


def test_small_steps_of_full_fine_tuning_are_noticed():
    base = testing.tiny_llama()
    before = fingerprint(base)
    with torch.no_grad():
        for parameter in base.parameters():  # one step of AdamW at a learning rate of 1e-5
            parameter += 1e-5 * torch.randn_like(parameter).sign()
    matrices = [name for name, parameter in base.named_parameters() if parameter.dim() == 2]
    after = fingerprint(base)
    assert all(before[name] != after[name] for name in matrices)


def test_digests_are_those_of_all_processes_devices_and_versions():
    """Computed with NumPy; others would make every saved adapter seem to be of another base."""
    model = nn.Linear(300, 70)
    with torch.no_grad():
        model.weight.copy_(torch.arange(21000.0).view(70, 300) / 21000)
        model.bias.copy_(torch.arange(70.0) - 35)
    assert fingerprint(model) == {"weight": "30951104", "bias": "1165ca85"}
    half = {"weight": "float16:1e97f1af", "bias": "float16:0e8e1655"}
    assert fingerprint(model.half()) == half


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_in_another_dtype_is_the_same(dtype):
    base = testing.tiny_llama()
    assert fingerprint(copy.deepcopy(base).to(dtype)) == fingerprint(base)


def test_float16_compares_with_float16_only():
    base = testing.tiny_llama()
    half = fingerprint(copy.deepcopy(base).half())
    other = fingerprint(altered(base).half())
    assert difference(half, fingerprint(testing.tiny_llama().half())) == ""
    assert f"{OTHER}: {len(half)} of {len(half)} tensors" in difference(half, other)
    for unlike in (testing.tiny_llama(), altered(testing.tiny_llama())):
        assert difference(half, fingerprint(unlike)) == ""  # unknown
        assert difference(fingerprint(unlike), half) == ""


def test_the_layout_of_a_tensor_in_memory_does_not_matter():
    base = nn.Linear(64, 48)
    transposed = nn.Linear(64, 48)
    transposed.weight = nn.Parameter(base.weight.detach().t().contiguous().t())
    transposed.bias = base.bias
    assert not transposed.weight.is_contiguous()
    assert fingerprint(transposed) == fingerprint(base)


def test_values_of_any_encoding_have_one_digest():
    base = nn.Linear(40, 30)
    with torch.no_grad():
        base.weight[0] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0] * 10)
    expected = fingerprint(base)
    base.weight.data[0, 0] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # NaN too
    assert fingerprint(base) == expected
    assert fingerprint(base.bfloat16()) == expected


@pytest.mark.parametrize("shape", [(), (1,), (SAMPLES,), (2 * SAMPLES - 1,), (4096, 1024), (3, 5)])
def test_few_values_are_read_from_all_over_a_tensor(shape):
    read_from: list[int] = []

    class Counting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.cat:
                read_from.extend(
                    args[0][0].storage_offset() + i * args[0][0].stride()[0]
                    for i in range(len(args[0][0]))
                )
            return func(*args, **(kwargs or {}))

    holder = nn.Module()
    holder.weight = nn.Parameter(torch.zeros(shape))
    with Counting():
        fingerprint(holder)
    size = holder.weight.numel()
    assert min(size, SAMPLES - 1) <= len(read_from) < 2 * SAMPLES
    assert len(set(read_from)) == len(read_from)
    if len(shape) == 2 and size > SAMPLES:
        columns = {place % shape[1] for place in read_from}
        assert len(columns) > SAMPLES // 2  # not one column of each row


def test_buffers_do_not_count_and_tied_tensors_count_once():
    base = testing.tiny_t5()
    digests = fingerprint(base)
    assert "shared.weight" in digests
    assert "encoder.embed_tokens.weight" not in digests  # tied
    untied = copy.deepcopy(base)
    untied.encoder.embed_tokens.weight = nn.Parameter(base.shared.weight.detach().clone())
    assert difference(digests, fingerprint(untied)) == ""
    assert difference(fingerprint(untied), digests) == ""
    base.register_buffer("positions", torch.ones(3))
    assert fingerprint(base) == digests


def test_tensors_that_are_not_complete_and_plain_have_no_digest():
    class Packed(nn.Parameter):
        """As quantized and sharded parameters, of a class of its own."""

    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    expected = fingerprint(base)
    base[0].weight = Packed(base[0].weight.data)
    base[1].weight = nn.Parameter(torch.empty(0))  # as under ZeRO-3
    base[2].weight = nn.Parameter(torch.zeros(8, 4, dtype=torch.uint8), requires_grad=False)
    base[3].to("meta")
    left = fingerprint(base)
    assert set(left) == {"0.bias", "1.bias", "2.bias"}
    assert difference(expected, left) == ""
    with torch.no_grad():
        base[0].bias += 1
    assert f"{OTHER}: 1 of 3 tensors, such as 0.bias" in difference(expected, fingerprint(base))


# Saving


@pytest.mark.cells(3)
@pytest.mark.parametrize(
    "method", ["mola", "sparse", "binary", "corda", "lora", "dora", "ia3", "vera"]
)
def test_every_adapter_is_saved_with_the_fingerprint_of_its_base(method, tmp_path):
    case = Case(method, "bert")
    model = case.wrap(case.base())
    expected = {
        name: digest
        for name, digest in fingerprint(case.base()).items()
        if not name.startswith("classifier.")
    }
    model.save_pretrained(tmp_path)
    assert Folder(tmp_path).base == expected
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(same) is type(model)
        same.save_pretrained(tmp_path / "again")
        assert Folder(tmp_path / "again").base == expected


@pytest.mark.parametrize("method", ["mola", "lora"])
def test_a_head_that_is_saved_does_not_count_whatever_its_seed(method, tmp_path, caplog):
    folders = [tmp_path / "one", tmp_path / "two"]
    case = Case(method, "bert")
    for seed, folder in enumerate(folders):
        base = case.base()
        torch.manual_seed(seed)
        nn.init.normal_(base.classifier.weight)
        case.wrap(base).save_pretrained(folder)
    one, two = (json.loads((folder / FILE).read_text()) for folder in folders)
    assert one.pop("weights") != two.pop("weights")
    assert one == two
    base = case.base()
    nn.init.normal_(base.classifier.weight)
    petl.load(base, folders[0])
    assert not caplog.text


def test_a_head_that_is_not_saved_counts_and_is_said(tmp_path, caplog):
    petl.wrap(testing.tiny_bert(), "lora").save_pretrained(tmp_path)  # no task type
    base = testing.tiny_bert()
    assert "the head 'classifier' of BertForSequenceClassification is frozen" in caplog.text
    nn.init.normal_(base.classifier.weight)
    with pytest.raises(petl.InputError):
        petl.load(base, tmp_path)


def test_embeddings_that_are_saved_do_not_count(tmp_path):
    fields = {"target_modules": ["q_proj", "embed_tokens"], "task_type": "CAUSAL_LM"}
    model = petl.wrap(testing.tiny_llama(), "lora", **fields)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    base = altered(testing.tiny_llama(), "model.embed_tokens.weight")
    petl.load(base, tmp_path)


@pytest.mark.parametrize("initialization", ["pissa", "olora"])
def test_the_fingerprint_is_of_the_base_before_an_initialization_changes_it(
    initialization, tmp_path
):
    base = testing.tiny_llama()
    before = fingerprint(base)
    model = petl.wrap(base, "lora", init_lora_weights=initialization, task_type="CAUSAL_LM")
    weight = base.model.layers[0].self_attn.q_proj.base_layer.weight
    assert not torch.equal(weight, testing.tiny_llama().model.layers[0].self_attn.q_proj.weight)
    model.save_pretrained(tmp_path)
    assert Folder(tmp_path).base == before


def test_each_of_several_adapters_is_saved_with_it(tmp_path):
    model = petl.wrap(testing.tiny_llama(), "mola")
    model.add_adapter("second", petl.build_config("mola"))
    model.save_pretrained(tmp_path)
    expected = fingerprint(testing.tiny_llama())
    assert Folder(tmp_path).base == Folder(tmp_path / "second").base == expected
    model.save_pretrained(tmp_path / "selected", selected_adapters=["second"])
    assert not (tmp_path / "selected" / FILE).exists()
    assert Folder(tmp_path / "selected" / "second").base == expected
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none" / FILE).exists()


def test_a_fused_lora_keeps_its_fingerprint_and_can_be_pickled(tmp_path):
    model = petl.wrap(testing.tiny_llama(), "lora", task_type="CAUSAL_LM")
    petl.fuse_lora(model)
    same = pickle.loads(pickle.dumps(model))
    assert type(same) is type(model)
    assert type(same).__name__ == "PeftModelForCausalLM"
    same.save_pretrained(tmp_path)
    assert Folder(tmp_path).base == fingerprint(testing.tiny_llama())


@pytest.mark.parametrize("method", ["mola", "lora"])
def test_plain_peft_loads_the_folder_without_a_warning(method, tmp_path):
    Case(method, "bert").wrap().save_pretrained(tmp_path)
    assert (tmp_path / FILE).is_file()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        PeftModel.from_pretrained(testing.tiny_bert(), tmp_path)


def test_a_base_without_values_leaves_no_fingerprint(tmp_path):
    petl.wrap(testing.tiny_llama(), "mola").save_pretrained(tmp_path)
    with torch.device("meta"):
        base = testing.tiny_llama()
    model = petl.wrap(base, "mola")
    assert known_fingerprint(model) == {}
    model.to_empty(device="cpu").save_pretrained(tmp_path)
    assert Folder(tmp_path).base == {}  # nor that of the adapter which was overwritten


# Loading


def test_another_base_of_the_same_shape_is_refused_unless_it_is_allowed(saved, caplog):
    petl.load(testing.tiny_llama(), saved)
    base = altered(testing.tiny_llama())
    before, count = copy.deepcopy(base.state_dict()), len(fingerprint(testing.tiny_llama()))
    found = f"loading {saved}: {OTHER}: {count} of {count} tensors, such as lm_head"
    with pytest.raises(petl.InputError, match=found) as raised:
        petl.load(base, saved)
    assert "\n" not in str(raised.value)
    assert list(base.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert not caplog.text
    petl.load(base, saved, other_base=True)
    (message,) = caplog.messages
    assert message.startswith(found)


@pytest.mark.parametrize("value", ["warn", 1, None])
def test_other_base_is_true_or_false(saved, value):
    with pytest.raises(petl.InputError, match=f"other_base={value!r}"):
        petl.load(testing.tiny_llama(), saved, other_base=value)


@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": 32},
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 3}},
        {"use_dora": True},
        {"r": 4, "rank_pattern": {".*": 8}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_config_that_says_something_else_than_its_tensors_is_refused(change, tmp_path):
    model = petl.wrap(testing.tiny_llama(), "lora", task_type="CAUSAL_LM", r=8, lora_alpha=16)
    testing.stir(model).save_pretrained(tmp_path)
    petl.load(testing.tiny_llama(), tmp_path)
    edit(tmp_path, **change)
    with pytest.raises(petl.InputError, match=f"{next(iter(change))}="):
        petl.load(testing.tiny_llama(), tmp_path)
    # not of version 1, which had no settings
    content = json.loads((tmp_path / FILE).read_text())
    old = {"version": 1, "tensors": content["tensors"]}
    (tmp_path / FILE).write_text(json.dumps(old))
    if "use_dora" not in change:  # which has other tensors
        petl.load(testing.tiny_llama(), tmp_path)


def test_the_scale_is_that_of_the_layer_not_of_the_config(tmp_path):
    model = petl.wrap(testing.tiny_llama(), "lora", task_type="CAUSAL_LM")
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.scale_layer(3)  # a config has no place for it
    model.save_pretrained(tmp_path)
    with pytest.raises(petl.InputError, match="1, not 3, on model"):
        petl.load(testing.tiny_llama(), tmp_path)


def test_a_config_of_another_method_that_was_changed_is_refused(saved):
    edit(saved, top_k=1)
    with pytest.raises(petl.InputError, match="top_k=1, not 2"):
        petl.load(testing.tiny_llama(), saved)


def test_a_config_without_lora_alpha_is_refused(tmp_path):
    petl.wrap(testing.tiny_llama(), "lora", task_type="CAUSAL_LM").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    del config["lora_alpha"]
    file.write_text(json.dumps(config))
    with pytest.raises(petl.InputError, match="lora_alpha"):
        petl.load(testing.tiny_llama(), tmp_path)


def edit(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("method", ["lora", "mola"])
def test_a_wrapped_model_says_which_package_saved_it(method, tmp_path):
    model = petl.wrap(testing.tiny_llama(), method, task_type="CAUSAL_LM")
    if method == "lora":
        assert type(model) is peft.PeftModelForCausalLM
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same.save_pretrained(tmp_path / "saved")
        card = (tmp_path / "saved" / "README.md").read_text()
        assert f"Saved by petl-peft {petl.__version__}" in card
        assert card.count("petl-peft") == 2
        shutil.rmtree(tmp_path / "saved")


@pytest.mark.thorough
def test_plain_peft_says_in_words_that_it_needs_petl(saved):
    script = "import sys, peft; peft.PeftConfig.from_pretrained(sys.argv[1])"
    line = [warm_python.without_peft(), "-c", script, str(saved)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert "PETL_MOLA of the package petl-peft: pip install petl-peft" in done.stderr


def test_further_adapters_are_compared_as_well(saved, caplog):
    model = petl.wrap(altered(testing.tiny_llama()), "mola", task_type="CAUSAL_LM")
    with pytest.raises(petl.InputError):
        petl.load(model, saved, adapter_name="second")
    assert list(model.peft_config) == ["default"]
    petl.load(model, saved, adapter_name="second", other_base=True)
    assert OTHER in caplog.text
    caplog.clear()
    model = petl.load(testing.tiny_llama(), saved)
    petl.load(model, saved, adapter_name="second")
    assert not caplog.text


def test_adapters_without_a_fingerprint_load_silently(saved, caplog):
    (saved / FILE).unlink()
    model = petl.load(altered(testing.tiny_llama()), saved)
    model.save_pretrained(saved / "again")
    assert Folder(saved / "again").base == {}  # it may have been trained on another base
    plain = peft.get_peft_model(testing.tiny_llama(), petl.build_config("mola"))
    assert known_fingerprint(plain) == {}  # initializations may have changed its weights
    assert not caplog.text


def test_an_adapter_keeps_the_fingerprint_of_the_base_that_it_was_trained_on(saved, tmp_path):
    original, other = Folder(saved).base, fingerprint(altered(testing.tiny_llama()))
    torch.manual_seed(0)
    model = petl.load(altered(testing.tiny_llama()), saved, other_base=True)
    petl.load(model, saved, adapter_name="trained", is_trainable=True, other_base=True)
    model.save_pretrained(tmp_path / "again")
    assert Folder(tmp_path / "again").base == original
    assert known_fingerprint(model) == Folder(tmp_path / "again" / "trained").base != original
    model.delete_adapter("default")
    model.add_adapter("default", petl.build_config("mola"))
    model.save_pretrained(tmp_path / "again")
    assert Folder(tmp_path / "again").base == known_fingerprint(model)
    assert set(other) == set(original)


def test_the_fingerprint_of_an_adapter_on_the_hub_is_optional(saved, monkeypatch):
    asked: list[tuple[Any, ...]] = []

    def download(*names: str, **where: Any) -> str:
        asked.append((*names, where))
        if names[0] == "org/old":
            raise EntryNotFoundError("404")
        return str(saved / names[1])

    monkeypatch.setattr("petl.core.adapter_folder.hf_hub_download", download)
    assert Folder("org/new", revision="v2").base == Folder(saved).base
    assert Folder("org/old").base == {}
    assert asked == [("org/new", FILE, {"revision": "v2"}), ("org/old", FILE, {})]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'{"version": 1}',
        b'{"version": 1, "tensors": []}',
        b'{"version": 1, "tensors": {"a": 3}}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_a_damaged_fingerprint_is_an_error_that_says_what_to_do(saved, content):
    (saved / FILE).write_bytes(content)
    with pytest.raises(petl.InputError, match=FILE) as raised:
        petl.load(testing.tiny_llama(), saved)
    assert len(str(raised.value).splitlines()) <= 3


def test_a_fingerprint_of_a_later_version_is_not_compared(saved, caplog):
    content = json.loads((saved / FILE).read_text())
    (saved / FILE).write_text(json.dumps({**content, "version": VERSION + 1}))
    petl.load(altered(testing.tiny_llama()), saved)
    assert "base models are not compared" in caplog.text


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-2] ^= 1  # of the last value's exponent or mantissa: it stays finite
    file.write_bytes(content)


def test_a_file_of_tensors_that_changed_since_it_was_saved_is_refused(tmp_path):
    model = petl.wrap(testing.tiny_llama(), "lora", task_type="CAUSAL_LM")
    testing.stir(model).save_pretrained(tmp_path)
    petl.load(testing.tiny_llama(), tmp_path)
    flip_a_bit(tmp_path / "adapter_model.safetensors")
    with pytest.raises(petl.InputError, match="safetensors is not the file that was saved"):
        petl.load(testing.tiny_llama(), tmp_path)
    (tmp_path / FILE).unlink()
    petl.load(testing.tiny_llama(), tmp_path)
