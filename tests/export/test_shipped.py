"""Only files that petl names go to the Hub and come from it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petl.errors import InputError
from petl.export.shipped import check, chosen

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


@given(st.lists(st.text()))
def test_nothing_is_invented(names):
    assert set(chosen(names)) <= {*names}


def test_a_model_is_read_strictly(tmp_path):
    with pytest.raises(InputError, match="has neither adapter_config"):
        check(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config\.json cannot be used"):
        check(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"has no model\.safetensors, and petl reads no other"):
        check(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(InputError, match=r"names \.\./x\.safetensors, which is no file of weights"):
        check(tmp_path)
