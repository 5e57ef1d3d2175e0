"""Methods that train another one, their inner method, with fields of both.

A tuner of PEFT reads the fields of its own config class, so a wrapper that passes attributes on
would not be enough: the config of `binary` over LoRA is generated as a subclass of LoRA's, and its
hooks are those of a class that derives from both methods.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache, partial, wraps
from typing import Any, ClassVar, Self

from peft import PeftConfig
from peft.utils import PeftType

from petl.core.compat import LoraModel
from petl.core.method import A, C, Method
from petl.core.register import make_tuner
from petl.core.registry import METHODS, method
from petl.core.spec.config import check_values, require_effect
from petl.core.support import Capability
from petl.core.tuners.adapter import AdapterTuner
from petl.core.types import Arguments, Fields
from petl.efficiency.fused_lora.switching import SwitchingLora
from petl.errors import InputError, UnknownNameError, did_you_mean
from petl.system.values import check_rules

ALONE = "none"  # in the name of the class that is generated without an inner method


class OuterConfig(PeftConfig):
    """Base of the configs: the class of an instance is generated for its field `inner`.

    `BinaryConfig(inner="mos", r=4)` sets fields of both methods.
    """

    method: ClassVar[str]  # set by `register`
    inner: Any  # its name, or None

    def __new__(cls, *args: object, **given: object) -> Self:
        """Create an instance of the class for `inner`.

        Raises:
            UnknownNameError: there is no such method, or it has no such field.
        """
        entry = METHODS[cls.method]
        if cls is entry.config_cls:
            variant = entry.variant(given)
            # so that `isinstance` and fields are those of the inner config
            cls = variant.config_cls
            unknown = _unknown_fields(cls, given)
            # a file, which has its type, may be of a later version
            if unknown and "peft_type" not in given:
                known = {f.name for f in fields(cls)}
                raise UnknownNameError(
                    f"method {variant.inner or entry.name!r} has no field {unknown[0]!r}"
                    + did_you_mean(unknown[0], known)
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        is_saved = self.peft_type is not None  # only a file names the type
        # the inner method's fields as well, before PEFT computes with them
        check_values(type(self), {f.name: getattr(self, f.name) for f in fields(self)})
        super().__post_init__()
        self.peft_type = PeftType[f"PETL_{self.method.upper()}"]
        check_rules(self)  # PEFT's own configs do not
        if not is_saved:
            require_effect(self, self.method)

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        # the generated class cannot be imported by name
        return _config_without_state, (self.method, self.inner), self.__getstate__()


def _config_without_state(name: str, inner: str | None) -> object:
    """Return a config, which pickle and copy then fill in."""
    cls = METHODS[name].variant({"inner": inner}).config_cls
    return object.__new__(cls)


class Outer(Method[Any, Any]):
    """A method that trains an inner method.

    Its `variant` is of a class that derives from it and from the inner method, so a hook calls
    that of the inner one by `super()`.

    Attributes:
        refused: by method, the reason for which it cannot be the inner one.
        purpose: end of "inner='x' cannot be ...".
        first_inner: the inner method by default; None: there is none.
        alone: what takes the place of an inner method where there is none; None: one is needed.
    """

    refused: ClassVar[Mapping[str, str]]
    purpose: ClassVar[str]
    first_inner: ClassVar[str | None] = None
    alone: ClassVar[Method[Any, Any] | None] = None
    needs_tuner = "the tuner has what its layers share"

    def variant(self, fields: Mapping[str, object]) -> Method[Any, Any]:
        """Return the method for the inner one in these fields, with its fields and capabilities.

        Raises:
            InputError: there is no such method, it cannot be the inner one, or has an inner method
                itself.
        """
        inner: Any = fields.get("inner", self.first_inner)
        if isinstance(inner, str) and inner in self.refused:
            raise InputError(f"inner={inner!r} cannot be {self.purpose}: {self.refused[inner]}")
        entry = self.alone if inner is None and self.alone is not None else method(inner)
        if entry.has_inner:
            raise InputError(
                f"inner={inner!r} cannot be {self.purpose}: it has an inner method of its own"
            )
        return _variant(METHODS[self.name], entry, inner)

    def facts_over(self, inner: Method[C, A]) -> Fields:
        """Return facts that differ from this inner method's; of `lacks` the rows that do."""
        raise NotImplementedError(f"{self.name} over {inner.name}")


