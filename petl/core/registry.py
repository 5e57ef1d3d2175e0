"""The registry of methods: register one, build its config, wrap a model with it, or its shapes."""

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from pkgutil import resolve_name
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from petl.core.compat import (
    adjustments_refused,
    extend_method,
    tuner_class,
    without_noise,
)
from petl.core.fingerprint import fingerprint, remember_base
from petl.core.layers.norms import keep_statistics
from petl.core.layers.wrappers import Fsdp1Check
from petl.core.losses import LossConfig, build_loss, extra_losses, loss, loss_part
from petl.core.method import Method, WrapContext
from petl.core.model.coverage import log_coverage
from petl.core.model.modes import undone_on_error
from petl.core.model.names import PRESETS, check_parameters, frozen_head
from petl.core.model.targets import (
    check_kinds,
    check_saved,
    check_targets,
    check_tokens,
    choose_convolutions,
    choose_default,
    leave_out,
    name_parameters,
    resolve_blocks,
    resolve_targets,
    say_idle_exclusions,
    target_shapes,
    words_among,
)
from petl.core.parameters import check_module, quantization_of, refuse_adapted, within_memory
from petl.core.spec.checks import check_adapter_name, check_rank
from petl.core.spec.config import check_values, require_effect
from petl.core.spec.facts import facts_of, modifies_base_weights
from petl.core.support import BASES, NO_CONVERSION, Capability, Conflict, Part, require_compatible
from petl.core.tuners.gradients import reach_reversible_blocks, watch_gradients
from petl.core.tuners.switching import apply_peft_fixes, enable_switching
from petl.core.types import Calibration, Fields, Settings
from petl.errors import (
    InputError,
    UnknownNameError,
    UnsupportedError,
    choose,
    did_you_mean,
    first_line,
)
from petl.system.imports.peft_hook import failure
from petl.system.imports.tables import LOSSES, METHODS, check_free

logger = logging.getLogger(__name__)
OF_WRAP = ("adapter_name", "calibration")  # arguments of `wrap` that are no fields


def adopt(
    name: str, config_cls: type[PeftConfig], *, summary: str, paper: str, **facts: object
) -> None:
    """Register a method that PEFT itself implements; `facts` are further ones of `Method`."""
    check_free(name, config_cls)
    METHODS[name] = Method(name=name, config_cls=config_cls, summary=summary, paper=paper, **facts)


def list_methods() -> list[str]:
    """Return the names of all methods, sorted."""
    return sorted(METHODS)


def method(name: str, *, others: Iterable[str] = ()) -> Method:
    """Return the registry's entry for the method called `name`.

    Args:
        name: of the method.
        others: further names to suggest if there is no such method.

    Raises:
        UnknownNameError: there is none; the message suggests the closest matches.
    """
    reason = failure(name) if isinstance(name, str) and name not in METHODS else ""
    if reason:
        raise UnknownNameError(f"no method {name!r}{reason}")
    return choose(METHODS, name, "method", others=others)


def get(name: str) -> type[PeftConfig] | type[LossConfig]:
    """Return the config class of the method or extra loss called `name`.

    Raises:
        UnknownNameError: there is none; the message suggests the closest matches.
    """
    # losses first: `method` raises for unknown names, with both as suggestions
    is_loss = isinstance(name, str) and name in LOSSES
    return LOSSES[name].config_cls if is_loss else method(name, others=LOSSES).config_cls


def method_of(config: PeftConfig) -> Method | None:
    """Return the most specific method whose config this is, or None.

    Several entries share a config class: "dora" is LoRA's with `use_dora` set.
    """
    classes, index = {cls.__name__ for cls in type(config).__mro__}, METHODS.index
    # of the others, whose config has another name, none is imported
    named = (METHODS[n] for n in METHODS if n not in index or index[n].config in classes)
    of_its_class = (entry for entry in named if isinstance(config, entry.config_cls))
    candidates: list[Method] = [
        m
        for m in (entry.variant(vars(config)) for entry in of_its_class)
        if type(config) is m.config_cls
        and all(getattr(config, k) == v for k, v in m.defaults.items())
    ]
    return max(candidates, key=lambda m: len(m.defaults), default=None)


