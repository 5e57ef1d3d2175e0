"""Nothing that petl loads can run code: not an adapter, a run, a checkpoint, a base or a template.

Each hostile file would make a folder, `RAN`, if its code ran.
"""

import ast
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from tiny_tokenizers import CHATML, byte_tokenizer
from torch import nn
from training_fixtures import ROOT, train
from transformers import dynamic_module_utils as modules

import petl
from petl.checkpoint import restore_optimizer, rng_state, step_folder, whole_folder, write
from petl.errors import InputError
from petl.models import load_base
from petl.optim import make_optimizer
from petl.saved import find, score
from petl.settings import TrainConfig
from petl.tasks import Classification
from petl.tasks.chat import encode_chat

pytest_plugins = ["training_fixtures"]

MODULE = "hostile_module"
CODE = "import os\ndef go(*_, **__): os.makedirs({ran!r}, exist_ok=True)\ngo()\n"


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, ran):
        self.ran = ran

    def __reduce__(self):
        return os.mkdir, (str(self.ran),)


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """The folder that hostile code makes; a module that does it when imported can be found."""
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
    """A finished run to be tampered with."""
    return shutil.copytree(made, tmp_path / "run")


@pytest.fixture
def load(run):
    """Load the adapter of the run onto a fresh base."""
    settings, task = find(run).settings["model"], find(run).task
    return lambda: petl.load(load_base(settings, task), run / "adapter")


def test_the_bomb_would_go_off(ran):
    pickle.loads(pickle.dumps(Bomb(ran)))
    assert ran.exists()


def test_a_pickle_in_place_of_the_adapter_is_not_read(load, run, ran):
    torch.save(Bomb(ran), run / "adapter" / "adapter_model.safetensors")
    with pytest.raises(InputError, match="cannot be read"):
        load()
    assert not ran.exists()


def test_a_pickle_beside_its_config_is_not_read(load, run, ran):
    (run / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(Bomb(ran), run / "adapter" / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model\.bin is not read, such files can hold"):
        load()
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
    with pytest.raises(InputError, match=f"megatron_core='{MODULE}', which is not megatron.core"):
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
    with pytest.raises(InputError, match="is not the configuration of a run"):
        find(run)
    assert not ran.exists()


@pytest.mark.parametrize("group", ["model", "data", "method", "train"])
def test_a_target_on_the_command_line_is_no_setting(tiny, tmp_path, ran, group):
    hostile = f"++{group}._target_={MODULE}.go"
    with pytest.raises(InputError, match="_target_"):
        train([*tiny.classify, "+method=lora", hostile], tmp_path / "new")
    assert not ran.exists()


def test_a_pickle_in_a_checkpoint_whose_sums_are_right_is_not_read(tmp_path, ran):
    base = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    model = get_peft_model(base, LoraConfig(target_modules=["0"], r=2))
    optimizer = make_optimizer(model, TrainConfig())
    whole = step_folder(tmp_path, 1)
    write(whole, model, optimizer, {}, [rng_state(torch.device("cpu"))], {"step": 1})
    hostile = step_folder(tmp_path, 2)
    with whole_folder(hostile, manifest=True) as folder:
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        (folder / "manifest.json").unlink()
        torch.save(Bomb(ran), folder / "optimizer.safetensors")
    restore_optimizer(whole, optimizer, model)
    with pytest.raises(SafetensorError):
        restore_optimizer(hostile, optimizer, model)
    assert not ran.exists()


def test_a_template_runs_no_code():
    tokenizer = byte_tokenizer(pad_token="<|im_end|>")
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() | length }}"
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    tokenizer.chat_template = CHATML
    encode_chat(tokenizer, talk)
    tokenizer.chat_template = CHATML + escape
    with pytest.raises(InputError, match=r"chat template .* refuses"):
        encode_chat(tokenizer, talk)


# The code that a base brings along


@pytest.fixture
def with_code(tiny, run, tmp_path, ran):
    """Make the base of the run one that brings code."""
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


def test_a_bases_own_code_runs_only_if_asked_for(with_code, ran, monkeypatch, tmp_path):
    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    task = Classification(classes=["colour", "beast", "tool"], max_length=16)
    given = {"name": "base", "source": "path", "path": str(with_code)}
    with pytest.raises(InputError, match=r"read it, then say model\.trust_remote_code=true"):
        load_base(given, task)
    assert not ran.exists()
    load_base({**given, "trust_remote_code": True}, task)
    assert ran.exists()


def test_a_run_cannot_ask_for_it_by_itself(run, with_code, ran):
    settings = OmegaConf.load(run / "config.yaml")
    settings.model.path, settings.model.trust_remote_code = str(with_code), True
    OmegaConf.save(settings, run / "config.yaml")
    with pytest.raises(InputError, match="read it, then say --trust-remote-code"):
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


def test_no_module_calls_what_could_run_a_files_code():
    testing = ROOT / "petl" / "testing"  # pickles what it has made itself
    files = [f for f in (ROOT / "petl").rglob("*.py") if testing not in f.parents]
    assert len(files) > 100
    for file in files:
        assert not called(ast.parse(file.read_text())) & RUNS_CODE, file
