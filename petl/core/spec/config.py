"""Fields that every method's config shares, and checks of their values."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig
from peft.utils import PeftType

from petl.errors import InputError


def config_field(text: str, default: Any) -> Any:
    """A config field: what it means, as `petl show` prints it, and its default."""
    if isinstance(default, list | dict):  # each config has its own
        return field(default_factory=default.copy, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class MethodConfig(PeftConfig):
    """Which modules to adapt. A method adds only the fields it alone needs.

    Values are normalised so that the config survives JSON: lists of targets become sets, tuples
    become lists.

    Raises:
        InputError: a value that the method cannot use (see `check`).
    """

    method: ClassVar[str]  # set by `register`

    target_modules: set[str] | list[str] | str | None = config_field(
        "names, suffixes, a regular expression, or a preset such as all-linear", "all-linear"
    )
    exclude_modules: set[str] | list[str] | str | None = config_field(
        "names, suffixes or a regular expression to leave out", None
    )
    modules_to_save: list[str] | None = config_field(
        "modules trained in full and saved, such as a head", None
    )
    layers_to_transform: list[int] | int | None = config_field(
        "indices of the blocks to adapt, from 0; null: all", None
    )
    layers_pattern: list[str] | str | None = config_field(
        "name of the module list that layers_to_transform counts", None
    )
    target_parameters: None = config_field("not supported; PEFT reads it", None)
    trainable_token_indices: None = config_field("not supported; PEFT reads it", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[f"PETL_{self.method.upper()}"]
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                setattr(self, name, set(value))
        for name in ("modules_to_save", "layers_to_transform", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(value, tuple | set | range):
                setattr(self, name, list(value))
        for name in ("target_parameters", "trainable_token_indices"):
            if getattr(self, name) is not None:
                raise InputError(
                    f"{name} is not supported by method {self.method!r}; leave it null"
                )
        self.check()

    def check(self) -> None:
        """Raise InputError for a value this method cannot use."""

    def sized(self, size: int) -> dict[str, Any]:
        """The fields that give the method this size, from 1: what `train.budget` chooses."""
        return in_proportion(self, size)

    def bounded(self, budget: int) -> dict[str, Any]:
        """Fields that hold a size which changes during training to `budget` parameters."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types; sets as sorted lists, for equal configs make equal files."""
        fields = dataclasses.asdict(self)
        return {k: sorted(v) if isinstance(v, set) else v for k, v in fields.items()}


def in_proportion(config: Any, r: int) -> dict[str, Any]:
    """This `r`, and a `lora_alpha` that leaves the scaling of the update as it is."""
    alpha = getattr(config, "lora_alpha", None)
    if alpha is None or config.r is None:
        return {"r": r}
    scaled = alpha * r / config.r
    return {"r": r, "lora_alpha": int(scaled) if scaled == int(scaled) else scaled}


def require(condition: bool, message: str) -> None:
    """Raise InputError with `message` unless `condition`: the way a `check` reads best."""
    if not condition:
        raise InputError(message)


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