def build_config(name: str, **fields: object) -> PeftConfig:
    """Build the config of method `name` with these fields.

    Raises:
        InputError: the method has no such field (the message suggests the closest matches), or
            cannot use the value.
    """
    entry = method(name).variant(fields)
    known = {f.name for f in dataclasses.fields(entry.config_cls) if f.init}
    for field in fields:
        if field not in known:
            raise UnknownNameError(
                f"method {name!r} has no field {field!r}" + did_you_mean(field, known)
            )
    check_values(entry.config_cls, fields)
    try:
        config = _construct(entry.config_cls, {**entry.defaults, **fields})
        # after PEFT's own `__post_init__`, which fills in some fields
        entry.check(config)
        require_effect(config, name, entry.acts)
        return config
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"method {name!r}: {error}") from error


def _construct(config_cls: Any, fields: Fields) -> PeftConfig:
    """Create the config, with a preset as `target_modules`.

    PEFT would read a preset as a regular expression, with which it refuses layers_to_transform, so
    it is set afterwards.
    """
    preset = fields.get("target_modules")
    if not isinstance(preset, str) or preset not in PRESETS:
        return config_cls(**fields)
    config = config_cls(**{**fields, "target_modules": [preset]})
    # `resolve_targets` replaces it once the model is known
    config.target_modules = preset
    return config


def wrap(
    model: nn.Module,
    name: str | PeftConfig | LossConfig,
    *,
    adapter_name: str = "default",
    calibration: Calibration | None = None,
    **fields: object,
) -> PeftModel:
    """Wrap `model`, in place, in a PeftModel that trains it with method `name`.

    Type checkers and editors see one signature for each of petl's methods (petl/signatures.pyi).
    A method of another package, or one whose name is not a literal, is given as a config.

    Args:
        model: any model; a Hugging Face one gets PEFT's task classes through `task_type`.
        name: one of `list_methods()`, or of `list_losses()`: then the fields `method` and
            `method_config` choose the method that trains with that loss. Or a config of either,
            with its fields set; it is copied, so that one config serves several models.
        adapter_name: the adapter's name in the model.
        calibration: batches (dicts of model inputs) for methods that use data before training;
            some also take a function that runs the model.
        fields: fields of the method's config, see `petl show NAME`; none next to a config.

    Raises:
        InputError: an unknown method or field, a config of no method, a value out of range, a
            target that matches nothing or is of a kind that the method cannot adapt, a rank far
            above the widths of its layers, a name that no adapter can have, calibration that is
            missing or not used.
    """
    check_module(model, "petl.wrap")
    chosen = _chosen(name, fields)
    if isinstance(chosen, LossConfig):
        return _wrap_with_loss(model, chosen, adapter_name, calibration)
    # PEFT would wrap it a second time, with a warning only
    if isinstance(model, PeftModel):
        raise InputError(
            f"the model is a PeftModel already, with adapters {', '.join(model.peft_config)}; add "
            "another one with model.add_adapter(name, petl.build_config(method, ...))"
        )
    refuse_adapted(model)
    entry, config = chosen
    if calibration is not None and not entry.needs_data(config):
        raise InputError(
            f"method {entry.name!r} does not use calibration data; leave calibration out"
        )
    resolve_blocks(config, model)
    given = facts_of(config).target_modules
    _choose_targets(entry, config, model)
    # before anything changes the model
    _check_shapes(entry, config, model)
    check_adapter_name(adapter_name, model, entry.tuner)
    check_saved(config, model)
    if facts_of(config).trainable_token_indices is not None:
        require_capability(config, Capability.NEW_TOKENS, "trainable_token_indices")
        check_tokens(config, model)
    refuse_other_kinds(model, config)
    refuse_quantized(model, config)
    digests = fingerprint(model)  # some initializations change the base weights
    with undone_on_error(model):
        wrapped = _adapted(entry, config, model, adapter_name, calibration)
    equip(wrapped, config)
    remember_base(wrapped, digests)
    head = frozen_head(wrapped.get_base_model())
    if head:
        logger.warning(
            "the head %r of %s is frozen and is not saved with the adapter: unless its values were "
            "trained before, pass task_type='SEQ_CLS', or modules_to_save=[%r]",
            head,
            type(wrapped.get_base_model()).__name__,
            head,
        )
    watch_gradients(wrapped)
    adapts_experts = not entry.lacking(Capability.EXPERTS, config)
    is_chosen = entry.own and given is None
    log_coverage(wrapped, given, is_chosen=is_chosen, adapts_experts=adapts_experts)
    return wrapped


