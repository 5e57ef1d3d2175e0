"""PEFT's LoRA under `petl.fuse_lora`: all operations give the same results as PEFT."""

import copy
import pickle
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from threading import Event
from time import sleep

import pytest
import torch
from peft.tuners.lora import LoraLayer, LoraModel

import petl
from petl import testing
from petl.core.compat import AuxiliaryTrainingWrapper, BaseTunerLayer
from petl.core.layers.class_swap import AdapterDict
from petl.core.layers.mixed_batch import AdapterRows
from petl.core.tuners.switching import SwitchingModel
from petl.efficiency.fused_lora.layer import FusedLoraLinear
from petl.efficiency.fused_lora.switching import SwitchingLora
from petl.testing import Case

CASES = {
    "decoder": Case("lora", "llama", {"target_modules": ["q_proj", "down_proj"]}),
    "head": Case("lora", "bert", {"target_modules": ["query", "value"], "lora_dropout": 0.1}),
    "dora": Case("dora", "llama", {"target_modules": ["q_proj", "down_proj"]}),
    "embedding": Case("lora", "llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "convolution": Case("lora", "vit", {"target_modules": ["projection", "q_proj"]}),
    "bias": Case("lora", "bert", {"target_modules": ["query"], "bias": "lora_only"}),
}
STEPS = 40


def pair(case, size=1):
    """Return a model with adapters "a0" (active) to "a<size - 1>" twice: PEFT's, and fused."""
    theirs = case.wrap(adapter_name="a0")
    ours = copy.deepcopy(theirs)
    petl.fuse_lora(ours)
    for index in range(1, size):
        for model in (theirs, ours):
            torch.manual_seed(index)
            model.add_adapter(f"a{index}", further(model))
    return theirs, ours


def further(model, **fields):
    """Return a config like that of the first adapter."""
    config = copy.deepcopy(next(iter(model.peft_config.values())))
    for name, value in {"bias": "none", "inference_mode": False, **fields}.items():
        setattr(config, name, value)
    return config


def state(model):
    """Return all that switching sets: trainable, active, merged, disabled, and tensor names."""
    hosts = {
        name: (module.active_adapters, module.disable_adapters, module.merged_adapters)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    }
    return {
        "names": list(model.state_dict()),
        "trains": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hosts": hosts,
        "active": (model.active_adapters, model.active_adapter, model.base_model.active_adapter),
        "adapters": list(model.peft_config),
    }


def within_disable(model):
    with model.disable_adapter():
        return state(model)


class Deeds:
    """Random operations on a model, with the same choices for both models."""

    def __init__(self, draw, saved, *, merges):
        self.draw, self.saved, self.merges, self.count = draw, saved, merges, 100

    def choose(self, names):
        """Return a random operation: a function of a model."""
        name, other = self.draw.choice(names), self.draw.choice(names)
        self.count += 1
        new, yes, seed = f"b{self.count}", self.draw.random() < 0.5, self.count
        several = len(names) > 2
        few = {"target_modules": {self.draw.choice(["q_proj", "query"])}, "inference_mode": yes}

        def add(model):
            torch.manual_seed(seed)
            model.add_adapter(new, further(model, **(few if seed % 2 else {})))

        def load(model):
            torch.manual_seed(seed)
            model.load_adapter(str(self.saved / "a0"), new, is_trainable=yes)

        deeds = [
            add,
            load,
            lambda model: model.set_adapter(name, inference_mode=yes),
            lambda model: model.set_adapter(name),
            lambda model: model.base_model.set_adapter([name, other] if yes else [name]),
            lambda model: model.set_requires_grad([name, other], yes),
            lambda model: model.delete_adapter(name if several else "none"),
            lambda model: model.delete_adapter(model.active_adapters[0] if several else "none"),
            lambda model: model.base_model.disable_adapter_layers(),
            lambda model: model.base_model.enable_adapter_layers(),
            within_disable,
            lambda model: model.train(yes),
            # PEFT's DoRA is left half switched when it is switched while merged
            lambda model: model.merge_adapter() if yes and self.merges else model.unmerge_adapter(),
        ]
        return self.draw.choice(deeds)


def outcome(deed, model):
    """Return the result of an operation, or its error as a string."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, on merged layers and on what becomes active
        try:
            found = deed(model)
        except (ValueError, KeyError, IndexError) as error:
            message = f"{type(error).__name__}: {error}"
            return message.replace("SwitchingLora", "LoraModel")[:60]  # before a printed module
    return found if isinstance(found, dict) else None


def stir_all(model, seed=3):
    """Add noise to every tensor of every adapter, trainable or not."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise, alpha=0.1)


def same_outputs(theirs, ours, batch):
    """Compare logits, or errors: PEFT may leave a deleted adapter active, which then raises."""

    def compute(model):
        return {"y": testing.logits(model, batch)}

    expected, found = outcome(compute, theirs), outcome(compute, ours)
    if isinstance(expected, str):
        assert found == expected
    else:
        assert testing.difference(found["y"], expected["y"]) < 1e-4


@pytest.mark.cells(1)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [1, 2])
def test_random_operations_give_the_same_results_as_peft(name, seed, tmp_path):
    case = CASES[name]
    theirs, ours = pair(case, 4)
    stir_all(theirs)
    ours.load_state_dict(theirs.state_dict())
    theirs.save_pretrained(tmp_path, selected_adapters=["a0"])
    deeds, batch = Deeds(random.Random(seed), tmp_path, merges=name != "dora"), case.batch()
    failures = 0
    for step in range(STEPS):
        deed = deeds.choose(list(theirs.peft_config))
        expected = outcome(deed, theirs)
        failures += isinstance(expected, str)
        assert outcome(deed, ours) == expected, step
        assert state(ours) == state(theirs), step
        if step % 4 == 0:
            for key, tensor in theirs.state_dict().items():
                torch.testing.assert_close(ours.state_dict()[key], tensor)
            same_outputs(theirs, ours, batch)
    assert failures < STEPS / 2


