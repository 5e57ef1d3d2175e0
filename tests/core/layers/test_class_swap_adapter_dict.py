"""AdapterDict: names and look-up cover all entries, traversal the visible ones."""

import copy
import pickle

import pytest
from torch import nn

from petl.core.layers.class_swap import convert_module_dicts


@pytest.fixture
def adapter_dict():
    owner = nn.Module()
    owner.things = nn.ModuleDict({name: nn.Linear(2, 2) for name in "abc"})
    owner.other = nn.Linear(2, 2)
    convert_module_dicts(owner)
    assert type(owner.other) is nn.Linear
    return owner.things


def walked(adapter_dict):
    return {name for name, _ in adapter_dict.named_children()}


def test_traversal_finds_visible_entries_and_look_up_all(adapter_dict):
    all_modules = {name: adapter_dict[name] for name in "abc"}
    adapter_dict.show_only(["b", "unknown"])
    assert walked(adapter_dict) == {"b"} == {name for name, _ in adapter_dict.items()}
    assert {key.split(".")[0] for key in adapter_dict.state_dict()} == {"b"}
    assert list(adapter_dict) == list(adapter_dict.keys()) == ["a", "b", "c"]
    assert len(adapter_dict) == 3
    assert all(
        name in adapter_dict and adapter_dict[name] is module
        for name, module in all_modules.items()
    )
    assert "unknown" not in adapter_dict
    adapter_dict.show_only(["c"])
    assert walked(adapter_dict) == {"c"}
    adapter_dict.show_all()
    assert dict(adapter_dict.items()) == all_modules


def test_additions_and_deletions_while_entries_are_hidden_are_kept(adapter_dict):
    adapter_dict.show_only(["a"])
    adapter_dict["new"] = nn.Linear(2, 2)
    assert walked(adapter_dict) == {"a", "new"}
    del adapter_dict["a"], adapter_dict["b"]
    assert walked(adapter_dict) == {"new"}
    adapter_dict.show_all()
    assert walked(adapter_dict) == {"c", "new"} == set(adapter_dict.keys())


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda adapter_dict: pickle.loads(pickle.dumps(adapter_dict))]
)
def test_a_copy_is_independent(adapter_dict, copied):
    again = copied(adapter_dict)
    again.show_only(["a"])
    del again["b"]
    assert walked(again) == {"a"}
    assert walked(adapter_dict) == set("abc") == set(adapter_dict)
