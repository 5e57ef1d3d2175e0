"""Tuners without a PeftModel around them, as transformers injects adapters; parallel wrappers."""

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from tiny_tokenizers import byte_tokenizer
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import BertConfig, BertModel, LlamaForCausalLM, pipeline
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import petl
from petl import testing
from petl.errors import UnsupportedError
from petl.testing import TINY_MODELS
from petl.testing.parallel import full_state

BATCH = TINY_MODELS["llama"].batch()
MOS = {"r": 4, "equivalent_rank": 2, "private_rank": 1}
WRAPPED = [("adapter", {}), ("mos", MOS), ("binary", {"inner": "lora"})]  # by parallel wrappers


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    testing.tiny_llama().save_pretrained(folder)
    return folder


def saved(base, folder, name, **fields):
    """Save a stirred adapter into `folder`, and return its logits."""
    model = testing.stir(petl.wrap(LlamaForCausalLM.from_pretrained(base), name, **fields))
    model.save_pretrained(folder)
    return testing.logits(model, BATCH)


@pytest.mark.cells(1)
@pytest.mark.parametrize("name", ["adapter", "sparse", "mola"])
def test_transformers_loads_adapters_without_shared_tensors(name, base, tmp_path):
    expected = saved(base, tmp_path, name)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(testing.logits(loaded, BATCH), expected, atol=1e-6)
    added = LlamaForCausalLM.from_pretrained(base)
    added.load_adapter(str(tmp_path))
    assert torch.allclose(testing.logits(added, BATCH), expected, atol=1e-6)


@pytest.mark.cells(2)
@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("mos", MOS, "share tensors"),
        ("mola", {"router_type": "recurrent"}, "share tensors"),
        ("mola", {"router_type": "pregated"}, "share tensors"),
        ("compacter", {}, "share tensors"),
        ("binary", {}, "codes"),
        ("increlora", {}, "pads"),
    ],
)
def test_what_needs_the_tuner_is_refused_with_the_reason(name, fields, reason, base, tmp_path):
    saved(base, tmp_path, name, **fields)
    with pytest.raises(NotImplementedError, match=reason) as raised:
        LlamaForCausalLM.from_pretrained(tmp_path)
    assert "petl.load" in str(raised.value)


def test_a_method_that_changes_in_training_is_not_injected_for_it():
    model, config = testing.tiny_llama(1), petl.build_config("sparse")
    with pytest.raises(petl.InputError):
        inject_adapter_in_model(config, model)
    assert not testing.tuner_layers(model)
    config.inference_mode = True
    assert testing.tuner_layers(inject_adapter_in_model(config, model))


def test_a_pipeline_is_built_from_the_folder_of_an_adapter(tmp_path):
    base, folder = str(tmp_path / "base"), str(tmp_path / "adapter")
    tokenizer = byte_tokenizer(pad_token="<unk>")
    config = BertConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    BertModel(config).save_pretrained(base)
    model = testing.stir(petl.wrap(BertModel.from_pretrained(base), "adapter", r=2)).eval()
    for path in (base, folder):
        tokenizer.save_pretrained(path)
    model.save_pretrained(folder)
    found = torch.tensor(pipeline("feature-extraction", model=folder)("a fox"))
    expected = model(**tokenizer("a fox", return_tensors="pt")).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.fixture
def one_process():
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize(("name", "fields"), WRAPPED)
def test_copies_of_nn_data_parallel_are_refused(name, fields):
    base = petl.wrap(testing.tiny_llama(), name, **fields).get_base_model()
    copied = base._replicate_for_data_parallel()
    with pytest.raises(UnsupportedError):
        copied(**BATCH)
    base(**BATCH)


def in_fsdp1(model, *, nested):
    policy = ModuleWrapPolicy({LlamaDecoderLayer}) if nested else None
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=cpu
    )


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("binary", {"inner": "lora"}, "quantized"),
        ("increlora", {}, "components"),
        ("sparse", {"total_step": 9}, "selection_algorithm='none'"),
        ("dora", {}, "magnitudes"),
        ("lora", {"init_lora_weights": "pissa"}, "pissa"),
        ("nested", {"method_config": {"r": 4}}, "components"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of torch, about FSDP1 itself
def test_fsdp1_is_refused_at_the_first_forward_pass(name, fields, reason, nested, one_process):
    sharded = in_fsdp1(petl.wrap(testing.tiny_llama(), name, **fields), nested=nested)
    with pytest.raises(UnsupportedError, match=rf"FSDP1 .*{reason}"):
        sharded(**BATCH)


@pytest.mark.filterwarnings("ignore")  # of torch, about FSDP1 itself
def test_fsdp1_is_refused_without_petl_wrap(one_process):
    config = petl.build_config("increlora", task_type="CAUSAL_LM")
    sharded = in_fsdp1(get_peft_model(testing.tiny_llama(), config), nested=True)
    with pytest.raises(UnsupportedError, match="components"):
        sharded(**BATCH)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("name", "fields"), [("adapter", {}), ("mos", MOS), ("lora", {"modules_to_save": ["lm_head"]})]
)
@pytest.mark.filterwarnings("ignore")  # of torch, about FSDP1 itself
def test_an_adapter_is_saved_from_inside_fsdp1(name, fields, nested, one_process, tmp_path):
    model = testing.stir(petl.wrap(testing.tiny_llama(), name, **fields))
    expected = testing.logits(model, BATCH)
    sharded = in_fsdp1(model, nested=nested)
    torch.testing.assert_close(testing.logits(sharded, BATCH), expected)
    with pytest.raises(petl.InputError):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, state_dict=full_state(sharded))
    loaded = petl.load(testing.tiny_llama(), tmp_path)
    torch.testing.assert_close(testing.logits(loaded, BATCH), expected)
    sharded(**BATCH)  # its wrappers are in place again


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("corda", {}),
        ("mola", {}),
        ("polyhistor", {"tasks": ["only"]}),
        ("pst", {}),
        ("sparse", {"selection_algorithm": "none"}),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of torch, about FSDP1 itself
def test_blocks_are_recomputed_in_fsdp1(name, fields, one_process):
    case = testing.Case(name, "llama", fields)
    expected = testing.gradients(case.wrap_stirred(), BATCH)
    model = case.wrap_stirred()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    found = testing.gradients(in_fsdp1(model, nested=True), BATCH)
    found = {key.replace("_fsdp_wrapped_module.", ""): grad for key, grad in found.items()}
    assert found.keys() == expected.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(found[key].view_as(grad), grad, atol=1e-5, rtol=1e-3)