def _adapted(
    entry: Method,
    config: PeftConfig,
    model: nn.Module,
    adapter_name: str,
    calibration: Calibration | None,
) -> PeftModel:
    """Return the model with an adapter, whose settings were checked.

    Raises:
        InputError: PEFT's tuner refuses a value; the model then is half changed.
    """
    finish = entry.calibrate(WrapContext(model, config, adapter_name, calibration))
    try:
        memory = f"an adapter of method {entry.name!r}", "lower its size, or adapt fewer modules"
        with without_noise(), adjustments_refused(), within_memory(*memory):
            # a UserWarning is raised here, too, for a value that PEFT would replace
            wrapped = get_peft_model(model, config, adapter_name=adapter_name)
    except Exception as error:  # PEFT's methods have errors of any type for a wrong value
        is_own = entry.own and not isinstance(error, UserWarning)
        if is_own or isinstance(error, InputError):  # messages of petl need no context
            raise
        # PEFT takes the first weight of a target, such as of a norm
        is_bare = isinstance(error, StopIteration)
        reason = "a target has no weights; choose others" if is_bare else first_line(error)
        if Conv1D.__name__ in reason:
            reason = "it does not adapt Conv1D of transformers; lora and petl's own methods do"
        raise InputError(f"method {entry.name!r} on {type(model).__name__}: {reason}") from error
    if finish is not None:
        finish(wrapped)
    return wrapped


def _choose_targets(entry: Method, config: PeftConfig, model: nn.Module) -> None:
    """Resolve presets and defaults, and leave out what a training pass never calls."""
    if not hasattr(config, "target_modules"):
        return
    targets, no_experts = config.target_modules, entry.lacking(Capability.EXPERTS, config)
    say_idle_exclusions(config, model)
    # petl's tuners resolve words themselves, when PEFT injects them
    is_word = targets is None or targets in (*PRESETS, "all-linear")
    if entry.own and (is_word or words_among(targets, model)):
        return
    if entry.own:
        check_targets(config, model, no_experts=no_experts)
    else:
        check_parameters(config, model)
        choose_convolutions(config, model, entry.tuner)
        resolve_targets(config, model, no_experts=no_experts)
        choose_default(config, model, entry.tuner, no_experts)
        if not no_experts and config.target_modules is not None:
            name_parameters(config, model)
    leave_out(config, model, entry.tuner, targets)


def _add_adapter(
    add: Callable[..., None],
    model: PeftModel,
    adapter_name: str,
    peft_config: PeftConfig,
    *args: object,
    **kwargs: object,
) -> None:
    """Add an adapter as PEFT does, of whose targets a tuner of PEFT's does not know the presets."""
    entry = method_of(peft_config)
    # PEFT adds prompts itself, to a model that has no adapter yet
    targets = vars(peft_config).get("target_modules")
    if targets and entry is not None and not entry.own:
        # also of a model whose last adapter was deleted
        base = cast(nn.Module, model.base_model.model)
        if targets in [*PRESETS] or words_among(targets, base):
            no_experts = entry.lacking(Capability.EXPERTS, peft_config)
            resolve_targets(peft_config, base, no_experts=no_experts)
            if not no_experts:
                name_parameters(peft_config, base)
    add(model, adapter_name, peft_config, *args, **kwargs)


extend_method(PeftModel, "add_adapter", _add_adapter)


