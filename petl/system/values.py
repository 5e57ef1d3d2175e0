"""Values from files, command lines and code: their types, what they may be, dataclasses of them.

`type_problem` compares a value with an annotation. A `Rule` says which values of that type are
allowed; `field` declares it with the default and one sentence, and `check_rules` applies it.
`read_fields` makes a dataclass of settings, and names the setting as the user wrote it.

An annotation is a plain type, a collection, a union, a Literal, an Enum, a TypedDict (entries that
it does not name are allowed) or a dataclass (they are not). `float` is a finite number,
`numbers.Real` any number, also NaN; true and false are no numbers. JSON has lists only, so that any
collection stands for a list, set or tuple.
"""

import dataclasses
import inspect
import math
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass
from difflib import get_close_matches
from enum import Enum
from functools import cache
from numbers import Real
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, is_typeddict

from petl.errors import (
    NEAREST_OF,
    InputError,
    UnknownNameError,
    described,
    did_you_mean,
    shown,
)

T = TypeVar("T")

LR = 1e-3  # default peak learning rate of most methods
# Of integers, all of which count or bound something: far above what runs, and exact in float64.
LARGEST = 10**12
MISSPELT = 0.8  # similarity, as of difflib, from which a word is another one with a mistake
COLLECTIONS = (list, set, tuple, range, frozenset)
WORDS = {
    dict: "a mapping",
    list: "a list",
    str: "text",
    int: "an integer",
    float: "a finite number",
    Real: "a number",
    bool: "true or false",
    NoneType: "null",
}


# Types


