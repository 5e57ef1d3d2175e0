"""The table of methods, and the ways to put one in it and to use one."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from petl.core.compat import add_method, adjustments_refused, freeze_ranks, without_noise
from petl.core.model.structure import quantization_of
from petl.core.model.targets import PRESETS, check_saved, resolve_targets, target_shapes
from petl.core.spec.config import check_values
from petl.core.spec.losses import LOSSES, LossConfig, build_loss, loss, require_hooks
from petl.core.spec.method import LR, Calibration, Method
from petl.core.switching.tuner import enable_switching, refuse_mixed_batches
from petl.errors import InputError, UnknownNameError, UnsupportedError, did_you_mean
from petl.imports.plugins import failure

Tuner = TypeVar("Tuner", bound=type[Any])
METHODS: dict[str, Method] = {}


def register(
    name: str,
    *,
    summary: str,
    paper: str,
    lr: float = LR,
    variant: Callable[[Method, Mapping[str, Any]], Method] | None = None,
) -> Callable[[Tuner], Tuner]:
    """Know a tuner as `name`: its `+method=` word, PEFT type and state-dict prefix.

    A decorator for a `MethodTuner` whose `config_cls` and `adapter_cls` are set. The PEFT type
    becomes `PETL_<NAME>` and the prefix `petl_<name>_`, since PEFT may one day ship that name.
    A tuner that has no `adapter_cls` of its own gives a `variant`, see `Method`.

    Raises:
        ValueError: `name` is taken.
    """

    def add(tuner: Tuner) -> Tuner:
        _check_free(name, tuner)
        tuner.prefix, tuner.config_cls.method = f"petl_{name}_", name
        add_method(f"petl_{name}", tuner.prefix, tuner.config_cls, tuner)
        additive = variant is None and tuner.adapter_cls.merge_refusal is None
        METHODS[name] = Method(
            name,
            tuner.config_cls,
            summary,
            paper,
            merges=additive,
            exports_lora=additive,
            own=True,
            start_tolerance=0.0 if variant else tuner.adapter_cls.start_tolerance,
            tuner_cls=tuner,
            variant=variant,
            lr=lr,
            unsupported=getattr(tuner, "unsupported", {}),
        )
        return tuner

    return add


def adopt(
    name: str, config_cls: type[PeftConfig], *, summary: str, paper: str, **facts: Any
) -> None:
    """List a method that PEFT already serves; `facts` are further fields of `Method`."""
    _check_free(name, config_cls)
    METHODS[name] = Method(name, config_cls, summary, paper, **facts)


def _check_free(name: str, newcomer: type) -> None:
    taken = METHODS.get(name) or LOSSES.get(name)  # `wrap` and `petl show` take either
    if taken is not None:
        raise ValueError(
            f"method {name!r} is taken by {_full_name(taken.config_cls)}; register "
            f"{_full_name(newcomer)} by another name"
        )


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def list_methods() -> list[str]:
    """The names of all methods, sorted."""
    return sorted(METHODS)


def method(name: str, *, others: Iterable[str] = ()) -> Method:
    """What petl knows of the method called `name`.

    Raises:
        UnknownNameError: there is none; the message names the nearest ones, `others` included.
    """
    if name not in METHODS:
        nearest = failure(name) or did_you_mean(str(name), [*METHODS, *others])
        raise UnknownNameError(f"no method {name!r}{nearest}")
    return METHODS[name]


def get(name: str) -> type[Any]:
    """The config class of the method or extra loss called `name`.

    Raises:
        UnknownNameError: there is none; the message names the nearest ones.
    """
    return LOSSES[name].config_cls if name in LOSSES else method(name, others=LOSSES).config_cls


def method_of(config: PeftConfig) -> Method | None:
    """The method that a config belongs to, the most specific entry first, or None."""
    of_its_class = (e for e in METHODS.values() if isinstance(config, e.config_cls))
    fits = [
        m
        for m in (entry.given(vars(config)) for entry in of_its_class)
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
    entry = method(name).given(fields)
    known = {f.name for f in dataclasses.fields(entry.config_cls) if f.init}
    for given in fields:
        if given not in known:
            raise UnknownNameError(
                f"method {name!r} has no field {given!r}" + did_you_mean(given, known)
            )
    check_values(entry.config_cls, fields)
    try:
        config = _construct(entry.config_cls, {**entry.defaults, **fields})
        entry.check(config)
        return config
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
    name: str | PeftConfig | LossConfig,
    *,
    adapter_name: str = "default",
    calibration: Calibration | None = None,
    **fields: Any,
) -> PeftModel:
    """A PeftModel that trains `model` with method `name`; `model` itself is changed in place.

    Type checkers and editors see one signature for each of petl's methods (petl/signatures.pyi).
    A method of another package, or one whose name is not a literal, is given as a config.

    Args:
        model: any model; a Hugging Face one gets PEFT's task classes through `task_type`.
        name: one of `list_methods()`, or of `list_losses()`: then `method` and `method_config` say
            which method trains with that term. Or a config of either, with its fields set; it is
            copied, so that one config serves several models.
        adapter_name: the adapter's name in the model.
        calibration: batches (dicts of model inputs) for methods that look at data before training;
            some also take a function that runs the model.
        fields: fields of the method's config, see `petl show NAME`; none next to a config.

    Raises:
        InputError: an unknown method or field, a config of no method, a value out of range, a
            target that matches nothing or is of a kind that the method cannot adapt, calibration
            that is missing or not used.
    """
    chosen = _chosen(name, fields)
    if isinstance(chosen, LossConfig):
        return _wrap_with_loss(model, chosen, adapter_name, calibration)
    if isinstance(model, PeftModel):
        raise InputError(
            "the model is a PeftModel already; add another adapter with model.add_adapter(name, "
            "petl.build_config(method, ...))"
        )
    entry, config = chosen
    if calibration is not None and not entry.calibration(config):
        raise InputError(
            f"method {entry.name!r} does not use calibration data; leave calibration out"
        )
    if not entry.own and hasattr(config, "target_modules"):
        resolve_targets(config, model)
    if entry.fit is not None:
        entry.fit(config, target_shapes(config, model))
    check_saved(config, model)
    refuse_quantized(model, config)
    finish = entry.on_wrap(model, config, calibration) if entry.on_wrap is not None else None
    try:
        with without_noise(), adjustments_refused():
            wrapped = get_peft_model(model, config, adapter_name=adapter_name)
    except (TypeError, ValueError, NotImplementedError, UserWarning) as error:
        ours = entry.own and not isinstance(error, UserWarning)
        if ours or isinstance(error, InputError):  # it says what is the user's to mend
            raise
        raise InputError(f"method {entry.name!r} on {type(model).__name__}: {error}") from error
    if finish is not None:
        finish(wrapped)
    apply_peft_fixes(wrapped, adapter_name)
    enable_switching(wrapped)
    return wrapped


def _chosen(
    name: str | PeftConfig | LossConfig, fields: Mapping[str, Any]
) -> LossConfig | tuple[Method, PeftConfig]:
    """What `wrap` puts on the model: the config of a loss, or a method and its config."""
    if isinstance(name, str):
        if name in LOSSES:
            return build_loss(name, **fields)
        return method(name, others=LOSSES).given(fields), build_config(name, **fields)
    if fields:
        raise InputError(
            f"{', '.join(fields)} given next to a {type(name).__name__}: set fields in the config"
        )
    return copy.deepcopy(name) if isinstance(name, LossConfig) else _of_config(name)


def _of_config(given: PeftConfig) -> tuple[Method, PeftConfig]:
    """The method of a config that a user made, and a checked copy: wrapping fills in fields.

    Raises:
        InputError: no method has such a config, or a value that the method cannot use.
    """
    entry = method_of(given) if isinstance(given, PeftConfig) else None
    if entry is None:
        raise InputError(
            f"{type(given).__name__} is not the config of a method; petl.wrap takes a name of "
            "petl.list_methods(), or a config of a class that petl.get(name) gives"
        )
    config = copy.deepcopy(given)
    usual = {f.name: f.default for f in dataclasses.fields(config)}
    chosen = {name: getattr(config, name) for name in usual}
    check_values(type(config), {k: v for k, v in chosen.items() if v != usual[k]})
    entry.check(config)
    return entry, config


def refuse_quantized(model: nn.Module, config: PeftConfig) -> None:
    """Raise UnsupportedError if `model` is quantised in a way that the method cannot adapt."""
    kind = quantization_of(model)
    reason = refusal(config, kind) if kind else ""
    if reason:
        raise UnsupportedError(f"the base model is quantised ({kind}): {reason}")


def apply_peft_fixes(model: PeftModel, adapter_name: str) -> None:
    """Freeze what PEFT should have, and refuse what it would let drop without a word."""
    freeze_ranks(model.base_model)
    reason = refusal(model.peft_config[adapter_name], "mixed")
    if reason:
        refuse_mixed_batches(model, reason)


def _wrap_with_loss(
    model: nn.Module,
    config: LossConfig,
    adapter_name: str,
    calibration: Calibration | None,
) -> PeftModel:
    """The model wrapped with the method that a loss's config names, and the loss on it."""
    entry = loss(config.name)
    entry.controller_cls.check(model, config)
    require_hooks(method(config.method).tuner, config.name)
    fields = {"adapter_name": adapter_name, "calibration": calibration, **config.method_config}
    wrapped = wrap(model, config.method, **fields)
    entry.controller_cls(wrapped, config)
    return wrapped


def keeps_base(config: PeftConfig) -> bool:
    """Whether a model without its adapter of this config is the pretrained one."""
    entry = method_of(config)
    return entry is None or entry.keeps_base(config)


def refusal(config: PeftConfig, capability: str) -> str:
    """Why a model with an adapter of this config does not have an ability, or "" if it does."""
    entry = method_of(config)
    reason = "" if entry is None else entry.unsupported.get(capability, "")
    return reason if isinstance(reason, str) else reason(config)


def needs_calibration(config: PeftConfig) -> str:
    """Why a config looks at calibration data, in words for a message; "" if it does not."""
    entry = method_of(config)
    return "" if entry is None else entry.calibration(config)


def no_calibration(why: str) -> InputError:
    """The error of a method that was given no calibration data, and why it needs them."""
    return InputError(f"{why} needs calibration data; pass calibration=batches to petl.wrap")
