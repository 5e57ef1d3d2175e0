"""The tuner of a quantised method: a subclass of the inner method's, made once for each."""

import re
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from petl.core.compat import BaseTunerLayer, LoraModel, adapter_weights
from petl.core.layers.class_swap import swapped_class
from petl.core.layers.layer import AdapterLayer
from petl.core.registry import register
from petl.core.spec.method import Method
from petl.core.switching.lora import SwitchingLora
from petl.core.switching.tuner import SwitchingTuner
from petl.core.tuners.base import ForwardContextTuner
from petl.core.tuners.tuner import MethodTuner
from petl.errors import InputError, UnsupportedError
from petl.methods.binary.config import (
    DEFAULT_INNER,
    INNER_DEFAULTS,
    BinaryConfig,
    config_of,
    inner_method,
)
from petl.methods.binary.head import find_head, take_head
from petl.methods.binary.reading import Quantized, Reader, Spot, add_spot, convert
from petl.methods.binary.stack import STACK, stack, unstack
from petl.ops.quantize import packed_bytes

START_TOLERANCE = 0.05  # weights that would start at zero are drawn within 0.002 of it
CODES, STATS = "_codes", "_stats"  # what the file adds to the name of a packed tensor
LATENT = "latent."  # what training's own state puts before it


def variant(entry: Method, given: Mapping[str, Any]) -> Method:
    """The entry of this method for the fields `given`: what the inner method is and promises."""
    inner = given.get("inner", DEFAULT_INNER)
    facts = inner_method(inner)
    return replace(
        facts,
        name=entry.name,
        config_cls=config_of(inner),
        summary=entry.summary,
        paper=entry.paper,
        defaults={**facts.defaults, "inner": inner},
        start_tolerance=START_TOLERANCE,
        exports_lora=facts.exports_lora and given.get("head_bits") is None,  # LoRA has no such head
        tuner_cls=tuner_of(inner),
        variant=entry.variant,
        inner=inner,
        inner_defaults=INNER_DEFAULTS.get(inner, {}),
    )


