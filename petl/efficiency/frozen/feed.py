"""Stored states in place of the frozen blocks, in the passes of a model whose rows all have them.

The tree of modules does not change. The class of each block of the prefix is swapped for one that
can return without running: the first block returns the stored states, the others what they get.
Everything else runs as before: embeddings, masks, rotary embeddings, the blocks above. Hooks in
front of the model's body look its rows up.
"""

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from petl.core.layers.class_swap import SwappedClass, restore_class, swap_class
from petl.core.layers.context import arguments_of_forward
from petl.efficiency.frozen.keys import KeyedRows, arguments_of, rows_of
from petl.efficiency.frozen.prefix import FrozenPrefix
from petl.efficiency.frozen.store import Store
from petl.system.collectives import REPLICA

logger = logging.getLogger(__name__)
# a look-up reads values on the host, so a compiled model breaks its graph there
_outside_graphs = torch.compiler.disable(
    reason="petl.cache_frozen looks up the rows of a batch: compile without fullgraph, or close it"
)


class FedBlock(SwappedClass):
    """Mixin for the class of a block of the prefix.

    Attributes:
        petl_feed: of the model.
    """

    computes_as_before = True
    petl_feed: "FrozenFeed"

    # not `forward`: checkpointing of transformers and torch's hooks act in `__call__`
    def __call__(self: Any, *args: object, **kwargs: object) -> object:
        feed = self.petl_feed
        if feed.states is None or REPLICA in self.__dict__:
            return super().__call__(*args, **kwargs)
        # neither hooks nor checkpointing: there is nothing to compute or to compute again
        if self is feed.prefix.blocks[0]:
            return feed.returned(feed.states)
        return feed.returned(args[0] if args else kwargs["hidden_states"])


@dataclass
class FrozenPasses:
    """Passes of a model, and of its copies.

    Attributes:
        hits, misses: that were and were not from a store.
        reason: of the last miss.
    """

    hits: int = 0
    misses: int = 0
    reason: str = ""

    def __deepcopy__(self, _: object) -> "FrozenPasses":
        return self


class FrozenFeed:
    """The hooks of a model and the swapped classes of its blocks.

    `copy.deepcopy` of the model gives the copy a feed of its own, with the same stores.

    Attributes:
        stores: that are looked up, in this order.
        states: those of the pass that runs, [B, T, ...]; None: its blocks run.
        watcher: called with the rows of each pass, in place of looking them up.
        passes: that looked their rows up.
        is_unchanged: compares the weights of the prefix with those of the stores.
    """

    def __init__(self, model: nn.Module, prefix: FrozenPrefix) -> None:
        self.prefix, self.stores = prefix, list[Store]()
        self.states: Tensor | None = None
        self.watcher: Callable[[KeyedRows], None] | None = None
        self.passes = FrozenPasses()
        self.autocast = ""  # of the states in the stores
        self.called: Mapping[str, nn.Module] = {}
        self.modules = list[nn.Module]()
        self.weights: tuple[object, ...] = ()
        self.wrong: tuple[object, ...] = ()
        self.is_unchanged: Callable[[], bool] = lambda: False
        self.inside = list[nn.Module]()  # a tuner and the base model in it may both be the body
        # a tuner calls the `forward` of its model, past the hooks of that model
        bodies: list[nn.Module] = [prefix.body]
        if prefix.body is prefix.base and model is not prefix.base:
            bodies.append(getattr(model, "base_model", prefix.body))
        self._hooks = [
            hook
            for body in dict.fromkeys(bodies)
            for hook in (
                # before other hooks, which may take the mask away
                body.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True),
                body.register_forward_hook(self._leave, always_call=True),
            )
        ]
        for block in prefix.own:
            block.__dict__["petl_feed"] = self
            swap_class(block, FedBlock)

    def close(self) -> None:
        """Undo all changes to the model."""
        for hook in self._hooks:
            hook.remove()
        for block in self.prefix.own:
            # of a block that was sharded since the class stays, and it runs: no pass has states
            restore_class(block, FedBlock)

    def returned(self, states: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        """Return states in the form of a block's output."""
        outputs = self.stores[0].form.outputs
        return (states, *[None] * (outputs - 1)) if outputs else states

    def remember(self, called: Mapping[str, nn.Module]) -> None:
        """Note the modules and weights of the prefix: the stores are of these.

        Args:
            called: modules that run up to the end of the prefix, by name in the body.
        """
        self.called, self.wrong = called, ()
        self.modules, self.weights = self._modules(), self._written()

    def _modules(self) -> list[nn.Module]:
        inside = [module for block in self.prefix.own for module in block.modules()]
        body = self.prefix.body
        # the others by name: an adapter takes the place of the module that it is for
        return inside + [body.get_submodule(name) for name in self.called]

    def _written(self) -> tuple[object, ...]:
        """Return what changes when a weight is written or replaced; None for one that trains."""
        weights = (p for module in self.modules for p in module._parameters.values())
        # torch counts writes in place, but not those through `.data`, which may change the memory
        return tuple(
            None if p.requires_grad else (p._version, p.data_ptr(), p.dtype)
            for p in weights
            if p is not None
        )

    def has_changed(self) -> bool:
        """Return True if the prefix is no longer the one of the stores."""
        if self._modules() != self.modules:
            return True
        written = self._written()
        if written == self.weights:
            return False
        # DDP writes the same values again: they are compared, once
        if None in written or written == self.wrong or not self.is_unchanged():
            self.wrong = written
            return True
        self.weights = written
        return False

    # Around a pass of the body

    @_outside_graphs
    def _enter(
        self, body: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]] | None:
        if REPLICA in body.__dict__:  # several at once, in threads that share this feed
            self.passes.misses += 1
            self.passes.reason = "nn.DataParallel runs copies of the model: start it with torchrun"
            return None
        # torch calls `_leave` after an exception, but not after Ctrl-C: that pass is over
        if body in self.inside:
            self.inside, self.states = [], None
        self.inside.append(body)
        # an exported pass runs all blocks: its inputs have no values
        if len(self.inside) > 1 or torch.compiler.is_compiling():
            return None
        given = arguments_of(self.prefix.body, args, kwargs)
        rows = rows_of(given, packs=getattr(self.prefix.base, "petl_packs", False))
        # before the stores: a prober needs the output of the blocks even for rows that are stored
        if self.watcher is not None:
            self.watcher(rows)
            return None
        if not self.stores:
            return None
        reason = rows.reason or self._why_not()
        if not reason:
            self.states = self._look_up(rows, _device_of(given))
        if self.states is None:
            self.passes.reason = reason or "rows that are in no store"
            self.passes.misses += 1
            return None
        self.passes.hits += 1
        # no key-value cache: it would lack the blocks that do not run
        return (args, {**kwargs, "use_cache": False}) if self._takes_cache(given) else None

    @_outside_graphs
    def _leave(self, body: nn.Module, *_: object) -> None:
        self.inside = [each for each in self.inside if each is not body]
        if not self.inside:
            self.states = None

    def _takes_cache(self, given: Mapping[str, object]) -> bool:
        return given.get("use_cache") is None and "use_cache" in arguments_of_forward(
            type(self.prefix.body)
        )

    def _why_not(self) -> str:
        """Return why a pass with known rows runs its blocks; "" if it need not."""
        config = self.prefix.body.config
        asked = [
            name
            for name in ("output_hidden_states", "output_attentions", "output_router_logits")
            if getattr(config, name, False)
        ]
        if asked:
            return f"the model's config has {asked[0]}"
        if autocast_of(self.prefix.body) != self.autocast:
            return "the precision is another one than that of the store"
        if self.has_changed():
            return "the frozen blocks have changed since the store was opened"
        return ""

    def _look_up(self, rows: KeyedRows, device: torch.device) -> Tensor | None:
        """Return the states of a batch's rows, padded with zeros; None if some have none."""
        found: list[Tensor | None] = [None] * len(rows.keys)
        for store in self.stores:
            numbers = store.find(rows.keys)
            # a row in two stores may differ in rounding: always that of the first
            for i in np.flatnonzero(numbers >= 0).tolist():
                found[i] = found[i] if found[i] is not None else store.row(int(numbers[i]))
        states = [row for row in found if row is not None]
        if len(states) < len(found) or not states:
            return None
        return gathered(states, rows, self.prefix.blocks, device)


