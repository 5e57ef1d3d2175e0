"""Base of methods that put a small bottleneck network at the end of a sub-layer.

Shapes: K width of the residual stream, D bottleneck. Let y [..., K] be the output of the projection
that closes a sub-layer, x the sub-layer's input (normalized, in a block that normalizes first) or
the residual stream, and f the network. The layer's output is then

    sequential                     y + f(y)    without residual  f(y)
    parallel, parallel_residual    y + f(x)    with residual     y + f(x) + x

before the sub-layer's dropout, its norm and the residual sum. At the location `block`, y is the
output of a whole block, after its last norm and residual sum, and x is the block's input.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from petl.core.layers.grouped import GroupedNetworks, InputHook
from petl.core.layers.layer import Adapter, LayerInfo, LayerShape
from petl.core.layers.mixed_batch import BatchedAdapter, stacked
from petl.core.method import C, Target, TrainContext, WrapContext, linear_target
from petl.core.model.calls import calls_of
from petl.core.model.heat_map import HeatMap, of_layers
from petl.core.model.names import LANGUAGE, candidate_names, in_layers, language_path, names_of
from petl.core.model.structure import (
    BLOCK,
    KINDS,
    VALUE,
    SubLayer,
    block_widths,
    blocks,
    find_sublayers,
    is_causal,
    norm_names,
)
from petl.core.model.targets import matched_names, resolve_targets
from petl.core.spec.checks import check_rank, rank_of
from petl.core.spec.config import MethodConfig, config_field, require
from petl.errors import InputError, UnknownNameError, did_you_mean
from petl.system.values import rule_of

LOCATIONS = (*KINDS, BLOCK)
PLACEMENTS = ("sequential", "parallel", "parallel_residual")
# by placement, the attribute of a `SubLayer` that names the input; targets that are no known
# sub-layer need input_modules
STREAMS = {"parallel": "source", "parallel_residual": "residual"}
BY_FACTOR = ("r=null", lambda config: config.r is None)  # beside which reduction_factor acts
ONE_CALL = {"gelu_new": "gelu_pytorch_tanh"}  # the same function, as one kernel of torch


@dataclass
class SubLayerConfig(MethodConfig):
    """Position, input and width of the network; `r` is D and overrides `reduction_factor`."""

    target_modules: set[str] | list[str] | str | None = config_field(
        "closing projections, or blocks, as names, suffixes or a regular expression; null: by "
        "locations",
        None,
    )
    r: int | None = config_field("width of the bottleneck; null: by reduction_factor", None, ge=1)
    reduction_factor: float | None = config_field(
        "the bottleneck is width / reduction_factor", 16, acts=BY_FACTOR
    )
    locations: list[str] = config_field(
        "subset of attn, cross_attn, ffn, and block for one adapter beside each whole block",
        ["attn", "ffn"],
        choices=LOCATIONS,
    )
    placement: str = config_field(
        "sequential (after the sub-layer), parallel (its input is the sub-layer's) or "
        "parallel_residual (its input is the residual stream)",
        "sequential",
        choices=PLACEMENTS,
    )
    residual: bool | None = config_field(
        "add the network's input to its output; null: for sequential only", None
    )
    non_linearity: str = config_field("a name in transformers' ACT2FN", "gelu")
    scaling: float | str = config_field(
        "factor of the network's output, or 'learned' from 1", 1.0, pattern="learned"
    )
    bneck_dropout: float = config_field("dropout inside the bottleneck", 0.0, ge=0, lt=1)
    use_bias: bool = config_field("biases of both projections", True)
    train_layer_norms: bool = config_field("also train and save the norms of the backbone", False)
    input_modules: dict[str, str] | None = config_field(
        "for parallel placements with target_modules: suffix of the target to suffix of the module "
        "whose first input feeds the network",
        None,
    )

    def check(self) -> None:
        locations = self.locations  # one name from a command line, a tuple from code
        self.locations = [locations] if isinstance(locations, str) else list(locations)
        allowed = ", ".join(map(str, rule_of(self.__dataclass_fields__["locations"]).options))
        require(bool(self.locations), f"locations=[] is empty; name some of {allowed}")
        self._check_width()
        check_activation(self.non_linearity)
        require(
            self.input_modules is None or self.reads_input,
            f"input_modules={self.input_modules} has no effect with placement='sequential'; leave "
            "it null",
        )

    @property
    def reads_input(self) -> bool:
        """True if the adapter reads another input than the output that it changes."""
        return self.placement != "sequential"

    def _check_width(self) -> None:
        r, factor = self.r, self.reduction_factor
        require(
            r is not None or (factor is not None and factor > 0),
            f"r is null and reduction_factor={factor} is not above 0; give one of them",
        )

    def check_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise InputError for a bottleneck that is far wider than the layers."""
        ranks = {key: self.rank_and_scaling(key, shape)[0] for key, shape in shapes.items()}
        check_rank(self, "r", shapes, linear=False, ranks=ranks)

    def rank_and_scaling(self, key: str, shape: tuple[int, int]) -> tuple[int, float]:
        """Return the bottleneck on a module of widths `shape`, and the factor of its output.

        The factor is 1 with scaling='learned', which starts there.
        """
        width = LayerShape(*shape).out_features
        scaling = self.scaling if isinstance(self.scaling, int | float) else 1.0
        return rank_of(self, key, self.bottleneck(width)), scaling

    def bottleneck(self, width: int) -> int:
        """Return D for a residual stream of this width."""
        if self.r is not None:
            return self.r
        assert self.reduction_factor is not None
        # a factor larger than the width would leave no bottleneck
        return max(1, int(width // self.reduction_factor))

    @property
    def adds_input(self) -> bool:
        """True if the network's input is added to its output."""
        return self.placement == "sequential" if self.residual is None else self.residual


def by_position(config: SubLayerConfig) -> bool:
    """Return True if adapters read no positions that the layer which they adapt may leave out."""
    # the residual stream before attention has all
    return config.placement != "parallel_residual" or "attn" not in config.locations


def check_activation(name: str) -> None:
    """Raise UnknownNameError unless transformers has an activation of that name."""
    # an open table, so not `choices`: transformers adds names
    if name not in ACT2FN:
        raise UnknownNameError(
            f"non_linearity={name!r} is not an activation" + did_you_mean(name, ACT2FN)
        )


S = TypeVar("S", bound="SubLayerAdapter")
SC = TypeVar("SC", bound=SubLayerConfig)


class SubLayerAdapter(Adapter):
    """Network at the end of a sub-layer; a method creates its tensors and overrides `network`."""

    def __init__(self, shape: LayerShape, config: Any, info: LayerInfo) -> None:
        super().__init__(shape, config, info)
        self.config = config
        self.width = self.input_width = shape.out_features
        self.placement, self.adds_input = config.placement, config.adds_input
        self.bottleneck, self.scaling = config.rank_and_scaling(info.key, shape)
        name = ONE_CALL.get(config.non_linearity, config.non_linearity)
        self.activations = (ACT2FN[name],)  # in a tuple, so that it is no submodule
        if config.scaling == "learned":
            self.scale = nn.Parameter(torch.ones(1))

    def adopt(self, name: str, module: nn.Module) -> None:
        """Register the tensors of a module under flat names, `<name>_weight` and so on."""
        for tensor, value in module.named_parameters():
            self.register_parameter(f"{name}_{tensor}", value)
        for tensor, value in module.named_buffers():
            self.register_buffer(f"{name}_{tensor}", value)

    def projection(self, name: str, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias (or None) of an adopted linear layer, cast to the dtype of `h`."""
        weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias", None)
        return weight.to(h.dtype), None if bias is None else bias.to(h.dtype)

    def act(self, z: Tensor) -> Tensor:
        """Apply the non-linearity of the config."""
        return self.activations[0](z)

    def network(self, h: Tensor) -> Tensor:
        """Return f(h) without its scale, [..., K] for h [..., K], in any precision."""
        raise NotImplementedError

    def added(self, y: Tensor, h: Tensor) -> Tensor:
        """Return `y + f(h)`, without a scale, in the dtype of `y`; a method may fuse the sum."""
        return y + self.network(h).to(y.dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        sequential, learned = self.placement == "sequential", self.config.scaling == "learned"
        # under autocast, y may be in half precision and x, from a layer norm, in float32
        h = y if sequential else x.to(y.dtype)
        keeps_y = not sequential or self.adds_input
        # the usual case in one fused call
        if keeps_y and self.scaling == 1.0 and not learned:
            out = self.added(y, h)
        else:
            f = self.network(h).to(y.dtype)
            if learned:
                f = f * self.scale.to(f.dtype)
            elif self.scaling != 1.0:
                f = f * self.scaling
            # a sequential network without residual replaces the sub-layer's output
            out = y + f if keeps_y else f
        # for sequential, y is h and was added already
        return out + h if self.adds_input and not sequential else out

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return the linear maps of the network without its non-linearity, [D, K] and [K, D]."""
        raise NotImplementedError

    @property
    def stacks(self) -> bool:
        """True if `network` broadcasts over the stacked tensors of several adapters (`stacked`)."""
        return False

    @property
    def form(self) -> tuple[object, ...]:
        """The settings that affect the computation but not the shapes of the tensors."""
        config = self.config
        return self.placement, self.adds_input, config.non_linearity, config.scaling

    @classmethod
    def batched(cls, adapters: Sequence[Self], dtype: torch.dtype) -> BatchedAdapter | None:
        """Return one network with the stacked tensors of all, if they have equal settings."""
        alike = all(adapter.stacks and adapter.form == adapters[0].form for adapter in adapters)
        return stacked(adapters, None if cls.keep_float32 else dtype) if alike else None

    @classmethod
    def grouped(
        cls,
        adapters: Sequence[Self],
        base_layer: nn.Module,
        generators: Sequence[torch.Generator | None],
        captured: InputHook | None,
    ) -> nn.Module:
        """The layer that trains several adapters in one pass: as one network if they are alike.

        Dropout inside the network would draw for all of them together, so with it each computes its
        rows alone.
        """
        drops = any(adapter.config.bneck_dropout for adapter in adapters)
        if not drops and cls.batched(adapters, torch.float32) is not None:
            return GroupedNetworks(base_layer, adapters, captured)
        return super().grouped(adapters, base_layer, generators, captured)


def sublayer_targets(
    c: WrapContext[SC],
    places: Sequence[tuple[str, str]],
    stream: Callable[[str], str] | None = None,
) -> list[Target]:
    """Return the closing projections of the locations, and add the backbone's norms if they train.

    Args:
        c: the model, and a config with the fields of `SubLayerConfig`.
        places: location and path of the modules that the method can adapt.
        stream: see `targets_with_streams`; None: by the placement.

    Raises:
        InputError: a location is not found, or `layers_to_transform` leaves none.
    """
    config, model = c.config, c.model
    # once resolved, the names are saved in the config, so loading does not search again
    if config.target_modules is None:
        for location in config.locations:
            # each location, so that one of two is not dropped silently
            if not any(kind == location for kind, _ in places):
                kinds = ", ".join(sorted({kind for kind, _ in places})) or "none"
                raise InputError(
                    f"no {_what(location)} is found in {type(model).__name__} (known: "
                    f"{kinds}); change locations, or name the projections that close the "
                    "sub-layers with target_modules"
                )
        config.target_modules = {
            path
            for kind, path in places
            if kind in config.locations and in_layers(config, model, path)
        }
        if not config.target_modules:
            raise InputError(
                f"layers_to_transform={config.layers_to_transform} leaves no sub-layer of "
                f"{type(model).__name__}"
            )
    if config.train_layer_norms:
        add_saved(config, norm_names(model))
    by_placement = STREAMS.get(config.placement, "")
    return targets_with_streams(c, (lambda path: by_placement) if stream is None else stream)


NO_NETWORKS = (
    "a bottleneck for each of them is large and in no paper; adapt the block that holds them (the "
    "module above), or use lora"
)


def sublayer_places(c: WrapContext[SC]) -> list[tuple[str, str]]:
    """Return location and path of the sub-layers of a model, and of its blocks if they are one."""
    found = [(sub.kind, sub.closing) for sub in find_sublayers(c.model)]
    found += [(BLOCK, path) for path in block_widths(c.model) if BLOCK in c.config.locations]
    # of a model for images and text, those of its language model, as of the presets
    inside = {*names_of(LANGUAGE, (path for _, path in found), language_path(c.model))}
    return [(kind, path) for kind, path in found if path in inside]


def targets_with_streams(c: WrapContext[Any], stream: Callable[[str], str]) -> list[Target]:
    """Return the targets that the config names: linear layers, whole blocks or mixtures of experts.

    Args:
        c: the model and the config.
        stream: by path of a target, the attribute of its `SubLayer` that names its adapter's
            input, or "" for the input of the target itself.
    """
    config, model = c.config, c.model
    resolve_targets(config, model, words=("all-linear",), no_experts=NO_NETWORKS)
    subs = find_sublayers(model)
    known, blocks_of = {sub.closing: sub for sub in subs}, block_widths(model)
    # one module is both input and end: its experts have no linear layer to attach to
    whole = {sub.closing: sub.width for sub in subs if sub.closing == sub.source}
    found = []
    for path in matched_names(config, model):
        width = blocks_of.get(path, whole.get(path))
        is_block = path in blocks_of
        target = linear_target(c, path) if width is None else Target(path, LayerShape(width, width))
        name = "" if is_block else stream(path)  # a block's own input is the residual stream
        source = _source(c, target, known.get(path), name) if name else ""
        found.append(replace(target, source=source, is_block=is_block))
    return found


@torch.no_grad()
def network_sizes(t: TrainContext[C, S]) -> list[HeatMap]:
    """Return a map of the size of each network: no weight of the model changes."""
    norms = {}
    for key, adapter in t.adapters:
        down, up = (m.float() for m in adapter.matrices())
        # per input feature, so that the widths of models do not count
        norms[key] = float((up @ down).norm()) / down.shape[1] ** 0.5
    return of_layers(
        t.model,
        norms,
        "update_norm",
        "Size of the adapters",
        "norm of up x down",
        "The Frobenius norm of the product of the two projections over the square root of the "
        "width: by how much an adapter without its non-linearity stretches a random input.",
    )


def _what(location: str) -> str:
    others = {BLOCK: "block", VALUE: "value projection of cross-attention"}
    return others.get(location, f"{location} sub-layer")


def refuse_in_decoders(model: nn.Module, keys: Iterable[str], setting: str, instead: str) -> None:
    """Raise InputError for a target in a decoder, where `setting` would read future tokens."""
    causal = {sub.closing for sub in find_sublayers(model) if sub.causal}
    decoders = tuple(f"{path}." for path, block in blocks(model) if is_causal(block))
    # models of unknown structure are recognized by the name of their class
    decoder = re.search("ForCausalLM|LMHead", type(model).__name__)
    for key in keys:
        require(
            key not in causal and not decoder and not f"{key}.".startswith(decoders),
            f"{setting} reads future tokens, and {key} belongs to a decoder; use {instead}, or "
            "leave the module out with exclude_modules",
        )


def add_saved(config: MethodConfig, names: Sequence[str]) -> None:
    """Add modules to those that a config trains in full and saves."""
    saved = config.modules_to_save or []
    # a second adapter, or a loaded config, names them already
    config.modules_to_save = [*saved, *(name for name in names if name not in saved)]


def _source(c: WrapContext[SC], target: Target, sub: SubLayer | None, stream: str) -> str:
    """Return the module whose input is that of the adapter on a target; "": its own."""
    path, width = target.path, target.shape.out_features
    source = _named_source(c.config, path, sub, stream)
    names = candidate_names(c.model)
    # only input_modules can name a missing module
    if source not in names:
        raise UnknownNameError(
            f"input_modules names {source!r} as the input of {path}, but the model has no such "
            "module" + did_you_mean(source, names)
        )
    # norms have no in_features; theirs is the residual stream's width
    takes = getattr(c.model.get_submodule(source), "in_features", width)
    require(
        takes == width,
        f"{source} takes {takes} features and {path} gives {width}; the input of a parallel "
        "adapter must be as wide as its output",
    )
    # equal for modules adapted as a unit, which have the input already
    if source == path:
        return ""
    reason = calls_of(c.model).why_no_input(source, path)
    require(
        not reason,
        f"the adapter on {path} would read the input of {source}, and {reason}; name another "
        "module with input_modules, or leave the module out with exclude_modules",
    )
    return source


def _named_source(config: SubLayerConfig, key: str, sub: SubLayer | None, stream: str) -> str:
    for target, source in (config.input_modules or {}).items():
        # with the dot, "o_proj" is no suffix of "two_proj"
        if f".{key}".endswith(f".{target}"):
            return key.removesuffix(target) + source
    source = getattr(sub, stream) if sub is not None else None
    if source is None:
        raise InputError(
            f"the input of the parallel adapter on {key} is not known; pass input_modules, for "
            f"example input_modules={{{key.rpartition('.')[2]!r}: 'the module whose input it is'}}"
        )
    return source
