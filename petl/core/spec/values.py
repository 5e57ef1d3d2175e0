"""Values of fields that a config takes and a tuner fails on later, most of them PEFT's."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from petl.errors import InputError

NUMBER = (int, float)  # PEFT annotates as int what may well have a fraction, such as lora_alpha
KINDS = {"int": NUMBER, "float": NUMBER, "bool": bool, "str": str}  # by a field's annotation


def check_values(config_cls: type[Any], fields: Mapping[str, Any]) -> None:
    """Refuse values of another kind than their field's, and those that train nothing, or nan.

    Raises:
        InputError: there is one; the message has the field, its value and what is allowed.
    """
    known = {field.name: field for field in dataclasses.fields(config_cls)}
    for name, value in fields.items():
        field = known[name]
        kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
        if kind not in KINDS:
            continue
        is_flag = isinstance(value, bool)  # which Python counts among the whole numbers
        if not isinstance(value, KINDS[kind]) or is_flag != (kind == "bool"):
            raise InputError(f"{name}={value!r} is not of type {kind}")
        if KINDS[kind] is NUMBER and not math.isfinite(value):
            raise InputError(f"{name}={value} is not a finite number")
        usual: Any = field.default  # 0 where PEFT's OFT takes a block size instead
        if name == "r" and (value % 1 or value < 1 <= usual):
            raise InputError(f"r={value} is not a whole number from 1")
        if name.endswith("dropout") and not 0 <= value < 1:
            raise InputError(f"{name}={value} is not in [0, 1)")
        if name.endswith("alpha") and not value > 0:
            raise InputError(f"{name}={value} is not above 0: it scales the update")