def feed_of(model: nn.Module) -> FrozenFeed | None:
    """Return the feed of a model's frozen blocks; None if they run in each pass."""
    fed = (module for module in model.modules() if isinstance(module, FedBlock))
    return next((block.petl_feed for block in fed), None)


@contextmanager
def paused(model: nn.Module) -> Generator[None]:
    """Run all blocks of a model inside the block: its rows are in no store, and are not counted."""
    feed = feed_of(model)
    if feed is None:
        yield
        return
    watcher, feed.watcher = feed.watcher, lambda _: None
    try:
        yield
    finally:
        feed.watcher = watcher


def gathered(
    states: Sequence[Tensor], rows: KeyedRows, blocks: Sequence[nn.Module], device: torch.device
) -> Tensor:
    """Return states of rows, [T_i, ...] each, as one padded tensor [B, T, ...] on the device."""
    width = max(len(row) for row in states) if rows.lengths is None else rows.width[0]
    # page-locked memory is what lets the copy run while the GPU computes
    pinned = device.type == "cuda"
    # zeros where the blocks would give others: nothing above may read padding (assumption)
    batch = torch.zeros(
        len(states), width, *states[0].shape[1:], dtype=states[0].dtype, pin_memory=pinned
    )
    for target, row in zip(batch, states, strict=True):
        target[: len(row)] = row
    # torch frees page-locked memory only when the copies from it are done
    batch = batch.to(device, non_blocking=True)
    # reentrant checkpointing of the blocks above trains only if an input requires a gradient
    return batch.requires_grad_() if torch.is_grad_enabled() and reentrant(blocks) else batch


def reentrant(blocks: Sequence[nn.Module]) -> bool:
    """Return True if the blocks are checkpointed in the reentrant way."""
    function = getattr(blocks[-1], "_gradient_checkpointing_func", None)
    on = getattr(blocks[-1], "gradient_checkpointing", False)
    # a partial of torch's checkpoint; if it does not say, assume the kind that needs a gradient
    return on and getattr(function, "keywords", {}).get("use_reentrant", True)


def autocast_of(module: nn.Module) -> str:
    """Return the dtype of autocast that is in effect on the device of a module; "" for none."""
    device = next(module.parameters()).device.type
    if not torch.is_autocast_enabled(device):
        return ""
    return str(torch.get_autocast_dtype(device)).removeprefix("torch.")


def _device_of(given: Mapping[str, object]) -> torch.device:
    return next(value.device for value in given.values() if isinstance(value, Tensor))
