"""Adapters of petl's methods on stacked experts become LoRAs in PEFT's layout."""

import pytest
import torch
from peft import PeftModel
from transformers import Llama4ForCausalLM, Llama4TextConfig

from petl.adapters.export.conversion import as_lora, save_lora
from petl.testing import Case, TinyModel, logits
from petl.testing.models import causal_batch

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FIELDS = {
    "mos": {"r": 3, "equivalent_rank": 2},
    "increlora": {},
    "sparse": {"density": 0.05},  # of full rank: by its singular values
}


def llama4():
    """Experts of other sides, with every token in each."""
    few = {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "pad_token_id": 0}
    config = Llama4TextConfig(**SIZES, **few, intermediate_size=24, intermediate_size_mlp=48)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Llama4ForCausalLM(config).eval()


LLAMA4 = TinyModel("llama4", llama4, causal_batch, "CAUSAL_LM", True)


@pytest.mark.cells(1)
@pytest.mark.parametrize("method", FIELDS)
@pytest.mark.parametrize("base", ["qwen3_moe", "gpt_oss", pytest.param(LLAMA4, id="llama4")])
@pytest.mark.parametrize("targets", ["block-linear", ["experts.down_proj"]], ids=str)
def test_a_lora_of_experts_computes_the_same(method, base, targets, tmp_path):
    case = Case(method, base, {**FIELDS[method], "target_modules": targets})
    model, batch = case.wrap_stirred(), case.batch()
    expected = logits(model, batch)
    assert not torch.equal(expected, logits(case.base(), batch))
    save_lora(*as_lora(model), tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path)
    bound = 1e-5 * float(expected.abs().max())
    assert float((logits(loaded, batch) - expected).abs().max()) <= bound
