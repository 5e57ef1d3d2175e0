"""Adapters in GGUF: tensors, scales and order of rows, what is refused, answers of llama.cpp."""

import json

import gguf_bases
import pytest
import torch
from gguf_bases import Answer
from safetensors.torch import load_file
from tiny_tokenizers import byte_tokenizer
from transformers import AutoModelForCausalLM

import petl
from petl import testing
from petl.adapters.export.gguf import DECODERS, FILE, export_gguf, row_order
from petl.adapters.export.saved_adapter import find
from petl.errors import InputError, RunStopped, UnsupportedError
from petl.generation.serving.gguf_model import tokens_in

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'petl-peft[gguf]'")
pytest_plugins = ["gguf_bases"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of a tiny Llama with a tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    testing.tiny_llama(2, vocabulary=260).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def adapter_of(base, name, folder, **fields):
    """Save an adapter with noise in all of its weights."""
    model = AutoModelForCausalLM.from_pretrained(base)
    fields = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields}
    torch.manual_seed(0)
    testing.stir(petl.wrap(model, name, **fields)).save_pretrained(folder)
    return find(folder)


def read(folder):
    """Fields and tensors of the adapter in a folder."""
    reader = gguf.GGUFReader(folder / FILE)
    fields = {field.name: field.contents() for field in reader.fields.values()}
    return fields, {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}


def updates(fields, tensors):
    """The update of each weight by llama.cpp's formula: alpha / R * B A."""
    names = {name.removesuffix(".lora_a") for name in tensors if name.endswith("a")}
    pairs = {name: (tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]) for name in names}
    return {name: fields["adapter.lora.alpha"] / len(A) * B @ A for name, (A, B) in pairs.items()}


def rotated_halves(vector, angle):
    """One head as transformers rotates it: feature i with feature i + D / 2."""
    first, second = vector.chunk(2)
    return torch.cat(
        [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()]
    )


def rotated_pairs(vector, angle):
    """One head as llama.cpp rotates it for Llama: neighbors as complex numbers."""
    turned = torch.view_as_complex(vector.view(-1, 2).contiguous()) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.view_as_real(turned).flatten()


def test_reordered_rows_give_the_scores_of_rotary_embeddings_over_halves():
    heads, size = 3, 8
    q, k = torch.randn(2, heads * size)
    at, to = torch.rand(2, size // 2) * 6
    order = row_order(heads * size, heads)
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        expected = rotated_halves(q[own], at) @ rotated_halves(k[own], to)
        actual = rotated_pairs(q[order][own], at) @ rotated_pairs(k[order][own], to)
        torch.testing.assert_close(actual, expected)


PLACES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.mark.cells(2)
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("lora", {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}}),
        ("rslora", {"r": 4}),
        ("mos", {"r": 3}),
        ("loha", {"r": 2}),
    ],
)
def test_the_file_has_the_updates_of_the_adapter(name, fields, llama, tmp_path):
    saved = adapter_of(llama, name, tmp_path / "adapter", **fields)
    written = export_gguf(saved, tmp_path / "out", None)
    assert written.difference.effect > 0.1
    assert [file.name for file in (tmp_path / "out").iterdir()] == [FILE]
    values, tensors = read(tmp_path / "out")
    assert values["general.type"] == "adapter"
    assert values["general.architecture"] == "llama"
    assert values["adapter.type"] == "lora"
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    model = saved.model()
    actual = updates(values, tensors)
    assert len(actual) == 14
    for source, place in PLACES.items():
        for block in range(2):
            layer = model.get_submodule(f"base_model.model.model.layers.{block}.{source}")
            expected = layer.get_delta_weight("default").detach().cpu()
            heads = {"attn_q": 4, "attn_k": 2}.get(place)
            expected = gguf_bases.pairs(expected, heads) if heads else expected
            torch.testing.assert_close(actual[f"blk.{block}.{place}.weight"], expected)


