"""The prefix of a model: its blocks below the lowest one that trains, and what runs before them."""

from collections import Counter
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from petl.core.compat import AuxiliaryTrainingWrapper, BaseTunerLayer
from petl.core.layers.class_swap import mixins_of
from petl.core.layers.context import arguments_of_forward, is_encoder_decoder
from petl.core.model.linear import linear_names
from petl.core.model.places import place
from petl.core.parameters import quantization_of
from petl.core.types import CausalModel, base_of
from petl.efficiency.frozen.keys import IDS, MEDIA
from petl.errors import UnsupportedError
from petl.ops.low_rank import hooks_of

# settings of a config that the output of blocks in evaluation mode does not depend on
# one that is missing here costs a store that is computed again, never a wrong one
OTHER = {
    *("id2label", "label2id", "num_labels", "problem_type", "_name_or_path", "use_cache"),
    *("architectures", "transformers_version", "torch_dtype", "dtype", "finetuning_task"),
    *("output_hidden_states", "output_attentions", "return_dict", "is_encoder_decoder"),
}
CAPTURING = "transformers.utils.output_capturing"  # its hooks do nothing unless outputs are asked


@dataclass(frozen=True)
class FrozenPrefix:
    """The first k blocks of a list of blocks.

    Attributes:
        path: of the list of blocks, in the base model.
        blocks: all of them.
        k: number of blocks in the prefix, from 0 to all.
        reason: why it ends there: what the first block above it has; "" if there is none.
        body: the module that gets the model's inputs and calls the blocks.
        base: the model without PEFT's wrapper.
    """

    path: str
    blocks: tuple[nn.Module, ...]
    k: int
    reason: str
    body: PreTrainedModel
    base: nn.Module

    @property
    def own(self) -> tuple[nn.Module, ...]:
        """The blocks of the prefix."""
        return self.blocks[: self.k]


def find_prefix(model: nn.Module) -> FrozenPrefix:
    """Return the longest prefix of a model of which nothing is trained, adapted or observed.

    Of an encoder-decoder it is that of the encoder. What runs before the blocks, such as the
    embeddings, is not looked at.

    Raises:
        UnsupportedError: the model has no single list of blocks, or is quantized.
    """
    base = base_of(model)
    path = _path_of_blocks(base)
    blocks = tuple(cast(nn.ModuleList, base.get_submodule(path)))
    parts = path.split(".")
    parents = (base.get_submodule(".".join(parts[:n])) for n in range(len(parts)))
    # an encoder inside of a model may be one of its own, which gets embeddings
    bodies = [
        module
        for module in parents
        if isinstance(module, PreTrainedModel)
        and not set(arguments_of_forward(type(module))).isdisjoint((IDS, *MEDIA))
    ]
    if not bodies:
        raise UnsupportedError(
            f"the blocks of {type(base).__name__} are in no model of transformers, so the inputs "
            "that they depend on are not known"
        )
    if quantization_of(base):
        raise UnsupportedError(
            f"the base model is quantized ({quantization_of(base)}), and its weights have no digest"
        )
    # what is above a block that runs is computed from its output, so the first one ends the prefix
    reasons = (reason_to_run(block) for block in blocks)
    first = ((i, f"block {i}: {why}") for i, why in enumerate(reasons) if why)
    k, reason = next(first, (len(blocks), ""))
    # the innermost body: an outer one also gets labels and what only its head reads
    return FrozenPrefix(path, blocks, k, reason, bodies[-1], base)


def _path_of_blocks(base: CausalModel) -> str:
    places = (place(base, name) for name in linear_names(base))
    paths = list(dict.fromkeys(where.stack for where in places if where is not None))
    if is_encoder_decoder(base):
        inside = set(base.get_encoder().modules())
        paths = [path for path in paths if base.get_submodule(path) in inside]
    if len(paths) != 1:
        found = ", ".join(paths) or "none"
        raise UnsupportedError(
            f"{type(base).__name__} has no single list of blocks with linear layers (found: "
            f"{found})"
        )
    return paths[0]


