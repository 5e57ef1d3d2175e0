"""The table of methods, and the ways to put one in it and to use one."""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from petl.core.compat import add_method
from petl.core.targets import PRESETS, resolve_targets
from petl.core.tuner import MethodTuner
from petl.errors import InputError, UnknownNameError, near

Tuner = TypeVar("Tuner", bound=type[MethodTuner])


@dataclass(frozen=True)
class Method:
    """What petl knows of a method.

    Attributes:
        name: the word after `+method=`.
        config_cls: its PEFT config.
        summary: one sentence.
        paper: authors, year, title or venue, arXiv id.
        merges: whether the adapter can be merged into the base weights.
        exports_lora: whether it can be saved as a plain LoRA.
        own: whether petl implements it (PEFT does otherwise).
        start_tolerance: how far outputs at the start may be off the base model's.
        defaults: fields that this entry sets, such as `use_dora` of "dora".
        before_wrap: called with (model, config, calibration) before the model is changed, or None.
        after_wrap: called with (model, calibration) once the model is wrapped, or None.
    """

    name: str
    config_cls: type[PeftConfig]
    summary: str
    paper: str
    merges: bool = True
    exports_lora: bool = False
    own: bool = False
    start_tolerance: float = 0.0
    defaults: dict[str, Any] = field(default_factory=dict)
    before_wrap: Callable[[nn.Module, Any, Iterable[Any] | None], None] | None = None
    after_wrap: Callable[[PeftModel, Iterable[Any] | None], None] | None = None


METHODS: dict[str, Method] = {}


def register(name: str, *, summary: str, paper: str) -> Callable[[Tuner], Tuner]:
    """Know a tuner as `name`: its `+method=` word, PEFT type and state-dict prefix.

    A decorator for a `MethodTuner` whose `config_cls` and `adapter_cls` are set. The PEFT type
    becomes `PETL_<NAME>` and the prefix `petl_<name>_`, since PEFT may one day ship that name.

    Raises:
        ValueError: `name` is taken.
    """

    def add(tuner: Tuner) -> Tuner:
        _check_free(name)
        tuner.prefix, tuner.config_cls.method = f"petl_{name}_", name
        add_method(f"petl_{name}", tuner.prefix, tuner.config_cls, tuner)
        additive = tuner.adapter_cls.merge_refusal is None
        METHODS[name] = Method(
            name,
            tuner.config_cls,
            summary,
            paper,
            additive,
            exports_lora=additive,
            own=True,
            start_tolerance=tuner.adapter_cls.start_tolerance,
        )
        return tuner

    return add


def adopt(
    name: str, config_cls: type[PeftConfig], *, summary: str, paper: str, **facts: Any
) -> None:
    """List a method that PEFT already serves; `facts` are further fields of `Method`."""
    _check_free(name)
    METHODS[name] = Method(name, config_cls, summary, paper, **facts)


def _check_free(name: str) -> None:
    if name in METHODS:
        raise ValueError(f"method {name!r} is taken by {METHODS[name].config_cls.__module__}")


def list_methods() -> list[str]:
    """The names of all methods, sorted."""
    return sorted(METHODS)


def method(name: str) -> Method:
    """What petl knows of the method called `name`.

    Raises:
        UnknownNameError: there is none; the message names the nearest ones.
    """
    if name not in METHODS:
        raise UnknownNameError(f"no method {name!r}" + near(str(name), METHODS))
    return METHODS[name]


def get(name: str) -> type[PeftConfig]:
    """The config class of the method called `name`; raises as `method` does."""
    return method(name).config_cls


def method_of(config: PeftConfig) -> Method | None:
    """The method that a config belongs to, the most specific entry first, or None."""
    fits = [
        m
        for m in METHODS.values()
        if type(config) is m.config_cls
        and all(getattr(config, k) == v for k, v in m.defaults.items())
    ]
    return max(fits, key=lambda m: len(m.defaults), default=None)


def build_config(name: str, **fields: Any) -> PeftConfig:
    """The config of method `name` with these fields.

    Raises:
        InputError: a field that the method does not have (the nearest are named), or a value that
            it cannot use.
    """
    entry = method(name)
    known = {f.name for f in dataclasses.fields(entry.config_cls) if f.init}
    for given in fields:
        if given not in known:
            raise UnknownNameError(f"method {name!r} has no field {given!r}" + near(given, known))
    try:
        return _construct(entry.config_cls, {**entry.defaults, **fields})
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"method {name!r}: {error}") from error


def _construct(config_cls: Any, fields: dict[str, Any]) -> PeftConfig:
    """The config; PEFT would take a preset for a regular expression, and refuse other fields."""
    preset = fields.get("target_modules")
    if not isinstance(preset, str) or preset not in PRESETS:
        return config_cls(**fields)
    config: Any = config_cls(**{**fields, "target_modules": [preset]})
    config.target_modules = preset
    return config


def wrap(
    model: nn.Module,
    name: str,
    *,
    adapter_name: str = "default",
    calibration: Iterable[Any] | None = None,
    **fields: Any,
) -> PeftModel:
    """A PeftModel that trains `model` with method `name`; `model` itself is changed in place.

    Args:
        model: any model; a Hugging Face one gets PEFT's task classes through `task_type`.
        name: one of `list_methods()`.
        adapter_name: the adapter's name in the model.
        calibration: batches (dicts of model inputs) for methods that look at data before training.
        fields: fields of the method's config, see `petl show NAME`.

    Raises:
        InputError: an unknown method or field, a value out of range, a target that matches nothing
            or is of a kind that the method cannot adapt, calibration that is missing or not used.
    """
    if isinstance(model, PeftModel):
        raise InputError(
            "the model is a PeftModel already; add another adapter with model.add_adapter(name, "
            "petl.build_config(method, ...))"
        )
    entry = method(name)
    config = build_config(name, **fields)
    needs = needs_calibration(config)
    if calibration is not None and not needs:
        raise InputError(f"method {name!r} does not use calibration data; leave calibration out")
    if calibration is None and needs:
        raise InputError(f"{needs} needs calibration data; pass calibration=batches to petl.wrap")
    if not entry.own and hasattr(config, "target_modules"):
        resolve_targets(config, model)
    if entry.before_wrap is not None:
        entry.before_wrap(model, config, calibration)
    try:
        wrapped = get_peft_model(model, config, adapter_name=adapter_name)
    except (TypeError, ValueError, NotImplementedError) as error:
        if entry.own:  # ours says by itself what is the user's to mend
            raise
        raise InputError(f"method {name!r} on {type(model).__name__}: {error}") from error
    if entry.after_wrap is not None:
        entry.after_wrap(wrapped, calibration)
    return wrapped


def needs_calibration(config: PeftConfig) -> str:
    """Why a config needs calibration data, in words for a message; "" if it does not."""
    start = getattr(config, "init_lora_weights", None)
    return f"init_lora_weights={start!r}" if start in ("eva", "lora_ga") else ""
