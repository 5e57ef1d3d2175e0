"""`model.adapter`: a finished adapter that is merged into the model below another method."""

import pytest
import torch

import petl
from petl import testing
from petl.data.models.finished_adapter import with_adapter
from petl.data.tasks.causal_lm import CausalLM
from petl.errors import UnsupportedError


def test_an_adapter_on_a_weight_that_another_module_has_too_is_refused(tmp_path):
    base = testing.tiny_llama()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    before = base.lm_head.weight.clone()
    adapted = testing.stir(petl.wrap(base, "lora", target_modules=["lm_head"]))
    adapted.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError):
        with_adapter(adapted.unload(), str(tmp_path), CausalLM(max_length=32), ())
    assert torch.equal(base.model.embed_tokens.weight, before)