def _check_shapes(entry: Method, config: PeftConfig, model: nn.Module) -> None:
    """Check the values of a method of PEFT against the shapes of its targets in `model`."""
    if not entry.overrides("fit") and not entry.rank:  # petl's own configs have `check_shapes`
        return
    shapes = target_shapes(config, model, entry.tuner)
    entry.fit(config, shapes)
    if entry.rank:
        check_rank(config, entry.rank, shapes)


def _chosen(
    name: str | PeftConfig | LossConfig, fields: Mapping[str, object]
) -> LossConfig | tuple[Method, PeftConfig]:
    """What `wrap` puts on the model: the config of a loss, or a method and its config."""
    if isinstance(name, str):
        if name in LOSSES:
            return build_loss(name, **fields)
        entry, config = method(name, others=LOSSES).variant(fields), build_config(name, **fields)
        entry.log_other_defaults(config, fields)
        return entry, config
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


def refuse_other_kinds(model: nn.Module, config: PeftConfig) -> None:
    """Raise ModuleKindError for a target on which no adapter computes; petl's tuners do so too."""
    entry = method_of(config)
    if entry is None or not entry.own:
        check_kinds(config, model, entry.tuner if entry else tuner_class(type(config)))
        if facts_of(config).target_parameters:
            check_stacks = resolve_name("petl.core.experts.lora:check_stacks")
            check_stacks(config, model, entry.lacking(Capability.EXPERTS, config) if entry else "")


def refuse_quantized(model: nn.Module, config: PeftConfig) -> None:
    """Raise UnsupportedError if `model` is quantized in a way that the method cannot adapt."""
    quantization = quantization_of(model)
    if quantization in BASES:
        require_capability(config, Capability(quantization), f"a {quantization} base model")


def _wrap_with_loss(
    model: nn.Module,
    config: LossConfig,
    adapter_name: str,
    calibration: Calibration | None,
) -> PeftModel:
    """Wrap the model with the method in a loss's config, and add the loss."""
    entry = loss(config.name)
    taken = config.method_config.keys() & {"model", "name"}
    if taken:
        raise InputError(
            f"method_config has {' and '.join(sorted(taken))}, and takes only fields of method="
            f"{config.method!r}; set method itself to name another one"
        )
    entry.controller_cls.check(model, config)
    # both checks before wrapping: a refusal leaves the model unchanged
    own = {k: v for k, v in config.method_config.items() if k not in OF_WRAP}
    require_compatible([loss_part(config), method_part(build_config(config.method, **own))])
    # method_config last, so that it may set them
    fields = {"adapter_name": adapter_name, "calibration": calibration, **config.method_config}
    with undone_on_error(model):  # the loss may not fit the adapter
        wrapped = wrap(model, config.method, **fields)
        entry.controller_cls(wrapped, config)
    return wrapped


def attach(model: PeftModel, config: LossConfig | None) -> object:
    """Attach the loss of `config` to a PeftModel and return its controller; None without one.

    Raises:
        InputError: the model lacks the modules that the loss needs, has such a loss already, or has
            a method with which the loss has no effect.
    """
    if config is None:
        return None
    require_compatible([loss_part(config), *map(method_part, model.peft_config.values())])
    return loss(config.name).controller_cls(model, config)


def without_data(fields: Settings) -> tuple[Fields, list[str]]:
    """Replace an initialization that needs data or weights, and return the fields and notes.

    Shapes do not depend on it; the notes are sentences for the user, none if nothing was replaced.
    """
    config = build_config(**fields)
    # True is PEFT's default: B of zeros
    start = facts_of(config).init_lora_weights
    if not isinstance(start, str) or not (
        needs_calibration(config) or modifies_base_weights(config)
    ):
        return dict(fields), []
    note = (
        f"init_lora_weights={start} needs weights or data; shapes are those of the default "
        "initialization"
    )
    # same shapes and ranks as every other initialization
    return {**fields, "init_lora_weights": True}, [note]


