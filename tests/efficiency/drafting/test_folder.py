"""Saved drafters: what comes back, for which models, and files that are refused."""

import json

import pytest
import torch
from draft_fixtures import PAD, VOCABULARY, prompt
from safetensors.torch import load_file, save_file
from tiny_tokenizers import byte_tokenizer

import petl
from petl import testing
from petl.efficiency.drafting import answers, drafter, fit
from petl.errors import InputError

CONFIG, WEIGHTS = "drafter_config.json", "drafter_model.safetensors"
PROMPTS = [prompt(i)[0].tolist() for i in range(11)]


@pytest.fixture(scope="module")
def model():
    return testing.tiny_llama()


@pytest.fixture
def saved(model, tmp_path):
    """The folder of a trained drafter."""
    guess = drafter("hydra", model=model, draft_vocab=50)
    fit(guess, answers(model, PROMPTS, tokens=8, pad_token_id=PAD), epochs=2)
    guess.save(tmp_path)
    return tmp_path


def change(folder, **values):
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"kind": "sequential", "layers": 2},
        {"kind": "parallel", "template": [[0], [1], [0, 0]]},
        {"prefix": True, "own_head": True, "heads": 2},
    ],
)
def test_a_saved_drafter_is_the_same(model, tmp_path, fields):
    guess = drafter("hydra", model=model, draft_vocab=50, **fields)
    fit(guess, answers(model, PROMPTS, tokens=8, pad_token_id=PAD), epochs=2)
    guess.save(tmp_path)
    again = petl.load_drafter(tmp_path, model)
    assert again.fields == guess.fields
    own, other = guess.state_dict(), again.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert again.frequencies.table() == guess.frequencies.table()
    h, after = torch.randn(3, 64), torch.randint(VOCABULARY, (3, 2))
    assert torch.equal(guess.head_logits(h, after), again.head_logits(h, after))
    again.save(tmp_path / "again")
    files = [(folder / WEIGHTS).read_bytes() for folder in (tmp_path, tmp_path / "again")]
    assert files[0] == files[1]


def test_a_drafter_has_the_dtype_of_its_model_for_decoding(saved):
    model = testing.tiny_llama().to(torch.bfloat16)
    again = petl.load_drafter(saved, model)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert again.vocab.dtype == torch.int32


def test_another_base_model_is_refused(saved):
    other = testing.tiny_llama()
    with torch.no_grad():
        other.lm_head.weight.mul_(1.1)
    with pytest.raises(InputError, match="another base model"):
        petl.load_drafter(saved, other)
    with pytest.raises(InputError, match=r"96 .*LlamaForCausalLM .*90"):
        petl.load_drafter(saved, testing.tiny_llama(vocabulary=90))


def test_another_adapter_is_a_warning(saved, caplog):
    other = testing.tiny_llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    petl.load_drafter(saved, other)
    assert "trained for other weights (another adapter, or one that is" in caplog.text


def adapted(name, seed):
    torch.manual_seed(seed)
    model = petl.wrap(testing.tiny_llama(), "lora", task_type="CAUSAL_LM", adapter_name=name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


def test_an_adapter_is_known_by_its_values_under_any_name(tmp_path, caplog):
    drafter("hydra", model=adapted("default", 1)).save(tmp_path)
    petl.load_drafter(tmp_path, adapted("mine", 1).get_base_model())
    assert caplog.text == ""
    # beside another one that does not compute
    several = adapted("mine", 1)
    several.add_adapter("second", several.peft_config["mine"])
    petl.load_drafter(tmp_path, several)
    assert caplog.text == ""
    petl.load_drafter(tmp_path, adapted("default", 2))
    assert "trained for other weights" in caplog.text
    caplog.clear()
    with several.disable_adapter():
        petl.load_drafter(tmp_path, several)
    assert "trained for other weights" in caplog.text


def test_another_tokenizer_is_refused(model, tmp_path):
    tokenizer = byte_tokenizer(pad_token="<|im_end|>")
    drafter("hydra", model=model).save(tmp_path, tokenizer)
    petl.load_drafter(tmp_path, model, tokenizer)
    petl.load_drafter(tmp_path, model)
    tokenizer.add_tokens(["more"])
    with pytest.raises(InputError):
        petl.load_drafter(tmp_path, model, tokenizer)


# Damaged files


def test_damaged_tensors_are_refused(saved, model):
    good = load_file(saved / WEIGHTS)

    def refused(message, **changed):
        tensors = {name: t for name, t in (good | changed).items() if t is not None}
        save_file(tensors, saved / WEIGHTS)
        with pytest.raises(InputError, match=message):
            petl.load_drafter(saved, model)

    refused("1 missing", **{"cell.norm": None})
    refused("1 unexpected", extra=torch.zeros(3))
    refused(r"cell.norm .*\[63\], not \[64\]", **{"cell.norm": torch.ones(63)})
    refused("vocab is F32", vocab=good["vocab"].float())
    refused("finite: 64 of cell.norm", **{"cell.norm": torch.ones(64) / 0})
    vocab = good["vocab"].clone()
    vocab[3] = VOCABULARY
    refused("vocab has index 96", vocab=vocab)
    vocab[3] = vocab[4]
    refused("vocab .*twice", vocab=vocab)
    (saved / WEIGHTS).write_bytes(b"\xff" * 64)
    with pytest.raises(InputError):
        petl.load_drafter(saved, model)
    (saved / WEIGHTS).unlink()
    with pytest.raises(InputError):
        petl.load_drafter(saved, model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "hydras"}, "'hydras'"),
        ({"name": 3}, "name"),
        ({"fields": {"heads": 10**15}}, "heads=1000000000000000"),
        ({"fields": {"heads": [1]}}, r"heads=\[1\]"),
        ({"fields": {"draft_vocab": 10**9}}, "has shape"),
        ({"fields": {"head": 3}}, "'head'"),
        ({"fields": {"model": 3}}, "'model'"),
        ({"fields": {"name": "free"}}, "'name'"),
        ({"fields": {"template": [[["a"]]]}}, "template"),
        ({"fields": []}, "fields"),
        ({"frequencies": []}, "frequencies"),
        ({"frequencies": [[0.5] * 8] * 2}, "frequencies"),
        ({"frequencies": [[7.0] * 8] * 3}, "0 to 1"),
        ({"vocabulary": -1}, "-1 tokens"),
        ({"hashes": {"base": 3}}, "hashes"),
        ({"hashes": {"base": "x"}}, "another base model"),
    ],
)
def test_damaged_configs_are_refused(saved, model, values, message):
    if isinstance(values.get("fields"), dict):
        known = json.loads((saved / CONFIG).read_text())["fields"]
        values = {"fields": known | values["fields"]}
    change(saved, **values)
    with pytest.raises(InputError, match=message):
        petl.load_drafter(saved, model)
