"""What a pass over several tokens costs, relative to a pass over one, on this machine.

Decoding learns it from its own passes; `Costs.measure` measures it.
"""

import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from petl.core.compat import BaseTunerLayer
from petl.core.model.modes import evaluation_mode
from petl.core.types import base_of
from petl.efficiency.drafting.cache import compact
from petl.efficiency.drafting.pairs import (
    ModelInputs,
    decoder_positions,
    ids_argument,
    sample_inputs,
    vocabulary_size,
)
from petl.efficiency.in_place_cache import cache_argument, cache_arguments
from petl.errors import InputError
from petl.ops.packed import PackedWeights, packed_classes

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)


class Costs:
    """Seconds of a pass by its number of tokens, after a cache.

    Attributes:
        seconds: by number of tokens; 1 is among them.
    """

    # kept for the whole process: a measurement takes 60 passes and a prefill
    _measured: dict[tuple[object, ...], "Costs"] = {}

    def __init__(self, seconds: Mapping[int, float]) -> None:
        """Take measured or assumed seconds.

        Raises:
            InputError: there is no value for one token, or one is not above 0.
        """
        if 1 not in seconds or any(n < 1 or not value > 0 for n, value in seconds.items()):
            raise InputError(
                f"Costs({dict(seconds)}) needs seconds above 0 by number of tokens, 1 included"
            )
        self.seconds = {n: float(seconds[n]) for n in sorted(seconds)}

    @property
    def plain(self) -> float | None:
        """Seconds of a pass over one token; None: not known yet."""
        return self.seconds[1]

    def __repr__(self) -> str:
        ratios = ", ".join(f"{n}: {self.ratio(n):.2f}" for n in self.seconds)
        return f"Costs({self.seconds[1]:.2e} s; {ratios})"

    def ratio(self, n: int) -> float:
        """Return c(n): the time of a pass over `n` tokens or more, the cheapest, over that of one.

        Between measured numbers the time is linear, beyond them proportional.

        Raises:
            InputError: `n` is below 1.
        """
        if n < 1:
            raise InputError(f"n={n} is no number of tokens of a pass: 1 or more")
        own = self._seconds_of(n)
        more = [value for count, value in self.seconds.items() if count > n]
        return min([own, *more]) / self.seconds[1]

    def padded(self, n: int) -> int:
        """Return the cheapest number of tokens for a pass over at least `n`."""
        own = self._seconds_of(n)
        cheaper = {c: value for c, value in self.seconds.items() if c > n and value < own}
        return min(cheaper, key=lambda count: cheaper[count], default=n)

    def _seconds_of(self, n: int) -> float:
        below = max(count for count in self.seconds if count <= n)
        above = min((count for count in self.seconds if count >= n), default=None)
        if above is None:
            return self.seconds[below] * n / below
        if above == below:
            return self.seconds[n]
        part = (n - below) / (above - below)
        return self.seconds[below] + part * (self.seconds[above] - self.seconds[below])

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        cache_length: int = 200,
        *,
        counts: Sequence[int] = COUNTS,
        rounds: int = 5,
        packed: PackedWeights | None = None,
        clock: Callable[[], float] = time.perf_counter,
        inputs: ModelInputs | None = None,
    ) -> "Costs":
        """Measure the passes of a decoder; kept per model shape, dtype, device, threads, adapters.

        Args:
            model: with its adapters or without.
            cache_length: tokens in the cache; fewer if the model has fewer positions.
            counts: numbers of tokens of a pass.
            rounds: of which the median is taken; the passes alternate.
            packed: copies of weights, for passes over more than one token.
            clock: seconds now.
            inputs: of a pass besides tokens: an encoder's outputs and their mask; None: random
                outputs for `cache_length` tokens, if there is an encoder.
        """
        inputs = sample_inputs(base_of(model), cache_length) if inputs is None else inputs
        # a pass reads all outputs of the encoder, however many tokens it has
        read = [tuple(each[0].shape) for each in inputs.values() if each is not None]
        key = (*_key(model), cache_length, tuple(counts), packed is not None, clock, *read)
        if key not in cls._measured:
            with evaluation_mode(model), torch.no_grad():
                cls._measured[key] = cls(
                    _seconds(model, cache_length, counts, rounds, packed, clock, inputs)
                )
        return cls._measured[key]


