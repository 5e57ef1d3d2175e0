"""Nothing that petl loads can run code: not an adapter, a run, a checkpoint, a base or a template.

Each hostile file would make a folder, `RAN`, if its code ran.
"""

import ast
import json
import os
import pickle
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import warm_python
from huggingface_hub import constants
from omegaconf import OmegaConf
from peft import (
    LoraConfig,
    MultitaskPromptTuningConfig,
    XLoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file
from tiny_tokenizers import CHATML, byte_tokenizer
from torch import nn
from training_fixtures import ROOT, train
from transformers import LlamaForCausalLM
from transformers import dynamic_module_utils as modules

import petl
from petl.adapters.export.saved_adapter import find, score
from petl.core.fingerprint import seal
from petl.data.models.loading import load_base
from petl.data.tasks.chat import encode_chat
from petl.data.tasks.classification import Classification
from petl.errors import InputError
from petl.system.files.disk import atomic_folder
from petl.training.optimizer import make_optimizer
from petl.training.runs.checkpoint import restore_optimizer, rng_state, step_folder, write
from petl.training.runs.settings import TrainConfig

pytest_plugins = ["training_fixtures"]

MODULE = "hostile_module"
CODE = "import os\ndef go(*_, **__): os.makedirs({ran!r}, exist_ok=True)\ngo()\n"


class Bomb:
    """Creates a folder when it is unpickled."""

    def __init__(self, ran):
        self.ran = ran

    def __reduce__(self):
        return os.mkdir, (str(self.ran),)


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """The folder that malicious code creates; a module that does so on import is importable."""
    folder = tmp_path / "RAN"
    (tmp_path / f"{MODULE}.py").write_text(CODE.format(ran=str(folder)))
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "run"
    return train([*tiny.classify, "+method=lora", "train.steps=1"], folder).path


@pytest.fixture
def run(made, tmp_path):
    """A finished run that tests modify."""
    return shutil.copytree(made, tmp_path / "run")


@pytest.fixture
def load(run):
    """Load the adapter of the run into a new base model."""
    settings, task = find(run).settings["model"], find(run).task
    return lambda: petl.load(load_base(settings, task), run / "adapter")


def test_the_bomb_explodes_if_it_is_unpickled(ran):
    pickle.loads(pickle.dumps(Bomb(ran)))
    assert ran.exists()


def test_a_pickle_in_place_of_the_adapter_is_not_read(load, run, ran):
    torch.save(Bomb(ran), run / "adapter" / "adapter_model.safetensors")
    with pytest.raises(InputError):
        load()
    assert not ran.exists()


def test_a_pickle_next_to_the_config_is_not_read(load, run, ran):
    (run / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(Bomb(ran), run / "adapter" / "adapter_model.bin")
    with pytest.raises(InputError):
        load()
    assert not ran.exists()


@pytest.mark.thorough
def test_the_command_in_the_error_makes_a_file_that_loads(load, run):
    folder = run / "adapter"
    expected = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(expected, folder / "adapter_model.bin")
    seal(folder)  # saved as a pickle, it has no digest of a safetensors file
    with pytest.raises(InputError) as refused:
        load()
    _, line = str(refused.value).split("by python ")
    subprocess.run([warm_python.python(), *shlex.split(line)], cwd=folder, check=True)
    found = get_peft_model_state_dict(load())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def on_the_hub(cache: Path, name: str, files: Path) -> Path:
    """Put files into the cache of the Hub's client as those of repository `name`."""
    home, commit = cache / f"models--{name.replace('/', '--')}", "0" * 40
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    return shutil.copytree(files, home / "snapshots" / commit)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_an_adapter_of_the_hub_is_read_from_safetensors_only(run, hub_cache, ran, tmp_path):
    settings, task = find(run).settings["model"], find(run).task
    whole = on_the_hub(hub_cache, "someone/whole", run / "adapter")
    hostile = on_the_hub(hub_cache, "someone/hostile", run / "adapter")
    (hostile / "adapter_model.safetensors").unlink()
    torch.save(Bomb(ran), hostile / "adapter_model.bin")
    expected = load_file(whole / "adapter_model.safetensors")
    found = get_peft_model_state_dict(petl.load(load_base(settings, task), "someone/whole"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(InputError):
        petl.load(load_base(settings, task), "someone/hostile")
    assert not ran.exists()


def test_a_mixture_cannot_name_experts_that_are_pickles(tiny, run, tmp_path, ran):
    shutil.copytree(run / "adapter", tmp_path / "expert")
    (tmp_path / "expert" / "adapter_model.safetensors").unlink()
    torch.save(Bomb(ran), tmp_path / "expert" / "adapter_model.bin")
    mixture = XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters={})
    mixture.save_pretrained(tmp_path / "mixture")
    shutil.copy(run / "adapter" / "adapter_model.safetensors", tmp_path / "mixture")
    edit(tmp_path / "mixture" / "adapter_config.json", adapters={"0": str(tmp_path / "expert")})
    base = LlamaForCausalLM.from_pretrained(tiny.folder / "llama")
    with pytest.raises(InputError, match="expert"):
        petl.load(base, tmp_path / "mixture")
    assert not ran.exists()


def test_prompts_cannot_be_initialized_from_a_pickle(tiny, tmp_path, ran):
    torch.save(Bomb(ran), tmp_path / "start.bin")
    prompts = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, num_tasks=2)
    base = LlamaForCausalLM.from_pretrained(tiny.folder / "llama")
    get_peft_model(base, prompts).save_pretrained(tmp_path / "prompts")
    edit(
        tmp_path / "prompts" / "adapter_config.json",
        prompt_tuning_init="EXACT_SOURCE_TASK",
        prompt_tuning_init_state_dict_path=str(tmp_path / "start.bin"),
    )
    with pytest.raises(InputError, match=r"start\.bin"):
        petl.load(LlamaForCausalLM.from_pretrained(tiny.folder / "llama"), tmp_path / "prompts")
    assert not ran.exists()


def edit(file: Path, **entries) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_an_adapters_config_is_data(load, run, ran):
    hostile = {"_target_": f"{MODULE}.go", "_partial_": False}
    mapping = {"parent_library": MODULE, "base_model_class": "go"}
    edit(run / "adapter" / "adapter_config.json", auto_mapping=mapping, inference={**hostile})
    edit(run / "adapter" / "adapter_config.json", **hostile)
    load()
    assert not ran.exists()


def test_an_adapter_cannot_name_a_module_to_import(load, run, ran):
    megatron = {"tensor_model_parallel_size": 1}
    edit(run / "adapter" / "adapter_config.json", megatron_config=megatron, megatron_core=MODULE)
    with pytest.raises(InputError, match=f"megatron_core='{MODULE}'"):
        load()
    assert not ran.exists()


@pytest.mark.parametrize("group", ["model", "data", "train"])
def test_a_runs_config_is_data(run, ran, group):
    settings = OmegaConf.load(run / "config.yaml")
    settings[group]["_target_"] = f"{MODULE}.go"
    OmegaConf.save(settings, run / "config.yaml")
    with pytest.raises(InputError, match="_target_"):
        score(find(run))
    assert not ran.exists()


def test_a_runs_config_makes_no_objects(run, ran):
    text = (run / "config.yaml").read_text()
    tag = f"!!python/object/apply:os.mkdir ['{ran}']"
    (run / "config.yaml").write_text(text.replace("seed: 0", f"seed: {tag}"))
    with pytest.raises(InputError, match="python/object/apply"):
        find(run)
    assert not ran.exists()


@pytest.mark.parametrize("group", ["model", "data", "method", "train"])
def test_a_target_on_the_command_line_is_not_a_setting(tiny, tmp_path, ran, group):
    hostile = f"++{group}._target_={MODULE}.go"
    with pytest.raises(InputError, match="_target_"):
        train([*tiny.classify, "+method=lora", hostile], tmp_path / "new")
    assert not ran.exists()


def test_a_pickle_in_a_checkpoint_with_correct_checksums_is_not_read(tmp_path, ran):
    base = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    model = get_peft_model(base, LoraConfig(target_modules=["0"], r=2))
    optimizer = make_optimizer(model, TrainConfig())
    whole = step_folder(tmp_path, 1)
    write(whole, model, optimizer, {}, [rng_state(torch.device("cpu"))], {"step": 1})
    hostile = step_folder(tmp_path, 2)
    with atomic_folder(hostile, manifest=True) as folder:
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        (folder / "manifest.json").unlink()
        torch.save(Bomb(ran), folder / "optimizer.safetensors")
    restore_optimizer(whole, optimizer, model)
    with pytest.raises(InputError):
        restore_optimizer(hostile, optimizer, model)
    assert not ran.exists()


def test_a_template_runs_no_code():
    tokenizer = byte_tokenizer(pad_token="<|im_end|>")
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() | length }}"
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    tokenizer.chat_template = CHATML
    encode_chat(tokenizer, talk)
    tokenizer.chat_template = CHATML + escape
    with pytest.raises(InputError):
        encode_chat(tokenizer, talk)


