"""The method: weights of an inner method's adapters become quantized ones."""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from petl.core.compat import BaseTunerLayer, adapter_weights
from petl.core.layers.class_swap import swapped_class
from petl.core.layers.layer import Adapter, AdapterLayer
from petl.core.method import (
    AdapterSet,
    Method,
    NewAdapters,
    Settings,
    Tensors,
    TrainContext,
    WrapContext,
)
from petl.core.model.heat_map import HeatMap, means
from petl.core.register import register
from petl.core.support import Capability, reason_of
from petl.core.types import Fields
from petl.errors import InputError, UnsupportedError
from petl.methods.binary.config import (
    DEFAULT_INNER,
    INNER_DEFAULTS,
    UNSUPPORTED_INNER,
    BinaryConfig,
)
from petl.methods.binary.head import find_head, prepare_head
from petl.methods.binary.pv import (
    CODES,
    STATS,
    CodedWeight,
    coded_of,
    distance,
    optimizer_of,
    take_steps,
)
from petl.methods.binary.quantized_weights import (
    QuantizedOwner,
    QuantizedWeight,
    Quantizer,
    add_quantized_weight,
    swap_module,
)
from petl.methods.binary.stack import STACK, stack, unstack
from petl.methods.families.conversion import set_refusal
from petl.methods.families.outer import Outer
from petl.ops.quantize import code_book, packed_bytes, unpack
from petl.system.files.tensor_file import check_finite

# of outputs at the start, for zeros become values of up to 0.002; checked by the contract tests
START_TOLERANCE = 0.05
HEAD_IN_CODES = "its head is quantized (head_bits), which a LoRA cannot save"
MOST_COLUMNS = 16  # of the heat map of codes
LATENT = "latent."  # prefix in the training state
QUANTIZER, PROGRESS = "quantizer", "progress"  # what the method remembers of a model
UNLESS_PV = {
    Capability.FSDP: "those of a shard with the largest distance are not the tensor's: use ddp",
    Capability.ZERO: "ZeRO has its own copies of what trains, which that does not reach: use ddp",
    Capability.ADAMR: "the reference does not move with them",
}
VIEWS = "FSDP1 puts plain tensors in place of its weights, which would not be quantized"
MOVED = "the codes change after each optimizer step (steps=pv), and {}"
Training = TrainContext[Any, Any]
Saved: TypeAlias = AdapterSet[BinaryConfig, Adapter]
New: TypeAlias = NewAdapters[BinaryConfig, Adapter]


