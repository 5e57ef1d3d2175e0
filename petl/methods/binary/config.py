"""The config of a quantised method: a subclass of the inner method's, made once for each.

PEFT's tuners read the fields of their own config class, so nothing that merely wraps a config or
passes attributes on would do.
"""

import copy
import re
from dataclasses import dataclass, field, fields
from functools import cache, partial
from typing import Any, ClassVar

from peft import PeftConfig
from peft.utils import PeftType

from petl.core.registry import method
from petl.core.spec.config import config_field, require
from petl.core.spec.method import Method
from petl.errors import InputError, UnknownNameError, did_you_mean
from petl.ops.quantize import BITS

DEFAULT_INNER = "adapter"
FORMATS = ("packed", "stacked", "latent")
UNFIT = {
    "binary": "its weights are quantised already",
    "adalora": "it prunes by zeros, which no code stands for",
    "increlora": "it is saved with the components that are alive, and rounds by those that are not "
    "as well",
    "corda": "it takes out of the base weights what its factors start from, and rounded factors do "
    "not make up for that",
    "delora": "it divides its factors by their lengths, so that a start however small is not near "
    "the base model",
    "vblora": "it ranks its logits to choose vectors, and rounding makes most of them equal",
}
INNER_DEFAULTS: dict[str, dict[str, Any]] = {
    "adapter": {  # Bi-AdaptFormer
        "r": 32,
        "locations": ["ffn"],
        "placement": "parallel_residual",
        "non_linearity": "relu",
        "use_bias": False,
        "bneck_dropout": 0.1,
        "init_weights": "binary",
    }
}


@dataclass
class BinaryConfig(PeftConfig):
    """Which method is quantised, and how; `BinaryConfig(inner="mos", r=4)` has its fields too."""

    __module__ = "petl.methods.binary"  # where it is imported from
    method: ClassVar[str]  # set by `register`

    inner: str = config_field(
        "the method whose weights are quantised: any but binary", DEFAULT_INNER
    )
    bits: int = config_field("bits of a weight: 1, 2, 4 or 8", 1)
    exclude_params: list[str] = config_field(
        "regular expressions for names of tensors that stay in float32", []
    )
    save_format: str = config_field(
        "packed (codes and statistics of each weight, for use), stacked (the same of all weights "
        "together: small adapters have less to name), or latent (float32; for training to go on)",
        "packed",
    )
    head_bits: int | None = config_field(
        "bits of the head's weights, without bias; null: as it is", None
    )
    head_module: str | None = config_field("the head; null: classifier, score or head", None)

    def __new__(cls, *args: Any, inner: str = DEFAULT_INNER, **given: Any) -> "BinaryConfig":
        """A config of the class for `inner`.

        Raises:
            UnknownNameError: no such method, or a field that it does not have.
        """
        if cls is BinaryConfig:
            cls = config_of(inner)
            known = {f.name for f in fields(cls)}
            for name in given:  # PEFT takes a TypeError for a file of a later version
                if name not in known:
                    raise UnknownNameError(
                        f"method {inner!r} has no field {name!r}{did_you_mean(name, known)}"
                    )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[f"PETL_{self.method.upper()}"]
        self.exclude_params = list(self.exclude_params)
        for name in ("bits", "head_bits"):
            value = getattr(self, name)
            allowed = (value is None and name == "head_bits") or (
                isinstance(value, int) and value in BITS
            )
            require(allowed, f"{name}={value!r} is not one of {', '.join(map(str, BITS))}")
        require(
            self.save_format in FORMATS,
            f"save_format={self.save_format!r} is not one of {', '.join(FORMATS)}",
        )
        require(
            self.head_module is None or self.head_bits is not None,
            f"head_module={self.head_module!r} has no use without head_bits",
        )
        start = getattr(self, "init_lora_weights", None)
        require(
            inner_method(self.inner).keeps_base(self) and start != "eva",
            f"inner={self.inner!r} with init_lora_weights={start!r} changes the base weights or "
            "the ranks at the start, which rounded factors do not make up for; take another start",
        )
        for pattern in self.exclude_params:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(
                    f"exclude_params: {pattern!r} is not a regular expression: {error}"
                ) from error


def inner_method(name: str) -> Method:
    """What the registry knows of an inner method.

    Raises:
        InputError: there is no such method, or it is this one.
    """
    if name in UNFIT:
        raise InputError(f"inner={name!r} is not for quantising: {UNFIT[name]}")
    return method(name)


@cache
def config_of(inner: str) -> type[BinaryConfig]:
    """`BinaryConfig` with the fields of the method `inner` and their defaults."""
    facts = inner_method(inner)
    kinds = {f.name: f for f in (*fields(facts.config_cls), *fields(BinaryConfig))}
    defaults = {"inner": inner, **facts.defaults, **INNER_DEFAULTS.get(inner, {})}
    namespace: dict[str, Any] = {
        "__module__": __package__,
        "__doc__": BinaryConfig.__doc__,
        "__annotations__": {name: kinds[name].type for name in defaults},
    }
    for name, value in defaults.items():
        namespace[name] = field(
            default_factory=partial(copy.copy, value), metadata=kinds[name].metadata
        )
    bases = (BinaryConfig, facts.config_cls)
    return dataclass(type(f"BinaryConfig_{inner}", bases, namespace))