def on_shapes(build: Callable[[], Any], fields: Settings) -> PeftModel:
    """Call `petl.wrap` with `fields` on the meta-device model that `build` returns.

    A method that computes with the base weights when it is created gets uninitialized memory.
    """
    try:
        return wrap(build(), **fields)
    except (InputError, NotImplementedError, RuntimeError) as error:
        if not needs_values(error):
            raise
        # built again: the failed wrap may have changed the first model
        base = build().to_empty(device="cpu")
        # to_empty gives each of two tied parameters memory of its own
        base.tie_weights()
        return wrap(base, **fields)


def needs_values(error: Exception) -> bool:
    """Return True for an error of torch that refuses to read values on the meta device."""
    if isinstance(error, InputError):  # of PEFT's methods: see `wrap`
        return isinstance(error.__cause__, NotImplementedError | RuntimeError)
    return isinstance(error, NotImplementedError | RuntimeError)


def check_on_shapes(build: Callable[[], Any], fields: Mapping[str, object]) -> None:
    """Raise InputError if `petl.wrap` would with these fields; no weights are read.

    Nothing is allocated, and the random numbers of a run stay the same. A method that computes with
    the base weights when it is created is checked up to there.
    """
    # PEFT creates some layers on the default device
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            wrap(build(), **without_data(fields)[0])
        except (InputError, NotImplementedError, RuntimeError) as error:
            if not needs_values(error):
                raise


def keeps_base(config: PeftConfig) -> bool:
    """Return True if a model without its adapter of this config equals the pretrained one."""
    entry = method_of(config)
    return entry is None or entry.keeps_base(config)


def refusal(config: PeftConfig, capability: Capability) -> str:
    """Return why a model with an adapter of this config lacks a capability; "": it has it."""
    entry = method_of(config)
    if entry is not None:
        return entry.lacking(capability, config)
    return NO_CONVERSION if capability is Capability.LORA_EXPORT else ""


def method_part(config: PeftConfig) -> Part:
    """Return the method of a config as a part of a choice."""
    entry = method_of(config)
    if entry is not None:
        return entry.part(config)
    has_prompts = config.is_prompt_learning or config.is_adaption_prompt
    return Part(type(config).__name__, (Capability.PROMPTS,) if has_prompts else ())


def equip(model: PeftModel, config: PeftConfig) -> None:
    """Give a PeftModel, wrapped or loaded with an adapter of this config, what petl adds to PEFT's.

    In FSDP1 it raises UnsupportedError if a method or extra loss of it lacks that.
    """
    apply_peft_fixes(model, refusal(config, Capability.MIXED_BATCH))
    enable_switching(model)
    model.register_forward_pre_hook(Fsdp1Check(_chosen_for))
    keep_statistics(model.get_base_model())
    reach_reversible_blocks(model.get_base_model())


def _chosen_for(model: nn.Module) -> list[Part]:
    methods = map(method_part, cast(PeftModel, model).peft_config.values())
    return [*methods, *(loss_part(each.config) for each in extra_losses(model))]


def require_capability(config: PeftConfig, capability: Capability, wanted: str) -> None:
    """Raise UnsupportedError if a model with an adapter of this config lacks a capability.

    Args:
        wanted: what needs it, for the message.
    """
    reason = refusal(config, capability)
    if reason:
        entry = method_of(config)
        name = entry.name if entry else config.peft_type
        raise UnsupportedError(str(Conflict(wanted, f"method {name}", reason)))


def needs_calibration(config: PeftConfig) -> str:
    """Return the reason for which a config needs calibration data; "" if it needs none."""
    entry = method_of(config)
    return "" if entry is None else entry.needs_data(config)


def is_computed(config: PeftConfig) -> bool:
    """Return True if calibration makes the final adapter, see `Method.is_computed`."""
    entry = method_of(config)
    return entry is not None and entry.is_computed(config)


def no_calibration(why: str) -> InputError:
    """Return the error for missing calibration data; `why` comes from `needs_calibration`."""
    return InputError(f"{why} needs calibration data; pass calibration=batches to petl.wrap")