@register
class Binary(Outer):
    """See the package."""

    name, config_cls = "binary", BinaryConfig
    summary = "adapter weights of 1, 2, 4 or 8 bits, trained quantized, over any other method"
    need = "a small file"
    recommended = "1 bit per weight of the adapter, over any other method"
    paper = (
        "Jie et al. 2023, Parameter Efficiency of Adapters from the Perspective of Precision "
        "Redundancy, ICCV, arXiv:2307.16867"
    )
    lr = 3e-3
    components = "one mean and deviation are those of a whole tensor"
    lacks = {Capability.MERGE: "that depends on the inner method"}  # for `petl methods`
    needs_tuner = "it decodes the codes in its files"
    refused, purpose, first_inner = UNSUPPORTED_INNER, "quantized", DEFAULT_INNER

    def facts_over(self, inner: Method[Any, Any]) -> Fields:
        """Return the facts that differ from this inner method's."""

        def lora_reason(config: Any) -> str:
            is_head = config is not None and config.head_bits is not None
            own = HEAD_IN_CODES if is_head else ""
            return own or reason_of(inner.lacks, Capability.LORA_EXPORT, config)

        def unless_pv(capability: Capability, why: str) -> Callable[[BinaryConfig | None], str]:
            def reason(config: BinaryConfig | None) -> str:
                is_pv = config is not None and config.steps == "pv"
                return MOVED.format(why) if is_pv else inner.lacking(capability, config)

            return reason

        adapter_cls = inner.adapter_cls
        return {
            "adapter_cls": adapter_cls and swapped_class(QuantizedOwner, adapter_cls),
            "start_tolerance": START_TOLERANCE,  # of quantized values
            "keep_float32": True,  # half precision loses the small updates of latent weights
            "by_position": inner.by_position if inner.own else True,  # PEFT's adapt single layers
            "resumable": {"save_format": "latent"},
            "inner_defaults": INNER_DEFAULTS.get(inner.name, {}),
            "lacks": {
                Capability.LORA_EXPORT: lora_reason,
                Capability.FSDP1: VIEWS,
                **{each: unless_pv(each, why) for each, why in UNLESS_PV.items()},
            },
        }

    # Adding and removing an adapter

    def settings(self, c: WrapContext[Any]) -> Mapping[str, Settings]:
        """Return those of the inner method; the head trains with the adapter if it is quantized."""
        config = c.config
        if config.head_bits is not None:
            head = find_head(c.model, config.head_module)
            # PEFT then makes a copy of the head for the adapter
            config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), head]))
        return super().settings(c)

    def added(self, new: New) -> None:
        """Quantize the adapter's weights.

        Raises:
            InputError: there are none, or fields of the config name others.
        """
        if QUANTIZER not in new.kept:
            quantizer = new.kept[QUANTIZER] = Quantizer(new.context, new.tuner)
            new.hooks.append(new.model.register_forward_pre_hook(quantizer.begin))
        quantizer, config = new.kept[QUANTIZER], new.config
        super().added(new)
        weights = _choose(new, quantizer)
        has_head = config.head_bits is not None
        if has_head:
            head = prepare_head(new.model, find_head(new.model, config.head_module), new.name)
            weights.append(
                QuantizedWeight(head, "weight", config.head_bits, new.name, quantizer, head=True)
            )
        quantizer.quantized_weights[new.name] = weights
        for quantized in weights:
            add_quantized_weight(quantized)
            initialize_constant(quantized.weight)
            quantized.start()
        layers = [m for m in new.model.modules() if isinstance(m, BaseTunerLayer)]
        set_refusal(layers, new.name, HEAD_IN_CODES if has_head else "")
        # also modules that compute with weights of others, such as shared pools
        for layer in layers:
            is_own = isinstance(layer, AdapterLayer)
            for module in [a for _, a in layer.pick([new.name])] if is_own else [layer]:
                swap_module(module, quantizer)

    def removed(self, old: Saved) -> None:
        """Forget the quantized weights of an adapter."""
        super().removed(old)
        quantizer: Quantizer = old.kept[QUANTIZER]
        for quantized in quantizer.quantized_weights.pop(old.name, []):
            del quantized.owner.__dict__["quantized_weights"][quantized.name]

    # Training, with steps on codes

    def optimizer(self, t: Training) -> Optimizer | None:
        """That of the inner method, or AdamW with groups of their own for the buffers."""
        coded = [*_coded(t)]
        own = super().optimizer(t)
        return optimizer_of(t.groups, coded) if own is None and coded else own

    def is_idle(self, t: Training) -> bool:
        """True if no codes train."""
        return not any(config.steps == "pv" for config in t.configs)

    def after_step(self, t: Training) -> None:
        """Change the codes of the weights that train."""
        super().after_step(t)
        # in this order: where several adapters train, the last one is what `metrics` shows
        for config, weights in _coded(t):
            t.kept[PROGRESS] = take_steps(weights, config)

    def metrics(self, t: Training) -> dict[str, float]:
        """The share of codes that the last step changed, and how far the buffers are from them."""
        weights = [weight for _, own in _coded(t) for weight in own]
        # none before the first step
        progress = t.kept.get(PROGRESS)
        found = super().metrics(t)
        if progress is not None:
            found["codes_changed"] = float(progress.changed) / progress.total
        return found | ({"distance": distance(weights)} if weights else {})

    # Results

    @torch.no_grad()
    def heat_maps(self, t: Training) -> list[HeatMap]:
        """How often each code occurs, and the maps of the inner method."""
        first = t.active[0]
        bits: int = first.config.bits
        shares = []
        for keys, quantized in _quantized_weights(first):
            weight = gathered(quantized.weight)
            if quantized.bits == bits:  # not the head, which has bits of its own
                numbers = unpack(quantized.encode(weight)[0], weight.numel(), bits)
                counts = torch.bincount(numbers, minlength=2**bits).float()
                counts = counts.view(min(len(counts), MOST_COLUMNS), -1).sum(1)
                label = _label(first, keys, quantized).removesuffix(".weight")
                role = re.sub(r"^.*\.\d+\.|petl_\w+_adapters\.", "", label.removeprefix("model."))
                shares.append((role, (100 * counts / counts.sum()).tolist()))
        rows = means(shares)
        # 256 codes are too many for a table
        codes = code_book(bits, torch.device("cpu"))[0].view(min(2**bits, MOST_COLUMNS), -1).mean(1)
        use = HeatMap(
            "code_use",
            "Binary: use of the codes",
            "% of the weights",
            list(rows),
            [f"{code:.2f}" for code in codes.tolist()],
            list(rows.values()),
            "The share of a module's weights that have each code, averaged over layers; the code "
            "is in standard deviations from the mean.",
            "quantized weight",
            "code",
        )
        return [use, *super().heat_maps(t)]

    # Files

    def state(self, t: Training) -> Tensors:
        """The inner method's state, and the latent weights where the adapter file has codes."""
        return super().state(t) | {LATENT + key: latent.weight for key, latent in _latent(t)}

    def load_state(self, t: Training, state: Mapping[str, Tensor]) -> None:
        """Restore the state that `state` returned."""
        latent = {key: tensor for key, tensor in state.items() if key.startswith(LATENT)}
        with torch.no_grad():
            for key, quantized in _latent(t):
                quantized.weight.copy_(latent[LATENT + key])
        # the rest is the inner method's
        if len(latent) < len(state):
            super().load_state(t, {k: v for k, v in state.items() if k not in latent})

    def pack(self, saved: Saved, tensors: Tensors) -> Tensors:
        """The inner method's tensors, with codes and statistics in place of quantized weights."""
        config, weights = saved.config, _quantized_weights(saved)
        beside = {name for keys, w in weights for key in keys for name in w.beside(key)}
        entries = super().pack(saved, {k: t for k, t in tensors.items() if k not in beside})
        stacked: dict[str, tuple[Tensor, Tensor]] = {}
        for keys, quantized in weights:
            # PEFT adds heads to `entries` later
            source = saved.state if quantized.head else entries
            # a shared weight is saved under one of its names
            key = next((key for key in keys if key in source), None)
            if key is None:
                raise UnsupportedError(
                    f"inner={config.inner!r} saves {keys[0]} in a format of its own, which cannot "
                    "be quantized; use another inner method"
                )
            weight, name = source[key], saved.name_in_file(quantized.unwrapped_key(key))
            # replaced by codes and statistics
            entries.pop(key, None)
            if config.save_format == "latent":
                entries[name] = weight
            if config.save_format == "stacked":
                stacked[_label(saved, keys, quantized)] = quantized.encode(gathered(weight))
            elif config.save_format == "packed" or quantized.takes_steps:
                entries[name + CODES], entries[name + STATS] = quantized.encode(gathered(weight))
        return entries | (stack(stacked) if stacked else {})

    def unpack(self, saved: Saved, tensors: Tensors) -> Tensors:
        """Decode a file of any format into the inner method's tensors.

        Raises:
            InputError: a quantized weight is missing or has another size.
        """
        check_finite(tensors, "the adapter file")
        entries, trains = dict(tensors), not saved.config.inference_mode
        more, lost = dict[str, Tensor](), ""
        weights = _quantized_weights(saved)
        if any(name.startswith(STACK) for name in entries):
            sizes = {
                _label(saved, keys, w): packed_bytes(w.weight.numel(), w.bits)
                for keys, w in weights
            }
            for name, (codes, stats) in unstack(entries, sizes).items():
                entries[name + CODES], entries[name + STATS] = codes, stats
            entries = {key: t for key, t in entries.items() if not key.startswith(STACK)}
        for keys, quantized in weights:
            names = {saved.name_in_file(quantized.unwrapped_key(key)): key for key in keys}
            name = next(
                (n for n in names if n in entries or n + CODES in entries), next(iter(names))
            )
            codes, stats = entries.pop(name + CODES, None), entries.pop(name + STATS, None)
            # one, the other, or both: of steps=pv, a file to resume from has codes and buffers
            latent, both = entries.pop(name, None), None
            if codes is not None and stats is not None:
                quantized.check(codes, stats)
                both = codes, stats
            elif codes is not None or stats is not None or latent is None:
                raise InputError(
                    f"the adapter file has no {name}, or not both of its codes and statistics; it "
                    "is incomplete, or was saved from another model or config"
                )
            if latent is None or (not quantized.takes_steps and both is not None):
                lost = quantized.lost
            found = dict(quantized.loaded(latent, both, trains=trains))
            entries[name] = found.pop("")
            more |= {name + suffix: tensor for suffix, tensor in found.items()}
            if quantized.head:
                entries[names[name]] = entries.pop(name)
        if lost and trains:
            warnings.warn(
                f"the adapter file has codes but {lost}; to resume exactly, save with "
                "save_format='latent'",
                stacklevel=3,
            )
        return super().unpack(saved, entries) | more