@pytest.mark.parametrize("name", ["decoder", "head", "dora", "convolution"])
def test_a_forward_pass_finds_hidden_adapters(name):
    case = CASES[name]
    _, model = pair(case, 3)
    stir_all(model)
    batch, calls = case.batch(), [{}]
    if name == "decoder":
        calls.append({"adapter_names": ["a0", "a2", "__base__", "a1"]})
    expected = [testing.logits(model, batch, **more) for more in calls]
    with model.base_model.only_visible({"a1"}):
        assert not any("a0" in key.split(".") for key in model.state_dict())
        found = [testing.logits(model, batch, **more) for more in calls]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_trains_and_computes_before_fusing_does_so_after_it():
    theirs = CASES["head"].wrap(adapter_name="a0")
    theirs.add_adapter("a1", further(theirs))
    theirs.set_requires_grad("a1", True)
    ours = copy.deepcopy(theirs)
    petl.fuse_lora(ours)
    for deed in (
        lambda model: model.eval(),
        lambda model: model.add_adapter("a2", further(model)),
        lambda model: model.base_model.disable_adapter_layers(),
    ):
        deed(theirs)
        deed(ours)
        assert state(ours) == state(theirs)


def test_only_a_fused_model_switches_by_itself():
    model = CASES["decoder"].wrap()
    assert not any(isinstance(module, AdapterDict) for module in model.modules())
    assert not isinstance(model, SwitchingModel)
    assert type(model.base_model) is LoraModel
    assert petl.fuse_lora(model) > 0
    assert petl.fuse_lora(model) == 0
    assert type(model.base_model) is SwitchingLora
    assert isinstance(model, SwitchingModel)
    assert all(isinstance(m, LoraLayer) for m in testing.tuner_layers(model).values())


