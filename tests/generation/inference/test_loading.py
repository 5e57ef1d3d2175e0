"""Language models are loaded from runs, adapter folders and folders of plain models."""

import json
import shutil

import pytest
from training_fixtures import train
from transformers import AutoConfig
from writer_fixtures import PROMPTS

from petl.adapters.export.merge import merge
from petl.adapters.export.saved_adapter import find
from petl.data.tasks.base import write_task
from petl.data.tasks.causal_lm import CausalLM
from petl.data.tasks.seq2seq import Seq2Seq
from petl.errors import InputError
from petl.generation.inference.loading import load_language_model
from petl.generation.inference.prompts import read_prompts
from petl.generation.inference.sampling import Sampling

pytest_plugins = ["task_fixtures", "training_fixtures", "writer_fixtures"]


def answers(model, name):
    with model.using(name):
        found = model.answer([model.encode(text) for text in PROMPTS], Sampling(max_new_tokens=12))
    return [answer.text for answer in found]


def test_a_merged_model_writes_what_the_adapter_does(writers, tmp_path):
    merge(find(writers.folder / "lora"), tmp_path / "merged", None)
    model = load_language_model(tmp_path / "merged")
    assert (model.names, model.is_chat) == (["base"], True)
    assert answers(model, "base") == answers(writers.load("lora"), "default")


def test_an_adapter_is_loaded_onto_a_plain_model(writers):
    model = writers.load("llama", first="lora")
    assert model.names == ["first", "base"]
    assert answers(model, "first") == answers(writers.load("lora"), "default")


@pytest.mark.parametrize(
    ("name", "others", "reason"),
    [
        ("lora", {"default": "other"}, "'default' is taken"),
        ("lora", {"base": "other"}, "'base' is taken"),
        ("lora", {"second": "mola"}, "cannot be added to a model with adapters of type LORA"),
        ("lora", {"second": "t5-lora"}, "not found in the base model"),
        ("nothing", {}, "is not a directory"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(writers, name, others, reason):
    with pytest.raises(InputError, match=reason):
        writers.load(name, **others)


def test_a_model_that_does_not_write_is_refused(writers, tmp_path):
    config = AutoConfig.from_pretrained(writers.folder / "llama")
    config.architectures = ["LlamaForSequenceClassification"]
    config.save_pretrained(tmp_path / "model")
    adapter = writers.folder / "lora" / "adapter_config.json"
    (tmp_path / adapter.name).write_text(adapter.read_text().replace("CAUSAL_LM", "SEQ_CLS"))
    for folder, kind in ((tmp_path / "model", "ForSequenceClassification"), (tmp_path, "SEQ_CLS")):
        with pytest.raises(InputError, match=rf"{kind}.*`petl predict`"):
            load_language_model(folder)


@pytest.mark.parametrize(
    ("name", "base"), [("lora", "llama"), ("mola", "llama"), ("t5-lora", "t5")]
)
def test_an_adapter_of_own_code_without_a_task_type_writes(writers, tmp_path, name, base):
    shutil.copytree(writers.folder / name, tmp_path / "own")
    file = tmp_path / "own" / "adapter_config.json"
    config = json.loads(file.read_text())
    of = AutoConfig.from_pretrained(writers.folder / base).architectures[0]
    for mapping in (None, {"base_model_class": of}):
        file.write_text(json.dumps(config | {"task_type": None, "auto_mapping": mapping}))
        model = load_language_model(tmp_path / "own")
        assert answers(model, "default") == answers(writers.load(name), "default")
    adapted = {"base_model_class": "LlamaForSequenceClassification"}  # of a folder of a decoder
    file.write_text(json.dumps(config | {"task_type": None, "auto_mapping": adapted}))
    with pytest.raises(InputError):
        load_language_model(tmp_path / "own")


def test_a_link_out_of_a_model_folder_is_refused(writers, tmp_path):
    (tmp_path / "secret").write_text("{}")
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (writers.folder / "llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError):
        load_language_model(folder)


def test_an_adapter_reads_prompts_as_it_has_learned(writers, tmp_path):
    for name, task, prompt in [
        ("lora", CausalLM(chat=True), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        ("lora", CausalLM(), "Hi"),
        ("t5-lora", Seq2Seq(prefix="echo: "), "echo: Hi"),
    ]:
        folder = tmp_path / f"{name}-{task.name}-{prompt[:1] == '<'}"
        shutil.copytree(writers.folder / name, folder)
        write_task(folder, task)
        model = load_language_model(folder)
        assert model.tokenizer.decode(model.encode("Hi")) == prompt


@pytest.mark.thorough
def test_a_run_reads_the_columns_and_system_prompt_that_it_has_learned_from(families, tmp_path):
    words = ["+method=lora", r"data.system=very\nold", "train.steps=1", "train.eval_steps=null"]
    quick = ["train.validation_share=null", "train.linear_probe=false"]
    run = train([*families("causal_lm", *words, *quick)], tmp_path / "run")
    model = load_language_model(run.path)
    assert (model.is_chat, model.system) == (True, "very\nold")
    found = list(read_prompts(str(families.folder / "test.jsonl"), model))
    for question in found:
        turns = [("system", "very\nold"), ("user", question.row["text"])]
        assert [(turn["role"], turn["content"]) for turn in question.prompt] == turns
        assert model.encode(question.row["text"]) == model.encode(question.prompt)
    found = list(read_prompts(str(families.folder / "test.jsonl"), model, system="new"))
    assert [len(question.prompt) for question in found] == [1] * len(found)
    assert "very new" in model.tokenizer.decode(model.encode(found[0].prompt, "very new"))