# Files of a base model


CLASSES = Classification(classes=["color", "beast", "tool"], max_length=16)


@pytest.fixture
def base(tiny, tmp_path):
    """A base model that tests modify, and settings that read it."""
    folder = shutil.copytree(tiny.folder / "bert", tmp_path / "base")
    return folder, {"name": "base", "source": "path", "path": str(folder)}


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_a_base_is_read_from_safetensors_only(base, ran, file):
    folder, settings = base
    load_base(settings, CLASSES)
    (folder / "model.safetensors").unlink()
    torch.save(Bomb(ran), folder / "pytorch_model.bin")
    if file.endswith(".json"):
        (folder / "pytorch_model.bin").rename(folder / "part.bin")
        (folder / file).write_text('{"metadata": {}, "weight_map": {"a": "part.bin"}}')
    with pytest.raises(InputError):
        load_base(settings, CLASSES)
    assert not ran.exists()


def test_a_base_of_the_hub_is_read_from_safetensors_only(base, hub_cache, ran):
    folder, _ = base
    on_the_hub(hub_cache, "someone/whole", folder)
    (folder / "model.safetensors").unlink()
    torch.save(Bomb(ran), folder / "pytorch_model.bin")
    on_the_hub(hub_cache, "someone/hostile", folder)
    load_base({"name": "someone/whole", "source": "hub"}, CLASSES)
    with pytest.raises(InputError):
        load_base({"name": "someone/hostile", "source": "hub"}, CLASSES)
    assert not ran.exists()