def quantizer_of(model: nn.Module) -> Quantizer | None:
    """Return what quantizes the weights of a PeftModel; None: its adapters are no binary ones."""
    return getattr(model.base_model, "kept", {}).get(QUANTIZER)


def _choose(new: New, quantizer: Quantizer) -> list[QuantizedWeight]:
    """The weights to quantize: tensors of two or more dimensions that are not excluded."""
    config, weights = new.config, dict[str, QuantizedWeight]()
    kind = CodedWeight if config.steps == "pv" else QuantizedWeight
    for key, (owner, name) in adapter_weights(new.tuner, new.name).items():
        short = new.name_in_file(key)
        bits = config.bits_pattern.get(short, config.bits)
        quantized = kind(owner, name, bits, new.name, quantizer)
        # its entries are adapters, and what stands beside a weight needs a dict of its own
        if isinstance(quantized, CodedWeight) and isinstance(owner, nn.ParameterDict):
            path, quantized.in_layer, _ = key.rsplit(".", 2)
            quantized.layer = new.tuner.get_submodule(path)
        # biases, norms and scales stay in float32
        if quantized.weight.dim() > 1 and quantized.weight.numel() > 1:
            weights[short] = quantized
    if not weights:
        raise InputError(
            f"inner={config.inner!r} trains no tensor of two or more dimensions, so there is "
            "nothing to quantize; use another inner method"
        )
    unknown = sorted(config.bits_pattern.keys() - weights.keys())
    if unknown:
        raise InputError(
            f"bits_pattern: {unknown[0]!r} is not one of the tensors to quantize, such as "
            f"{next(iter(weights))}"
        )
    for pattern in config.exclude_params:
        matched = [key for key in weights if re.search(pattern, key)]
        if not matched or len(matched) == len(weights):
            raise InputError(
                f"exclude_params: {pattern!r} matches {'all' if matched else 'none'} of the "
                f"tensors to quantize, such as {next(iter(weights))}"
            )
        for key in matched:
            del weights[key]
    return list(weights.values())


