"""Networks that predict which blocks of tokens attention looks at, from the hidden states.

Of each layer two networks, of queries and of keys, map the hidden states of a block of tokens, by
head, to D numbers; the products of the two, summed over heads, predict the pooled map of that
layer (`pooled_map`). They belong to a base model, and are trained with it frozen.

Shapes: B rows, T tokens, b tokens of a block, N blocks of a row, H width of the hidden states, h
heads, D = H / h.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from petl.core.model.modes import calibration_pass, checked_batches, forward
from petl.core.parameters import check_module
from petl.core.types import Arguments, base_of
from petl.efficiency.tokens.elimination import oracle_map, valid_tokens
from petl.efficiency.tokens.layers import SECOND_HALF, places_of, width_of_states
from petl.efficiency.tokens.scores import Choice, column_sums, in_blocks
from petl.efficiency.tokens.settings import TokenSettings, layers_setting
from petl.errors import InputError
from petl.system.files.disk import write_atomic
from petl.system.files.tensor_file import check_finite, read_file
from petl.system.values import check_rules, real

WIDTH = 512  # of the first hidden layer, as in the paper
IDLE = 0.8  # a unit that is not above 0 in a larger share of cases is left out
PRUNED_EVERY = 100  # steps
SIDES = ("q", "k")
LINEAR_LAYERS = 3


class Network(nn.Module):
    """Three linear layers without biases and ReLU between: [..., b D] to [..., D].

    Args:
        weights: of the layers, [O, I] each.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(weight) for weight in weights])
        self._idle: list[Tensor] = []

    @classmethod
    def new(cls, block: int, width: int, generator: torch.Generator) -> "Network":
        """Return a network for D = `width` with weights as nn.Linear draws them."""
        sizes = [block * width, WIDTH, block * width, width]
        return cls(
            [
                (2 * torch.rand(out, inner, generator=generator) - 1) / inner**0.5
                for inner, out in pairwise(sizes)
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the numbers of a block; in training, count the inputs for which units are idle."""
        *inner, last = self.weights
        counts = []
        for weight in inner:
            x = F.relu(F.linear(x, weight))
            counts.append((x.detach() <= 0).flatten(0, -2).sum(0))
        if self.training:
            before = self._idle or [torch.zeros_like(count) for count in counts]
            self._idle = [old + new for old, new in zip(before, counts, strict=True)]
        return F.linear(x, last)

    @torch.no_grad()
    def prune(self, inputs: int) -> None:
        """Leave out the units that were idle in more than `IDLE` of the inputs; one at least stays.

        Args:
            inputs: their number since the last call.
        """
        for number, idle in enumerate(self._idle):
            kept = idle <= IDLE * inputs
            kept[idle.argmin()] = True
            above, below = self.weights[number], self.weights[number + 1]
            self.weights[number] = nn.Parameter(above[kept].clone())
            self.weights[number + 1] = nn.Parameter(below[:, kept].clone())
        self._idle = []


class LayerPredictor(nn.Module):
    """The two networks of a layer."""

    def __init__(self, queries: Network, keys: Network) -> None:
        super().__init__()
        self.queries, self.keys = queries, keys

    @property
    def sides(self) -> dict[str, Network]:
        """Both networks, by their letter in the names of tensors."""
        return {"q": self.queries, "k": self.keys}

    def forward(self, blocks: Tensor) -> Tensor:
        """Return the predicted map [B, N, N] of `by_head` of a layer's hidden states.

        As in `pooled_map`, nothing is found in later keys.
        """
        queries, keys = self.queries(blocks), self.keys(blocks)  # [B, h, N, D]
        return (queries @ keys.mT).sum(1).tril()

    def prune(self, inputs: int) -> None:
        """Leave out idle units of both networks, see `Network.prune`."""
        for side in self.sides.values():
            side.prune(inputs)


class Predictors(nn.Module):
    """The predictors of layers of a base model.

    Attributes:
        block: b.
        heads: h.
        layers: the predictor of each layer, by its number as text.
    """

    def __init__(self, block: int, heads: int, layers: Mapping[str, LayerPredictor]) -> None:
        super().__init__()
        self.block, self.heads = block, heads
        self.layers = nn.ModuleDict(layers)

    def each(self) -> dict[str, LayerPredictor]:
        """The predictor of each layer."""
        return {name: cast(LayerPredictor, predictor) for name, predictor in self.layers.items()}

    @classmethod
    def new(cls, layers: Iterable[int], block: int, heads: int, hidden: int) -> "Predictors":
        """Return predictors with random weights, the same each time."""
        generator = torch.Generator().manual_seed(0)
        made = {
            str(layer): LayerPredictor(
                *(Network.new(block, hidden // heads, generator) for _ in SIDES)
            )
            for layer in layers
        }
        return cls(block, heads, made)

    def map_of(self, layer: int, hidden: Tensor, valid: Tensor) -> Tensor:
        """Return the predicted map [B, N, N] of a layer with the input [B, T, H]."""
        return self.layers[str(layer)](by_head(hidden, valid, self.block, self.heads))

    def save(self, file: Path) -> None:
        """Write them as safetensors: `LAYER.lemo_q1.weight` and so on."""
        tensors = {
            f"{layer}.lemo_{side}{number}.weight": weight.detach().contiguous()
            for layer, predictor in self.each().items()
            for side, network in predictor.sides.items()
            for number, weight in enumerate(network.weights, start=1)
        }
        shape = {"block": str(self.block), "heads": str(self.heads)}
        write_atomic(file, save(tensors, shape))

    @classmethod
    def load(
        cls, file: Path, layers: Iterable[int], block: int, heads: int, hidden: int
    ) -> "Predictors":
        """Read those of these layers, for hidden states of H = `hidden` numbers.

        Raises:
            InputError: the file is damaged, lacks a layer, is of another block size or model, or
            has integers.
        """
        shape, found = read_file(file)
        # float8 has no `isfinite`
        tensors = {name: t.float() if t.is_floating_point() else t for name, t in found.items()}
        check_finite(tensors, str(file))
        for name, asked in (("block", block), ("heads", heads)):
            if shape.get(name) != str(asked):
                raise InputError(
                    f"{file} has predictors for {name}={shape.get(name)}, and {name}={asked} is "
                    "asked for; train others with `petl train-predictors`"
                )
        made = {}
        for layer in map(str, layers):
            sides = []
            for side in SIDES:
                names = [f"{layer}.lemo_{side}{n}.weight" for n in range(1, LINEAR_LAYERS + 1)]
                missing = [name for name in names if name not in tensors]
                if missing:
                    known = ", ".join(sorted({name.partition(".")[0] for name in tensors}))
                    raise InputError(f"{file} has no {missing[0]}; it has layers {known}")
                weights = {name: tensors[name] for name in names}
                sides.append(network_of(file, weights, block * (hidden // heads), hidden // heads))
            made[layer] = LayerPredictor(*sides)
        return cls(block, heads, made)


def network_of(file: Path, weights: Mapping[str, Tensor], inner: int, out: int) -> Network:
    """Return the network of these weights [O, I] by name, from `inner` to `out` numbers.

    Raises:
        InputError: one has no real numbers, or does not take what the one before it gives.
    """
    *_, last = weights
    for name, weight in weights.items():
        if not weight.is_floating_point():
            raise InputError(
                f"{file}: {name} has numbers of type {weight.dtype}, not of a floating type"
            )
        if weight.dim() != 2 or weight.shape[1] != inner or (name == last and len(weight) != out):
            shape = f"[{out if name == last else '...'}, {inner}]"
            raise InputError(f"{file}: {name} has shape {list(weight.shape)}, not {shape}")
        inner = len(weight)
    return Network([*weights.values()])


def by_head(hidden: Tensor, valid: Tensor, block: int, heads: int) -> Tensor:
    """Return hidden states [B, T, H] by head and block of tokens, [B, h, N, b D].

    Those of a token have a mean square of 1; padding is 0.
    """
    x = hidden.float()
    x = x * x.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt() * valid[..., None]
    return in_blocks(x, block).unflatten(-1, (heads, -1)).permute(0, 3, 1, 2, 4).flatten(3)


class Trained(NamedTuple):
    """Predictors, and how well they find what attention looks at.

    Attributes:
        predictors: as `Predictors.load` returns them.
        recall: share of the blocks that the oracle keeps which they keep too, in the last tenth of
            the batches, each before it was trained on.
        loss: mean square error there, over the mean square of the map.
    """

    predictors: Predictors
    recall: float
    loss: float


def train_predictors(
    model: nn.Module,
    batches: Iterable[Arguments],
    *,
    block: int = 64,
    layers: str | Sequence[int] = SECOND_HALF,
    keep: float = 0.4,
    lr: float = 1e-3,
) -> Trained:
    """Train predictors of the pooled maps of a decoder's attention, with the model frozen.

    Each batch is a pass of the model and a step of Adam on the mean square error of each layer.
    Units that are idle in more than 80 % of the inputs are left out every 100 steps.

    Args:
        model: a causal LM with rotary positions.
        batches: of `input_ids` and `attention_mask`, as many as there shall be steps; those with
            fewer tokens than a block are left out.
        block: tokens of a block.
        layers: `second_half`, `all`, or numbers from 0.
        keep: share of the blocks by which recall is measured, above 0.
        lr: of Adam, above 0.

    Raises:
        UnsupportedError: the model is none, or its queries and keys are not known.
        InputError: a value is not allowed, or no batch has as many tokens as a block.
    """
    check_module(model, "petl.train_predictors")
    check_rules(TokenSettings(block=block, layers=layers_setting(layers), keep=keep))
    real(0, above=True).check("lr", lr, float)
    base = base_of(model)
    places = places_of(base, layers)
    rows = long_enough(batches, block)
    # there is one, before networks are made: those of a block that is too long fill the memory
    first = next(rows)
    heads, hidden = base.config.get_text_config().num_attention_heads, width_of_states(base)
    predictors = Predictors.new(places, block, heads, hidden).to(base.device)
    choice = Choice(block, keep, 0, 0)
    optimizer = torch.optim.Adam(predictors.parameters(), lr)
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def look(layer: int, module: nn.Module, args: tuple[Tensor, ...], kwargs: Arguments) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        target = oracle_map(module, places[layer].attention, block, states, kwargs)
        found[layer] = states, valid_tokens(kwargs.get("attention_mask"), states), target

    hooks = [
        place.module.register_forward_pre_hook(partial(look, layer), with_kwargs=True)
        for layer, place in places.items()
    ]
    inputs, scored = 0, []
    with calibration_pass(model, hooks):
        for step, batch in enumerate(chain([first], rows), start=1):
            forward(model, batch)
            errors = []
            for layer, (states, valid, target) in found.items():
                with torch.enable_grad():
                    predicted = predictors.map_of(layer, states, valid)
                    errors.append(F.mse_loss(predicted, target))
                recall = agreement(choice, predicted.detach(), target, valid)
                scored.append((recall, float(errors[-1] / target.square().mean().clamp(min=1e-30))))
            inputs += target.shape[0] * target.shape[1] * heads
            optimizer.zero_grad()
            torch.autograd.backward(errors)
            optimizer.step()
            if step % PRUNED_EVERY == 0:
                for predictor in predictors.each().values():
                    predictor.prune(inputs)
                # moments of units that are gone would not fit
                inputs, optimizer = 0, torch.optim.Adam(predictors.parameters(), lr)
    last = scored[-max(len(places), len(scored) // 10) :]
    recalls, losses = zip(*last, strict=True)
    return Trained(predictors.eval(), sum(recalls) / len(last), sum(losses) / len(last))


def long_enough(batches: Iterable[Arguments], block: int) -> Iterator[Arguments]:
    """Yield the batches that have a block of tokens; in shorter ones there is nothing to choose.

    Raises:
        InputError: there are none.
    """
    longest = 0
    for batch in checked_batches(batches):
        ids = batch.get("input_ids", batch.get("inputs_embeds"))
        if not isinstance(ids, Tensor) or ids.dim() < 2:
            raise InputError(
                f"a batch has {', '.join(map(str, batch))}: give input_ids, a tensor [rows, tokens]"
            )
        longest = max(longest, ids.shape[1])
        if ids.shape[1] >= block:
            yield batch
    if not longest:
        raise InputError("there are no batches to train predictors on: give rows")
    if longest < block:
        raise InputError(
            f"block={block} is longer than all rows, of at most {longest} tokens: choose a "
            "smaller block, or give longer rows"
        )


def agreement(choice: Choice, predicted: Tensor, target: Tensor, valid: Tensor) -> float:
    """Return the share of the tokens of blocks chosen by a map that another map chooses too."""
    one, other = (
        choice.positions(column_sums(pooled), valid).cpu() for pooled in (predicted, target)
    )
    pairs = zip(one.tolist(), other.tolist(), strict=True)
    return sum(len({*a} & {*b}) / len(b) for a, b in pairs) / len(one)
