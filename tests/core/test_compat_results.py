"""Results that PEFT gives without a word, in models that petl has wrapped or loaded."""

import copy
import pickle

import pytest
import torch
from peft.utils.hotswap import hotswap_adapter
from transformers import BartConfig, BartForCausalLM, BertConfig, BertForQuestionAnswering

import petl
from petl import testing
from petl.errors import UnsupportedError

IDS = torch.arange(8)[None]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def small(base, method="lora", scale=1e-4, **fields):
    """An adapter whose update is far below a step of bfloat16."""
    model = petl.wrap(base, method, task_type="CAUSAL_LM", **fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=scale)
    return model


@pytest.mark.parametrize("name", ["foobar", "a_foo"])
def test_swapping_an_adapter_leaves_those_alone_whose_names_contain_its_own(name, tmp_path):
    for seed, adapter in enumerate((name, "foo")):
        torch.manual_seed(seed)
        model = petl.wrap(testing.tiny_llama(), "lora", task_type="CAUSAL_LM")
        testing.stir(model).save_pretrained(tmp_path / adapter)
    model = petl.load(testing.tiny_llama(), tmp_path / name, adapter_name=name)
    petl.load(model, tmp_path / "foo", adapter_name="foo")
    before = logits(model)
    hotswap_adapter(model, tmp_path / "foo", "foo")
    assert torch.equal(logits(model), before)
    model.set_adapter("foo")
    expected = logits(petl.load(testing.tiny_llama(), tmp_path / "foo"))
    assert torch.allclose(logits(model), expected)


def test_an_adalora_that_was_loaded_takes_labels(tmp_path):
    model = petl.wrap(testing.tiny_llama(), "adalora", task_type="CAUSAL_LM", total_step=10)
    testing.stir(model).save_pretrained(tmp_path)
    loaded = petl.load(testing.tiny_llama(), tmp_path)
    found = loaded(input_ids=IDS, labels=IDS)
    expected = torch.nn.functional.cross_entropy(found.logits[0, :-1], IDS[0, 1:])
    torch.testing.assert_close(found.loss, expected)
    assert model(input_ids=IDS, labels=IDS).loss > found.loss  # with its penalty


def test_adalora_takes_tensors_that_no_step_reaches():
    model = petl.wrap(testing.tiny_llama(), "adalora", task_type="CAUSAL_LM", total_step=10)
    hooks, absent = petl.lifecycle(model), next(p for n, p in model.named_parameters() if "_A" in n)
    model(input_ids=IDS, labels=IDS).loss.backward()
    absent.grad = None
    hooks.after_step(1)
    assert absent.grad is None


def test_the_norm_that_trains_is_read_by_a_kernel_of_its_block():
    model = petl.wrap(testing.tiny_llama(), "ln_tuning", task_type="CAUSAL_LM")
    layer = model.base_model.model.model.layers[0].input_layernorm
    norm = layer.ln_tuning_layers["default"]
    assert layer.weight is norm.weight
    assert layer.variance_epsilon == norm.variance_epsilon
    with model.disable_adapter():
        assert layer.weight is layer.base_layer.weight
    assert not hasattr(layer, "no_such_attribute")


