"""Method: what a method provides, by composition; and the contexts that its hooks get.

A method is three classes. The **config** (a `MethodConfig`) has its fields. The **adapter** (an
`Adapter`) is what it trains on one layer, with the mathematics. The **method** (a `Method`) says
the rest: its name, facts about it, and what happens when a model is wrapped, trained and saved.
`register` makes it known. petl's one tuner, `AdapterTuner`, asks it; no method has a tuner.

A method has facts as class attributes, and overrides the hooks that it needs; most need none. It
has no state: one instance serves all models. Each hook has one argument, typed by the method's
config and adapter:

    WrapContext    a model before it is changed: targets, settings, shared, calibrate
    AdapterSet     the adapters of one name in a model: pack, unpack, removed, released
    NewAdapters    the same, when they were just added: added
    TrainContext   a model that trains, with its active adapters: all further ones

What a method remembers while it trains stands in its adapters, in the `settings` that they share,
or in `kept`, a dict for each model.
"""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Self, TypeVar

from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from petl.core.compat import BaseTuner, BaseTunerLayer, LoraModel, tuner_class
from petl.core.experts.layout import experts_of
from petl.core.experts.linears import paths_of_experts
from petl.core.layers.context import ForwardContext, InputCapture
from petl.core.layers.layer import Adapter, LayerShape, shape_of
from petl.core.model.heat_map import HeatMap
from petl.core.model.linear import LINEAR_KINDS, refuse_other_kind
from petl.core.model.names import NO_EXPERTS, matched_stacks
from petl.core.model.targets import matched_names, refuse_fused, resolve_targets
from petl.core.spec.components import Ordered
from petl.core.spec.config import Acts
from petl.core.spec.facts import facts_of
from petl.core.support import Capability, Lacks, Part, reason_of, without_lora
from petl.core.types import Calibration, Chart, Group
from petl.errors import ModuleKindError
from petl.system.files.paths import method_preset
from petl.system.values import LR

Finish = Callable[[PeftModel], None]
Settings = dict[str, Any]  # by name, what an adapter needs besides its shape
Tensors = dict[str, Tensor]
Shapes = Mapping[str, LayerShape]
C = TypeVar("C", bound=PeftConfig)
A = TypeVar("A", bound=Adapter)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """A module that gets an adapter.

    Attributes:
        path: of the module in the base model.
        shape: widths of its input and output.
        source: path of the module whose first input the adapter gets as `x`; "": its own input.
            Both modules must run in the same call of their block, the source first, so that
            checkpointing recomputes them together.
        stack: path of the parameter with the weights of all experts, of which the module, that of
            one, is made before it is adapted; "": it is no expert.
        is_block: True for a whole block: the adapter gets its first input and first output, and in
            `with_base` all of its arguments; see `BlockAdapters`. It cannot be merged.
    """

    path: str
    shape: LayerShape
    source: str = ""
    is_block: bool = False
    stack: str = ""


@dataclass
class WrapContext(Generic[C]):
    """A model that is about to get an adapter; nothing in it has changed.

    Attributes:
        model: the base model, which may have other adapters.
        config: of the adapter; a hook may fill in fields, which are saved.
        adapter_name: the adapter's name.
        calibration: what the user gave `petl.wrap`; for `calibrate` only.
        targets: by path, in the model's order, once `Method.targets` has returned them.
    """

    model: nn.Module
    config: C
    adapter_name: str
    calibration: Calibration | None = None
    targets: dict[str, Target] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, LayerShape]:
        """By path, the widths of each target."""
        return {path: target.shape for path, target in self.targets.items()}

    @property
    def has_weights(self) -> bool:
        """False on the meta device, where a model has shapes only."""
        return not any(parameter.is_meta for parameter in self.model.parameters())