def type_problem(value: object, hint: object, place: str = "") -> str:
    """Return how a value differs from an annotation, or "" if it does not.

    Of a Literal only the types are compared: those of PEFT's fields are incomplete.

    >>> type_problem(2, float), type_problem(True, int, "r")
    ('', 'r is true, not an integer')
    >>> type_problem({"q", "k"}, list[str]), type_problem([1], list[str], "names")
    ('', 'names[0] is 1, not text')

    Args:
        place: the name of the field, such as "after.accuracy".
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return ""
    if origin in (typing.Union, UnionType):
        problems = [type_problem(value, each, place) for each in arguments]
        # that of the kind of value which it is, if there is one
        return "" if "" in problems else max(problems, key=lambda text: _is_inside(text, place))
    if origin is Literal:
        same = any(type(value) is type(choice) for choice in arguments)
        return "" if same else _wrong(value, f"one of {arguments}", place)
    # `None` in an annotation stands for its type
    kind: Any = origin or (NoneType if hint is None else hint)
    if is_typeddict(kind):
        return _entry_problem(value, _hints_of_keys(kind), kind.__required_keys__, place)
    if dataclasses.is_dataclass(kind) and not isinstance(value, kind):
        return _dataclass_problem(value, kind, place)
    if not _is_a(value, kind):
        return _wrong(value, WORDS.get(kind, kind.__name__), place)
    return _content_problem(value, kind, arguments, place)


def _content_problem(value: Any, kind: object, arguments: tuple[object, ...], place: str) -> str:
    """Return how what is in a collection or mapping differs from its annotation, or ""."""
    if kind in (dict, Mapping) and arguments:
        keys, values = arguments
        found = (
            type_problem(key, keys, _join(place, key))
            or type_problem(entry, values, _join(place, key))
            for key, entry in value.items()
        )
        return next(filter(None, found), "")
    if kind not in COLLECTIONS or not arguments:
        return ""
    # tuple[int, str] has a type for each place, tuple[int, ...] one for all
    if kind is tuple and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            return _wrong(value, f"{len(arguments)} values", place)
        hints = arguments
    else:
        hints = (arguments[0],) * len(value)
    pairs = enumerate(zip(value, hints, strict=True))
    found = (type_problem(entry, hint, f"{place}[{i}]") for i, (entry, hint) in pairs)
    return next(filter(None, found), "")


_hints_of_keys = cache(typing.get_type_hints)  # of a TypedDict: a file may have one a line


def _dataclass_problem(value: object, kind: Any, place: str) -> str:
    """Return why a mapping does not hold the fields of a dataclass, or ""."""
    hints = hints_of(kind)
    required = [f.name for f in dataclasses.fields(kind) if is_required(f)]
    # a misspelt field is named before those that are then missing
    unknown = [key for key in value if key not in hints] if isinstance(value, Mapping) else []
    if unknown:
        return f"{_join(place, unknown[0])} is unknown"
    return _entry_problem(value, hints, required, place)


def _entry_problem(
    value: object, hints: Mapping[str, object], required: Iterable[str], at: str
) -> str:
    """Return how the entries of a mapping differ from their annotations, or ""."""
    if not isinstance(value, Mapping):
        return _wrong(value, WORDS[dict], at)
    # sorted: a set has no order, and the message is to be the same each time
    for key in sorted(required):
        if key not in value:
            return f"{at or 'it'} has no {key}"
    present = (key for key in hints if key in value)
    found = (type_problem(value[key], hints[key], _join(at, key)) for key in present)
    return next(filter(None, found), "")


def _is_a(value: object, kind: Any) -> bool:
    # a bool is an int in Python
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    if kind in COLLECTIONS:
        return isinstance(value, COLLECTIONS)
    # JSON has the values of members
    if inspect.isclass(kind) and issubclass(kind, Enum):
        return isinstance(value, kind) or value in [member.value for member in kind]
    return isinstance(value, kind)


def _wrong(value: object, words: str, place: str) -> str:
    return f"{place or 'the content'} is {described(value)}, not {words}"


def _is_inside(problem: str, place: str) -> bool:
    """Return True if a problem is that of an entry of the value at `place`."""
    return problem.startswith((f"{place}.", f"{place}[")) if place else " is " not in problem


def _join(place: str, key: object) -> str:
    name = key if str(key).isidentifier() else described(key)
    return f"{place}.{name}" if place else str(name)


def is_finite(value: object) -> bool:
    """Return True unless a value contains a number that is infinite or NaN."""
    if isinstance(value, Mapping):
        return all(map(is_finite, value.values()))
    if isinstance(value, COLLECTIONS):
        return all(map(is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def type_name(hint: object) -> str:
    """Return a type as it is written in an annotation, such as "list[str] | null"."""
    if isinstance(hint, type) and not get_args(hint):
        return "null" if hint is NoneType else hint.__name__
    if get_origin(hint) in (typing.Union, UnionType):
        # sorted, null last: typing caches equal unions, so their order depends on the imports
        names = sorted(map(type_name, get_args(hint)), key=lambda name: (name == "null", name))
        return " | ".join(names)
    return str(hint).replace("typing.", "")


@cache
def hints_of(kind: Any) -> dict[str, object]:
    """Return the annotation of each field of a dataclass, evaluated."""
    try:
        hints = typing.get_type_hints(kind)
    except NameError:  # annotations of another package, imported under TYPE_CHECKING only
        hints = {}
    return {field.name: hints.get(field.name, Any) for field in dataclasses.fields(kind)}


# Rules


@dataclass(frozen=True)
class Rule:
    """The values that a field may have besides those of another type, in words and as a test.

    Attributes:
        words: the end of "... is not".
        options: all allowed values, if they can be listed; of a collection, of its entries.
        reason: the end of a message, after a colon.
        bounds: the arguments of `bounded`, if it made the rule.
    """

    words: str
    holds: Callable[[Any], bool]
    options: tuple[object, ...] = ()
    reason: str = ""
    bounds: Mapping[str, float | str] | None = None

    def check(self, name: str, value: object, hint: object = Any) -> None:
        """Raise InputError if the field `name` may not have a value.

        Args:
            hint: the annotation of the field.
        """
        # the type comes first: a rule need not expect a value of another one
        if type_problem(value, hint):
            words = WORDS.get(hint, f"of type {type_name(hint)}")
        elif (value is None and NoneType in get_args(hint)) or self.holds(value):
            return
        else:
            raise_beyond(name, value)
            words = self.words + (", or null" if NoneType in get_args(hint) else "")
        raise InputError(
            f"{name}={shown(value)} is not {words}{self.reason and f': {self.reason}'}"
        )


FREE = Rule("a value of its type", lambda value: True)

BETAS = Rule(
    "two numbers from 0 to below 1", lambda v: len(v) == 2 and all(0 <= beta < 1 for beta in v)
)


def integer(low: int, high: int = LARGEST) -> Rule:
    """Rule for integers from `low` to `high`."""
    words = f"an integer from {low:,}" + (f" to {high:,}" if high < LARGEST else "")
    return Rule(words, lambda value: low <= value <= high)


def real(low: float, high: float = math.inf, *, above: bool = False) -> Rule:
    """Rule for finite numbers from `low` (with `above`: greater than it) to `high`."""
    words = f"a number {'above' if above else 'from'} {low:g}"
    words += f" to {high:g}" if high < math.inf else ""
    return Rule(words, lambda x: (low < x if above else low <= x) and x <= high)


def one_of(*options: object) -> Rule:
    """Rule for a value that is one of `options`, booleans in YAML's spelling.

    Of a collection, each entry is one of them.
    """
    # `is`: 1 == True, and the words are shown as YAML has them
    words = ", ".join("true" if o is True else "false" if o is False else str(o) for o in options)

    def holds(value: object) -> bool:
        entries = value if isinstance(value, COLLECTIONS) else [value]
        return all(entry in options for entry in entries)

    return Rule(f"one of {words}", holds, options)


def bounded(
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    pattern: str = "",
    reason: str = "",
) -> Rule:
    """Rule for numbers that are at least `ge`, above `gt`, at most `le`, below `lt`.

    Of a list, each entry is one.

    >>> bounded(ge=1).words, bounded(ge=0, lt=1).words
    ('at least 1', 'in [0, 1)')
    >>> bounded(ge=1, pattern="low|high").words, bounded(pattern="auto").words
    ('at least 1, or text that matches low|high', 'a number, or text that matches auto')

    Args:
        pattern: a regular expression of what a text may be instead.
    """
    # of each side, one bound at most is given
    lower = gt if ge is None else ge
    upper = lt if le is None else le
    if lower is not None and upper is not None:
        words = f"in {'(['[gt is None]}{lower}, {upper}{')]'[lt is None]}"
    elif lower is not None:
        words = f"{'at least' if gt is None else 'above'} {lower}"
    elif upper is not None:
        words = f"{'at most' if lt is None else 'below'} {upper}"
    else:
        words = "a number"
    words += f", or text that matches {pattern}" if pattern else ""

    def holds(value: Any) -> bool:
        if isinstance(value, COLLECTIONS):
            return all(map(holds, value))
        if isinstance(value, str):
            return re.fullmatch(pattern, value) is not None
        return (
            (ge is None or value >= ge)
            and (gt is None or value > gt)
            and (le is None or value <= le)
            and (lt is None or value < lt)
        )

    given = {"ge": ge, "gt": gt, "le": le, "lt": lt, "pattern": pattern or None}
    bounds = {name: bound for name, bound in given.items() if bound is not None}
    return Rule(words, holds, reason=reason, bounds=bounds)


def field(default: object, rule: Rule = FREE, text: str = "", **more: object) -> Any:
    """Declare a field of a dataclass: its default, the rule for its values, its meaning.

    Args:
        more: what else its metadata has.
    """
    metadata = {"rule": rule, "help": text, **more}
    if isinstance(default, list | dict):  # a copy for each instance: they are mutable
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def rule_of(declared: dataclasses.Field) -> Rule:
    """Return the rule of a field; `FREE` if it has none."""
    return declared.metadata.get("rule", FREE)


def is_required(declared: dataclasses.Field) -> bool:
    """Return True if a field has no default."""
    return declared.default is MISSING and declared.default_factory is MISSING


def check_rules(instance: Any, group: str = "") -> None:
    """Raise InputError for the first field of a dataclass whose type or rule its value breaks.

    Fields without a rule are not checked.

    Args:
        group: the word before the dot in the message: "train" for `train.lr`.
    """
    hints = hints_of(type(instance))
    for declared in dataclasses.fields(instance):
        rule = rule_of(declared)
        # fields of PEFT's own configs have none, and are checked elsewhere
        if rule is not FREE:
            name = f"{group}.{declared.name}" if group else declared.name
            rule.check(name, getattr(instance, declared.name), hints[declared.name])


# Settings


def read_fields(kind: type[T], settings: Mapping[str, object], group: str) -> T:
    """Build an instance of the dataclass `kind` from settings.

    Null counts as not given, except where the type of the field allows it. A number is text where
    text is asked for, and a text that is a number is one.

    Args:
        group: the word before the dot in messages: "train" for `train.lr`.

    Raises:
        InputError: an unknown setting, a missing one, or a value of another type.
    """
    known = {each.name: each for each in dataclasses.fields(kind) if each.init}  # ty: ignore
    hints = hints_of(kind)
    for key in settings:
        if key not in known:
            raise unknown_setting(f"{group}.{key}", known)
    given = {}
    for name, declared in known.items():
        value = settings.get(name)
        # a YAML lists every setting, with null for "the default"
        if value is not None or (name in settings and NoneType in get_args(hints[name])):
            given[name] = _setting(value, hints[name], f"{group}.{name}")
        elif is_required(declared):
            raise InputError(f"{group}.{name} is not given: set {group}.{name}=...")
    return kind(**given)


def _setting(value: object, hint: object, name: str) -> object:
    converted = convert(value, hint)
    if type_problem(converted, hint):
        words = WORDS[float] if isinstance(converted, float) and hint is float else ""
        raise InputError(f"{name}={shown(value)} is not {words or f'of type {type_name(hint)}'}")
    raise_beyond(name, converted)
    return converted


def raise_beyond(name: str, value: object) -> None:
    """Raise InputError if the value of a setting is an integer beyond `LARGEST`."""
    if isinstance(value, int) and abs(value) > LARGEST:
        raise InputError(
            f"{name}={shown(value)} is out of range: no number of a run is beyond {LARGEST:,}"
        )


def convert(value: object, hint: Any) -> Any:
    """Return a value of a YAML file or command line as the type that is asked for, if it fits.

    >>> convert("1e-3", float), convert(7, str), convert([1, 2], list[str]), convert(3, float)
    (0.001, '7', ['1', '2'], 3.0)
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (typing.Union, UnionType):
        others = [each for each in arguments if each is not NoneType]
        # of several types, the value has to have one as it is
        return convert(value, others[0]) if len(others) == 1 and value is not None else value
    if origin is list and isinstance(value, COLLECTIONS) and arguments:
        return [convert(entry, arguments[0]) for entry in value]
    if origin is dict and isinstance(value, Mapping) and arguments:
        keys, values = arguments
        return {convert(key, keys): convert(entry, values) for key, entry in value.items()}
    # YAML reads the name of a folder such as 2024 as a number
    is_scalar = isinstance(value, str | int | float)
    if hint is str and is_scalar:
        return str(value)
    if hint in (int, float) and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return hint(value)
        # no number: the caller names the value as it was given
        except (ValueError, OverflowError):
            return value
    return value


def unknown_setting(key: str, known: Iterable[str]) -> UnknownNameError:
    """Return the error for the setting `key`; `known` holds the last parts of names it may have."""
    return UnknownNameError(f"no setting {key}{named_here(key.rpartition('.')[2], known)}")


def named_here(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown setting: how it is named here, or near names.

    >>> named_here("num_train_epochs", ["lr"]), named_here("lrr", ["lr"])
    ('; write train.epochs', "; did you mean 'lr'?")
    >>> named_here("leraning_rate", ["lr", "loraplus_ratio"])
    '; learning_rate is train.lr here'

    Args:
        known: the last parts of names that it may have.
    """
    from petl.system.settings.other_names import HERE  # of wrong names alone

    if name in HERE:
        return f"; write {HERE[name]}"
    # a name of another trainer, misspelt, unless one of petl is nearer
    known = {*known}
    near = get_close_matches(name[:NEAREST_OF], {*HERE, *known}, n=1, cutoff=MISSPELT)
    if near and near[0] not in known:
        return f"; {near[0]} is {HERE[near[0]]} here"
    return did_you_mean(name, known)
