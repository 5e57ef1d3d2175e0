"""Which share of a model's block weights its adapters reach, and which layers they do not.

Counted are weights of at least two dimensions in the lists of layers: linear layers, experts, and
convolutions over one place; those over several places where the adapters reach some of them.
Embeddings, biases and norms are not.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from peft import PeftConfig, PeftModel
from torch import nn
from torch.nn.modules.conv import _ConvNd

from petl.core.compat import AuxiliaryTrainingWrapper, BaseTunerLayer
from petl.core.experts.layout import experts_of
from petl.core.experts.linears import linears_of
from petl.core.layers.class_swap import AdapterDict
from petl.core.model.calls import place_of
from petl.core.model.names import LANGUAGE, language_path, part_in, stack_names
from petl.core.model.places import Place, place
from petl.core.parameters import quantization_of, trainable
from petl.core.spec.facts import facts_of
from petl.ops.expert_linear import ExpertLinears

logger = logging.getLogger(__name__)
LOW = 0.5  # a share below it is a warning
SHOWN = 4  # kinds of layers that a line names


class _Weight(NamedTuple):
    """One weight: path and kind of its module, entries, whether it is adapted or quantized."""

    path: str
    size: int
    stacked: bool
    linear: bool
    wide: bool  # of a convolution over several places
    reached: bool
    quantized: bool


@dataclass(frozen=True)
class Coverage:
    """The share of block weights that the adapters of a model reach.

    Attributes:
        share: in [0, 1]; of a model of several parts, of those that have an adapter.
        missed: shares that are not reached, by kind of layer, the largest first.
        without: shares of all block weights of the parts that have no adapter.
        stacked: the share of weights of experts in stacks among those that are not reached.
        linear: likewise, of weights of linear layers.
        bare: blocks without an adapter.
        full: share of weights in full precision; None if the base is not quantized.
    """

    share: float
    missed: dict[str, float]
    without: dict[str, float]
    stacked: float = 0.0
    linear: float = 1.0
    bare: int = 0
    full: float | None = None

    def __str__(self) -> str:
        text = f"adapters reach {_percent(self.share)} of the block weights"
        if self.without:
            text += f" outside {' and '.join(map(repr, self.without))}"
        kinds = [f"{kind} ({_percent(part)})" for kind, part in self.missed.items()]
        if kinds:
            shown = kinds if len(kinds) <= SHOWN + 1 else kinds[:SHOWN]
            more = f" and {len(kinds) - SHOWN} others" if len(kinds) > len(shown) else ""
            text += f"; not reached: {', '.join(shown)}{more}"
        for part, share in self.without.items():
            text += f"; no adapter on the part {part!r} ({_percent(share)} of all block weights)"
        if self.full:
            text += f"; {_percent(self.full)} of them are not quantized"
        return text


def coverage_of(model: PeftModel) -> Coverage | None:
    """Return the coverage of the adapters of `model`; None for a method that adapts no weight."""
    base = model.get_base_model()
    weights = [*_weights(base, "")]
    # the small one of a block of Mamba is no place for an adapter; those of a ResNet are
    with_wide = any(weight.wide and weight.reached for weight in weights)
    everywhere = [(w, place(base, w.path)) for w in weights if with_wide or not w.wide]
    inside = [(weight, where) for weight, where in everywhere if where is not None]
    counted = inside or everywhere  # a model without lists of layers
    language = language_path(base)
    # a projector is in no block
    seen = counted if language is None else everywhere
    if not any(weight.reached for weight, _ in seen):
        return None

    def part_of(weight: _Weight) -> str:
        return LANGUAGE if language is None else part_in(weight.path, language)

    adapted = {part_of(weight) for weight, _ in counted if weight.reached}
    sizes, missed, without = Counter[bool](), Counter[str](), Counter[str]()
    stacked = linear = 0
    for weight, where in counted:
        if part_of(weight) not in adapted:
            without[part_of(weight)] += weight.size
            continue
        sizes[weight.reached] += weight.size
        if not weight.reached:
            missed[_kind(weight.path, where)] += weight.size
            stacked += weight.size * weight.stacked
            linear += weight.size * weight.linear
    all_blocks, with_adapters = (
        {(w.stack, w.index) for each, w in inside if part_of(each) in adapted and take(each)}
        for take in (lambda each: True, lambda each: each.reached)
    )
    total = max(sizes.total(), 1)
    everything = sizes.total() + without.total()
    full = sum(w.size for w, _ in counted if not w.quantized and part_of(w) in adapted) / total
    return Coverage(
        sizes[True] / total,
        {kind: size / total for kind, size in missed.most_common()},
        {part: size / everything for part, size in without.most_common()},
        stacked / max(sizes[False], 1),
        linear / max(sizes[False], 1),
        len(all_blocks) - len(with_adapters),
        full if quantization_of(base) else None,
    )


def log_coverage(model: PeftModel, given: object, *, is_chosen: bool, adapts_experts: bool) -> None:
    """Log the coverage of a wrapped model: a warning if it is low and not asked for.

    Args:
        given: the targets as the user gave them.
        is_chosen: the method finds its own places.
        adapts_experts: the method can adapt stacked experts.
    """
    found = coverage_of(model)
    # of a model without values, such as that of a plan, other places tell
    if next(model.parameters()).device.type == "meta":
        return
    if found is None:
        logger.info("the adapters change no weight of the blocks: they compute beside them")
        return
    low = not is_chosen and is_low(found, model.active_peft_config, given)
    is_preset = given == "block-linear"
    way_out = low and found.stacked >= LOW and adapts_experts and not is_preset
    hint = "; target_modules=block-linear adapts the experts too" if way_out else ""
    logger.log(logging.WARNING if low else logging.INFO, "%s%s", found, hint)
    on_experts = trained_on_experts(model)
    if on_experts and given != "experts" and not isinstance(given, list | set):
        logger.info(
            "%s of %s trained parameters are those of experts; name others to leave these out, "
            "such as target_modules=attention-linear",
            f"{on_experts:,}",
            f"{sum(parameter.numel() for _, parameter in trainable(model)):,}",
        )


def trained_on_experts(model: PeftModel) -> int:
    """Return the number of trained parameters on stacked experts."""
    base = model.get_base_model()
    modules = {stack.rpartition(".")[0] for stack in stack_names(base)}
    inside = tuple(f"{path}." for path in modules)
    return sum(p.numel() for name, p in trainable(base) if name.startswith(inside))


def is_low(found: Coverage, config: PeftConfig, given: object) -> bool:
    """Return True for a share below LOW, unless it is what was asked for.

    Asked for is a part of the blocks (`layers_to_transform`), and a low share of names that reach
    every block and leave out linear layers only.
    """
    everything = given in ("all-linear", "block-linear", LANGUAGE)
    named = not everything and not found.bare and found.linear > LOW
    asked = named or facts_of(config).layers_to_transform is not None
    return found.share < LOW and not asked


def _weights(module: nn.Module, path: str) -> Iterator[_Weight]:
    """Yield the weights of a base model, those under adapters included."""
    adapted: set[str] = set()
    inner: Any = module
    while isinstance(inner, BaseTunerLayer):
        # PEFT adapts single parameters of a module by layers around it
        adapted.add(getattr(inner, "parameter_name", "weight"))
        inner = vars(inner).get("base_layer") or inner._modules["base_layer"]
    linears = linears_of(inner)
    adapted |= set() if linears is None else set(linears._modules)
    if isinstance(inner, AuxiliaryTrainingWrapper):  # trained in full
        inner, adapted = inner.original_module, {"", *adapted}
    if not isinstance(inner, nn.Embedding):
        yield from _own_weights(inner, path, adapted)
    for name, child in inner.named_children():
        if not isinstance(child, AdapterDict | ExpertLinears):
            for weight in _weights(child, f"{path}.{name}" if path else name):
                yield weight._replace(reached=weight.reached or "" in adapted)


def _own_weights(module: nn.Module, path: str, adapted: set[str]) -> Iterator[_Weight]:
    sides: int = getattr(module, "in_features", 0) * getattr(module, "out_features", 0)
    in_stacks = experts_of(module) is not None
    for name, parameter in module._parameters.items():
        quantized = parameter is not None and not parameter.is_floating_point()
        if parameter is None or parameter.dim() < 2 or "bias" in name:
            continue
        wide = isinstance(module, _ConvNd) and parameter[0, 0].numel() > 1
        # packed weights have other shapes
        size = sides if quantized and sides else parameter.numel()
        reached = name in adapted or "" in adapted
        # a module may have a matrix that is none of a linear layer
        owner = f"{path}.{name}" if name != "weight" and parameter.dim() == 2 else path
        is_linear = bool(sides) or (name == "weight" and parameter.dim() == 2)
        yield _Weight(owner, size, in_stacks, is_linear, wide, reached, quantized)


def _kind(path: str, where: Place | None) -> str:
    return place_of(path if where is None else where.name)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
