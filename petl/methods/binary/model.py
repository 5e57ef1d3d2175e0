"""The tuner of a quantized method: a generated subclass of the inner method's tuner."""

import re
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from petl.core.compat import BaseTunerLayer, adapter_weights
from petl.core.layers.class_swap import swapped_class
from petl.core.layers.conversion import set_refusal
from petl.core.layers.layer import AdapterLayer
from petl.core.method import Method
from petl.core.model.heat_map import HeatMap, means
from petl.core.model.weight_changes import change_map
from petl.core.register import register
from petl.core.support import Capability, Lacks
from petl.core.switching.tuner import SwitchingTuner
from petl.core.tuners.adapter import AdapterTuner
from petl.core.tuners.base import ForwardContextTuner
from petl.errors import InputError, UnsupportedError
from petl.methods.binary.config import (
    DEFAULT_INNER,
    INNER_DEFAULTS,
    BinaryConfig,
    config_of,
    inner_method,
)
from petl.methods.binary.head import find_head, prepare_head
from petl.methods.binary.quantized_weights import (
    QuantizedOwner,
    QuantizedWeight,
    Quantizer,
    add_quantized_weight,
    swap_module,
)
from petl.methods.binary.stack import STACK, stack, unstack
from petl.methods.families.inner import ON_THEIR_WAY, tuner_class_of, undo_injection
from petl.ops.quantize import code_book, packed_bytes, unpack
from petl.system.files.tensor_file import check_finite

# of outputs at the start, for zeros become values of up to 0.002; checked by the contract tests
START_TOLERANCE = 0.05
HEAD_IN_CODES = "its head is quantized (head_bits), which a LoRA cannot save"
MOST_COLUMNS = 16  # of the heat map of codes
CODES, STATS = "_codes", "_stats"  # suffixes of a packed tensor's name in the file
LATENT = "latent."  # prefix in the training state


def variant(entry: Method, given: Mapping[str, Any]) -> Method:
    """The registry's entry for the fields `given`: the inner method's, with this one's classes."""
    inner = given.get("inner", DEFAULT_INNER)
    inner_entry = inner_method(inner)
    return inner_entry.changed(
        name=entry.name,
        config_cls=config_of(inner),
        summary=entry.summary,
        paper=entry.paper,
        defaults={**inner_entry.defaults, "inner": inner},
        start_tolerance=START_TOLERANCE,  # of quantized values
        lacks={**inner_entry.lacks, **rows_of(given)},
        tuner_cls=tuner_of(inner),
        variant=entry.variant,
        inner=inner,
        inner_defaults=INNER_DEFAULTS.get(inner, {}),
    )


def rows_of(given: Mapping[str, Any]) -> Lacks:
    """What it lacks in addition to the inner method, with these fields."""
    rows = {Capability.TOGETHER: ON_THEIR_WAY}
    return (
        rows if given.get("head_bits") is None else rows | {Capability.LORA_EXPORT: HEAD_IN_CODES}
    )