@register(
    "binary",
    summary="weights of 1, 2, 4 or 8 bits, trained as such, over any other method",
    paper="Jie et al. 2023, Parameter Efficiency of Adapters from the Perspective of Precision "
    "Redundancy, ICCV, arXiv:2307.16867",
    lr=3e-3,
    variant=variant,
)
class BinaryModel(SwitchingTuner, ForwardContextTuner):
    """The tuner of `BinaryConfig`; an instance is of the class that `tuner_of(inner)` makes."""

    config_cls = BinaryConfig
    uses_shared_state = True  # the reader

    peft_config: dict[str, Any]
    reader: Reader

    def __new__(
        cls, model: Any = None, peft_config: Any = None, adapter_name: str = "", **options: Any
    ) -> Any:
        if cls is BinaryModel:
            config = peft_config[adapter_name] if isinstance(peft_config, dict) else peft_config
            cls = tuner_of(config.inner)
        return super().__new__(cls)

    # Putting an adapter in place

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        self.reader = Reader(self.context)
        self.hooks.append(model.register_forward_pre_hook(self.reader.begin))

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Let the inner method put the adapter in place, then quantise its weights.

        Raises:
            InputError: the model's adapters have another inner method, or this one has nothing to
                quantise; the model is left as it was.
        """
        config = self.peft_config[adapter_name]
        for other in self.peft_config.values():
            if other.inner != config.inner:
                raise InputError(
                    f"inner={config.inner!r} cannot stand beside an adapter with "
                    f"inner={other.inner!r}; wrap another copy of the model"
                )
        head = None
        if config.head_bits is not None:
            head = find_head(model, config.head_module)
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
            spots = self._choose(config, adapter_name)
        except InputError:
            self.delete_adapter(adapter_name)
            if not self.peft_config:
                self.unload()
            for parameter in trained:
                parameter.requires_grad_(True)
            raise
        if head is not None:
            owner = take_head(model, head, adapter_name)
            spots.append(
                Spot(owner, "weight", config.head_bits, adapter_name, self.reader, head=True)
            )
        self.reader.spots[adapter_name] = spots
        for spot in spots:
            add_spot(spot)
            start(spot.weight)
        for module in self._computing(adapter_name):
            convert(module, self.reader)

    def _computing(self, adapter_name: str) -> Iterator[nn.Module]:
        """The modules that compute with an adapter's weights."""
        for layer in self.model.modules():
            if isinstance(layer, AdapterLayer):
                yield from (adapter for _, adapter in layer.pick([adapter_name]))
            elif isinstance(layer, BaseTunerLayer):
                yield layer

    def _choose(self, config: BinaryConfig, adapter_name: str) -> list[Spot]:
        """The weights to quantise: tensors of two or more dimensions, but for those excluded."""
        weights: dict[str, Spot] = {}
        for key, (owner, name) in adapter_weights(self, adapter_name).items():
            spot = Spot(owner, name, config.bits, adapter_name, self.reader)
            if spot.weight.dim() > 1 and spot.weight.numel() > 1:
                weights[self._remove_adapter_name_from_key(key, adapter_name)] = spot
        if not weights:
            raise InputError(
                f"method {config.inner!r} trains no tensor of two or more dimensions, so there is "
                "nothing to quantise; choose another inner method"
            )
        for pattern in config.exclude_params:
            named = [key for key in weights if re.search(pattern, key)]
            if not named or len(named) == len(weights):
                raise InputError(
                    f"exclude_params: {pattern!r} is found in {'all' if named else 'none'} of the "
                    f"tensors to quantise, such as {next(iter(weights))}"
                )
            for key in named:
                del weights[key]
        return list(weights.values())

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Latent weights are float32 whatever is asked for."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=True)

    # Taking it away

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and what is known of its weights."""
        super().delete_adapter(adapter_name)
        for spot in self.reader.spots.pop(adapter_name, []):
            del spot.owner.__dict__["spots"][spot.name]

    # Files

    def training_state(self) -> dict[str, Tensor]:
        """The latent weights, where the adapter file holds codes; with the inner method's state."""
        inner = getattr(super(), "training_state", dict)()
        return inner | {LATENT + key: spot.weight for key, spot in self._latent()}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `training_state` gave."""
        latent = {key: tensor for key, tensor in state.items() if key.startswith(LATENT)}
        with torch.no_grad():
            for key, spot in self._latent():
                spot.weight.copy_(latent[LATENT + key])
        if len(latent) < len(state):
            inner: Any = super()
            inner.load_training_state({k: v for k, v in state.items() if k not in latent})

    def _latent(self) -> Iterator[tuple[str, Spot]]:
        """What trains and is saved as codes, by name in the tuner."""
        for name, config in self.peft_config.items():
            if config.save_format != "latent":
                spots = _spots(self, name)
                yield from ((keys[0], spot) for keys, spot in spots if spot.packed is None)

    @contextmanager
    def resumable(self) -> Generator[None]:
        """Within it, `save_pretrained` writes latent weights, from which training can go on."""
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
        """The inner method's entries, with codes and stats in place of each quantised weight."""
        tuner = tuner_of(config.inner)
        entries = super(BinaryModel, tuner)._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        stacked: dict[str, tuple[Tensor, Tensor]] = {}
        for keys, spot in _spots(model, adapter_name):
            source = state_dict if spot.head else entries  # PEFT adds heads later, by their wrapper
            key = next((key for key in keys if key in source), None)
            if key is None:
                raise UnsupportedError(
                    f"method {config.inner!r} saves {keys[0]} in a form of its own, which cannot "
                    "be packed"
                )
            weight, name = source[key], spot.outside(key)
            entries.pop(key, None)
            if config.save_format == "latent":
                entries[name] = weight
            elif config.save_format == "stacked":
                stacked[_label(tuner, keys, spot)] = spot.encode(whole(weight))
            else:
                entries[name + CODES], entries[name + STATS] = spot.encode(whole(weight))
        return entries | (stack(stacked) if stacked else {})

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        end = next((end for end in (CODES, STATS) if key.endswith(end)), "")
        return super()._remove_adapter_name_from_key(key.removesuffix(end), adapter_name) + end

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The entries of a file of any format as the inner method's, under the model's names.

        Raises:
            InputError: a quantised weight is missing, or of another size.
        """
        tuner = tuner_of(config.inner)
        entries, trains, packed = dict(state_dict), not config.inference_mode, False
        if any(name.startswith(STACK) for name in entries):
            sizes = {
                _label(tuner, keys, spot): packed_bytes(spot.weight.numel(), spot.bits)
                for keys, spot in _spots(model, adapter_name)
            }
            for name, (codes, stats) in unstack(entries, sizes).items():
                entries[name + CODES], entries[name + STATS] = codes, stats
            entries = {key: t for key, t in entries.items() if not key.startswith(STACK)}
        for keys, spot in _spots(model, adapter_name):
            names = {
                tuner._remove_adapter_name_from_key(spot.outside(key), adapter_name): key
                for key in keys
            }
            name = next(
                (n for n in names if n in entries or n + CODES in entries), next(iter(names))
            )
            codes, stats = entries.pop(name + CODES, None), entries.pop(name + STATS, None)
            if codes is not None and stats is not None:
                entries[name] = spot.take(codes, stats, trains=trains)
                packed = True
            elif codes is None and stats is None and name in entries:
                spot.packed = None
            else:
                raise InputError(
                    f"the adapter file lacks {name}, or part of its codes and stats; it was "
                    "truncated, or saved from another model or config"
                )
            if spot.head:
                entries[names[name]] = entries.pop(name)
        if packed and trains:
            warnings.warn(
                "the file is packed and holds no latent weights, which are lost: training starts "
                "from weights spread evenly about the codes; to go on exactly, save with "
                "save_format='latent'",
                stacklevel=2,
            )
        return super(BinaryModel, tuner)._remap_adapter_state_dict_for_load(
            model, config, adapter_name, entries
        )


@cache
def tuner_of(inner: str) -> type[BinaryModel]:
    """`BinaryModel` over the tuner of the method `inner`."""
    plain = inner_method(inner).tuner
    plain = SwitchingLora if plain is LoraModel else plain
    facts = {"prefix": plain.prefix, "__module__": __package__, "__doc__": BinaryModel.__doc__}
    if issubclass(plain, MethodTuner):
        facts["adapter_cls"] = swapped_class(Quantized, plain.adapter_cls)
    return type(f"BinaryModel_{inner}", (BinaryModel, plain), facts)


def _spots(model: nn.Module, adapter_name: str) -> list[tuple[list[str], Spot]]:
    """The quantised weights of an adapter, each with its name in `model`, or names if shared."""
    found: dict[int, tuple[list[str], Spot]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Quantized):
            for name, spot in module.__dict__["spots"].items():
                if spot.adapter_name == adapter_name:
                    found.setdefault(id(spot), ([], spot))[0].append(f"{path}.{name}")
    return list(found.values())


def _label(tuner: type[BinaryModel], keys: list[str], spot: Spot) -> str:
    """The name of a weight in a file, the same whatever the adapter is called."""
    outside = (spot.outside(key) for key in keys)
    return min(tuner._remove_adapter_name_from_key(key, spot.adapter_name) for key in outside)


@torch.no_grad()
def start(weight: Tensor) -> None:
    """Draw a weight that is constant anew about its value: it has no deviation and cannot move."""
    if not weight.is_meta and weight.min() == weight.max():
        value = float(weight.flatten()[0])  # 0 but for scales
        nn.init.trunc_normal_(weight, value, std=1e-3, a=value - 2e-3, b=value + 2e-3)


def whole(weight: Tensor) -> Tensor:
    """`weight` itself, or all of one that is spread over processes."""
    gather = getattr(weight, "full_tensor", None)
    return weight if gather is None else gather()
