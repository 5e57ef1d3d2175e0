"""Adding, switching and deleting with many adapters: cost, and the same results as PEFT."""

import copy
import cProfile
import gc
import pickle
import random
import warnings
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import delete_adapter, set_adapter, set_requires_grad

import petl
from petl import testing
from petl.core.compat import BaseTuner, BaseTunerLayer
from petl.core.tuners.switching import hosts_of, layers_of
from petl.errors import UnsupportedError
from petl.testing import Case

METHODS = ["mos", "mola", "adapter"]  # with shared pools, with pools and routers, on blocks
FIELDS = {"mos": {"r": 4}}  # the largest r for so few layers


def crowd(method, size):
    """A model with adapters "a0" (active) to "a<size - 1>"."""
    case = Case(method, "llama", FIELDS.get(method, {}))
    model = case.wrap(adapter_name="a0")
    for index in range(1, size):
        model.add_adapter(f"a{index}", case.config())
    return case, model


def flags(model):
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def calls(action):
    """Return the number of function calls in `action`, without those of a garbage collection."""
    profile = cProfile.Profile()
    gc.collect()
    gc.disable()
    try:
        profile.runcall(action)
    finally:
        gc.enable()
    return sum(entry.callcount for entry in profile.getstats())


HOSTED = {
    **{method: Case(method, "llama", FIELDS.get(method, {})) for method in METHODS},
    "lora": Case("lora", "llama", {"target_modules": ["q_proj", "down_proj"]}),
    "dora": Case("dora", "llama", {"target_modules": ["q_proj", "down_proj"]}),
    "lora with a head": Case("lora", "bert", {"target_modules": ["query"]}),
    "binary on lora": Case("binary", "llama", {"inner": "lora", "target_modules": ["q_proj"]}),
    "binary on mola": Case("binary", "bert", {"inner": "mola", "head_bits": 2}),
}


# with pools, beside blocks, with magnitudes, with a head, with an inner method
@pytest.mark.thorough
@pytest.mark.parametrize("name", ["mos", "adapter", "dora", "lora with a head", "binary on mola"])
def test_operations_on_an_adapter_cost_the_same_among_many(name, tmp_path):
    case, build = HOSTED[name], {"llama": testing.tiny_llama, "bert": testing.tiny_bert}
    small = replace(case.tiny, build=partial(build[case.tiny.name], 2 if name == "mos" else 1))
    case = replace(case, model=small, fields={**case.fields, **({"r": 2} if name == "mos" else {})})
    few, many = (costs(case, size, tmp_path / str(size)) for size in (3, 10))
    grown = {deed: (cost, many[deed]) for deed, cost in few.items() if many[deed] > 1.05 * cost}
    assert not grown