def test_layers_that_a_further_adapter_comes_to_are_fused_too():
    _, model = pair(CASES["decoder"])
    before = len(testing.tuner_layers(model))
    model.add_adapter("wide", further(model, target_modules={"v_proj"}))
    layers = testing.tuner_layers(model).values()
    assert len(layers) > before
    assert all(isinstance(layer, FusedLoraLinear) for layer in layers)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_switch_by_themselves(copied):
    theirs, ours = pair(CASES["head"], 3)
    again = copied(ours)
    assert type(again) is type(ours)
    assert type(again.base_model) is SwitchingLora
    for model in (theirs, again):
        model.set_adapter("a2")
        with model.disable_adapter():
            pass
    assert state(again) == state(theirs)
    assert state(ours) != state(again)


def test_all_layers_of_a_call_that_generates_are_given_the_same_rows(monkeypatch):
    theirs, ours = pair(CASES["decoder"], 3)
    stir_all(theirs)
    ours.load_state_dict(theirs.state_dict())
    seen, mixed = [], FusedLoraLinear._mixed_batch_forward

    def forward(layer, x, *args, adapter_names, **kwargs):
        seen.append(adapter_names)
        return mixed(layer, x, *args, adapter_names=adapter_names, **kwargs)

    monkeypatch.setattr(FusedLoraLinear, "_mixed_batch_forward", forward)
    asked = {
        "input_ids": CASES["decoder"].batch()["input_ids"][:, :4],
        "adapter_names": ["a0", "a2", "__base__", "a1"],
        "max_new_tokens": 3,
        "min_new_tokens": 3,
        "do_sample": False,
    }
    expected, found = (model.generate(**asked) for model in (theirs, ours))
    assert torch.equal(found, expected)
    assert len(seen) == 3 * len(testing.tuner_layers(ours))
    assert all(type(rows) is AdapterRows for rows in seen)
    assert len({id(rows) for rows in seen}) == 1


def test_a_batch_for_an_adapter_that_is_not_there_is_refused_and_all_stay_in_sight():
    _, model = pair(CASES["decoder"], 2)
    before = list(model.state_dict())
    with pytest.raises(ValueError, match="non-existing"):
        testing.logits(model, CASES["decoder"].batch(), adapter_names=["a0", "a1", "a0", "who"])
    assert list(model.state_dict()) == before


def test_a_call_that_fails_leaves_no_hooks():
    case = CASES["decoder"]
    model = case.wrap_stirred().eval()
    petl.fuse_lora(model)
    batch = case.batch()
    expected = testing.logits(model, batch)
    with pytest.raises(ValueError, match="adapter_names"):
        model(**batch, adapter_names=["default"])  # too few
    assert torch.equal(testing.logits(model, batch), expected)


def test_threads_that_serve_and_one_that_switches_do_not_disturb_one_another():
    case = CASES["decoder"]
    theirs, ours = pair(case, 4)
    stir_all(theirs)
    ours.load_state_dict(theirs.state_dict())
    batch, names = case.batch(), ["a0", "a2", "__base__", "a1"]
    expected = testing.logits(theirs, batch, adapter_names=names)
    theirs.eval()
    ours.eval()
    gaps, done = [], Event()

    def serve():
        while not done.is_set():
            with torch.no_grad():
                found = ours(**batch, adapter_names=names).logits
            gaps.append(testing.difference(found, expected))

    with ThreadPoolExecutor(2) as pool:
        served = [pool.submit(serve) for _ in range(2)]
        try:
            for step in count():
                if step > 3 and (len(gaps) > 8 or any(one.done() for one in served)):
                    break
                for model in (theirs, ours):
                    model.set_adapter(f"a{step % 4}")
                    torch.manual_seed(step)
                    model.add_adapter(f"new{step}", further(model))
                    if step % 3:
                        model.delete_adapter(f"new{step}")
        finally:
            done.set()
        for one in served:
            one.result()
    assert max(gaps) < 1e-4
    assert state(ours) == state(theirs)


def test_a_switch_waits_for_a_thread_that_hides_adapters():
    theirs, ours = pair(CASES["head"], 3)
    looks = Event()

    def look():
        with ours.base_model.only_visible(()):
            looks.set()
            sleep(0.05)

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        looks.wait()
        for model in (ours, theirs):
            model.set_adapter("a2")
        looking.result()
    assert state(ours) == state(theirs)
