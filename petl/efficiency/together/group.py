"""A group of adapters, each in a model of its own, that share one base and one pass over it.

`share_weights` copies the modules of a model and not its weights, so K models take the memory of
one. A group has one more such copy, in which modules for the rows of all members take the place of
adapted layers; the members' own models stay as they are and evaluate, save and load as ever.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from petl.core.compat import AuxiliaryTrainingWrapper, BaseTunerLayer, ModulesToSaveWrapper
from petl.core.experts.layer import ExpertLayer
from petl.core.experts.lora import FusedExperts, GroupedExperts
from petl.core.layers.block import BlockAdapters
from petl.core.layers.grouped import (
    GroupedLora,
    GroupedLowRank,
    GroupedModules,
    InputHook,
    RowDropout,
    StackedParameter,
)
from petl.core.layers.layer import AdapterLayer
from petl.core.model.copies import share_weights
from petl.core.model.structure import layer_drop
from petl.core.parameters import trainable
from petl.core.support import Capability, Part, require_compatible
from petl.core.types import Arguments, base_of
from petl.efficiency.frozen.feed import feed_of
from petl.efficiency.fused_lora.layer import FusedLoraLinear
from petl.efficiency.rewrite import parts_of
from petl.efficiency.together.batches import (
    MASKS,
    Batch,
    GroupedBatch,
    check_loss,
    joined,
    loss_of,
    part,
    rows_of,
)
from petl.errors import InputError, UnsupportedError

TOGETHER = Part(
    "training of several adapters in one pass",
    (Capability.TOGETHER,),
    {
        Capability.CHANGED_BASE: "their initial values are taken out of the base weights, which "
        "all jobs share (as with init_lora_weights=pissa); choose another initialization, or train "
        "them one by one",
        Capability.BIASES: "it trains biases of the base, of which a pass of several has one",
        Capability.EXTRA_LOSS: "an extra loss observes one model, and the rows are of several",
        Capability.CHECKPOINTING: "it would draw other dropout masks; train fewer at once",
    },
)


GROUPED = AdapterLayer | ModulesToSaveWrapper | FusedExperts


class Member:
    """An adapter of a group.

    Attributes:
        model: the PeftModel of this adapter alone.
        generator: random numbers of its dropout, in the adapter and in the base; None: the default
            ones.
        base: the transformers model inside.
        adapted: by path in `base`, the layers and heads with trained tensors.
        trained: the trained tensors.
        precision: dtype of autocast of its run; "": none. Set where runs differ.
    """

    precision = ""

    def __init__(self, model: PeftModel, generator: torch.Generator | None = None) -> None:
        refuse(model)
        self.model, self.generator = model, generator
        self.base = base_of(model)
        self.adapted = dict(adapted_modules(self.base))
        self.trained = [parameter for _, parameter in trainable(model)]
        for path, layer in self.adapted.items():
            refuse_layer(path, layer)

    @property
    def name(self) -> str:
        """The name of the adapter in the model."""
        return self.model.active_adapters[0]


def refuse(model: PeftModel) -> None:
    """Raise UnsupportedError if the adapter of `model` cannot train together with others."""
    drop = layer_drop(base_of(model).config)
    if drop:
        raise UnsupportedError(
            f"{TOGETHER.name} is not possible with {drop} of the base's config: it leaves out "
            "layers for all rows of a pass"
        )
    require_compatible([TOGETHER, *parts_of(model)])


def adapted_modules(base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module of the adapted layers and trained heads, not of modules inside them."""
    found: list[str] = []
    for path, module in base.named_modules():
        if any(path.startswith(f"{outer}.") for outer in found):
            continue
        if isinstance(module, BlockAdapters):
            raise UnsupportedError(
                f"{path} adapts a whole block, which passes more than one tensor on: such adapters "
                "cannot train together"
            )
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            found.append(path)
            yield path, module


def refuse_layer(path: str, layer: nn.Module) -> None:
    """Raise UnsupportedError unless there is a form of this layer for the rows of several."""
    if isinstance(layer, FusedLoraLinear):
        if layer._only_active() is None:
            raise UnsupportedError(
                f"the LoRA layer {path} is not two plain factors (DoRA, a bias, or another "
                "variant), so adapters cannot train together"
            )
    elif isinstance(layer, ExpertLayer) or not isinstance(layer, GROUPED):
        raise UnsupportedError(
            f"{path} is {type(layer).__name__}, which cannot compute the rows of several adapters "
            "in training"
        )


