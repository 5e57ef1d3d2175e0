"""Exported LoRAs have the outputs of the adapted model, and PEFT loads them without petl."""

import json
import shutil
import subprocess

import pytest
import torch
import warm_python
from export_fixtures import (
    adapted,
    classifier,
    close,
    logits,
    save_stirred,
    tokens,
)
from safetensors.torch import load_file, save_file
from training_fixtures import bert_config, words, write_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import petl
from petl.adapters.export.conversion import as_lora
from petl.adapters.export.lora import export_lora
from petl.adapters.export.merge import merge
from petl.adapters.export.saved_adapter import find
from petl.core.fingerprint import layer_in
from petl.errors import InputError, UnsupportedError

pytest_plugins = ["export_fixtures", "training_fixtures"]
pytestmark = pytest.mark.usefixtures("pair_method")

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def test_factors_are_exported_unchanged(tiny, tmp_path):
    saved = save_stirred(classifier(tiny), "test_pair", tmp_path / "pair", task_type="SEQ_CLS")
    export_lora(find(saved), tmp_path / "out", None)
    before = load_file(saved / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(before) == len(after)
    for name, tensor in after.items():
        source = name.replace(".lora_", ".petl_test_pair_adapters.lora_").removesuffix(".weight")
        own = before.get(source, before.get(name))
        # ranks of 2 and 3 become one, by zeros, and their scales one, by a factor of B
        kept = tensor[tuple(slice(size) for size in own.shape)]
        factor = kept.norm() / own.norm()
        torch.testing.assert_close(kept, own * factor)
        torch.testing.assert_close(tensor.norm(), kept.norm())
        assert "lora_B" in name or factor == pytest.approx(1)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (3, {}, {})
    assert config["modules_to_save"] == ["classifier", "score"]


STOCK = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

base, adapter, tokens, out = sys.argv[1:]
model = AutoModelForSequenceClassification.from_pretrained(base)
model = PeftModel.from_pretrained(model, adapter).eval()
ids = torch.load(tokens)
with torch.no_grad():
    torch.save(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, out)
assert "petl" not in sys.modules
"""


@pytest.mark.thorough
def test_stock_peft_loads_the_lora_without_petl(tiny, tmp_path):
    saved = save_stirred(classifier(tiny), "test_pair", tmp_path / "pair", task_type="SEQ_CLS")
    export_lora(find(saved), tmp_path / "out", None)
    ids = tokens()
    torch.save(ids, tmp_path / "tokens")
    paths = [tiny.folder / "steady", tmp_path / "out", tmp_path / "tokens", tmp_path / "logits"]
    line = [warm_python.python(), "-W", "error::UserWarning:peft", "-c", STOCK, *map(str, paths)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    close(torch.load(tmp_path / "logits"), logits(adapted(saved), ids))


def test_a_hadamard_product_becomes_a_lora_of_at_most_the_square_of_its_rank(tiny, tmp_path):
    fields = {"r": 2, "target_modules": ["query", "intermediate.dense"], "task_type": "SEQ_CLS"}
    saved = save_stirred(classifier(tiny), "loha", tmp_path / "loha", **fields)
    written = export_lora(find(saved), tmp_path / "out", None)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    ranks = {len(tensor) for name, tensor in tensors.items() if "lora_A" in name}
    assert ranks == {4}
    assert written.difference.effect > 1e-3


def test_an_update_of_zero_becomes_a_lora_of_rank_one(tiny):
    model = petl.wrap(classifier(tiny), "loha", target_modules=["query"], task_type="SEQ_CLS")
    config, tensors = as_lora(model)
    assert config.r == 1
    assert all(not tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


def test_a_lora_of_pefts_own_is_copied_and_compared(lora_run, tmp_path):
    written = export_lora(find(lora_run.path), tmp_path / "out", None)
    for name in ("adapter_config.json", "adapter_model.safetensors", "base_fingerprint.json"):
        source = lora_run.path / "adapter" / name
        assert (tmp_path / "out" / name).read_bytes() == source.read_bytes()
    assert written.difference.relative == 0
    assert written.difference.effect > 0


@pytest.mark.cells(2)
@pytest.mark.parametrize(
    "fields",
    [
        {"use_rslora": True},
        {"alpha_pattern": {"query": 5}},
        {"rank_pattern": {"query": 2}},
        {"use_rslora": True, "rank_pattern": {"layer.0.attention.self.query": 2}},
    ],
    ids=str,
)
def test_a_lora_is_exported_with_one_rank_and_the_scale_alpha_over_r(fields, tiny, tmp_path):
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["query", "value"], **fields}
    saved = save_stirred(classifier(tiny), "lora", tmp_path / "lora", task_type="SEQ_CLS", **fields)
    export_lora(find(saved), tmp_path / "out", None)  # compares the outputs
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert [config[f] for f in ("use_rslora", "rank_pattern", "alpha_pattern")] == [False, {}, {}]
    before, after = (load_file(f / WEIGHTS) for f in (saved, tmp_path / "out"))
    scale = config["lora_alpha"] / config["r"]
    for key in (key for key in after if ".lora_A." in key):
        other = key.replace(".lora_A.", ".lora_B.")
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        own = layer_in(find(saved).config, name)["scale"]
        assert after[key].shape[0] == after[other].shape[1] == config["r"]
        torch.testing.assert_close(
            scale * after[other] @ after[key], own * before[other] @ before[key]
        )
    petl.load(classifier(tiny), tmp_path / "out")


def cut(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def spoil(folder):
    tensors = load_file(folder / WEIGHTS)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, folder / WEIGHTS)


def set_field(**fields):
    def change(folder):
        raw = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**raw, **fields}))

    return change


@pytest.mark.parametrize(
    "damage", [cut, spoil, set_field(r=3), set_field(lora_alpha=float("nan")), set_field(r="x")]
)
def test_a_damaged_lora_is_not_exported(damage, lora_run, tmp_path):
    run = shutil.copytree(lora_run.path, tmp_path / "run")
    damage(run / "adapter")
    with pytest.raises(InputError):
        export_lora(find(run), tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_methods_without_a_weight_update_are_not_exported(mola_run, tiny, tmp_path):
    ia3 = {"target_modules": ["query"], "feedforward_modules": []}
    pruned = {"total_step": 9, "target_modules": ["query"]}  # its config is a subclass of LoRA's
    saved = {
        name: save_stirred(classifier(tiny), name, tmp_path / name, task_type="SEQ_CLS", **fields)
        for name, fields in (("ia3", ia3), ("adalora", pruned))
    }
    for name, path in {"mola": mola_run.path, **saved}.items():
        with pytest.raises(UnsupportedError, match=f"method {name}: "):
            export_lora(find(path), tmp_path / "out", None)


@pytest.mark.thorough
def test_a_head_of_several_layers_is_exported_completely(tmp_path):
    shared = bert_config().to_dict() | {"num_labels": 3, "max_position_embeddings": 40}
    kinds = ("model_type", "architectures", "id2label", "label2id")
    config = RobertaConfig(**{k: v for k, v in shared.items() if k not in kinds})
    write_model(tmp_path / "roberta", RobertaForSequenceClassification, config)
    base = RobertaForSequenceClassification.from_pretrained(tmp_path / "roberta")
    saved = save_stirred(base, "test_pair", tmp_path / "pair", task_type="SEQ_CLS")
    export_lora(find(saved), tmp_path / "out", None)
    merge(find(saved), tmp_path / "merged", None)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    heads = {name.partition(".classifier.")[2] for name in tensors if ".classifier." in name}
    assert heads == {"dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias"}


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["test_pair", "vera"])
def test_a_conv1d_base_is_supported(name, tmp_path):
    config = GPT2Config(
        vocab_size=len(words()), n_positions=40, n_embd=32, n_layer=2, n_head=2, n_inner=48
    )
    write_model(tmp_path / "gpt2", GPT2LMHeadModel, config)
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    fields = {"target_modules": ["c_attn"], "task_type": "CAUSAL_LM"}
    fields |= {"r": 4, "d_initial": 1.0, "fan_in_fan_out": True} if name == "vera" else {}
    saved = save_stirred(base, name, tmp_path / "adapter", **fields)
    lora = export_lora(find(saved), tmp_path / "lora", None)
    merge(find(saved), tmp_path / "merged", None)
    ids = tokens()
    wanted = logits(adapted(saved), ids)
    close(logits(adapted(tmp_path / "lora"), ids), wanted)
    close(logits(GPT2LMHeadModel.from_pretrained(tmp_path / "merged"), ids), wanted)
    assert lora.difference.effect > 1e-3
