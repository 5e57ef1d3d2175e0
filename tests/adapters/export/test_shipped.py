"""Only files that petl names go to the Hub and come from it."""

import ast
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers

import petl
from petl import testing
from petl.adapters import deltas
from petl.adapters.export.shipped import check, chosen
from petl.errors import InputError
from petl.methods import pela
from petl.ops.ternary import FILE as TERNARY

ADAPTER = ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize(
    "name",
    [
        *("optimizer.pt", "optimizer.safetensors", "rng-0.safetensors", "trainer_state.json"),
        *("adapter_model.bin", "x.py", "../adapter_model.safetensors", "/etc/tokenizer.json"),
        *("checkpoints/step-000004/adapter/adapter_model.safetensors", "state.json", ".env"),
        *("model.safetensors", "model-00001-of-00002.safetensors", "config.json", "a/README.md"),
        *("additional_chat_templates/../../x.jinja", "tokenizer.model.py", "base/x.json"),
    ],
)
def test_other_files_of_an_adapter_stay(name):
    assert chosen([*ADAPTER, name]) == ADAPTER


def test_files_of_a_model_and_of_tokenizers_go():
    names = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model"]
    names += ["additional_chat_templates/tool_use.jinja", "generation_config.json"]
    assert chosen(names) == sorted(names)
    assert chosen([*ADAPTER, "tokenizer.json", "base/config.json", "task.json"]) == sorted(
        [*ADAPTER, "base/config.json", "task.json", "tokenizer.json"]
    )
    # what an adapter of several widths was trained at
    assert "nested.json" in chosen([*ADAPTER, "nested.json"])


def test_the_files_of_every_tokenizer_go():
    folder = Path(transformers.__file__).parent / "models"
    texts = [file.read_text() for file in folder.glob("*/tokenization_*.py")]
    found = [re.search(r"^VOCAB_FILES_NAMES = (\{[^}]*\})", text, re.MULTILINE) for text in texts]
    names = {name for each in found if each for name in ast.literal_eval(each[1]).values()}
    assert {"vocab.txt", "source.spm", "bpe.codes"} < names
    assert {*chosen([*ADAPTER, *names])} == {*ADAPTER, *names}


def test_a_small_model_goes_with_its_ranks(tmp_path):
    model = petl.wrap(testing.tiny_llama(2), "pela", task_type="CAUSAL_LM")
    pela.save(pela.export(model), tmp_path / "small")
    assert check(tmp_path / "small") == "model"
    there = tmp_path / "there"
    there.mkdir()
    for name in chosen(file.name for file in (tmp_path / "small").iterdir()):
        shutil.copy(tmp_path / "small" / name, there)
    loaded = pela.load(transformers.AutoConfig.from_pretrained(there), there)
    ids = torch.arange(4, 12)[None]
    torch.testing.assert_close(loaded(ids).logits, model.eval()(input_ids=ids).logits)
    (there / "ranks.json").write_text('{"ranks": {"a": "x"}}')
    with pytest.raises(InputError, match=r"ranks\.json"):
        check(there)


def test_a_compressed_adapter_goes_and_is_read_strictly(tmp_path):
    model = testing.stir(petl.wrap(testing.tiny_llama(2), "lora"))
    model.save_pretrained(tmp_path / "lora")
    deltas.compress_adapter(tmp_path / "lora", tmp_path / "small", density=0.2)
    assert check(tmp_path / "small") == "adapter"
    names = [file.name for file in (tmp_path / "small").iterdir()]
    assert TERNARY in chosen(names)
    (tmp_path / "small" / TERNARY).write_bytes(b"x" * 40)
    with pytest.raises(InputError, match=TERNARY):
        check(tmp_path / "small")