@register(
    "binary",
    summary="adapter weights of 1, 2, 4 or 8 bits, trained quantized, over any other method",
    need="a small file",
    recommended="1 bit per weight of the adapter, over any other method",
    paper="Jie et al. 2023, Parameter Efficiency of Adapters from the Perspective of Precision "
    "Redundancy, ICCV, arXiv:2307.16867",
    lr=3e-3,
    variant=variant,
)
class BinaryModel(SwitchingTuner, ForwardContextTuner):
    """Tuner of `BinaryConfig`; instances have the class that `tuner_of(inner)` generates."""

    config_cls = BinaryConfig
    lacks = {Capability.MERGE: "that depends on the inner method"}  # for `petl methods`
    needs_tuner = "it decodes the codes in its files"

    peft_config: dict[str, Any]
    quantizer: Quantizer

    def __new__(
        cls, model: Any = None, peft_config: Any = None, adapter_name: str = "", **options: Any
    ) -> Any:
        if cls is BinaryModel:
            config = peft_config[adapter_name] if isinstance(peft_config, dict) else peft_config
            # PEFT instantiates the registered class: return the generated one
            cls = tuner_of(config.inner)
        return super().__new__(cls)

    @torch.no_grad()
    def heat_maps(self) -> list[HeatMap]:
        """How often each code occurs, and the maps of the inner method."""
        name = self.active_adapters[0]
        bits: int = self.peft_config[name].bits
        quantized_weights = _quantized_weights(self, name)
        shares = []
        for keys, quantized in quantized_weights:
            weight = gathered(quantized.weight)
            if quantized.bits == bits:  # not the head, which has bits of its own
                numbers = unpack(quantized.encode(weight)[0], weight.numel(), bits)
                counts = torch.bincount(numbers, minlength=2**bits).float()
                counts = counts.view(min(len(counts), MOST_COLUMNS), -1).sum(1)
                label = _label(type(self), keys, quantized).removesuffix(".weight")
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
        inner: Any = super()
        own = inner.heat_maps() if hasattr(inner, "heat_maps") else None
        return [use, *(change_map(self.model, self.active_adapters) if own is None else own)]

    # Adding an adapter

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        self.quantizer = Quantizer(self.context)
        self.hooks.append(model.register_forward_pre_hook(self.quantizer.begin))

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Let the inner method add the adapter, then quantize its weights.

        Raises:
            InputError: the model's adapters have another inner method, or this one has nothing to
                quantize; the model is then left unchanged.
        """
        self.refuse_without_tuner(self.needs_tuner)
        config = self.peft_config[adapter_name]
        for other in self.peft_config.values():
            if other.inner != config.inner:
                raise InputError(
                    f"inner={config.inner!r} cannot be added to a model with an adapter of "
                    f"inner={other.inner!r}; wrap another copy of the model"
                )
        head = None
        if config.head_bits is not None:
            head = find_head(model, config.head_module)
            # PEFT then makes a copy of the head for the adapter
            config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), head]))
        with self.only_visible({adapter_name}):
            self._inject(model, adapter_name, head, *args, **kwargs)

    def _inject(
        self, model: nn.Module, adapter_name: str, head: str | None, *args: Any, **kwargs: Any
    ) -> None:
        config = self.peft_config[adapter_name]
        trained = [p for p in model.parameters() if p.requires_grad]
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        try:
            weights = self._choose(config, adapter_name)
        except InputError:
            undo_injection(self, adapter_name, trained)
            raise
        if head is not None:
            owner = prepare_head(model, head, adapter_name)
            weights.append(
                QuantizedWeight(
                    owner, "weight", config.head_bits, adapter_name, self.quantizer, head=True
                )
            )
        self.quantizer.quantized_weights[adapter_name] = weights
        for quantized in weights:
            add_quantized_weight(quantized)
            initialize_constant(quantized.weight)
        layers = (m for m in self.model.modules() if isinstance(m, BaseTunerLayer))
        set_refusal(layers, adapter_name, HEAD_IN_CODES if head is not None else "")
        # also modules that compute with weights of others, such as shared pools
        for module in self._computing(adapter_name):
            swap_module(module, self.quantizer)

    def _computing(self, adapter_name: str) -> Iterator[nn.Module]:
        """Yield the modules that compute with an adapter's weights."""
        for layer in self.model.modules():
            if isinstance(layer, AdapterLayer):
                yield from (adapter for _, adapter in layer.pick([adapter_name]))
            elif isinstance(layer, BaseTunerLayer):
                yield layer

    def _choose(self, config: BinaryConfig, adapter_name: str) -> list[QuantizedWeight]:
        """The weights to quantize: tensors of two or more dimensions that are not excluded."""
        weights: dict[str, QuantizedWeight] = {}
        for key, (owner, name) in adapter_weights(self, adapter_name).items():
            short = self._remove_adapter_name_from_key(key, adapter_name)
            bits = config.bits_pattern.get(short, config.bits)
            quantized = QuantizedWeight(owner, name, bits, adapter_name, self.quantizer)
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

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep latent weights in float32: half precision would lose small updates."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=True)

    # Removing an adapter

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter and its quantized weights."""
        super().delete_adapter(adapter_name)
        for quantized in self.quantizer.quantized_weights.pop(adapter_name, []):
            del quantized.owner.__dict__["quantized_weights"][quantized.name]

    # Files

    def training_state(self) -> dict[str, Tensor]:
        """The inner method's state, and the latent weights where the adapter file has codes."""
        # not every inner tuner has a state
        inner = getattr(super(), "training_state", dict)()
        return inner | {LATENT + key: quantized.weight for key, quantized in self._latent()}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Restore the state that `training_state` returned."""
        latent = {key: tensor for key, tensor in state.items() if key.startswith(LATENT)}
        with torch.no_grad():
            for key, quantized in self._latent():
                quantized.weight.copy_(latent[LATENT + key])
        # the rest is the inner method's
        if len(latent) < len(state):
            inner: Any = super()
            inner.load_training_state({k: v for k, v in state.items() if k not in latent})

    def _latent(self) -> Iterator[tuple[str, QuantizedWeight]]:
        """Yield the trainable weights that are saved as codes, with their names in the tuner."""
        for name, config in self.peft_config.items():
            if config.save_format != "latent":
                weights = _quantized_weights(self, name)
                yield from (
                    (keys[0], quantized) for keys, quantized in weights if quantized.packed is None
                )

    @contextmanager
    def resumable(self) -> Generator[None]:
        """Context in which `save_pretrained` writes latent weights, so that training can resume."""
        formats = [(config, config.save_format) for config in self.peft_config.values()]
        for config, _ in formats:
            config.save_format = "latent"
        try:
            yield
        finally:
            for config, save_format in formats:
                config.save_format = save_format

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """The inner method's entries, with codes and statistics in place of quantized weights."""
        tuner = tuner_of(config.inner)
        entries = super(BinaryModel, tuner)._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        stacked: dict[str, tuple[Tensor, Tensor]] = {}
        for keys, quantized in _quantized_weights(model, adapter_name):
            source = state_dict if quantized.head else entries  # PEFT adds heads to `entries` later
            # a shared weight is saved under one of its names
            key = next((key for key in keys if key in source), None)
            if key is None:
                raise UnsupportedError(
                    f"inner={config.inner!r} saves {keys[0]} in a format of its own, which cannot "
                    "be quantized; use another inner method"
                )
            weight, name = source[key], quantized.unwrapped_key(key)
            # replaced by codes and statistics
            entries.pop(key, None)
            if config.save_format == "latent":
                entries[name] = weight
            elif config.save_format == "stacked":
                stacked[_label(tuner, keys, quantized)] = quantized.encode(gathered(weight))
            else:
                entries[name + CODES], entries[name + STATS] = quantized.encode(gathered(weight))
        return entries | (stack(stacked) if stacked else {})

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        end = next((end for end in (CODES, STATS) if key.endswith(end)), "")
        return super()._remove_adapter_name_from_key(key.removesuffix(end), adapter_name) + end

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Decode a file of any format into the inner method's entries, under the model's names.

        Raises:
            InputError: a quantized weight is missing or has another size.
        """
        check_finite(state_dict, "the adapter file")
        tuner = tuner_of(config.inner)
        entries, trains, packed = dict(state_dict), not config.inference_mode, False
        if any(name.startswith(STACK) for name in entries):
            sizes = {
                _label(tuner, keys, quantized): packed_bytes(
                    quantized.weight.numel(), quantized.bits
                )
                for keys, quantized in _quantized_weights(model, adapter_name)
            }
            for name, (codes, stats) in unstack(entries, sizes).items():
                entries[name + CODES], entries[name + STATS] = codes, stats
            entries = {key: t for key, t in entries.items() if not key.startswith(STACK)}
        for keys, quantized in _quantized_weights(model, adapter_name):
            names = {
                tuner._remove_adapter_name_from_key(quantized.unwrapped_key(key), adapter_name): key
                for key in keys
            }
            name = next(
                (n for n in names if n in entries or n + CODES in entries), next(iter(names))
            )
            codes, stats = entries.pop(name + CODES, None), entries.pop(name + STATS, None)
            if codes is not None and stats is not None:
                entries[name] = quantized.decode(codes, stats, trains=trains)
                # latent weights are lost: see the warning below
                packed = True
            elif codes is None and stats is None and name in entries:
                quantized.packed = None  # a file of latent weights
            else:
                raise InputError(
                    f"the adapter file has no {name}, or not both of its codes and statistics; it "
                    "is incomplete, or was saved from another model or config"
                )
            if quantized.head:
                entries[names[name]] = entries.pop(name)
        if packed and trains:
            warnings.warn(
                "the adapter file has codes but no latent weights: training starts from weights "
                "spread evenly around the codes; to resume exactly, save with save_format='latent'",
                stacklevel=2,
            )
        return super(BinaryModel, tuner)._remap_adapter_state_dict_for_load(
            model, config, adapter_name, entries
        )


@cache
def tuner_of(inner: str) -> type[BinaryModel]:
    """Generate the subclass of `BinaryModel` and of the tuner of the method `inner`."""
    tuner = tuner_class_of(inner_method(inner))
    body = {"prefix": tuner.prefix, "__module__": __package__, "__doc__": BinaryModel.__doc__}
    if issubclass(tuner, AdapterTuner):
        adapter_cls = swapped_class(QuantizedOwner, tuner.method.adapter_cls)
        body["method"] = tuner.method.changed(adapter_cls=adapter_cls)
    return type(f"BinaryModel_{inner}", (BinaryModel, tuner), body)


def _quantized_weights(
    model: nn.Module, adapter_name: str
) -> list[tuple[list[str], QuantizedWeight]]:
    """The quantized weights of an adapter, each with its names in `model` (several if shared)."""
    found: dict[int, tuple[list[str], QuantizedWeight]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedOwner):
            for name, quantized in module.__dict__["quantized_weights"].items():
                if quantized.adapter_name == adapter_name:
                    # by id: a shared weight has several names
                    found.setdefault(id(quantized), ([], quantized))[0].append(f"{path}.{name}")
    return list(found.values())


def _label(tuner: type[BinaryModel], keys: list[str], quantized: QuantizedWeight) -> str:
    """The name of a weight in a stacked file, without the adapter's name."""
    unwrapped = (quantized.unwrapped_key(key) for key in keys)
    return min(
        tuner._remove_adapter_name_from_key(key, quantized.adapter_name) for key in unwrapped
    )


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
