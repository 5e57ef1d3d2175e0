"""Methods that are trained with an inner method, of which they are generated subclasses.

A tuner of PEFT reads the fields of its own config class, so a wrapper that passes attributes on
would not be enough: the config of `binary` over LoRA is a subclass of LoRA's, and its tuner one of
LoRA's tuner. The classes are generated for each inner method, with its name after an underscore.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial, wraps
from typing import Any

from torch import nn

from petl.core.compat import LoraModel
from petl.core.method import Method
from petl.core.registry import method
from petl.efficiency.fused_lora.switching import SwitchingLora
from petl.errors import InputError, UnknownNameError, did_you_mean

# why a method over another one trains alone
ON_THEIR_WAY = "its layers change the tensors of an inner method on their way"


def inner_method(name: Any, unsupported: Mapping[str, str], what: str) -> Method:
    """Return the registry's entry of an inner method; `name` may be of any type.

    Args:
        name: of the inner method.
        unsupported: by method, the reason for which it cannot be the inner one.
        what: end of "inner='x' cannot be ...".

    Raises:
        InputError: there is no such method, it is unsupported or has an inner method itself.
    """
    if isinstance(name, str) and name in unsupported:
        raise InputError(f"inner={name!r} cannot be {what}: {unsupported[name]}")
    entry = method(name)
    if entry.has_inner:
        raise InputError(f"inner={name!r} cannot be {what}: it has an inner method of its own")
    return entry


def tuner_class_of(entry: Method) -> type[Any]:
    """Return the tuner of an inner method; of PEFT's LoRA, petl's subclass of its tuner."""
    return SwitchingLora if entry.tuner is LoraModel else entry.tuner


def config_over(
    outer: type[Any], name: str, config_cls: type[Any], defaults: Mapping[str, Any]
) -> type[Any]:
    """Generate the subclass `<outer>_<name>` of `outer` and of the inner method's config.

    Args:
        outer: config of the outer method; its `__module__` must find the class by name, for pickle.
        name: of the inner method.
        config_cls: its config.
        defaults: fields of either that get another default.
    """
    inherited = {f.name: f for f in (*fields(config_cls), *fields(outer))}
    namespace: dict[str, Any] = {
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
    generated: Any = dataclass(type(f"{outer.__name__}_{name}", bases, namespace))
    generated.__init__ = _without_unknown_fields(generated.__init__)
    return generated


def refuse_unknown(cls: type[Any], inner: str, given: Mapping[str, Any]) -> None:
    """Raise UnknownNameError for the first of `given` that is no field of a generated config."""
    if "peft_type" in given:  # from a file, which may be of a later version
        return
    for name in _unknown_fields(cls, given):
        known = {f.name for f in fields(cls)}
        raise UnknownNameError(f"method {inner!r} has no field {name!r}{did_you_mean(name, known)}")


def _unknown_fields(cls: type[Any], given: Iterable[str]) -> list[str]:
    return sorted({*given} - {f.name for f in fields(cls)})


def _without_unknown_fields(init: Callable[..., None]) -> Callable[..., None]:
    """Return an `__init__` that warns of unknown fields, those of a later version, and drops them.

    PEFT does so for other configs, by the signature of the registered class, which lacks the fields
    of the inner method.
    """

    @wraps(init)
    def filtered(self: Any, *args: Any, **given: Any) -> None:
        unknown = _unknown_fields(type(self), given)
        if unknown:
            warnings.warn(
                f"Unexpected keyword arguments {unknown} for class {type(self).__name__}, these "
                "are ignored: the file was probably saved by a later version of petl or PEFT",
                stacklevel=2,
            )
        init(self, *args, **{k: v for k, v in given.items() if k not in unknown})

    return filtered


def undo_injection(tuner: Any, adapter_name: str, trained: Iterable[nn.Parameter]) -> None:
    """Remove an adapter that the inner method has added and the outer one refuses.

    Args:
        tuner: that of the model.
        adapter_name: the adapter.
        trained: what was trainable before.
    """
    tuner.delete_adapter(adapter_name)
    if not tuner.peft_config:
        tuner.unload()
    for parameter in trained:
        parameter.requires_grad_(True)


def generated_class(module: str, name: str, makers: Mapping[str, Callable[[str], type]]) -> type:
    """Return a generated class by its name, such as `BinaryConfig_lora`; for unpickling.

    Args:
        module: whose attribute it is.
        name: of the class.
        makers: by name of the outer class, the function that generates a subclass.

    Raises:
        AttributeError: it is no name of a generated class.
    """
    stem, _, inner = name.partition("_")
    if stem in makers and inner:
        return makers[stem](inner)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")
