"""`petl.check(..., base=...)`: weights, outputs and merging are compared with a loaded base."""

import json
import shutil

import checked_folders as folders
import pytest
import torch
from mixtures import SIZES
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import petl
from petl.core.fingerprint import seal
from petl.testing.case import stir

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def saved(tmp_path):
    """A copy of a healthy folder of petl, whose tensors a function changes."""

    def copy(config="lora", make=None, part="lora_B"):
        folder = shutil.copytree(folders.healthy(config, "petl"), tmp_path / "adapter")
        if make is not None:
            found = load_file(folder / WEIGHTS)
            found = {k: make(v) if part in k else v for k, v in found.items()}
            save_file(found, folder / WEIGHTS)
            seal(folder)
        return folder

    return copy


def base_of(tmp_path, seed: int = 0, dtype: torch.dtype = torch.float32, **fields):
    """Another base: of another seed, dtype or shape."""
    folder = shutil.copytree(folders.base(), tmp_path / "base")
    model = folders.tiny(**fields)
    if seed:
        torch.manual_seed(seed)
        with torch.no_grad():
            model.model.layers[1].self_attn.q_proj.weight.normal_()
    model.to(dtype).save_pretrained(folder)
    return folder


def ids(checked) -> set[str]:
    return {found.id for found in checked if found.severity != "note"}


@pytest.mark.parametrize("config", ["lora", "dora", "all-linear"])
def test_an_adapter_on_its_own_base_is_fine(config):
    checked = petl.check(folders.healthy(config, "petl"), base=folders.base())
    assert checked.ok, [*checked]
    assert checked.made_by.startswith("petl ")
    assert not {name for name, _ in checked.not_checked} & {"base.adapted", "base.effect"}


def test_a_base_with_other_weights_below_the_adapter_is_an_error(saved, tmp_path):
    checked = petl.check(saved(), base=base_of(tmp_path, seed=1))
    assert ids(checked) >= {"base.adapted"}
    assert "1 of 12 tensors" in next(f.what for f in checked if f.id == "base.adapted")


def test_the_base_says_its_class_where_the_adapter_does_not(saved, tmp_path):
    folder = saved()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": None}))
    seal(folder)
    assert petl.check(folder, base=folders.base()).ok
    assert ids(petl.check(folder, base=base_of(tmp_path, seed=1))) >= {"base.adapted"}


def test_a_check_does_not_ask_for_the_run_that_it_was_given(saved, caplog):
    assert petl.check(saved(), base=folders.base()).ok
    assert "folder of a run" not in caplog.text


def test_weights_below_a_method_of_petl_are_compared_too(tmp_path):
    model = petl.wrap(folders.tiny(), "mola", task_type="CAUSAL_LM", target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "adapter")
    assert ids(petl.check(tmp_path / "adapter", base=base_of(tmp_path, seed=1))) >= {"base.adapted"}


def test_a_file_that_was_changed_is_a_finding_beside_a_base_too(saved):
    folder = saved()
    save_file({k: 2 * v for k, v in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    checked = petl.check(folder, base=folders.base())
    assert ids(checked) == {"format.changed"}
    assert "is not the file that was saved there" in dict(checked.not_checked)["base.fits"]


def test_without_a_fingerprint_weights_are_not_compared(tmp_path):
    checked = petl.check(folders.healthy("lora", "llama-factory"), base=base_of(tmp_path, seed=1))
    assert checked.ok
    assert dict(checked.not_checked)["base.adapted"].startswith("no base_fingerprint.json")


def test_an_adapter_of_transformers_4_on_experts_fits_its_base(tmp_path):
    config = MixtralConfig(**SIZES, num_local_experts=6, num_experts_per_tok=2)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    folder = tmp_path / "adapter"
    folder.mkdir()
    tensors = {}
    for key, W in load_file(tmp_path / "base" / "model.safetensors").items():
        if key.endswith(".w1.weight"):
            for side, shape in (("A", (2, W.shape[1])), ("B", (len(W), 2))):
                name = key.replace(".weight", f".lora_{side}.weight")
                tensors[f"base_model.model.{name}"] = torch.randn(shape)
    save_file(tensors, folder / WEIGHTS)
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["w1"]}
    (folder / CONFIG).write_text(json.dumps({**fields, "task_type": "CAUSAL_LM"}))
    assert petl.check(folder, base=tmp_path / "base").ok


def test_a_base_of_another_shape_is_an_error(saved, tmp_path):
    checked = petl.check(saved(), base=base_of(tmp_path, num_hidden_layers=2))
    assert ids(checked) == {"base.fits"}
    assert dict(checked.not_checked)["merge.loss"].startswith("the adapter does not fit")


def test_an_update_that_bfloat16_rounds_off_is_an_error(saved, tmp_path):
    base = base_of(tmp_path, dtype=torch.bfloat16)
    small = petl.check(saved(make=lambda v: 1e-4 * v), base=base)
    assert "merge.loss" in ids(small)
    shutil.rmtree(tmp_path / "adapter")
    large = petl.check(saved(make=lambda v: 10 * v), base=base)
    assert any(f.id == "merge.kept" and "bfloat16" in f.what for f in large)


def test_outputs_that_do_not_change_are_an_error(saved, tmp_path):
    rows = tmp_path / "rows.jsonl"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows.write_text(f'{json.dumps({"messages": chat})}\n{{"text": "some words"}}\n')
    folder = saved(make=lambda v: 1e-9 * v)
    checked = petl.check(folder, base=folders.base(), data=rows)
    assert ids(checked) == {"base.effect"}
    assert "on 2 rows" in next(f.what for f in checked if f.id == "base.effect")


ODD = (
    *({}, {"text": 5}, {"text": ""}, {"text": " "}, {"messages": 5}, {"messages": ["a"]}),
    *({"messages": []}, {"messages": [{"role": 5}]}, {"conversations": []}),
    {"messages": [{"role": "refused", "content": "a"}]},
)


@pytest.mark.parametrize("others", [[{"text": "some words"}], []])
def test_rows_that_cannot_be_encoded_are_left_out_and_counted(others, saved, tmp_path):
    folder = saved()
    refusal = "{% if m.role not in ('user', 'assistant') %}{{ raise_exception('no role') }}"
    template = folders.CHATML.replace(" %}", f" %}}{refusal}{{% endif %}}", 1)
    folders.save_tokenizer(folder, template)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in (*ODD, *others)))
    checked = petl.check(folder, base=folders.base(), data=rows)
    told = [f.what for f in checked if f.id == "base.rows"]
    if others:
        assert f"1 of {len(ODD) + 1} rows; without line 1: " in told[0]
    else:
        assert "line 1: " in dict(checked.not_checked)["base.effect"]
    assert not ids(checked) & {"base.effect", "base.outputs"}


