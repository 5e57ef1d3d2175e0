"""Files of quantized adapters: contents, sizes, and loading."""

import pytest
import torch
from binary_fixtures import LORA, MOS, logits, train, trained, wrapped
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import petl
from petl.cli.catalog import reference
from petl.core.adapter_file import WEIGHTS, safetensors_bytes, saved_shapes
from petl.errors import InputError
from petl.methods.binary import quantizer_of
from petl.testing.models import TINY_MODELS, tiny_llama


@pytest.fixture
def batch():
    return TINY_MODELS["llama"].batch()


@pytest.mark.cells(2)
@pytest.mark.parametrize(
    ("fields", "bits"),
    [(LORA, 1), (MOS, 2), (MOS, 1), ({"r": 3}, 4), ({"r": 3, "use_bias": True}, 8)],
    ids=["lora", "mos-2", "mos-1", "adapter", "biases"],
)
def test_packed_file_has_codes_and_stats_and_loads_to_equal_outputs(batch, tmp_path, bits, fields):
    model = train(wrapped(**fields, bits=bits), batch)
    model.save_pretrained(tmp_path / "first")
    tensors = load_file(tmp_path / "first" / WEIGHTS)
    biases = {k: t for k, t in tensors.items() if k.endswith("_bias")}
    assert {t.dtype for t in biases.values()} == (
        {torch.float32} if "use_bias" in fields else set()
    )
    kept = {*biases, *(k for k in tensors if k.rpartition(".")[2].startswith("index_"))}
    quantized = {k: t for k, t in tensors.items() if k not in kept}
    sizes = [p.numel() for p in trained(model).values() if p.dim() > 1]
    assert len(quantized) == 2 * len(sizes)
    for key, tensor in quantized.items():
        if key.endswith("_stats"):
            assert (tensor.dtype, tensor.shape) == (torch.float32, (2,))
        else:
            assert key.endswith("_codes")
            assert tensor.dtype == torch.uint8
            assert len(tensor) in {-(-size * bits // 8) for size in sizes}
    loaded = petl.load(tiny_llama(), tmp_path / "first", adapter_name="other")
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    for quantized in quantizer_of(loaded).quantized_weights["other"]:
        assert len(quantized.weight.unique()) <= 2**bits

    loaded.save_pretrained(tmp_path / "second")
    again = load_file(tmp_path / "second" / "other" / WEIGHTS)
    assert {k: t.tolist() for k, t in again.items()} == {k: t.tolist() for k, t in tensors.items()}
    twice = petl.load(tiny_llama(), tmp_path / "second" / "other")
    assert torch.equal(logits(twice, batch), logits(model, batch))


def test_sizes_below_a_byte_are_packed(tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3))

    model = petl.wrap(base(), "binary", inner="lora", r=1, target_modules=["0", "2"], bits=2)
    x = torch.ones(2, 3)
    model.save_pretrained(tmp_path)
    codes = load_file(tmp_path / WEIGHTS)
    assert {len(t) for k, t in codes.items() if k.endswith("_codes")} == {1, 2}
    assert torch.equal(petl.load(base(), tmp_path)(x), model.eval()(x))


def file_bytes(model):
    """Bytes of the adapter's saved tensors."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return sum(t.numel() * t.element_size() for t in state.values())


def vit_base(labels=100):
    with torch.device("meta"):
        return ViTForImageClassification(ViTConfig(num_labels=labels))


@pytest.mark.cells(2)
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 73_920),
        ({"r": 1}, 2_496),
        ({"inner": "lora", "r": 32, "target_modules": ["q_proj", "v_proj"]}, 147_840),
        ({"modules_to_save": ["classifier"]}, 381_520),
        ({"head_bits": 1}, 83_528),
    ],
    ids=["adaptformer", "h=1", "lora", "float32 head", "bi-head"],
)
def test_bytes_equal_those_of_the_authors_files(fields, expected):
    model = petl.wrap(vit_base(), "binary", **fields)
    assert file_bytes(model) == expected
    if not fields:
        assert sum(p.numel() for p in trained(model).values()) == 589_824


def counted_bytes(model, bits=1):
    """Bytes of the codes, and of mean and deviation of each weight."""
    return sum(-(-p.numel() * bits // 8) + 8 for p in trained(model).values())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_file_on_disk_is_within_five_per_cent_of_the_bits(tmp_path, bits):
    model = nn.ModuleDict({"a": nn.Linear(4096, 2048), "b": nn.Linear(2048, 4096)})
    wrapped = petl.wrap(model, "binary", inner="lora", r=32, bits=bits, target_modules=["a", "b"])
    wrapped.save_pretrained(tmp_path)
    size, counted = (tmp_path / WEIGHTS).stat().st_size, counted_bytes(wrapped, bits)
    assert counted <= size <= 1.05 * counted


def decoder(hidden, ffn, layers):
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers)
        )


NAMES_COST = {  # overhead of the default adapter's file over codes and statistics, as a fraction
    "MiniLM": (reference.build, 0.185),
    "SmolLM2-135M": (lambda: decoder(576, 1536, 30), 0.125),
    "ViT-B": (lambda: vit_base().vit, 0.085),
    "Llama 3 8B": (lambda: decoder(4096, 14336, 32), 0.018),
}


@pytest.mark.cells(2)
@pytest.mark.parametrize(("model", "bits"), zip(NAMES_COST, [1, 2, 4, 8], strict=True))
def test_a_stacked_file_is_within_five_percent_of_its_bits(model, bits):
    adapted = petl.wrap(NAMES_COST[model][0](), "binary", bits=bits, save_format="stacked")
    size = safetensors_bytes(saved_shapes(adapted))
    counted = counted_bytes(adapted, bits)
    assert counted < size < 1.05 * counted


@pytest.mark.cells(2)
@pytest.mark.parametrize(
    "fields",
    [
        LORA,
        {"inner": "mos", "r": 4, "equivalent_rank": 4},
        {"inner": "compacter", "r": 8},
        {**LORA, "exclude_params": ["lora_A"], "bits": 4},
    ],
    ids=["lora", "mos", "compacter", "excluded"],
)
def test_a_stacked_file_loads_like_a_packed_one(fields, batch, tmp_path):
    model = train(wrapped(**fields, save_format="stacked"), batch)
    model.save_pretrained(tmp_path / "stacked")
    model.peft_config["default"].save_format = "packed"
    model.save_pretrained(tmp_path / "packed")
    names = load_file(tmp_path / "stacked" / WEIGHTS)
    assert sum(name.endswith((".codes", ".stats", ".layout")) for name in names) == 3
    assert not any(name.endswith(("_codes", "_stats")) for name in names)
    loaded = petl.load(tiny_llama(), tmp_path / "packed", adapter_name="one")
    again = petl.load(tiny_llama(), tmp_path / "stacked", adapter_name="other")
    assert torch.equal(logits(again, batch), logits(loaded, batch))
    again.save_pretrained(tmp_path / "again")  # saving a loaded adapter writes an equal file
    written = load_file(tmp_path / "again" / "other" / WEIGHTS)
    assert all(torch.equal(written[name], tensor) for name, tensor in names.items())


def test_a_stacked_file_of_other_weights_raises(batch, tmp_path):
    wrapped(**LORA, save_format="stacked").save_pretrained(tmp_path)
    file = tmp_path / WEIGHTS
    tensors = load_file(file)
    codes = next(name for name in tensors if name.endswith(".codes"))
    for change, message in (
        ({codes: tensors[codes][:-1]}, r"\[335\]"),
        ({codes.replace("codes", "layout"): torch.zeros(8, dtype=torch.uint8)}, "another model"),
        ({codes: None}, "1 missing"),
    ):
        kept = {name: t for name, t in (tensors | change).items() if t is not None}
        save_file(kept, file)
        with pytest.raises(InputError, match=message):
            petl.load(tiny_llama(), tmp_path)


def test_latent_file_restores_bit_exact_latent_weights(batch, tmp_path):
    model = train(wrapped(**LORA, save_format="latent"), batch)
    model.save_pretrained(tmp_path)
    loaded = petl.load(tiny_llama(), tmp_path, is_trainable=True)
    for name, p in trained(loaded).items():
        assert torch.equal(p, trained(model)[name])
    assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_training_from_a_packed_file_warns_and_starts_at_its_outputs(batch, tmp_path):
    model = train(wrapped(**LORA), batch)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="latent"):
        loaded = petl.load(tiny_llama(), tmp_path, is_trainable=True)
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), atol=2e-5, rtol=0)
    loss = loaded(**batch).loss
    train(loaded, batch, steps=5)
    assert loaded(**batch).loss < loss


def test_weights_loaded_for_inference_do_not_train(batch, tmp_path):
    wrapped(**LORA).save_pretrained(tmp_path)
    loaded = petl.load(tiny_llama(), tmp_path)
    logits(loaded.train(), batch)  # no gradients needed
    loaded.set_adapter("default")
    with pytest.raises(InputError):
        loaded(**batch)


def test_checkpoints_have_latent_weights_and_the_final_file_codes(batch, tmp_path):
    model = wrapped(**LORA)
    rows = [{k: t[i] for k, t in batch.items()} for i in range(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, save_steps=1, report_to=[], use_cpu=True
    )
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[petl.Callback()])
    trainer.train()
    latent = load_file(tmp_path / "checkpoint-2" / WEIGHTS)
    for name, p in trained(model).items():
        assert torch.equal(latent[name.replace(".default", "")], p)
    assert petl.load(tiny_llama(), tmp_path / "checkpoint-1").peft_config["default"].inner == "lora"
    model.save_pretrained(tmp_path / "final")
    assert all(k.endswith(("_codes", "_stats")) for k in load_file(tmp_path / "final" / WEIGHTS))


@pytest.mark.parametrize("damage", ["lacks codes", "lacks stats", "other bits", "truncated"])
def test_damaged_files_do_not_load(tmp_path, damage):
    model = wrapped(**LORA)
    state = get_peft_model_state_dict(model)
    key = next(k for k in state if k.endswith("_codes"))
    if damage == "lacks codes":
        del state[key]
    elif damage == "lacks stats":
        del state[key.replace("_codes", "_stats")]
    elif damage == "other bits":
        state[key] = state[key].repeat(2)
    else:
        state[key] = state[key][:-1]
    with pytest.raises(InputError):
        set_peft_model_state_dict(wrapped(**LORA), state)
