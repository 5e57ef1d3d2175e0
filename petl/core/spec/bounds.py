"""Allowed values of config fields: declared with the field, checked with one generated message."""

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from petl.errors import InputError


@dataclass(frozen=True)
class Bounds:
    """The values that a number or a choice may take; `str(bounds)` is the end of a message.

    >>> str(Bounds(ge=1)), str(Bounds(ge=0, lt=1)), str(Bounds(choices=("linear", "cosine")))
    ('at least 1', 'in [0, 1)', 'one of linear, cosine')

    Attributes:
        ge, gt: lower bound, inclusive or exclusive; at most one of them.
        le, lt: upper bound, inclusive or exclusive; at most one of them.
        choices: all allowed values; of a list, those that its entries may take.
        reason: end of the message, after a colon.
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: tuple[Any, ...] = ()
    reason: str = ""

    def __bool__(self) -> bool:
        return bool(self.choices) or self.is_numeric

    def __str__(self) -> str:
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        lower = self.gt if self.ge is None else self.ge
        upper = self.lt if self.le is None else self.le
        if lower is not None and upper is not None:
            opening, closing = "(["[self.gt is None], ")]"[self.lt is None]
            return f"in {opening}{lower}, {upper}{closing}"
        if lower is not None:
            return f"{'at least' if self.gt is None else 'above'} {lower}"
        return f"{'at most' if self.lt is None else 'below'} {upper}"

    @property
    def is_numeric(self) -> bool:
        """True if there is a lower or an upper bound."""
        return any(bound is not None for bound in (self.ge, self.gt, self.le, self.lt))

    def check(self, name: str, value: Any, *, integer: bool = False) -> None:
        """Raise InputError if field `name` may not have this value.

        Args:
            integer: refuse numbers that are not of type int, such as 2.0.
        """
        wrong = self._wrong_type(value, integer) or self._out_of_bounds(value, integer)
        if wrong:
            raise InputError(f"{name}={value!r} {wrong}{self.reason and f': {self.reason}'}")

    def _wrong_type(self, value: Any, integer: bool) -> str:
        if self.choices or not (integer or self.is_numeric):
            return ""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # 2.0 is refused as well: torch does not take it as a size
        if integer and not (is_number and isinstance(value, int)):
            return "is not an integer"
        if not is_number:
            return "is not a number"
        return "" if math.isfinite(value) else "is not a finite number"

    def _out_of_bounds(self, value: Any, integer: bool) -> str:
        if self.choices:
            # of a list, each entry is a choice
            is_list = isinstance(value, list | tuple | set)
            for entry in value if is_list else [value]:
                known = entry in self.choices and (not integer or type(entry) is int)
                if not known:  # True and 1.0 equal 1
                    return f"has {entry!r}, which is not {self}" if is_list else f"is not {self}"
        inside = (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )
        return "" if inside else f"is not {self}"


def bounds_of(field: dataclasses.Field) -> Bounds:
    """The bounds that `config_field` declared for a field; empty (false) if there are none."""
    return field.metadata.get("bounds", Bounds())


def check_bounds(config: Any, skip: Collection[str] = ()) -> None:
    """Raise InputError for the first field of a config whose value its bounds do not allow.

    None is allowed where the annotation has it. A field annotated `int` takes no fraction, so one
    that may have a fraction, such as lora_alpha, is to be annotated `float`.

    Args:
        skip: names of fields that are not checked.
    """
    for field in dataclasses.fields(config):
        bounds, value = bounds_of(field), getattr(config, field.name)
        # annotations are compared as text: configs may postpone their evaluation
        types = [part.strip() for part in annotation(field).split("|")]
        if not bounds or field.name in skip or (value is None and "None" in types):
            continue
        bounds.check(field.name, value, integer="int" in types and "float" not in types)


def annotation(field: dataclasses.Field) -> str:
    """A field's annotation as it is written in source code, such as "int | None"."""
    return field.type.__name__ if isinstance(field.type, type) else str(field.type)