class AdapterGroup:
    """Adapters that train in one pass over one base.

    The members may change between passes. `losses` and `backward` are one pass; each member then
    has the gradients in its own parameters that a pass of its own would have given.

    Args:
        checked: the loss is known to be the model's own, see `check_loss`.

    Attributes:
        members: in the order of their rows.
    """

    def __init__(self, *, checked: bool = False) -> None:
        self.members: list[Member] = []
        self._lead: nn.Module | None = None  # built at the next pass
        self._stacks: list[StackedParameter] = []
        self._checked = checked

    def join(self, member: Member) -> None:
        """Add a member behind the others.

        Raises:
            InputError: its adapter is of another method, or on other modules.
        """
        if self.members:
            check_alike(self.members[0], member)
        # the stacks have another K from now on
        self.dissolve()
        self.members.append(member)

    def leave(self, member: Member) -> None:
        """Remove a member, whose tensors get memory of their own."""
        self.dissolve()
        self.members.remove(member)

    def dissolve(self) -> None:
        """Give all tensors memory of their own; the next pass stacks them again."""
        for stack in self._stacks:
            stack.release()
        self._stacks, self._lead = [], None

    def losses(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Return the loss of each member over its batch, 0-d, with auxiliary losses of its own.

        Args:
            batches: with labels, in the order of the members.
        """
        members = self.members
        if not self._checked:
            check_loss(members[0].model, batches[0])
            self._checked = True
        lead = self._built()
        for stack in self._stacks:
            stack.refresh()
        # without labels: the model's own loss would be a mean over the rows of all members
        together = joined(members[0].base, batches)
        contexts = [
            context_of(member, batch, together, k)
            for k, (member, batch) in enumerate(zip(members, batches, strict=True))
        ]
        for member, inputs in zip(members, contexts, strict=True):
            run_pre_hooks(member.base, inputs)
        with drawing_by_rows([member.generator for member in members], together.rows):
            output = lead(**together.inputs)
        losses = []
        for k, (member, batch) in enumerate(zip(members, batches, strict=True)):
            own = part(output, k, together.rows, batch)
            result = {"loss": loss_of(member.base, own, batch)}
            losses.append(run_hooks(member.base, contexts[k], result)["loss"])
        return losses

    def backward(self, losses: Sequence[Tensor]) -> None:
        """Add the gradients of the members' losses to those of their parameters."""
        # one call: the members' losses have one graph
        torch.autograd.backward(list(losses))
        for stack in self._stacks:
            stack.hand_out()

    def _built(self) -> nn.Module:
        """The model for the rows of all members; built again after they have changed."""
        if self._lead is None:
            for member in self.members:
                for parameter in member.trained:  # switching another model has frozen none of them
                    parameter.requires_grad_(True)
            self._lead, self._stacks = build(self.members)
        return self._lead


@contextmanager
def drawing_by_rows(generators: Sequence[torch.Generator | None], rows: int) -> Generator[None]:
    """Inside the block, a pass draws each member's random numbers from its own generator.

    Raises:
        UnsupportedError: it has drawn others, which members would share.
    """
    own = [generator for generator in generators if generator is not None]
    if len(own) < len(generators):
        yield
        return
    before = default_states(own[0].device)
    with RowDropout(own, rows):
        yield
    if default_states(own[0].device) != before:
        raise UnsupportedError(
            "the base model draws random numbers other than by dropout of its rows, so those of "
            "several adapters cannot be told apart: train its adapters one by one"
        )


def default_states(device: torch.device) -> tuple[object, ...]:
    """Return the states of torch's generator of a device and of numpy's."""
    source: ModuleType = torch if device.type == "cpu" else torch.get_device_module(device)
    of_numpy: Any = np.random.get_state()
    _, keys, position, *_ = of_numpy
    return source.get_rng_state().numpy().tobytes(), keys.tobytes(), position


def check_alike(first: Member, other: Member) -> None:
    """Raise InputError if two adapters cannot be members of one group."""
    kinds = [type(member.model.active_peft_config).__name__ for member in (first, other)]
    if kinds[0] != kinds[1]:
        raise InputError(
            f"adapters that train together are of one method, and these are {kinds[0]} and "
            f"{kinds[1]}: call it once for each method"
        )
    differing = sorted(first.adapted.keys() ^ other.adapted.keys())
    if differing:
        raise InputError(
            f"adapters that train together are on the same modules, and {differing[0]} is adapted "
            "by one of two only"
        )
    fed = [feed_of(member.base) is not None for member in (first, other)]
    if fed[0] != fed[1]:
        raise InputError(
            "one of two adapters reads the output of its frozen blocks from a store, and the other "
            "computes it: adapters that train together do the same"
        )
    weights, others = (base_weights(member) for member in (first, other))
    # the same objects, not equal values: the pass reads those of the first member
    foreign = next((name for name, weight in weights.items() if others[name] is not weight), None)
    if foreign is not None:
        raise InputError(
            f"adapters that train together share the weights of their base, and {foreign} has two: "
            "make the models by share_weights"
        )


def base_weights(member: Member) -> dict[str, nn.Parameter]:
    """Return the frozen parameters of the base, without those of modules that train as a whole."""
    heads = [p for p, m in member.adapted.items() if isinstance(m, AuxiliaryTrainingWrapper)]
    return {
        name: parameter
        for name, parameter in member.base.named_parameters()
        if not parameter.requires_grad and not any(name.startswith(f"{h}.") for h in heads)
    }


def build(members: Sequence[Member]) -> tuple[nn.Module, list[StackedParameter]]:
    """Return the model for the rows of all members, and the stacked tensors in it."""
    lead = share_weights(members[0].base)
    # the copy has the mode of its modules, but a member may have changed since
    lead.train(members[0].base.training)
    # the members' own run in their place, with their own inputs
    for hooks in (lead._forward_pre_hooks, lead._forward_hooks):
        # deepcopy has copied these dicts, so the member's model keeps its hooks
        hooks.clear()
    feed = feed_of(lead)
    if feed is not None:  # each member may have rows of its own
        feeds: list[Any] = [feed_of(member.base) for member in members]
        stores = {store.folder: store for each in feeds for store in each.stores}
        feed.stores = list(stores.values())
    stacks: list[StackedParameter] = []
    generators = [member.generator for member in members]
    for path in members[0].adapted:
        layers = [member.adapted[path] for member in members]
        names = [member.name for member in members]
        copied = lead.get_submodule(path)
        new = grouped(copied, layers, names, generators)
        # others read the parameters of the members themselves
        if isinstance(new, GroupedLowRank):
            stacks += new.stacks
        # under the same path, so that hooks find their modules
        owner, _, name = path.rpartition(".")
        setattr(lead.get_submodule(owner), name, new)
    attach_captures(lead, members)
    return lead, stacks


def grouped(
    copied: Any,
    layers: Sequence[Any],
    names: Sequence[str],
    generators: Sequence[torch.Generator | None],
) -> nn.Module:
    """Return the module that computes what `layers` compute, each for the rows of its own.

    Args:
        copied: a copy of the first layer, whose base layer the new module takes.
        layers: of the members.
        names: of their adapters.
        generators: of their dropout.
    """
    first, pairs = layers[0], list(zip(layers, names, strict=True))
    if isinstance(first, ModulesToSaveWrapper):
        return GroupedModules([layer.modules_to_save[name] for layer, name in pairs], generators)
    if isinstance(first, FusedLoraLinear):
        factors = [layer._factors(name) for layer, name in pairs]
        dropouts = [layer.lora_dropout[name] for layer, name in pairs]
        return GroupedLora(copied.base_layer, generators, factors, dropouts)
    if isinstance(first, FusedExperts):
        return GroupedExperts(copied.get_base_layer(), layers, names, generators)
    for capture in copied.captures.values():  # a copy, which would keep the input
        capture.detach()
    adapters = [layer.adapters[name] for layer, name in pairs]
    captured = InputHook() if first.captures else None
    return type(adapters[0]).grouped(adapters, copied.base_layer, generators, captured)


def attach_captures(lead: nn.Module, members: Sequence[Member]) -> None:
    """Register the hooks through which layers get the input of another module."""
    for path, layer in members[0].adapted.items():
        captures = getattr(layer, "captures", None) or {}
        for capture in captures.values():
            module: Any = lead.get_submodule(path)
            source = lead.get_submodule(capture.source)
            source.register_forward_pre_hook(module.captured, with_kwargs=True)


# The hooks of the members' base models, by which tuners follow a pass


def context_of(member: Member, batch: Batch, together: GroupedBatch, k: int) -> Arguments:
    """Return the inputs as member k's own hooks shall see them: of its rows, with its labels.

    Rows that were added to fill up the batch are masked: statistics over tokens leave them out.

    Raises:
        InputError: there are such rows, and statistics over inputs that have no mask.
    """
    first, count = k * together.rows, rows_of(batch)
    own = {
        name: value[first : first + together.rows] if isinstance(value, Tensor) else value
        for name, value in together.inputs.items()
    }
    if count < together.rows and member.base._forward_pre_hooks:
        if "input_ids" in own:
            own.setdefault("attention_mask", torch.ones_like(own["input_ids"]))
        elif "attention_mask" not in own:
            raise InputError(
                f"batches of {count} and {together.rows} rows: adapters of this method train "
                "together on such inputs with batches of as many rows"
            )
        for name in MASKS:
            if name in own:
                own[name] = own[name].clone()
                own[name][count:] = 0
    return {**own, **{name: batch[name] for name in ("labels",) if name in batch}}


def run_pre_hooks(base: nn.Module, kwargs: Mapping[str, object]) -> None:
    """Call the forward pre-hooks of a model, as its own call would."""
    for key, hook in base._forward_pre_hooks.items():
        if key in base._forward_pre_hooks_with_kwargs:
            cast(Any, hook)(base, (), dict(kwargs))
        else:
            cast(Any, hook)(base, ())


def run_hooks(base: nn.Module, kwargs: Mapping[str, object], output: dict[str, Tensor]) -> Any:
    """Call the forward hooks of a model with this output; return it as they leave it."""
    for key, hook in base._forward_hooks.items():
        if key in base._forward_hooks_with_kwargs:
            result = cast(Any, hook)(base, (), dict(kwargs), output)
        else:
            result = cast(Any, hook)(base, (), output)
        output = output if result is None else result
    return output