def costs(case, size, folder):
    """Return the number of function calls of each operation with `size` adapters."""
    model = case.wrap(adapter_name="a0")
    petl.fuse_lora(model)
    configs = [copy.deepcopy(model.peft_config["a0"]) for _ in range(size)]
    for index in range(1, size):
        model.add_adapter(f"a{index}", configs[index])
    model.eval().save_pretrained(folder, selected_adapters=["a0"])
    saved, batch = folder / "a0", {k: v for k, v in case.batch().items() if k != "labels"}
    names = ["a0", "loaded", "__base__", "a0"]
    deeds = {
        "add": lambda: model.add_adapter("new", configs[0]),
        "switch": lambda: model.set_adapter("new"),
        "disable": lambda: within_disable(model),
        "let train": lambda: model.set_requires_grad("a1"),
        "delete": lambda: model.delete_adapter("a1"),
        "delete the active": lambda: model.delete_adapter("new"),
        "load": lambda: petl.load(model, saved, adapter_name="loaded"),
        "load as PEFT does": lambda: model.load_adapter(str(saved), "again"),
        "save": lambda: model.save_pretrained(folder / "one", selected_adapters=["a0"]),
    }
    if case.method != "dora":  # which PEFT refuses to mix
        deeds["mix"] = lambda: model(**batch, adapter_names=names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that it activates another adapter
        return {deed: calls(action) for deed, action in deeds.items()}


def within_disable(model):
    with model.disable_adapter():
        pass


EMBEDDED = Case("lora", "llama", {"target_modules": ["q_proj", "embed_tokens"]})


@pytest.mark.cells(3)
@pytest.mark.parametrize("case", [*HOSTED.values(), EMBEDDED], ids=[*HOSTED, "lora of embeddings"])
def test_a_saved_adapter_is_the_file_that_peft_writes(case, tmp_path):
    model = testing.stir(case.wrap(adapter_name="a0"), "a0")
    petl.fuse_lora(model)
    model.add_adapter("a1", case.config())
    model.add_adapter("a2", case.config())
    model.set_adapter("a2")
    model.save_pretrained(tmp_path / "one", selected_adapters=["a1"], save_embedding_layers=False)
    model.save_pretrained(tmp_path / "all", save_embedding_layers=False)
    PeftModel.save_pretrained(model, str(tmp_path / "peft"), save_embedding_layers=False)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        for name in model.peft_config:
            expected = (tmp_path / "peft" / name / file).read_bytes()
            assert (tmp_path / "all" / name / file).read_bytes() == expected
        expected = (tmp_path / "peft" / "a1" / file).read_bytes()
        assert (tmp_path / "one" / "a1" / file).read_bytes() == expected
    assert sorted(f.name for f in (tmp_path / "one").iterdir() if f.is_dir()) == ["a1"]


def test_the_model_lists_all_adapters_while_one_is_saved():
    _, model = crowd("mola", 3)
    view = model._listing("a1")
    assert list(view.peft_config) == ["a0", "a1"]  # a0 is active
    assert list(model.peft_config) == ["a0", "a1", "a2"]
    assert view.get_base_model() is model.get_base_model()


def test_an_adapter_that_is_not_there_is_not_saved(tmp_path):
    _, model = crowd("mola", 2)
    with pytest.raises(ValueError, match="selected_adapters"):
        model.save_pretrained(tmp_path, selected_adapters=["a1", "stranger"])
    assert not list(tmp_path.iterdir())


class Peft:
    """The same operations by PEFT's own functions, which visit all modules."""

    def __init__(self, model):
        self.model, self.tuner = model, model.base_model

    def set_adapter(self, name, inference_mode=False):
        set_adapter(self.tuner.model, name, inference_mode)
        self.tuner.active_adapter = self.model.active_adapter = name

    def set_requires_grad(self, name, requires_grad):
        set_requires_grad(self.tuner.model, name, requires_grad)

    def enable(self, enabled):
        for module in self.tuner.model.modules():
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(enabled)

    def delete_adapter(self, name):
        del self.tuner.peft_config[name]
        chosen = delete_adapter(self.tuner.model, name, self.tuner.prefix)
        self.tuner.active_adapter = chosen
        self.model.active_adapter = chosen[0]
        if name in self.tuner.shared:
            del self.tuner.shared[name]


class Ours:
    def __init__(self, model):
        self.model, self.tuner = model, model.base_model
        self.set_adapter, self.delete_adapter = model.set_adapter, model.delete_adapter
        self.set_requires_grad = model.set_requires_grad
        self.enable = self.tuner._enable_adapter_layers


@pytest.mark.cells(1)
@pytest.mark.parametrize("method", METHODS)
def test_trainable_and_active_adapters_are_the_same_as_with_pefts_functions(method):
    _, model = crowd(method, 5)
    ours, theirs = Ours(model), Peft(copy.deepcopy(model))
    draw = random.Random(0)
    names = [f"a{index}" for index in range(5)]
    deeds = [
        lambda side, name: side.set_adapter(name),
        lambda side, name: side.set_adapter(name, inference_mode=True),
        lambda side, name: side.set_requires_grad(name, True),
        lambda side, name: side.set_requires_grad(name, False),
        lambda side, name: side.enable(False),
        lambda side, name: side.enable(True),
    ]
    for step in range(40):
        deed, name = draw.choice(deeds), draw.choice(names)
        if step % 13 == 12:
            names.remove(name)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT warns that it activates another adapter
                ours.delete_adapter(name)
                theirs.delete_adapter(name)
        else:
            deed(ours, name)
            deed(theirs, name)
        assert flags(ours.model) == flags(theirs.model), step
        assert ours.model.active_adapters == theirs.model.active_adapters
        assert set(ours.model.state_dict()) == set(theirs.model.state_dict())


@pytest.mark.cells(1)
@pytest.mark.parametrize("method", METHODS)
def test_adding_an_adapter_does_not_change_what_trains(method):
    case, model = crowd(method, 3)
    model.set_requires_grad("a2", True)  # in addition to "a0", which is active
    before = flags(model)
    config = case.config()
    config.inference_mode = True
    model.add_adapter("new", config)
    after = flags(model)
    assert {name: after[name] for name in before} == before
    assert not any(after[name] for name in after.keys() - before.keys())
    model.set_adapter("a1")
    assert all(("a1" in name.split(".")) == train for name, train in flags(model).items())


def test_hidden_adapters_have_the_mode_of_the_model():
    _, model = crowd("mola", 3)
    layers = testing.tuner_layers(model).values()
    adapters = [layer.adapters[name] for layer in layers for name in ("a0", "a1", "a2")]
    with model.base_model.only_visible({"a1"}):
        for mode in (True, False):
            model.train(mode)
            assert {part.training for each in adapters for part in each.modules()} == {mode}


def test_a_forward_pass_finds_hidden_adapters():
    case, model = crowd("mos", 3)
    for index in range(3):
        model.set_adapter(f"a{index}")
        testing.stir(model, f"a{index}", seed=index)
    model.eval()
    batch, names = case.batch(), ["a0", "a2", "__base__", "a1"]
    expected = testing.logits(model, batch, adapter_names=names)
    keys = set(model.state_dict())
    with model.base_model.only_visible({"a1"}):
        hidden = keys - set(model.state_dict())
        assert hidden == {k for k in keys if {"a0", "a2"} & set(k.split("."))}
        assert torch.equal(testing.logits(model, batch, adapter_names=names), expected)
    assert set(model.state_dict()) == keys


def test_after_a_refused_adapter_all_are_visible():
    case, model = crowd("mola", 3)
    keys = list(model.state_dict())
    config = case.config()
    config.target_modules = {"no_such_layer"}
    with pytest.raises(ValueError, match="no_such_layer"):
        model.add_adapter("new", config)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("name", ["a.b", "__base__", "keys"])
@pytest.mark.parametrize("method", ["mos", "compacter"])
def test_a_refused_adapter_leaves_no_shared_tensors(method, name):
    fields = {"mos": {"r": 2}}.get(method, {})
    model = petl.wrap(testing.tiny_llama(), method, **fields)
    before = set(model.state_dict())
    with pytest.raises(petl.InputError):
        model.add_adapter(name, petl.build_config(method, **fields))
    assert set(model.state_dict()) == before


def test_an_adapter_on_which_peft_fails_leaves_no_shared_tensors(monkeypatch):
    model = petl.wrap(testing.tiny_llama(), "mos", r=2)
    before = set(model.state_dict())
    monkeypatch.setattr(BaseTuner, "inject_adapter", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.add_adapter("other", petl.build_config("mos", r=2))
    assert set(model.state_dict()) == before


def test_hosts_are_found_without_visiting_their_adapters():
    _, model = crowd("mola", 3)
    tuner = model.base_model
    every = [module for module in tuner.model.modules() if isinstance(module, BaseTunerLayer)]
    assert list(layers_of(tuner.model)) == every
    assert set(hosts_of(tuner.model)) >= set(every)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("rslora", {}),
        ("dora", {}),
        # of which PEFT's sum has none
        ("lora", {"lora_bias": True}),
        ("lora", {"trainable_token_indices": [1, 2]}),
        ("lora", {"modules_to_save": ["lm_head"]}),
    ],
    ids=str,
)
def test_a_sum_that_peft_computes_wrongly_is_refused_for_each_of_its_adapters(name, more):
    fields = {"r": 2, "target_modules": ["q_proj"]}
    model = petl.wrap(testing.tiny_llama(), name, **fields, **more)
    model.add_adapter("plain", petl.build_config("lora", **fields))
    model.add_adapter("other", petl.build_config(name, **fields, **more))
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        each.add_weighted_adapter(["plain"], [0.5], "less", "linear")
        for wrong in ("default", "other"):
            with pytest.raises(UnsupportedError):
                each.add_weighted_adapter(["plain", wrong], [1.0, 1.0], "sum", "linear")
        assert list(each.peft_config) == ["default", "plain", "other", "less"]