class LearnedCosts(Costs):
    """Costs that are learned from the passes of decoding: medians of the latest ones.

    Of a number of tokens with few passes the ratio is the expected one, as many times larger as
    those of the others are in the median; before the first pass over one token all are expected.
    """

    KEPT, LEAST = 9, 2  # passes of a number of tokens: the latest, and as many as are believed

    def __init__(self, expected: Costs) -> None:
        super().__init__(expected.seconds)
        self.expected = expected
        self._times: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=self.KEPT))

    @property
    def plain(self) -> float | None:
        """Seconds of a pass over one token; None: there was none yet."""
        return self.seconds[1] if self._times[1] else None

    def add(self, count: int, seconds: float) -> None:
        """Take the time of a pass over `count` tokens."""
        self._times[count].append(seconds)
        if self._times[1]:
            unit = statistics.median(self._times[1])
            times = {n: each for n, each in self._times.items() if n > 1}
            known = {n: statistics.median(t) for n, t in times.items() if len(t) >= self.LEAST}
            larger = [seconds / self.expected.ratio(n) for n, seconds in known.items()]
            usual = statistics.median(larger) if larger else unit
            found = {n: value * usual for n, value in self.expected.seconds.items()} | known
            self.seconds = {1: unit, **{n: found[n] for n in sorted(found) if n > 1}}


# SmolLM2-135M in float32, one thread, 200 tokens in the cache: with packed weights, also for plans
# before a measurement; and without, means of an AMD EPYC and an Intel Xeon processor
TYPICAL = Costs({1: 1.0, 2: 1.29, 3: 1.1, 4: 1.1, 6: 1.08, 8: 1.27, 16: 1.56, 32: 2.2, 64: 3.5})
UNPACKED = Costs({1: 1.0, 2: 1.4, 3: 1.6, 4: 1.6, 6: 1.8, 8: 2.1, 16: 2.3, 32: 3.3, 64: 5.0})


def _key(model: nn.Module) -> tuple[object, ...]:
    base = base_of(model)
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    adapters = {(*m.active_adapters, m.disable_adapters, *m.merged_adapters) for m in layers}
    parameters = sum(p.numel() for p in model.parameters())
    config = base.config.get_text_config()
    shape = (type(model).__name__, parameters, config.num_hidden_layers, config.vocab_size)
    state = (config._attn_implementation, len(layers), *sorted(map(str, adapters)))
    return (*shape, base.dtype, str(base.device), torch.get_num_threads(), *state)


def _seconds(
    model: Any,
    cache_length: int,
    counts: Sequence[int],
    rounds: int,
    packed: PackedWeights | None,
    clock: Callable[[], float],
    inputs: ModelInputs,
) -> dict[int, float]:
    base = base_of(model)
    limit = decoder_positions(base)
    if limit is not None:
        counts = [n for n in counts if n <= limit // 2]
        cache_length = min(cache_length, limit - max(counts))
    # of a generator of its own: measuring leaves the random state as it is
    generator = torch.Generator().manual_seed(0)
    vocabulary = vocabulary_size(base)
    shape = (1, cache_length + max(counts))
    ids = torch.randint(vocabulary, shape, generator=generator).to(model.device)
    name, tokens = cache_argument(base), ids_argument(base)
    own = {tokens: ids[:, :cache_length], **cache_arguments(model, use_cache=True)}
    cache = model(**own, **inputs, use_cache=True)[name]
    times: dict[int, list[float]] = {n: [] for n in counts}
    with nullcontext() if packed is None else packed_classes(model):
        # all counts in each round: a busy moment of the machine hits them alike
        for number in range(rounds + 1):
            for n in counts:
                copies = nullcontext() if packed is None or n == 1 else packed.active()
                own = {tokens: ids[:, cache_length : cache_length + n], name: cache}
                start = _now(clock, model.device)
                with copies:
                    model(**own, **inputs, use_cache=True)
                taken = _now(clock, model.device) - start
                # not timed: the value for one token stands for plain decoding, which crops nothing
                compact(cache, [], n)
                if number:  # the first round warms up
                    times[n].append(taken)
    return {n: statistics.median(values) for n, values in times.items()}


def _now(clock: Callable[[], float], device: torch.device) -> float:
    # on an accelerator (CUDA, MPS, XPU, ...) a call returns before its kernels have run
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return clock()