@cache
def _variant(outer: Any, entry: Method[Any, Any], inner: str | None) -> Method[Any, Any]:
    word = inner or ALONE
    cls = type(f"{type(outer).__name__}_{word}", (type(outer), type(entry)), {})
    facts = {name: getattr(entry, name) for name in Method.__annotations__}
    # of a method of PEFT, hooks are attributes
    own = outer.facts_over(entry)
    facts |= vars(entry) | {
        "name": outer.name,
        "summary": outer.summary,
        "paper": outer.paper,
        "needs_tuner": outer.needs_tuner,
        "defaults": {**entry.defaults, "inner": inner},
        "inner": inner or "",
        # the inner method's tensors mean something else here
        "strength_tensors": outer.strength_tensors,
        "components": outer.components,
        "lacks": {
            **entry.lacks,
            Capability.EXPERTS: "the method is for linear layers; use its inner method alone",
            Capability.TOGETHER: "its layers change the tensors of an inner method on their way",
            **own.pop("lacks"),
        },
        **own,
    }
    defaults = {**facts["defaults"], **facts["inner_defaults"]}
    facts["config_cls"] = _config_over(outer.config_cls, word, entry.config_cls, defaults)
    if not entry.own:
        lora = entry.tuner is LoraModel  # petl's subclass of its tuner
        facts["over"] = SwitchingLora if lora else entry.over or entry.tuner
    variant = cls(**facts)
    prefix = entry.tuner.prefix if inner else outer.tuner.prefix
    # PEFT creates an object of the registered class
    variant.tuner_cls = make_tuner(variant, prefix, (outer.tuner, variant.over or AdapterTuner))
    return variant


def _config_over(
    outer: type[PeftConfig], name: str, config_cls: type[PeftConfig], defaults: Mapping[str, object]
) -> type[PeftConfig]:
    """Generate the subclass `<outer>_<name>` of the outer and of the inner method's config.

    Args:
        outer: config of the outer method.
        name: of the inner method.
        config_cls: its config.
        defaults: fields of either that get another default.
    """
    inherited = {f.name: f for f in (*fields(config_cls), *fields(outer))}
    namespace: Arguments = {
        "__module__": outer.__module__,
        "__doc__": outer.__doc__,
        "__annotations__": {name: inherited[name].type for name in defaults},
    }
    for key, value in defaults.items():
        namespace[key] = field(
            # a factory also for immutable values: dataclasses refuse mutable defaults
            default_factory=partial(copy.copy, value),
            metadata=inherited[key].metadata,
        )
    # the outer config first: its __post_init__ calls the inner config's
    bases = (outer, config_cls)
    generated = dataclass(type(f"{outer.__name__}_{name}", bases, namespace))
    generated.__init__ = _without_unknown_fields(generated.__init__)
    return generated


def _unknown_fields(cls: type[Any], given: Iterable[str]) -> list[str]:
    return sorted({*given} - {f.name for f in fields(cls)})


def _without_unknown_fields(init: Callable[..., None]) -> Callable[..., None]:
    """Return an `__init__` that warns of unknown fields, those of a later version, and drops them.

    PEFT does so for other configs, by the signature of the registered class, which lacks the fields
    of the inner method.
    """

    @wraps(init)
    def filtered(self: object, *args: object, **given: object) -> None:
        unknown = _unknown_fields(type(self), given)
        if unknown:
            warnings.warn(
                f"Unexpected keyword arguments {unknown} for class {type(self).__name__}, these "
                "are ignored: the file was probably saved by a later version of petl or PEFT",
                stacklevel=2,
            )
        init(self, *args, **{k: v for k, v in given.items() if k not in unknown})

    return filtered
