"""Passes that find out what a prefix is and compute its output: they end where the prefix ends.

Rows are computed in one order whatever their source: the longest first, rows of one length by their
key, in batches of about `POSITIONS` positions. So a store of the same rows has the same bits
whenever it is filled.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from accelerate.utils import send_to_device
from torch import Tensor, nn

from petl.core.layers.class_swap import original_class
from petl.core.model.modes import evaluation_mode
from petl.core.parameters import buffer_of
from petl.efficiency.frozen.feed import FrozenFeed, autocast_of
from petl.efficiency.frozen.keys import KeyedRows
from petl.efficiency.frozen.prefix import (
    OTHER,
    FrozenPrefix,
    PassEnd,
    dropouts,
    reason_of_pass,
    watched_pass,
)
from petl.efficiency.frozen.store import OutputSpec, name_of
from petl.errors import InputError, UnsupportedError
from petl.system.progress import Pass
from petl.system.random_states import states_kept

POSITIONS = 2048  # of a batch: enough for large products, little memory
CHUNK = 64  # rows that are collated at a time to read their keys
Batch = Mapping[str, Any]
Output = Tensor | tuple[Tensor | None, ...]  # of a block
Collate = Callable[[list[Any]], Batch]
logger = logging.getLogger(__name__)


class Prober:
    """Runs the prefix of a model on batches.

    Attributes:
        called: the modules that were called up to the end of the prefix, by name in the body.
    """

    def __init__(
        self, model: nn.Module, feed: FrozenFeed, device: torch.device | None = None
    ) -> None:
        """Keep the arguments.

        Args:
            device: of the inputs; None: that of the model.
        """
        self.model, self.feed, self.prefix = model, feed, feed.prefix
        self.called: dict[str, nn.Module] = {}
        self.device = device or next(feed.prefix.body.parameters()).device

    def rows(self, batch: Batch) -> KeyedRows:
        """Return the rows of a batch; nothing is computed.

        Raises:
            UnsupportedError: they have no keys.
        """
        seen: list[KeyedRows] = []

        def watch(rows: KeyedRows) -> None:
            seen.append(rows)
            raise PassEnd

        self._run(batch, watch)
        if not seen:
            raise UnsupportedError(f"a pass does not reach {type(self.prefix.body).__name__}")
        if seen[0].reason:
            raise UnsupportedError(seen[0].reason)
        return seen[0]

    def output(self, batch: Batch) -> tuple[KeyedRows, Output]:
        """Return the rows of a batch, and what the last block of the prefix returns for them."""
        seen: list[KeyedRows] = []
        outputs: list[Output] = []

        def keep(block: nn.Module, inputs: object, output: Output) -> None:
            outputs.append(output)
            raise PassEnd

        hook = self.prefix.own[-1].register_forward_hook(keep)
        try:
            self._run(batch, seen.append)
        finally:
            hook.remove()
        if not outputs:
            raise UnsupportedError(f"a pass does not reach block {self.prefix.k - 1}")
        return seen[0], outputs[0]

    def _run(self, batch: Batch, watcher: Callable[[KeyedRows], None]) -> None:
        inputs = send_to_device(dict(batch), self.device)
        self.feed.watcher = watcher
        try:
            with torch.no_grad():
                # all of it, so that masks, positions and embeddings are made as in training
                self.model(**inputs)
        except PassEnd:
            pass
        finally:
            self.feed.watcher = None
            self.feed.inside = []

    def inspect(self, batch: Batch, *, without_dropout: bool) -> tuple[OutputSpec, list[str]]:
        """Return the form of the prefix's output, and the dropouts that a store leaves out.

        Raises:
            UnsupportedError: the output is not a fixed function of the rows.
        """
        with evaluation_mode(self.model):
            seen: list[KeyedRows] = []
            with watched_pass(self.prefix) as watched:
                self._run(batch, seen.append)
            output, self.called = watched.output, watched.called
            if output is None:
                raise UnsupportedError(f"a pass does not reach block {self.prefix.k - 1}")
            reason = reason_of_pass(self.prefix, watched)
            if reason:
                raise UnsupportedError(reason)
            form = self._form(seen[0], output)
            left_out = dropouts(self.called.items())
            if left_out and not without_dropout:
                raise UnsupportedError(
                    f"dropout is on below block {self.prefix.k}: {left_out[0]}"
                    + (f" and {len(left_out) - 1} more" if len(left_out) > 1 else "")
                )
            self._refuse_batch_norms()
            if self._is_random(batch, output):
                if not without_dropout:
                    raise UnsupportedError(
                        f"the output of block {self.prefix.k - 1} differs between training and "
                        "evaluation mode: something below is random, or a running statistic"
                    )
                left_out = left_out or ["what is random in training mode"]
        return form, left_out

    def _refuse_batch_norms(self) -> None:
        for name, module in self._modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise UnsupportedError(
                    f"{name} is a {type(module).__name__}, which in training reads the whole batch"
                )

    def _is_random(self, batch: Batch, output: Output) -> bool:
        with states_kept(self.device):
            self.model.train()
            again = self.output(batch)[1]
        # bits can be compared: batch and kernels are the same (assumption: these are deterministic)
        return not torch.equal(_first(again), _first(output))

    def _form(self, rows: KeyedRows, output: Output) -> OutputSpec:
        tokens = rows.lengths is not None
        form = OutputSpec.of(output, by_token=tokens)
        if form is None:
            raise UnsupportedError(
                f"the blocks of {type(self.prefix.base).__name__} hand on more than hidden states "
                "(such as T5's position bias)"
            )
        states = _first(output)
        if len(states) != len(rows.keys) or (tokens and states.shape[1] != rows.width[0]):
            raise UnsupportedError(
                f"block {self.prefix.k - 1} returns {list(states.shape)} for {len(rows.keys)} rows "
                f"of {list(rows.width)}: not one vector for each position"
            )
        return form

    def _modules(self) -> list[tuple[str, nn.Module]]:
        """Return the modules that the prefix may run, by name: some rows choose other experts."""
        inside = (
            (f"blocks.{i}.{name}", module)
            for i, block in enumerate(self.prefix.own)
            for name, module in block.named_modules()
        )
        known = {module for block in self.prefix.own for module in block.modules()}
        before = ((name, module) for name, module in self.called.items() if module not in known)
        return [*before, *inside]

    def digest(self) -> str:
        """Return a name for all that the output of the prefix depends on, rows aside."""
        weights = hashlib.sha256()
        for name, module in self._modules():
            # below the swaps: an open cache must not change the digest
            kind = original_class(module)
            weights.update(f"{name} {kind.__module__}.{kind.__qualname__}".encode())
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            for key, tensor in own:
                weights.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                weights.update(buffer_of(tensor))
        precision = autocast_of(self.prefix.body)
        return name_of(weights.hexdigest(), *ingredients(self.prefix, precision, self.device))

    @property
    def computation(self) -> str:
        """A name for what the prefix computes with its weights, whatever their values."""
        return name_of(*ingredients(self.prefix, autocast_of(self.prefix.body), self.device))


def ingredients(prefix: FrozenPrefix, precision: str, device: torch.device) -> list[object]:
    """Return what the output of a prefix depends on, besides its weights and the rows.

    Args:
        precision: dtype of autocast; "": none.
    """
    config = prefix.body.config
    kept = {
        name: value
        for name, value in config.to_dict().items()
        if name not in OTHER and "dropout" not in name
    }
    return [
        repr(sorted(kept.items(), key=lambda item: item[0])),
        prefix.path,
        prefix.k,
        str(config._attn_implementation),
        precision,
        device.type,
        # its code is what blocks compute; torch's version, left out, changes rounding alone
        transformers.__version__,
    ]


def _first(output: Output) -> Tensor:
    states, *_ = output if isinstance(output, tuple) else (output,)
    assert states is not None
    return states


class Contents:
    """The rows of a store to be: their keys, and the order in which they are computed.

    Attributes:
        order: positions in `rows`, each row once: the longest first.
        keys, lengths: of these rows, in this order; the lengths of images or clips are 0.
    """

    def __init__(self, prober: Prober, rows: Sequence[Any], collate: Collate) -> None:
        self.prober, self.rows, self.collate = prober, rows, collate
        found: dict[bytes, tuple[int, int]] = {}
        widths = set[tuple[int, ...]]()
        shown = Pass(f"reading {len(rows):,} rows", len(rows), unit="rows", quiet=True)
        # in training, some models change their inputs at random
        with evaluation_mode(prober.model), shown:
            for start in range(0, len(rows), CHUNK):
                numbers = range(start, min(start + CHUNK, len(rows)))
                batch = prober.rows(self.batch(numbers))
                if batch.lengths is None:
                    widths.add(batch.width)
                lengths = batch.lengths or [0] * len(batch.keys)
                for number, key, length in zip(numbers, batch.keys, lengths, strict=True):
                    found.setdefault(key, (length, number))
                shown.advance(len(numbers))
        if len(widths) > 1:
            sizes = ", ".join(map(str, sorted(widths)[:3]))
            raise UnsupportedError(f"images or clips have several padded sizes, such as {sizes}")
        ordered = sorted(found.items(), key=lambda item: (-item[1][0], item[0]))
        self.keys = [key for key, _ in ordered]
        self.lengths = [length for _, (length, _) in ordered]
        self.order = [number for _, (_, number) in ordered]

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Return the collated rows at these positions.

        Raises:
            InputError: it is not a dict.
        """
        # a data set reads several rows at once
        at_once = getattr(self.rows, "__getitems__", None)
        rows = at_once(list(numbers)) if at_once else [self.rows[number] for number in numbers]
        batch = self.collate(rows)
        if not isinstance(batch, Mapping):
            raise InputError(
                f"collate returned {type(batch).__name__} for {len(rows)} rows: let it return a "
                "dict of the model's inputs, such as input_ids and attention_mask"
            )
        return batch

    @property
    def digest(self) -> str:
        """A name for the set of rows."""
        return hashlib.sha256(b"".join(sorted(self.keys))).hexdigest()

    def positions(self, form: OutputSpec) -> list[int]:
        """Return the positions of each row's states."""
        return [length or form.positions for length in self.lengths]

    def states(self, form: OutputSpec) -> Iterator[Tensor]:
        """Yield the states of each row on the CPU, [T, ...], in order."""
        positions, start = self.positions(form), 0
        shown = Pass(
            f"computing {self.prober.prefix.k} frozen blocks once for {len(self.order):,} rows",
            len(self.order),
            unit="rows",
        )
        with evaluation_mode(self.prober.model), shown:
            while start < len(self.order):
                count = max(1, POSITIONS // max(1, positions[start]))
                part = slice(start, start + count)
                rows, output = self.prober.output(self.batch(self.order[part]))
                if rows.keys != self.keys[part]:
                    raise InputError(
                        f"{len(rows.keys)} rows are not the same each time they are read, so their "
                        "outputs cannot be kept: leave out what changes them at random"
                    )
                states = _first(output).cpu()
                for row, length in zip(states, positions[part], strict=True):
                    yield row[:length]
                start += count
                shown.advance(len(rows.keys))