def test_targets_that_ia3_scales_at_their_input_are_saved_by_the_names_of_the_targets(tmp_path):
    config = BartConfig(
        vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, decoder_ffn_dim=16,
        decoder_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    base = BartForCausalLM(config)
    model = petl.wrap(copy.deepcopy(base), "ia3", task_type="CAUSAL_LM")
    testing.stir(model).save_pretrained(tmp_path)
    assert torch.equal(logits(petl.load(base, tmp_path)), logits(model))
    inputs = [n for n, p in model.named_parameters() if "ia3" in n and p.shape == (1, 16)]
    assert any("fc2" in name for name in inputs)


@pytest.mark.parametrize("deed", ["merge_and_unload", "merge_adapter"])
@pytest.mark.parametrize("method", ["lora", "dora", "mos"])
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_merging_into_a_tied_head_is_refused(method, deed):
    base = testing.tiny_llama()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    fields = {"r": 3, "equivalent_rank": 3} if method == "mos" else {}
    targets = ["q_proj", "lm_head"]
    model = petl.wrap(base, method, target_modules=targets, task_type="CAUSAL_LM", **fields)
    before = logits(testing.stir(model))
    with pytest.raises(UnsupportedError):
        getattr(model, deed)()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_update_that_rounding_removes_is_not_merged_unless_that_is_allowed(method):
    model = small(testing.tiny_llama().bfloat16(), method)
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = {name: tensor.clone() for name, tensor in same.state_dict().items()}
        for deed in (same.merge_adapter, same.merge_and_unload):
            with pytest.raises(UnsupportedError):
                deed()
        after = same.state_dict()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    model.merge_and_unload(lossy=True)


def test_the_lost_share_is_that_of_the_update():
    model = small(testing.tiny_llama().bfloat16(), target_modules=["q_proj"])
    lost = whole = 0.0
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            weight, delta = layer.base_layer.weight.data, layer.get_delta_weight("default").float()
            kept = (weight + delta.bfloat16()).float() - weight.float()
            lost += float((kept - delta).square().sum())
            whole += float(delta.square().sum())
    share = 100 * (lost / whole) ** 0.5
    assert share > 20
    with pytest.raises(UnsupportedError, match=f"{share:.0f} %"):
        model.merge_and_unload()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_rounding_keeps_is_merged(dtype):
    model = testing.stir(petl.wrap(testing.tiny_llama().to(dtype), "lora", task_type="CAUSAL_LM"))
    before = logits(model)
    assert torch.allclose(logits(model.merge_and_unload()), before, atol=0.5)


def test_an_adapter_with_new_tokens_names_the_size_that_the_base_needs(tmp_path):
    base = testing.tiny_llama()
    rows = base.get_input_embeddings().num_embeddings
    base.resize_token_embeddings(rows + 3)
    tokens = [rows, rows + 2]
    fields = {"trainable_token_indices": tokens, "target_modules": ["q_proj"]}
    petl.wrap(base, "lora", task_type="CAUSAL_LM", **fields).save_pretrained(tmp_path)
    for deed in (
        lambda: petl.load(testing.tiny_llama(), tmp_path, other_base=True),
        lambda: petl.wrap(testing.tiny_llama(), "lora", task_type="CAUSAL_LM", **fields),
        lambda: petl.wrap(
            testing.tiny_llama(), "lora", trainable_token_indices={"embed_tokens": tokens}
        ),
    ):
        with pytest.raises(petl.InputError, match=f"{rows + 3}"):
            deed()


@pytest.mark.parametrize(
    ("fields", "said"),
    [({}, True), ({"task_type": "SEQ_CLS"}, False), ({"modules_to_save": ["classifier"]}, False)],
)
def test_a_head_that_is_neither_trained_nor_saved_is_said(fields, said, caplog):
    petl.wrap(testing.tiny_bert(), "lora", **fields)
    assert ("is frozen and is not saved with the adapter" in caplog.text) is said


@pytest.mark.parametrize("name", ["token_type_ids", "position_ids"])
def test_question_answering_reads_all_of_its_inputs(name):
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16,
    )  # fmt: skip
    base = BertForQuestionAnswering(config)
    model = testing.stir(petl.wrap(base, "lora", task_type="QUESTION_ANS")).eval()
    given = {"input_ids": IDS, name: IDS.flip(1) if name == "position_ids" else IDS % 2}
    with torch.no_grad():
        found, without = model(**given).start_logits, model(input_ids=IDS).start_logits
        merged = model.merge_and_unload()(**given).start_logits
    assert not torch.allclose(found, without, atol=1e-4)
    torch.testing.assert_close(merged, found, atol=1e-5, rtol=0)