def test_a_model_is_freed_when_it_is_deleted():
    model = petl.wrap(testing.tiny_llama(), "lora", target_modules=["q_proj"])
    weight = weakref.ref(model.get_parameter("base_model.model.lm_head.weight"))
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("method", ["mola", "adapter"])
def test_the_head_of_the_active_adapter_trains_on_beside_a_frozen_one(method):
    case = Case(method, "bert", {})
    model = case.wrap(adapter_name="one")
    before = flags(model)
    assert any(".modules_to_save.one." in name and trains for name, trains in before.items())
    config = case.config()
    config.inference_mode = True
    model.add_adapter("frozen", config)
    after = flags(model)
    assert {name: after[name] for name in before} == before
    assert not any(after[name] for name in after.keys() - before.keys())


def test_a_deleted_adapter_is_not_in_use():
    _, model = crowd("mola", 3)
    model.set_requires_grad("a2", True)  # in addition to "a0", which is active
    assert model.base_model.in_use() == {"a0", "a2"}
    model.delete_adapter("a2")
    assert model.base_model.in_use() == {"a0"}


@pytest.mark.parametrize("method", ["mola", "adapter"])
def test_each_row_of_a_mixed_batch_has_the_trained_norms_of_its_adapter(method):
    case = Case(method, "llama", {"modules_to_save": ["norm", "input_layernorm"]}).without_head()
    model = testing.stir(case.wrap(adapter_name="one"), "one")
    model.add_adapter("two", case.config())
    model.set_adapter("two")
    model = testing.stir(model, "two", seed=3).eval()
    ids, names = case.batch()["input_ids"][:3], ["one", "__base__", "two"]
    norms = model.get_base_model().model.norm.modules_to_save
    assert not torch.equal(norms["one"].weight, norms["two"].weight)
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=names).logits
        with model.disable_adapter():
            torch.testing.assert_close(mixed[1:2], model(input_ids=ids[1:2]).logits)
        for row, name in ((0, "one"), (2, "two")):
            model.set_adapter(name)
            torch.testing.assert_close(mixed[row], model(input_ids=ids[row : row + 1]).logits[0])