def test_an_encoder_decoder_is_compared_on_rows(tmp_path):
    sizes = {"vocab_size": 272, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}
    base = T5ForConditionalGeneration(T5Config(**sizes, num_heads=4, decoder_start_token_id=0))
    base.save_pretrained(tmp_path / "base")
    folders.save_tokenizer(tmp_path / "base")
    config = LoraConfig(target_modules=["q"], task_type="SEQ_2_SEQ_LM")
    stir(get_peft_model(base, config)).save_pretrained(tmp_path / "adapter")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "some words"}\n')
    checked = petl.check(tmp_path / "adapter", base=tmp_path / "base", data=rows)
    assert "base.rows" in {found.id for found in checked}, checked.not_checked


@pytest.mark.parametrize("base", ["/no/such", "no/such", "empty"])
def test_a_base_that_cannot_be_opened_is_an_error_of_the_user(base, saved, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(petl.InputError):
        petl.check(saved(), base=tmp_path / base if base == "empty" else base)


def test_a_tokenizer_that_does_not_suit_the_base_is_a_finding(saved):
    folder = saved()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<new {i}>" for i in range(20)])
    tokenizer.save_pretrained(folder)
    checked = petl.check(folder, base=folders.base())
    assert ids(checked) == {"vocabulary.tokens"}
    assert "280 tokens" in dict(checked.not_checked)["base.fits"]


@pytest.mark.parametrize("fields", [{"lora_alpha": -16}, {"trainable_token_indices": [-3]}])
def test_an_adapter_that_petl_refuses_is_an_error(fields, tmp_path):
    folder = tmp_path / "adapter"
    config = LoraConfig(**folders.QV, trainable_token_indices=[3])
    stir(get_peft_model(folders.tiny(), config)).save_pretrained(folder)
    folders.change(folder, **fields)
    assert "base.fits" in ids(petl.check(folder, base=folders.base()))


def test_outputs_that_are_nan_are_an_error_of_their_own(saved):
    assert ids(petl.check(saved(make=lambda v: 1e30 * v), base=folders.base())) == {"base.outputs"}


@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_outputs_that_are_the_same_for_all_inputs_are_one_too(bias, tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    base = BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=4))
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=["query"], task_type="SEQ_CLS")
    model = stir(get_peft_model(base, config))
    head = model.get_base_model().classifier.modules_to_save["default"]
    head.weight.data.fill_(0)
    head.bias.data.fill_(bias)
    model.save_pretrained(tmp_path / "adapter")
    found = ids(petl.check(tmp_path / "adapter", base=tmp_path / "base"))
    assert found == {"dead.zero", "base.outputs"}


def test_a_head_that_equals_the_base_is_noted(tmp_path):
    folder = tmp_path / "adapter"
    model = petl.wrap(folders.tiny(), "lora", **folders.QV, modules_to_save=["lm_head"])
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_B.default.weight.data.fill_(0.1)
    model.save_pretrained(folder)
    found = [f.id for f in petl.check(folder, base=folders.base())]
    assert "base.head" in found