def test_an_adapter_in_a_bases_folder_is_not_read(base, run, ran):
    folder, settings = base
    shutil.copy(run / "adapter" / "adapter_config.json", folder)
    edit(folder / "adapter_config.json", base_model_name_or_path=None)
    torch.save(Bomb(ran), folder / "adapter_model.bin")
    with pytest.raises(InputError):
        load_base(settings, CLASSES)
    assert not ran.exists()


# Code of a base model


@pytest.fixture
def with_code(tiny, run, tmp_path, ran):
    """Make the base model of the run one with code of its own."""
    folder = shutil.copytree(tiny.folder / "bert", tmp_path / "base")
    code = (
        f"import os\nos.makedirs({str(ran)!r}, exist_ok=True)\n"
        "from transformers import BertConfig, BertForSequenceClassification\n"
        "class Config(BertConfig): model_type = 'hostile'\n"
        "class Model(BertForSequenceClassification): config_class = Config\n"
    )
    (folder / "code.py").write_text(code)
    auto = {"AutoConfig": "code.Config", "AutoModelForSequenceClassification": "code.Model"}
    edit(folder / "config.json", auto_map=auto, model_type="hostile")
    return folder


def test_code_of_a_base_runs_only_if_allowed(with_code, ran, monkeypatch, tmp_path):
    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    given = {"name": "base", "source": "path", "path": str(with_code)}
    with pytest.raises(InputError):
        load_base(given, CLASSES)
    assert not ran.exists()
    load_base({**given, "trust_remote_code": True}, CLASSES)
    assert ran.exists()


def test_a_run_cannot_allow_it_itself(run, with_code, ran):
    settings = OmegaConf.load(run / "config.yaml")
    settings.model.path, settings.model.trust_remote_code = str(with_code), True
    OmegaConf.save(settings, run / "config.yaml")
    with pytest.raises(InputError):
        find(run)
    assert not ran.exists()
    assert find(run, trust_remote_code=True).settings["model"]["trust_remote_code"]


# The code of petl

RUNS_CODE = {
    *("eval", "exec", "compile", "__import__"),
    *("pickle.load", "pickle.loads", "torch.load", "joblib.load", "yaml.load", "yaml.unsafe_load"),
    *("np.load", "numpy.load", "instantiate", "hydra.utils.instantiate", "hydra.utils.call"),
    *("shelve.open", "marshal.loads", "dill.loads"),
}


def called(tree: ast.AST) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def test_no_module_calls_functions_that_could_run_code_in_a_file():
    testing = ROOT / "petl" / "testing"  # pickles what it has made itself
    files = [f for f in (ROOT / "petl").rglob("*.py") if testing not in f.parents]
    assert len(files) > 100
    for file in files:
        assert not called(ast.parse(file.read_text())) & RUNS_CODE, file