def _coded(t: Training) -> Iterator[tuple[BinaryConfig, list[CodedWeight]]]:
    """Yield the weights of active adapters that train with steps on codes, with their config."""
    for adapters in t.active:
        weights = coded_of(t.kept[QUANTIZER].quantized_weights[adapters.name])
        if weights:
            yield adapters.config, weights


def _latent(t: Training) -> Iterator[tuple[str, QuantizedWeight]]:
    """Yield the trainable weights that are saved as codes, with their names in the PeftModel."""
    for adapters in t.active:
        if adapters.config.save_format != "latent":
            for keys, quantized in _quantized_weights(adapters):
                if quantized.packed is None:
                    yield keys[0], quantized


def _quantized_weights(adapters: Saved) -> list[tuple[list[str], QuantizedWeight]]:
    """The quantized weights of an adapter, each with its names in the PeftModel.

    A weight that modules share has several.
    """
    found: dict[int, tuple[list[str], QuantizedWeight]] = {}
    for path, module in adapters.tuner.named_modules(prefix="base_model", remove_duplicate=False):
        if isinstance(module, QuantizedOwner):
            for name, quantized in module.__dict__["quantized_weights"].items():
                if quantized.adapter_name == adapters.name:
                    found.setdefault(id(quantized), ([], quantized))[0].append(f"{path}.{name}")
    return list(found.values())


def _label(adapters: Saved, keys: list[str], quantized: QuantizedWeight) -> str:
    """The name of a weight in a stacked file."""
    return min(adapters.name_in_file(quantized.unwrapped_key(key)) for key in keys)


@torch.no_grad()
def initialize_constant(weight: Tensor) -> None:
    """Draw a constant weight around its value: without a deviation, it would never change."""
    if not weight.is_meta and weight.min() == weight.max():
        value = float(weight.flatten()[0])  # 0, except for scales
        # the spread of the authors' up projection
        nn.init.trunc_normal_(weight, value, std=1e-3, a=value - 2e-3, b=value + 2e-3)


def gathered(weight: Tensor) -> Tensor:
    """`weight` itself, or the complete tensor of a sharded one."""
    gather = getattr(weight, "full_tensor", None)
    return weight if gather is None else gather()
