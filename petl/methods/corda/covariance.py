"""Second moments (covariances) of the inputs of many layers, from one pass over calibration data.

Shapes: I in, B rows of a batch, T tokens of a row. A sample is a row of a batch, its real tokens
only: `X` [T, I]. C = mean over samples of (X / m)^T (X / m), with m the sample's signed maximum.
"""

import inspect
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petl.core.layers.context import is_encoder_decoder
from petl.core.layers.layer import shape_of
from petl.core.masks import Tokens, tokens_of
from petl.core.model.modes import run_over
from petl.core.types import Calibration
from petl.methods.corda.experts import Seen, reading, scaled_rows
from petl.methods.corda.oriented import DampedInverse
from petl.system import collectives as distributed

logger = logging.getLogger(__name__)


class Covariance:
    """A running mean over samples of X^T X.

    Attributes:
        matrix: the mean, [I, I].
        samples: number of samples.
        tokens: rows of all X together, an upper bound of the matrix's rank.
        damped: the damped matrix and its inverse, cached for layers that share this covariance.
    """

    damped: DampedInverse | None = None

    def __init__(self, matrix: Tensor, samples: int = 0) -> None:
        self.matrix, self.samples = matrix, samples
        self.tokens = torch.zeros((), dtype=torch.int64, device=matrix.device)

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        """Add scaled samples x [B, T, I], which are zero where the mask [B, T] is zero."""
        tokens = x.shape[0] * x.shape[1] if mask is None else mask.sum()
        self.add_rows(x.flatten(0, 1), len(x), tokens)

    def add_rows(self, flat: Tensor, rows: int, tokens: int | Tensor) -> None:
        """Add the scaled rows [N, I] of a number of samples, with this many tokens."""
        self.samples += rows
        self.tokens += tokens
        with torch.autocast(flat.device.type, enabled=False):  # the caller's may use bfloat16
            product = flat.t() @ flat
        # a running mean stays in range, also in float16
        self.matrix.lerp_((product / rows).to(self.matrix.dtype), rows / self.samples)

    def over_processes(self) -> "Covariance":
        """The mean over the samples of all processes; a process may have none."""
        if distributed.num_processes() == 1:
            return self
        counts = torch.stack([torch.full_like(self.tokens, self.samples), self.tokens])
        # sums of float16 would overflow
        total = self.matrix.to(torch.promote_types(self.matrix.dtype, torch.float32)) * self.samples
        counts, total = distributed.summed(counts), distributed.summed(total)
        samples = int(counts[0])
        merged = Covariance((total / max(1, samples)).to(self.matrix.dtype), samples)
        merged.tokens = counts[1]
        return merged


