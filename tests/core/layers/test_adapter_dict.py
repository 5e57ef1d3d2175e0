"""A shelf: names and look-ups are of all that it has, walks of what is shown."""

import copy
import pickle

import pytest
from torch import nn

from petl.core.layers.adapter_dict import shelve


@pytest.fixture
def shelf():
    owner = nn.Module()
    owner.things = nn.ModuleDict({name: nn.Linear(2, 2) for name in "abc"})
    owner.other = nn.Linear(2, 2)
    shelve(owner)
    assert type(owner.other) is nn.Linear
    return owner.things


def walked(shelf):
    return {name for name, _ in shelf.named_children()}


def test_a_walk_finds_what_is_shown_and_a_look_up_finds_all(shelf):
    every = {name: shelf[name] for name in "abc"}
    shelf.show(["b", "unknown"])
    assert walked(shelf) == {"b"} == {name for name, _ in shelf.items()}
    assert {key.split(".")[0] for key in shelf.state_dict()} == {"b"}
    assert list(shelf) == list(shelf.keys()) == ["a", "b", "c"]
    assert len(shelf) == 3
    assert all(name in shelf and shelf[name] is module for name, module in every.items())
    assert "unknown" not in shelf
    shelf.show(["c"])
    assert walked(shelf) == {"c"}
    shelf.show_all()
    assert dict(shelf.items()) == every


def test_what_is_added_and_deleted_meanwhile_stays_so(shelf):
    shelf.show(["a"])
    shelf["new"] = nn.Linear(2, 2)
    assert walked(shelf) == {"a", "new"}
    del shelf["a"], shelf["b"]
    assert walked(shelf) == {"new"}
    shelf.show_all()
    assert walked(shelf) == {"c", "new"} == set(shelf.keys())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda shelf: pickle.loads(pickle.dumps(shelf))])
def test_a_copy_is_a_shelf_of_its_own(shelf, copied):
    again = copied(shelf)
    again.show(["a"])
    del again["b"]
    assert walked(again) == {"a"}
    assert walked(shelf) == set("abc") == set(shelf)