def reason_to_run(block: nn.Module) -> str:
    """Return why a block must run in every pass; "" if its output follows from its input."""
    for name, module in block.named_modules():
        where = f"{name} " if name else ""
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            return f"{where}has an adapter"
        # whole blocks with adapters, quantized weights, merged tokens; not recomputation
        if not all(mixin.computes_as_before for mixin in mixins_of(module)):
            return f"{where}computes otherwise with an adapter"
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            return f"{where}is trained"
        if any(getattr(hook, "__module__", "") != CAPTURING for hook in hooks_of(module)):
            return f"{where}has a hook"
    return ""


def reason_before(prefix: FrozenPrefix, modules: Iterable[tuple[str, nn.Module]]) -> str:
    """Return why the input of the blocks is no fixed function of a row; "" if it is.

    Args:
        modules: that were called up to the end of the prefix, by name.
    """
    inside = {module for block in prefix.own for module in block.modules()}
    for name, module in modules:
        # the tensors of an adapter may be in containers, which are never called
        is_adapted = isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        if is_adapted and module not in inside:
            return f"{name}, which has an adapter, is read before the blocks"
        trained = [key for key, p in module.named_parameters(recurse=False) if p.requires_grad]
        if trained:
            where = ".".join(filter(None, (name, trained[0])))
            return f"{where}, which is trained, is read before the blocks"
    return ""


class PassEnd(Exception):
    """Ends a pass of a model: what is computed after the prefix is not needed.

    No BaseException of another kind: torch runs `always_call` hooks after an Exception only.
    """


@dataclass
class PrefixPass:
    """What one pass of a model shows of its prefix.

    Attributes:
        called: the modules that ran up to the end of the prefix, by name in the body.
        output: of the last block of the prefix; None: the pass did not reach it.
        calls: of each module in the whole pass.
    """

    called: dict[str, nn.Module] = field(default_factory=dict)
    output: Any = None
    calls: Counter[nn.Module] = field(default_factory=Counter)


@contextmanager
def watched_pass(
    prefix: FrozenPrefix, reached: Callable[[], object] = lambda: None
) -> Generator[PrefixPass]:
    """Watch a pass inside the block, which ends with the body of the model.

    Args:
        reached: called at the end of the prefix.
    """
    seen = PrefixPass()
    # families differ in what runs before block 0, so this is seen from a pass, not from names
    names = {module: name for name, module in prefix.body.named_modules()}

    def note(module: nn.Module, _: object) -> None:
        seen.calls[module] += 1
        if seen.output is None:
            seen.called.setdefault(names[module], module)

    def keep(block: nn.Module, _: object, output: object) -> None:
        if seen.output is None:
            seen.output = output
            reached()

    def end(*_: object) -> None:
        raise PassEnd

    hooks = [module.register_forward_pre_hook(note) for module in names]
    hooks += [prefix.own[-1].register_forward_hook(keep), prefix.body.register_forward_hook(end)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def reason_of_pass(prefix: FrozenPrefix, seen: PrefixPass) -> str:
    """Return why the output of a prefix is no fixed function of a row; "" if it may be one."""
    from petl.core.model.structure import layer_drop  # of models with frozen blocks alone

    setting = layer_drop(prefix.body.config)
    if setting:
        return f"the model's config has {setting}: training leaves out blocks at random"
    reason = reason_before(prefix, seen.called.items())
    if reason:
        return reason
    for i, block in enumerate(prefix.own):
        if seen.calls[block] > 1:  # as ALBERT's do
            return f"block {i} runs {seen.calls[block]} times in a pass, each time on another input"
    return ""


def dropouts(modules: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """Return the dropout modules that are not switched off, with their probability."""
    return [
        f"{name} ({module.p:g})"
        for name, module in modules
        # base of torch's dropout modules; F.dropout is found by a pass in training mode (fill.py)
        if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0
    ]