def scaled(x: Tensor, mask: Tensor | None, norm: str) -> Tensor:
    """Samples [B, T, I] divided by their maximum, at least float32; zero where the mask is zero.

    "signed_max" divides by |max x|, as in the published code; where that is 0, and for "abs_max",
    by max |x|. The mask is [B, T].
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    real = None if mask is None else mask.bool().unsqueeze(-1)
    if real is not None:
        # zero rows add nothing to X^T X
        x = torch.where(real, x, 0.0)
    if norm == "none":
        return x
    divisor = x.abs().amax((1, 2))
    if norm == "signed_max":
        # a zero of the padding would otherwise be the maximum of a sample without positive entries
        signed = x if real is None else torch.where(real, x, -torch.inf)
        signed = signed.amax((1, 2)).abs()
        divisor = torch.where((signed > 0) & (signed < torch.inf), signed, divisor)
    return x / torch.where(divisor > 0, divisor, 1.0)[:, None, None]


class PaddingMasks:
    """The padding masks of the current forward pass, assigned to the inputs of layers.

    Attributes:
        unmasked: layers whose inputs had another number of rows than a mask that has padding.
    """

    def __init__(self, model: nn.Module) -> None:
        self.unmasked: set[nn.Module] = set()
        self.names = list(inspect.signature(model.forward).parameters)
        get_decoder = getattr(model, "get_decoder", None)
        decoder = get_decoder() if is_encoder_decoder(model) and get_decoder is not None else None
        self.in_decoder = set(decoder.modules()) if isinstance(decoder, nn.Module) else set()
        self.encoded: weakref.ref[Tensor] | None = None  # output of the encoder
        self.rows = 1  # batch size
        self.tokens = Tokens(None, None)

    def begin(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook of the model: store batch size and masks."""
        named = dict(zip(self.names, args, strict=False)) | dict(kwargs)
        names = (getattr(model, "main_input_name", ""), "inputs_embeds")
        given = [*(named.get(name) for name in names), *args, *kwargs.values()]
        first = next((t for t in given if isinstance(t, Tensor) and t.dim() > 0), None)
        self.rows = 1 if first is None else len(first)
        self.tokens = tokens_of(named, has_decoder=bool(self.in_decoder))

    def note_encoded(self, encoder: nn.Module, args: object, output: Any) -> None:
        """Forward hook of the encoder: store its output, which cross-attention reads."""
        states = output[0] if not isinstance(output, Tensor) else output
        # weak: the encoder's output must not outlive the pass
        self.encoded = weakref.ref(states)

    def samples(self, module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The input of a layer as [B, T, I], and its mask [B, T] if it has one."""
        rows = self.rows if (x.numel() // x.shape[-1]) % self.rows == 0 else 1
        x_BTI = x.reshape(rows, -1, x.shape[-1])
        encoded = self.encoded is not None and self.encoded() is x
        mask = self.tokens[1 if module in self.in_decoder and not encoded else 0]
        if mask is None:
            return x_BTI, None
        if mask.shape != x_BTI.shape[:2]:
            if x_BTI.shape[1] > 1 and not mask.all():  # one row is a summary, as of a pooler
                self.unmasked.add(module)
            return x_BTI, None
        return x_BTI, mask.to(x.device)

    def warn(self, layers: Mapping[str, nn.Module]) -> None:
        """Log the layers in whose inputs padding could not be masked."""
        names = [name for name, layer in layers.items() if layer in self.unmasked]
        if names:
            logger.warning(
                "%d layers, such as %s, have inputs with another number of rows than "
                "attention_mask, so padding counts there like tokens; calibrate on batches "
                "without padding, of one sample each",
                len(names),
                names[0],
            )


def first_input(args: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """The first argument of a forward call."""
    return args[0] if args else next(iter(kwargs.values()))


def empty(layer: nn.Module, dtype: torch.dtype) -> Covariance:
    """A covariance of zero samples for the inputs of a layer, on the layer's device."""
    # the layer of an expert has no tensors of its own
    weight: Any = layer.weight
    width, device = shape_of(layer).in_features, weight.device
    return Covariance(torch.zeros(width, width, dtype=dtype, device=device))


def collect(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    data: Calibration,
    *,
    norm: str,
    dtype: torch.dtype,
    rounds: int = 1,
) -> dict[str, list[Covariance]]:
    """Covariances of the inputs of `layers` in a pass over calibration data, by layer name.

    Sample n goes to covariance n mod `rounds` of its layer. With P processes, process p has samples
    p, p + P, ... A layer that is never called keeps covariances of zero samples.

    Args:
        data: of this process.
        norm: see `scaled`.
    """
    tokens = PaddingMasks(model)
    found = {name: [empty(layer, dtype) for _ in range(rounds)] for name, layer in layers.items()}
    seen = dict.fromkeys(layers, 0)
    first, step = distributed.number(), distributed.num_processes()

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, kwargs: Mapping[str, object]) -> None:
            x, mask = tokens.samples(module, first_input(args, kwargs))
            x = scaled(x, mask, norm).to(torch.promote_types(dtype, torch.float32))
            # global sample numbers, so that rounds do not depend on the number of processes
            samples = first + step * torch.arange(seen[name], seen[name] + len(x), device=x.device)
            for number, covariance in enumerate(found[name]):
                # rows of this round
                mine = slice(None) if rounds == 1 else samples % rounds == number
                if len(x[mine]):
                    covariance.add(x[mine], None if mask is None else mask[mine])
            seen[name] += len(x)

        return hook

    passed = [0, 0]  # samples before this pass of the model, and with it

    def count(model: nn.Module, args: object, kwargs: Mapping[str, object]) -> None:
        tokens.begin(model, args, kwargs)
        passed[:] = passed[1], passed[1] + tokens.rows

    def read(expert: Seen) -> None:
        rows = scaled_rows(expert, norm).to(torch.promote_types(dtype, torch.float32))
        add_rows(found[expert.path], rows, first + step * (passed[0] + expert.sample))

    handles = [model.register_forward_pre_hook(count, with_kwargs=True)]
    get_encoder = getattr(model, "get_encoder", None)
    if tokens.in_decoder and get_encoder is not None:
        handles.append(get_encoder().register_forward_hook(tokens.note_encoded))
    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(hook_of(name), with_kwargs=True))
    with reading(layers, tokens.samples, read):
        run_over(model, data, handles)
    tokens.warn(layers)
    return found


def add_rows(covariances: Sequence[Covariance], rows: Tensor, samples: Tensor) -> None:
    """Add scaled rows [N, I] of the samples with these global numbers, each to its round."""
    for number, covariance in enumerate(covariances):
        mine = samples % len(covariances) == number
        own = rows[mine]
        if len(own):
            covariance.add_rows(own, len(samples[mine].unique()), len(own))


def leaders(model: nn.Module, layers: Mapping[str, nn.Module], data: Calibration) -> dict[str, str]:
    """For each layer, the first layer that has the same input tensors in a pass over data.

    Query, key and value projections read one tensor, and so do gate and up projections: they share
    a covariance.
    """
    inputs: dict[str, tuple[int, ...]] = dict.fromkeys(layers, ())
    # weak references: the id of a freed tensor may be used again
    alive: list[tuple[int, weakref.ref[Tensor]]] = []

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, kwargs: Mapping[str, object]) -> None:
            x = first_input(args, kwargs)
            number = next((n for n, reference in alive if reference() is x), None)
            if number is None:
                number = len(alive)
                alive.append((number, weakref.ref(x)))
            # a layer may be called several times
            inputs[name] += (number,)

        return hook

    handles = [
        layer.register_forward_pre_hook(hook_of(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    run_over(model, data, handles)
    first: dict[tuple[int, ...], str] = {}
    return {name: first.setdefault(seen, name) if seen else name for name, seen in inputs.items()}