def test_factors_are_written_unchanged_where_scales_are_equal(llama, tmp_path):
    saved = adapter_of(llama, "lora", tmp_path / "adapter", r=4, lora_alpha=6)
    export_gguf(saved, tmp_path / "out", None)
    values, tensors = read(tmp_path / "out")
    assert values["adapter.lora.alpha"] == 6
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"
    assert torch.equal(tensors["blk.1.ffn_up.weight.lora_a"], stored[key.format("A")])
    assert torch.equal(tensors["blk.1.ffn_up.weight.lora_b"], stored[key.format("B")])


@pytest.mark.thorough
def test_a_file_that_holds_something_else_is_not_kept(llama, tmp_path, monkeypatch):
    saved = adapter_of(llama, "lora", tmp_path / "adapter")
    add = gguf.GGUFWriter.add_tensor
    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", lambda self, n, t: add(self, n, t * 1.1))
    with pytest.raises(RunStopped):
        export_gguf(saved, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


@pytest.mark.thorough
def test_what_llama_cpp_cannot_hold_is_refused(llama, tmp_path):
    def refused(name, message, model=llama, **fields):
        saved = adapter_of(model, name, tmp_path / f"{model.name}{name}{len(fields)}", **fields)
        with pytest.raises(UnsupportedError, match=message):
            export_gguf(saved, tmp_path / "out", None)
        assert not (tmp_path / "out").exists()

    refused("mola", "method mola")
    refused("dora", r"model\.layers\.0\.self_attn\.q_proj")
    refused("lora", "biases", bias="all")
    refused("lora", "lm_head", modules_to_save=["lm_head"], r=2)
    refused("lora", "task_type=SEQ_CLS", task_type="SEQ_CLS")
    config = json.loads((llama / "config.json").read_text())
    assert not config["tie_word_embeddings"]
    saved = adapter_of(llama, "lora", tmp_path / "head", target_modules=["lm_head"])
    export_gguf(saved, tmp_path / "head-out", None)
    assert "output.weight.lora_a" in read(tmp_path / "head-out")[1]
    config["tie_word_embeddings"] = True
    tied_folder = tmp_path / "tied"
    testing.tiny_llama(2, vocabulary=260).save_pretrained(tied_folder)
    byte_tokenizer().save_pretrained(tied_folder)
    (tied_folder / "config.json").write_text(json.dumps(config))
    refused("lora", "lm_head", tied_folder, target_modules=["lm_head"])


def test_other_architectures_are_refused_by_name(tmp_path):
    testing.tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    saved = adapter_of(tmp_path / "gpt2", "lora", tmp_path / "adapter", target_modules=["c_attn"])
    with pytest.raises(InputError, match="gpt2"):
        export_gguf(saved, tmp_path / "out", None)


def greedy(model, prompt, length):
    """The tokens with which a model continues a prompt."""
    ids = torch.tensor([prompt])
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=length,
        do_sample=False,
    )
    return made[0, len(prompt) :].tolist()


@pytest.mark.cells(2)
@pytest.mark.parametrize("family", DECODERS)
def test_llama_cpp_continues_as_petl_does(family, llama_cpp: Answer, tmp_path):
    """Tiny random decoders: each tensor of the adapter is at its place."""
    base = gguf_bases.build(family)
    base.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    gguf_bases.write(base, family, tmp_path / "base.gguf")
    saved = adapter_of(tmp_path / "base", "lora", tmp_path / "adapter", r=4)
    export_gguf(saved, tmp_path / "out", None)
    prompts = [[5, 9, 33, 60, 7, 12], [21, 22, 23]]
    model = petl.load(base, tmp_path / "adapter").eval()

    def own(prompt):
        return greedy(model, prompt, 12)

    adapter = tmp_path / "out" / FILE
    answers = llama_cpp(tmp_path / "base.gguf", adapter, prompts, 12)
    assert [tokens_in(answer) for answer in answers] == [own(p) for p in prompts]
    plain = llama_cpp(tmp_path / "base.gguf", None, prompts, 12)
    with model.disable_adapter():
        assert [tokens_in(answer) for answer in plain] == [own(p) for p in prompts]
    assert plain != answers