@dataclass
class AdapterSet(Generic[C, A]):
    """The adapters of one name in a model.

    Attributes:
        model: the base model.
        name: the adapters' name.
        config: of the adapters.
        adapters: by path of the adapted module, in the model's order; without those in PEFT's
            layers.
        tuner: that of the model; None if the model was injected without one.
        kept: what the method remembers of this model, under keys of its own.
        state: in `pack`, all tensors of the model by name.
    """

    model: nn.Module
    name: str
    config: C
    adapters: Mapping[str, A]
    tuner: Any = None
    kept: dict[object, Any] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)

    def key(self, path: str, tensor: str) -> str:
        """Return the name of a tensor of the adapter at a path, in a file."""
        return f"base_model.model.{path}.{self.adapters[path].info.layer.slot}.{tensor}"

    def name_in_file(self, key: str) -> str:
        """Return the name in a file of the tensor of this name in the model."""
        return self.tuner._remove_adapter_name_from_key(key, self.name)

    @property
    def trains(self) -> bool:
        """True if any tensor of the adapters, or of those that they share, has a gradient."""
        shared = {adapter.info.shared for adapter in self.adapters.values()} - {None}
        modules = [*self.adapters.values(), *(pool for pool in shared if pool is not None)]
        return any(p.requires_grad for module in modules for p in module.parameters())


@dataclass
class NewAdapters(AdapterSet[C, A]):
    """Adapters that were just added to a model.

    Attributes:
        context: what the layers of the model share in a forward pass.
        hooks: handles of hooks, which are removed with the last adapter: append to it.
        placed: by name and path, all adapters that the model has, also later on.
    """

    context: ForwardContext = field(kw_only=True)
    hooks: list[RemovableHandle] = field(kw_only=True)
    placed: Mapping[str, Mapping[str, A]] = field(kw_only=True)

    def once(self, key: object) -> bool:
        """Return True the first time that it is asked for this key and model."""
        is_new = key not in self.kept
        self.kept[key] = True
        return is_new


