"""The PEFT tuner that every method derives from."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.optim import Optimizer

from petl.core.compat import AuxiliaryTrainingWrapper, BaseTunerLayer, get_quantization_kwargs
from petl.core.layers.context import InputCapture
from petl.core.layers.layer import HALF, Adapter, AdapterLayer, LayerInfo, LayerShape, shape_of
from petl.core.model.targets import LINEAR_KINDS, matched_names, resolve_targets
from petl.core.serving.mixed_batch import AdapterRows, is_generation_call
from petl.core.spec.config import MethodConfig
from petl.core.switching.tuner import hosts_of, layers_of
from petl.core.tuners.base import SharedStateTuner
from petl.errors import (
    InputError,
    ModuleKindError,
    UnknownNameError,
    UnsupportedError,
    did_you_mean,
)


class MethodTuner(SharedStateTuner):
    """Puts an `adapter_cls` on every targeted linear layer.

    A method overrides `layer_settings` when a layer's adapter depends on its position,
    `make_shared` when its layers share tensors, and `update_and_allocate` when it changes while
    training.
    """

    config_cls: ClassVar[type[MethodConfig]]
    adapter_cls: ClassVar[type[Adapter]]
    unsupported: ClassVar[
        Mapping[str, Any]
    ] = {}  # what the method cannot do, see `Method.unsupported`
    target_module_mapping: dict[str, list[str]] = {}
    uses_shared_state = True  # the forward context, and pools

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._infos: dict[str, dict[str, tuple[LayerShape, LayerInfo]]] = {}  # by adapter and path
        self.placed: dict[str, dict[str, Adapter]] = {}  # likewise, in the model's order
        super().__init__(*args, **kwargs)

    # What a method may override

    def choose_targets(self, config: Any, model: nn.Module) -> None:
        """Set `config.target_modules` to names that match modules of `model`."""
        resolve_targets(config, model, words=("all-linear",))

    def layer_settings(
        self, config: Any, model: nn.Module, shapes: Mapping[str, LayerShape]
    ) -> dict[str, dict[str, Any]]:
        """By module path, what its adapter must know beyond its own shape (`LayerInfo.settings`).

        Called once per adapter, before anything is changed, so this is where a method refuses
        targets that it cannot serve, with an InputError.
        """
        return {}

    def whole_modules(self, config: Any, model: nn.Module) -> Mapping[str, int]:
        """Paths of targets that may be whole modules, not linear layers, and their widths.

        Such a module maps one tensor to one tensor of the same width, and its adapter sees both.
        """
        return {}

    def sources(
        self, config: Any, model: nn.Module, shapes: Mapping[str, LayerShape]
    ) -> Mapping[str, str]:
        """By module path, the module whose first input its adapter gets instead of the layer's.

        Both must run in the same call of their block, the source first, so that checkpointing
        recomputes them together. Called before anything is changed, as `layer_settings` is.
        """
        return {}

    def make_shared(self, config: Any, shapes: Mapping[str, LayerShape]) -> nn.Module | None:
        """Tensors that all layers of one adapter share, as a flat module, or None."""
        return None

    def prepare(self, batches: Any) -> None:
        """Look at training batches once, before there is an optimizer."""

    def make_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer | None:
        """The optimizer that the method insists on, over these groups; None: any will do."""
        return None

    def attach_optimizer(
        self,
        optimizer: Optimizer,
        start_step: int = 0,
        *,
        first: int = 0,
        total_steps: int | None = None,
    ) -> None:
        """Act on each step of `optimizer`, which is about to train this model.

        Args:
            optimizer: a torch optimizer, or a wrapper that has one as `optimizer`.
            start_step: optimizer steps that were done before, in a run that is resumed.
            first: what `update_and_allocate` is told after the first step of a run: 0 in PEFT's
                loops, 1 from petl's lifecycle.
            total_steps: length of the run, for a method whose config does not say it.
        """

    def planned_parameters(self) -> int | None:
        """Numbers in the active adapter once it is trained; None: as many as train."""
        return None

    def series(self) -> dict[str, float]:
        """Figures of the last training forward for the log."""
        return {}

    def pictures(self, folder: Path) -> list[Path]:
        """Draw what the method found out while training; the files written into `folder`."""
        return []

    # Injection

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Plan the adapter called `adapter_name`, check it, then let PEFT put it in place."""
        with self.only_visible({adapter_name}):
            sources = self._plan(model, adapter_name, low_cpu_mem_usage)
            for capture in _captures(
                model
            ):  # PEFT copies modules that it trains in full, hooks included
                capture.detach()
            config: Any = self.peft_config[adapter_name]
            targets = config.target_modules
            try:
                super().inject_adapter(
                    model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict
                )
                for key, source in sources.items():
                    layer: Any = model.get_submodule(key)
                    layer.captures[adapter_name] = InputCapture(
                        self.context, key, adapter_name, source
                    )
            finally:
                for capture in _captures(model):
                    capture.attach(model)
                del self._infos[adapter_name]
        if config.layers_to_transform is not None:
            config.target_modules = targets  # PEFT shortens long lists, and would then read indices

    def _plan(
        self, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> Mapping[str, str]:
        """Settle where the adapter stands and what its layers share; answers its `sources`."""
        config: Any = self.peft_config[adapter_name]
        self.choose_targets(config, model)
        whole = self.whole_modules(config, model)
        shapes = {
            key: LayerShape(whole[key], whole[key]) if key in whole else self._shape(model, key)
            for key in matched_names(config, model)
        }
        plans = self.layer_settings(config, model, shapes)
        sources = self.sources(config, model, shapes)
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            pool = self.make_shared(config, shapes)
        if pool is not None:
            self.shared[adapter_name] = pool  # the layers move it, once it has data
        self._infos[adapter_name] = {
            key: (shape, LayerInfo(key, adapter_name, self.context, pool, plans.get(key, {})))
            for key, shape in shapes.items()
        }
        return sources

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:
        """PEFT's answer; while `inject_adapter` is at work, whether it has planned the module."""
        if not self._infos:
            return super()._check_target_module_exists(peft_config, key)
        return any(key in infos for infos in self._infos.values())

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config  # `inject_adapter` has resolved the targets

    def _shape(self, model: nn.Module, key: str) -> LayerShape:
        module = model.get_submodule(key)
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if not isinstance(base, LINEAR_KINDS) and not hasattr(base, "in_features"):
            raise ModuleKindError(
                f"{key} is {type(base).__name__}, not a linear layer; "
                f"method {self.config_cls.method!r} adapts nn.Linear and Conv1D"
            )
        if _never_called(model, key):
            raise ModuleKindError(
                f"{key} is read by {type(model.get_submodule(key.rpartition('.')[0])).__name__} "
                "without being called, so an adapter on it would do nothing; choose another target"
            )
        return shape_of(base)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        shape, info = self._infos[adapter_name][current_key]
        if isinstance(target, AdapterLayer):
            layer = target
        else:
            quantization = get_quantization_kwargs(self.model)
            layer = AdapterLayer(target, self.prefix, self.shared, shape, **quantization)
        adapter = self.adapter_cls(shape, peft_config, info)
        self.placed.setdefault(adapter_name, {})[current_key] = adapter
        layer.add(adapter_name, adapter, inference_mode=peft_config.inference_mode)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    # Casting, switching, mixing

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Adapters are float32; without autocast they take the base layer's half precision.

        A method whose `Adapter.keep_float32` is set stays in float32 either way.
        """
        autocast = autocast_adapter_dtype or self.adapter_cls.keep_float32
        for layer in layers_of(self.model):
            if adapter_name in layer.adapters:
                dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())[1]
                _cast(layer.adapters[adapter_name], dtype, autocast)
        if adapter_name in self.shared:
            dtype = next((p.dtype for p in self.model.parameters()), None)
            _cast(self.shared[adapter_name], dtype, autocast)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Generator[None]:
        """Serve `adapter_names`: one adapter per row of the batch, in evaluation mode."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise InputError("adapter_names is for inference; call model.eval() first")
        unknown = sorted(set(names) - set(self.peft_config) - {"__base__"})
        if unknown:
            raise UnknownNameError(
                f"no adapter {unknown[0]!r}" + did_you_mean(unknown[0], self.peft_config)
            )
        beams = kwargs.get("num_beams") or 1
        encoder = self._encoder_modules() if beams > 1 else set()
        handles = []
        once, beamed = (
            AdapterRows(
                [name for name in names for _ in range(count)],
                is_generation_call=is_generation_call(kwargs),
            )
            for count in (1, beams)
        )
        for host in hosts_of(self.model):
            hook = partial(_inject_names, once if host in encoder else beamed)
            handles.append(host.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _encoder_modules(self) -> set[nn.Module]:
        """Modules of an encoder, whose rows beam search does not repeat."""
        get_encoder = getattr(self.model, "get_encoder", None)
        is_encoder_decoder = getattr(
            getattr(self.model, "config", None), "is_encoder_decoder", False
        )
        return (
            set(get_encoder().modules())
            if is_encoder_decoder and get_encoder is not None
            else set()
        )

    # Merging

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        if self.adapter_cls.merge_refusal is not None:
            raise UnsupportedError(self.adapter_cls.merge_refusal)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        captures = list(_captures(self.model))
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for capture in captures:
            capture.detach()
        return model

    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):  # a head, of any kind, gives way as it is
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, the tensors that its layers share included."""
        super().delete_adapter(adapter_name)
        self.placed.pop(adapter_name, None)

    # Auxiliary losses

    def aux_loss(self) -> Tensor:
        """The weighted auxiliary loss of the last training forward, 0-d and detached; 0 if none."""
        return self.context.total()

    # Loading

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's renaming, but strict: each tensor of the adapter must be there, and no other."""
        remapped = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        marks = (f".{cls.prefix}adapters.", f".{cls.prefix}pools.")
        tail = f".{adapter_name}."
        wanted = {k for k in model.state_dict() if any(m[:-1] + tail in k for m in marks)}
        given = {k for k in remapped if any(m in k for m in marks)}
        missing, unexpected = sorted(wanted - given), sorted(given - wanted)
        if missing or unexpected:
            raise InputError(_mismatch(missing, unexpected))
        return remapped


def _mismatch(missing: list[str], unexpected: list[str]) -> str:
    parts = [
        f"{len(keys)} {word} (such as {keys[0]})"
        for word, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    ]
    return (
        f"the adapter file does not fit this model and config: tensors {' and '.join(parts)}; "
        "it was truncated, or saved from another model or config"
    )


def _inject_names(rows: AdapterRows, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    kwargs["adapter_names"] = rows
    return args, kwargs


def _cast(module: nn.Module, base_dtype: torch.dtype | None, autocast: bool) -> None:
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            half = parameter.dtype in HALF
            dtype = torch.float32 if autocast and half else None
            if not autocast and base_dtype in HALF and parameter.is_floating_point():
                dtype = base_dtype
            if dtype is not None and dtype != parameter.dtype:
                cast = nn.Parameter(parameter.data.to(dtype), requires_grad=parameter.requires_grad)
                setattr(owner, name, cast)


def _captures(model: nn.Module) -> list[InputCapture]:
    return [capture for layer in layers_of(model) for capture in layer.captures.values()]


def _never_called(model: nn.Module, key: str) -> bool:
    """Whether the owner of the module uses its weight without calling it, always or at times."""
    parent = model.get_submodule(key.rpartition(".")[0])
    return isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer)
