"""Types, rules and settings: which values pass, and the field that a message names."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from numbers import Real
from typing import Any, Literal, NotRequired, TypedDict

import pytest

from petl.errors import InputError, UnknownNameError
from petl.system.values import (
    LARGEST,
    bounded,
    check_rules,
    field,
    integer,
    one_of,
    read_fields,
    real,
    type_problem,
)


class Level(Enum):
    LOW = "low"
    HIGH = "high"


class Inner(TypedDict):
    name: str
    size: NotRequired[int | None]


@dataclass
class State:
    step: int
    window: list[list[float]]
    best: float | None = None


@pytest.mark.parametrize(
    ("value", "shape", "problem"),
    [
        (1, int, ""),
        (1, float, ""),
        (True, int, "the content is true, not an integer"),
        (1, bool, "the content is 1, not true or false"),
        (math.nan, float, "the content is NaN, not a finite number"),
        (math.nan, Real, ""),
        ("1", float, 'the content is "1", not a finite number'),
        (None, int | None, ""),
        ({"a": [1, "x"]}, dict[str, list[int]], 'a[1] is "x", not an integer'),
        ({"a b": "x"}, dict[str, int] | None, '"a b" is "x", not an integer'),
        ({"name": "x", "more": 1}, Inner, ""),
        ({"name": "x", "size": 1.5}, Inner, "size is 1.5, not an integer"),
        ({"a": {"name": None}}, dict[str, Inner], "a.name is null, not text"),
        ({}, Inner, "it has no name"),
        ([], Inner, "the content is a list, not a mapping"),
        ({"step": 1, "window": [[1.0]]}, State, ""),
        ({"step": 1}, State, "it has no window"),
        ({"step": 1, "window": [], "other": 1}, State, "other is unknown"),
        ({"a": object}, Any, ""),
        ({"q", "k"}, list[str] | None, ""),
        ((1, "x"), tuple[int, str], ""),
        ((1,), tuple[int, str], "the content is [1], not 2 values"),
        ({"k": 1}, Mapping[str, str], "k is 1, not text"),
        ("low", Level, ""),
        ("mid", Level, 'the content is "mid", not Level'),
        ("other", Literal["a", "b"], ""),  # PEFT's lists are incomplete
        (1, Literal["a", "b"], "the content is 1, not one of ('a', 'b')"),
        (State(1, []), State, ""),
    ],
)
def test_a_type_names_the_field_that_differs(value, shape, problem):
    assert type_problem(value, shape) == problem


@dataclass
class Settings:
    r: int = field(8, bounded(ge=1), "rank")
    size: int | None = field(None, bounded(ge=0, le=9))
    alpha: float = field(16.0, bounded(gt=0, reason="it scales the update"))
    dropout: float = field(0.0, bounded(ge=0, lt=1))
    decay: float = field(0.0, bounded(lt=1))
    rate: float = field(0.5, real(0, 1, above=True))
    steps: int | None = field(None, integer(2))
    start: str = field("zero", one_of("zero", "normal"))
    bits: int = field(1, one_of(1, 2))
    places: list[str] = field(["ffn"], one_of("attn", "ffn"))
    free: str = field("anything")


WRONG = {
    "r": (0, 1.0, True, "8", None),
    "size": (10, -1, 2.0),
    "alpha": (0, math.nan, math.inf, "16"),
    "dropout": (1, -0.1),
    "decay": (1,),
    "rate": (0, 1.01),
    "steps": (1, 2.5),
    "start": ("one", 0, None),
    "bits": (3, True, 1.0),
    "places": (["ffn", "mlp"], "mlp"),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in WRONG.items() for v in vs])
def test_a_wrong_value_is_named_with_what_is_allowed(name, value):
    with pytest.raises(InputError) as error:
        check_rules(Settings(**{name: value}), "train")
    assert str(error.value).startswith(f"train.{name}={value!r} is not ")
    assert str(error.value).endswith("update") == (name == "alpha")


def test_allowed_values_pass():
    check_rules(Settings())
    check_rules(Settings(r=1, size=None, alpha=0.5, decay=-5, places=["attn"], free=""))
    check_rules(Settings(size=9, dropout=0.999, rate=1, steps=2, start="normal", bits=2))
    assert Settings().places is not Settings().places


def test_settings_become_the_types_of_their_fields():
    given = {"r": "4", "size": None, "alpha": 2, "rate": "1e-3", "free": 7, "places": ["attn"]}
    made = read_fields(Settings, given, "train")
    assert (made.r, made.size, made.alpha, made.rate, made.free) == (4, None, 2.0, 1e-3, "7")
    assert isinstance(made.alpha, float)
    assert read_fields(Settings, {"r": None}, "train").r == 8  # null: not given


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"siez": 1}, UnknownNameError, ("train.siez", "size")),
        ({"r": 4.5}, InputError, ("train.r=4.5", "int")),
        ({"size": "many"}, InputError, ("train.size='many'", "int | null")),
        ({"r": LARGEST + 1}, InputError, (f"{LARGEST + 1}", f"{LARGEST:,}")),
    ],
)
def test_a_wrong_setting_is_named_as_it_was_written(given, kind, words):
    with pytest.raises(kind) as error:
        read_fields(Settings, given, "train")
    assert all(word in str(error.value) for word in words)


def test_a_setting_without_a_default_has_to_be_given():
    @dataclass
    class Source:
        path: str

    with pytest.raises(InputError, match=r"model\.path"):
        read_fields(Source, {}, "model")