@dataclass
class TrainContext(Generic[C, A]):
    """A model with its active adapters, which trains or has trained.

    Attributes:
        model: the base model.
        active: the active adapters.
        context: what the layers of the model share in a forward pass.
        kept: what the method remembers of this model, under keys of its own.
        optimizer: that of the training, or a wrapper that has one as `optimizer`; None: not given.
        step: completed optimizer steps.
        first: the step that `after_step` gets after the first step of a run: 0 in PEFT's loops, 1
            in petl's lifecycle.
        total: length of the run in optimizer steps, if it is known.
        groups: parameter groups, for `optimizer`.
    """

    model: nn.Module
    active: list[AdapterSet[C, A]]
    context: ForwardContext
    kept: dict[object, Any]
    optimizer: Optimizer | None = None
    step: int = 0
    first: int = 0
    total: int | None = None
    groups: list[Group] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The names of the active adapters."""
        return [adapters.name for adapters in self.active]

    @property
    def configs(self) -> list[C]:
        """The configs of the active adapters."""
        return [adapters.config for adapters in self.active]

    @property
    def adapters(self) -> list[tuple[str, A]]:
        """Path and adapter of all active adapters."""
        return [pair for adapters in self.active for pair in adapters.adapters.items()]

    @property
    def trained(self) -> list[AdapterSet[C, A]]:
        """Those of the active adapters that train."""
        return [adapters for adapters in self.active if adapters.trains]


class Method(Generic[C, A]):
    """A method: facts about it as class attributes, and hooks that petl asks.

    All hooks have a default. A method of PEFT is an instance of this class with PEFT's config.

    Attributes:
        name: the word after `+method=`.
        config_cls: its config.
        adapter_cls: what it trains on one layer; None for methods of PEFT.
        summary: one sentence.
        paper: authors, year, title or venue, arXiv id.
        need: what a user wants who chooses it, in a few words; `petl methods` groups by it.
        recommended: why it is the first to try for its need; "": it is not.
        lr: the default peak learning rate, with AdamW. Where it is not `LR`: measured, the best of
            the few that were tried on the quickstart task (docs/results.md).
        lr_by: a field with whose values in the mapping the method has another default than `lr`.
        rank: for a method of PEFT, the field for the rank of a layer's update, which has rank
            (I + O) parameters; "" if it has none.
        rank_step: `r` must be a multiple of this.
        defaults: fields that it sets, such as `use_dora` of "dora".
        acts: for a method of PEFT, fields that act only beside others; petl's fields say so.
        lacks: its rows of the table of petl/core/support.py: by capability, why it is lacking.
        needs_tuner: why its adapters cannot be loaded without the tuner, by transformers' own
            `load_adapter`; "": they can, if no tensors are shared.
        free_dims: by name of a tensor, the dimension that may have another size in a file.
        optional_tensors: last parts of names of tensors that a file may lack.
        by_position: True if an adapter changes each position by itself, and nothing counts the
            positions of a layer or reads those before a layer that computes a part of them; or a
            function of the config that returns it. Blocks may then compute fewer, see
            petl/efficiency/skip_unread/read_positions.py and petl/efficiency/tokens.
        capture_cls: hook that captures the input of an adapter with a source.
        charts: of metrics of its own.
        takes_task_ids: True if its model takes `task_ids`, one for each row, in `forward` and
            `generate`; its adapters read `ForwardContext.tasks`.
        features: what a run does besides training it, each "module:class", see
            `petl.training.features`.
        inner: of a `variant`, the inner method, whose fields it has in addition to its own.
        inner_defaults: defaults of the variant for fields of the inner method.
        own: True for a method of petl's kind, False for one of PEFT.
        start_tolerance: maximum difference of outputs at the start from the base model's.
        decays: False if weight decay leaves the adapter's tensors out; the head's may decay.
        keep_float32: True if its tensors never take the base model's half precision.
        resumable: values of fields of the config with which training can resume from a file.
        strength_tensors: patterns of the names of tensors in which the update of a layer is linear,
            or a function of the config that returns them, see petl/core/strengths.py; a pattern is
            for a part of the name between dots. (): there are none.
        strength_field: the field of its config with the strength of an adapter; "": none.
        strengths: that are tried where none are given, see petl/core/strengths.py; (): the default.
        components: by name, the tensors of a layer with its components in order, each of which is
            a part of the update of its own, or a function of the config that returns them, see
            petl/core/adapter_widths; a text: why there is no such order.
        over: the tuner of PEFT whose layers it trains; None: petl's own layers.
        tuner_cls: the tuner, which `make_tuner` generates; None: PEFT's.
    """

    name: str
    config_cls: type[C]
    adapter_cls: type[A] | None = None
    summary: str = ""
    paper: str = ""
    need: str = ""
    recommended: str = ""
    lr: float = LR
    lr_by: tuple[str, Mapping[str, float]] | None = None
    rank: str = ""
    rank_step: int = 1
    defaults: Mapping[str, object] = {}
    acts: Mapping[str, Acts] = {}
    lacks: Lacks = {}
    needs_tuner: str = ""
    free_dims: Mapping[str, int] = {}
    optional_tensors: tuple[str, ...] = ()
    by_position: bool | Callable[[Any], bool] = False
    capture_cls: type[InputCapture] = InputCapture
    charts: tuple[Chart, ...] = ()
    takes_task_ids: bool = False
    features: tuple[str, ...] = ()
    inner: str = ""
    inner_defaults: Mapping[str, object] = {}
    own: bool = False
    start_tolerance: float = 0.0
    decays: bool = True
    keep_float32: bool = False
    resumable: Mapping[str, object] = {}
    strength_tensors: tuple[str, ...] | Callable[[C], tuple[str, ...]] = ()
    strength_field: str = ""
    strengths: Sequence[float] = ()
    components: Ordered | Callable[[C], Ordered] = "its components have no order"
    over: type[BaseTuner] | None = None
    tuner_cls: type[BaseTuner] | None = None

    def __init__(self, **facts: object) -> None:
        """Create the method; `facts` are attributes, or functions in place of hooks."""
        vars(self).update(facts)

    def changed(self, **facts: object) -> Self:
        """Return a copy with other facts."""
        other = copy.copy(self)
        vars(other).update(facts)
        return other

    def overrides(self, hook: str) -> bool:
        """Return True if the method has a hook of its own, not the default."""
        own = getattr(self, hook)
        return getattr(own, "__func__", own) is not getattr(Method, hook)

    # What a config means

    def variant(self, fields: Mapping[str, object]) -> "Method[Any, Any]":
        """Return the method for these fields of the config: itself, unless it has an inner one."""
        return self

    def check(self, config: C) -> None:
        """Raise InputError for values that PEFT accepts and then fails on; for methods of PEFT.

        A config of petl has a `check` of its own.
        """

    def fit(self, config: C, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Likewise, with the shapes [O, I] of the linear layers that the config targets."""

    def keeps_base(self, config: C) -> bool:
        """Return True if the model without the adapter equals the pretrained one."""
        return True

    def needs_data(self, config: C) -> str:
        """Return the reason for which it needs calibration data, for a message; "": it needs none.

        A run passes them, `petl.wrap` as `calibration`.
        """
        return ""

    def is_computed(self, config: C) -> bool:
        """Return True if calibration makes the final adapter, so that nothing trains.

        A run then has train.steps=0, and its scores before are the base model's.
        """
        return False

    # Wrapping a model

    def targets(self, c: WrapContext[C]) -> list[Target]:
        """Return what gets an adapter; by default, the linear layers and experts of the config.

        Also replaces `config.target_modules` by what matches exactly these modules, which is saved.

        Raises:
            InputError: a module is missing, or of a kind that the method cannot adapt.
        """
        return linear_targets(c, self.lacking(Capability.EXPERTS, c.config))

    def settings(self, c: WrapContext[C]) -> Mapping[str, Settings]:
        """Return, by path of the target, what an adapter needs besides its shape.

        Its `info.settings`. A method refuses a model that it cannot adapt here, with an InputError.
        """
        return {}

    def shared(self, c: WrapContext[C]) -> nn.Module | None:
        """Return the tensors that all adapters of the set share, as a flat module, or None."""
        return None

    def calibrate(self, c: WrapContext[C]) -> Finish | None:
        """Compute what the adapters start from, before `petl.wrap` changes the model.

        Not called when an adapter is loaded. The function that it returns, if any, is called with
        the wrapped model.
        """
        return None

    def added(self, new: NewAdapters[C, A]) -> None:
        """Complete adapters that were just added; also before their tensors are loaded."""

    def removed(self, old: AdapterSet[C, A]) -> None:
        """Undo what `added` did outside of the adapters, which are gone and were not merged."""

    def joins(self, configs: Sequence[C]) -> str:
        """Return why adapters of these two or more configs cannot be active together; "": they can.

        `Adapter.combination_refusal` is for reasons that depend on an adapter's state.
        """
        return ""

    def released(self, idle: AdapterSet[C, A]) -> None:
        """Free what adapters hold while they are active; they are active no longer."""

    # Training

    def rate(self, t: TrainContext[C, A], name: str) -> float | None:
        """Return the peak learning rate of the parameter called `name`; None: that of all."""
        return None

    def optimizer(self, t: TrainContext[C, A]) -> Optimizer | None:
        """Return the optimizer that the method requires, over `groups`, or None."""
        return None

    def begin(self, t: TrainContext[C, A]) -> None:
        """Begin, or resume, a training with `optimizer` after `step` steps."""

    def after_step(self, t: TrainContext[C, A]) -> None:
        """Change ranks, masks or schedules after optimizer step `step`.

        It runs before gradients are cleared. A method that overrides it and can resume overrides
        `state` and `load_state`, too.
        """

    def is_idle(self, t: TrainContext[C, A]) -> bool:
        """Return True if `after_step` has nothing to do with these configs."""
        return False

    def state(self, t: TrainContext[C, A]) -> Tensors:
        """Return the state that exact resumption needs and the adapter file does not have."""
        return {}

    def load_state(self, t: TrainContext[C, A], state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned.

        Raises:
            InputError: the state is of another model.
        """

    # Results

    def planned(self, t: TrainContext[C, A]) -> int | None:
        """Return the number of parameters of the trained adapter; None: those that train now."""
        return None

    def metrics(self, t: TrainContext[C, A]) -> dict[str, float]:
        """Return metrics of the last training forward for the log."""
        return {}

    def figures(self, t: TrainContext[C, A]) -> dict[str, float]:
        """Return figures of the trained adapter for scores.json, such as its share of zeros."""
        return {}

    def heat_maps(self, t: TrainContext[C, A]) -> list[HeatMap]:
        """Return maps of what the method did, for the folder of a run; no forward pass is allowed.

        petl adds by how much each weight has changed, "weight_change", where it is not among them
        and the update is one matrix.
        """
        return []

    # Files

    def pack(self, saved: AdapterSet[C, A], tensors: Tensors) -> Tensors:
        """Return the tensors to save, given those of the adapters by their names in the model."""
        return tensors

    def unpack(self, saved: AdapterSet[C, A], tensors: Tensors) -> Tensors:
        """Return the tensors of the adapters, given those of a file, both by names without adapter.

        `Adapter.check_saved` then checks values.
        """
        return tensors

    # Derived

    @property
    def has_inner(self) -> bool:
        """True if its fields and capabilities depend on an inner method."""
        return self.overrides("variant")

    @property
    def updates(self) -> bool:
        """True if it changes its adapters while they train."""
        return self.overrides("after_step")

    def part(self, config: C) -> Part:
        """Return the method, with this config, as a part of a choice."""
        facts = facts_of(config)
        uses = {
            Capability.NEW_HEAD: facts.replaces_head,
            Capability.CHANGED_BASE: not self.keeps_base(config),
            Capability.BIASES: facts.trains_biases,
        }
        lacks = {each: partial(self.lacking, each) for each in Capability}
        return Part(f"method {self.name}", [c for c, used in uses.items() if used], lacks, config)

    def lacking(self, capability: Capability, config: C | None = None) -> str:
        """Return why it lacks a capability with this config; "": it has it.

        Args:
            capability: of the table.
            config: None for a capability of all configs.
        """
        if capability is Capability.LORA_EXPORT:
            return without_lora(self.lacks, config)
        if capability in self.lacks:
            return reason_of(self.lacks, capability, config)
        if capability is Capability.EXPERTS:
            if not self.own:
                return self._why_no_experts(config)
            return NO_EXPERTS if self.overrides("targets") else ""
        if capability is Capability.RANKS:
            # AdaLoRA has an `r` that it does not use
            known = {"r", "rank_pattern"} <= self.config_cls.__dataclass_fields__.keys()
            return "" if known and self.rank in ("", "r") else "it has no rank_pattern"
        if capability is Capability.NEW_TOKENS:
            known = "trainable_token_indices" in self.config_cls.__dataclass_fields__
            return "" if known else "PEFT's config of it has no trainable_token_indices"
        is_computed = config is not None and self.is_computed(config)
        if is_computed and capability in (Capability.EXTRA_LOSS, Capability.FIND_LR):
            return "it computes its adapter from data and trains nothing (train.steps=0)"
        # what a layer computes for a row must depend on that row and on the adapter alone
        if capability is Capability.TOGETHER and self.tuner is not LoraModel:
            return "the method is not written for rows of several adapters in training"
        if capability is Capability.ADAMR and self.updates:
            return (
                "it adds or exchanges entries while it trains, and the reference does not move "
                "with them"
            )
        return ""

    def _why_no_experts(self, config: C | None) -> str:
        """Return why a method of PEFT adapts no stacks of experts; "": a plain LoRA does.

        PEFT's LoRA adapts single parameters, which its other methods do not.
        """
        if self.tuner is not LoraModel:
            return NO_EXPERTS
        facts = facts_of(config)
        start = facts.init_lora_weights
        # a start from random numbers reads no weight
        wrong = [] if start in (None, True, False, "gaussian") else [f"init_lora_weights={start}"]
        fields = ("use_dora", "lora_bias", "fan_in_fan_out")
        wrong += [f"{field}=true" for field in fields if getattr(facts, field)]
        what = f"with {', '.join(wrong)} LoRA adapts linear layers, and no stacked experts"
        return f"{what}; use lora without it" if wrong else ""

    @property
    def merges(self) -> bool:
        """True if the adapter can be merged into the base weights."""
        return not self.lacking(Capability.MERGE)

    @property
    def exports_lora(self) -> bool:
        """True if it can be saved as a plain LoRA."""
        return not self.lacking(Capability.LORA_EXPORT)

    @property
    def by(self) -> str:
        """The package that implements it: "petl", "PEFT", or the name of another."""
        # of the config: PEFT's LoRA stays PEFT's, though petl lists it
        package = self.config_cls.__module__.partition(".")[0]
        return "PEFT" if package == "peft" else package

    @property
    def tuner(self) -> type[Any]:
        """The tuner class of the method."""
        return self.tuner_cls or tuner_class(self.config_cls)

    def default_lr(self, fields: Mapping[str, object]) -> float:
        """Return the default peak learning rate with these fields of the config."""
        if self.lr_by is None:
            return self.lr
        name, rates = self.lr_by
        return rates.get(str(fields.get(name)), self.lr)

    def log_other_defaults(self, config: PeftConfig, given: Mapping[str, object]) -> None:
        """Log, in one line, the fields that are not given and have other defaults in train.py.

        There each field has the value of the method's YAML file, here that of the config class:
        PEFT's, for its own methods, so that `petl.wrap(model, "lora")` is what `peft.LoraConfig()`
        gives.
        """
        if not logger.isEnabledFor(logging.INFO):
            return
        inner = {**method_preset(self.inner), **self.inner_defaults} if self.inner else {}
        preset = {**inner, **method_preset(self.name), **given}
        here, there = [], []
        for name, value in preset.items():
            used = getattr(config, name, value)
            used = sorted(used) if isinstance(used, set) else used
            # a mapping is a group of settings of train.py
            is_field = name not in given and name != "name" and not isinstance(value, dict)
            if is_field and used != value:
                here.append(f"{name}={used}")
                there.append(f"{name}={value}")
        if here:
            logger.info(
                "%s: fields that are not given have the defaults of petl.wrap, %s; train.py has %s",
                self.name,
                ", ".join(here),
                ", ".join(there),
            )


# Targets


def linear_targets(c: WrapContext[Any], no_experts: str = NO_EXPERTS) -> list[Target]:
    """Return the linear layers that `config.target_modules` names; None: all inside the blocks.

    Args:
        no_experts: why the method adapts no stacks of experts; "": it does, as one linear layer for
            each expert.
    """
    # PEFT's default, for which it has a table of models
    if c.config.target_modules is None:
        c.config.target_modules = "all-linear"
    # PEFT's word; here it leaves out layers outside of blocks
    resolve_targets(c.config, c.model, words=("all-linear",), no_experts=no_experts)
    linear = [linear_target(c, path) for path in matched_names(c.config, c.model)]
    stacks = [] if no_experts else matched_stacks(c.config, c.model)
    return linear + [target for stack in stacks for target in expert_targets(c, stack)]


def expert_targets(c: WrapContext[C], stack: str) -> list[Target]:
    """Return a target for each expert of the stack at this path."""
    path, _, name = stack.rpartition(".")
    module = c.model.get_submodule(path)
    layout = experts_of(module)
    assert layout is not None
    _, *widths = layout.shape(module, name)
    paths = paths_of_experts(stack, layout.count(module))
    return [Target(each, LayerShape(*widths), stack=stack) for each in paths]


def linear_target(c: WrapContext[Any], path: str, source: str = "") -> Target:
    """Return the target at `path`.

    Raises:
        ModuleKindError: it is no linear layer, or one that the model does not call.
    """
    module = c.model.get_submodule(path)
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if not isinstance(base, LINEAR_KINDS) and not hasattr(base, "in_features"):
        raise ModuleKindError(
            f"{path} is {type(base).__name__}, not a linear layer; "
            f"method {c.config.method!r} adapts nn.Linear and Conv1D"
        )
    refuse_other_kind(base, path)
    refuse_fused(c.model, path)
    return Target(path, shape_of(base), source)
