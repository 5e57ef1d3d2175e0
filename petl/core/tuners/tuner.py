"""MethodTuner, the PEFT tuner from which every method derives."""

from collections.abc import Generator, Mapping, Set
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.optim import Optimizer

from petl.core.compat import AuxiliaryTrainingWrapper, BaseTunerLayer, get_quantization_kwargs
from petl.core.layers.block import (
    BlockAdapters,
    add_to_block,
    check_block_adapter_name,
    refuse_own_forward,
)
from petl.core.layers.context import InputCapture
from petl.core.layers.layer import HALF, Adapter, AdapterLayer, LayerInfo, LayerShape, shape_of
from petl.core.model.heat_map import HeatMap
from petl.core.model.linear import LINEAR_KINDS, refuse_other_kind
from petl.core.model.targets import (
    matched_names,
    refuse_fused,
    resolve_blocks,
    resolve_targets,
)
from petl.core.model.weight_changes import change_map
from petl.core.serving.mixed_batch import AdapterRows, is_generation_call
from petl.core.spec.checks import check_adapter_name, check_tensor_names
from petl.core.spec.config import MethodConfig
from petl.core.support import Capability, Lacks, reason_of, without_lora
from petl.core.switching.tuner import hosts_of, layers_of
from petl.core.tuners.base import SharedStateTuner, check_loaded, watch
from petl.errors import (
    InputError,
    ModuleKindError,
    UnknownNameError,
    UnsupportedError,
    did_you_mean,
)


class MethodTuner(SharedStateTuner):
    """Tuner that puts an `adapter_cls` on every targeted linear layer.

    A method overrides `layer_settings` when a layer's adapter depends on its position,
    `make_shared` when its layers share tensors, and `update_and_allocate` when it changes during
    training.

    Attributes:
        config_cls: the method's config.
        adapter_cls: the method's adapter.
        lacks: by capability, why the method lacks it; see `Method.lacks`.
        needs_tuner: why its adapters cannot be loaded without the tuner, by transformers' own
            `load_adapter`; "": they can, if no tensors are shared.
        free_dims: by name of a tensor, the dimension that may have another size in a file.
        optional_tensors: last parts of names of tensors that a file may lack.
        by_position: True if an adapter changes each position by itself, and nothing counts the
            positions of a layer: the last block may then compute only those that are read, see
            petl/efficiency/skip_unread/read_positions.py.
        capture_cls: hook that captures the input of an adapter with a source, see `sources`.
        placed: by adapter name and module path, the adapters in the model's order.
    """

    config_cls: ClassVar[type[MethodConfig]]
    adapter_cls: ClassVar[type[Adapter]]
    lacks: ClassVar[Lacks] = {}
    needs_tuner: ClassVar[str] = ""
    free_dims: ClassVar[Mapping[str, int]] = {}
    optional_tensors: ClassVar[tuple[str, ...]] = ()
    by_position: ClassVar[bool] = False
    capture_cls: ClassVar[type[InputCapture]] = InputCapture
    target_module_mapping: dict[str, list[str]] = {}  # read by PEFT; petl resolves targets itself

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # by adapter name and module path, while `inject_adapter` runs
        self._infos: dict[str, dict[str, tuple[LayerShape, LayerInfo]]] = {}
        self._blocks: Set[str] = set()  # those of `_infos` that are blocks
        self.placed: dict[str, dict[str, Adapter]] = {}
        super().__init__(*args, **kwargs)

    # Methods to override

    @property
    def needs_updates(self) -> bool:
        """True if `update_and_allocate` of the active adapters has something to select."""
        return True

    def choose_targets(self, config: Any, model: nn.Module) -> None:
        """Set `config.target_modules` to names that match modules of `model`."""
        # PEFT's default, for which it has a table of models
        if config.target_modules is None:
            config.target_modules = "all-linear"
        # PEFT's word; here it leaves out layers outside of blocks
        resolve_targets(config, model, words=("all-linear",))

    def layer_settings(
        self, config: Any, model: nn.Module, shapes: Mapping[str, LayerShape]
    ) -> dict[str, dict[str, Any]]:
        """Return, by module path, `LayerInfo.settings`: what an adapter needs besides its shape.

        Called once per adapter, before anything is changed, so a method refuses targets that it
        cannot adapt here, with an InputError.
        """
        return {}

    def whole_modules(self, config: Any, model: nn.Module) -> Mapping[str, int]:
        """Return the paths and widths of modules that are adapted as a unit, not as linear layers.

        Such a module maps one tensor to one tensor of the same width, and its adapter gets both.
        """
        return {}

    def block_modules(self, config: Any, model: nn.Module) -> Mapping[str, int | LayerShape]:
        """Return the paths and widths of the blocks that are adapted as a whole if targeted.

        Their adapters get the block's first input and first output, and in `with_base` all of its
        arguments; see `BlockAdapters`. Such a block cannot be merged. One number: the width of both
        input and output.
        """
        return {}

    def sources(
        self, config: Any, model: nn.Module, shapes: Mapping[str, LayerShape]
    ) -> Mapping[str, str]:
        """Return, by module path, the module whose first input its adapter gets as `x`.

        Adapters of other paths get the input of their own layer. Both modules must run in the same
        call of their block, the source first, so that checkpointing recomputes them together.
        Called before anything is changed, as `layer_settings` is.
        """
        return {}

    def make_shared(self, config: Any, shapes: Mapping[str, LayerShape]) -> nn.Module | None:
        """Return the tensors that all layers of one adapter share, as a flat module, or None."""
        return None

    def prepare(self, batches: Any) -> None:
        """Use training batches once, before the optimizer exists, such as for calibration."""

    def make_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer | None:
        """Return the optimizer that the method requires, over these parameter groups, or None."""
        return None

    def attach_optimizer(
        self,
        optimizer: Optimizer,
        start_step: int = 0,
        *,
        first: int = 0,
        total_steps: int | None = None,
    ) -> None:
        """Hook into the steps of `optimizer`, before the first of them.

        Args:
            optimizer: a torch optimizer, or a wrapper that has one as `optimizer`.
            start_step: optimizer steps already done, in a resumed run.
            first: the step number that `update_and_allocate` gets after the first step of a run: 0
                in PEFT's loops, 1 in petl's lifecycle.
            total_steps: length of the run, for a method whose config does not have it.
        """

    def planned_parameters(self) -> int | None:
        """Return the number of parameters of the trained adapter; None: those that train now."""
        return None

    def series(self) -> dict[str, float]:
        """Return metrics of the last training forward for the log."""
        return {}

    def figures(self) -> dict[str, float]:
        """Return figures of the trained adapter for scores.json, such as its share of zeros."""
        return {}

    def heat_maps(self) -> list[HeatMap]:
        """Return maps of what the method did, for the folder of a run; no forward pass is allowed.

        By default, by how much each weight has changed; empty where the update is not one matrix.
        """
        return change_map(self.model, self.active_adapters)

    # Injection

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Check and prepare the adapter called `adapter_name`, then inject it with PEFT."""
        with self.only_visible({adapter_name}):
            sources = self._prepare_layers(model, adapter_name, low_cpu_mem_usage)
            # PEFT deep-copies modules of modules_to_save, and would copy the capture hooks too
            for capture in _captures(model):
                capture.detach()
            config: Any = self.peft_config[adapter_name]
            targets = config.target_modules
            has_blocks = bool(self._blocks & self._infos[adapter_name].keys())
            try:
                super().inject_adapter(
                    model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict
                )
                for key, source in sources.items():
                    layer: Any = model.get_submodule(key)
                    layer.captures[adapter_name] = self.capture_cls(
                        self.context, key, adapter_name, source
                    )
                if hasattr(type(self), "update_and_allocate"):
                    watch(self)
            except Exception:  # PEFT forgets the config of a refused adapter
                if adapter_name in self.shared:
                    del self.shared[adapter_name]
                raise
            finally:
                for capture in _captures(model):
                    capture.attach(model)
                del self._infos[adapter_name]
        if config.layers_to_transform is not None or has_blocks:
            # PEFT shortens long lists of names to suffixes, and with layers_to_transform it would
            # then read layer indices from names, which fails for models it does not know; of a
            # block, nothing but its index would be left
            config.target_modules = targets

    def _prepare_layers(
        self, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> Mapping[str, str]:
        """Fill `_infos` and `shared` for an adapter, and return its `sources`."""
        config: Any = self.peft_config[adapter_name]
        if self.needs_tuner:
            self.refuse_without_tuner(self.needs_tuner)
        if hasattr(type(self), "update_and_allocate") and not config.inference_mode:
            self.refuse_without_tuner("it changes its adapters while they train")
        resolve_blocks(config, model)
        self.choose_targets(config, model)
        blocks = self.block_modules(config, model)
        widths = {**self.whole_modules(config, model), **blocks}
        shapes = {
            key: _both(widths[key]) if key in widths else self._shape(model, key)
            for key in matched_names(config, model)
        }
        self._blocks = blocks.keys() & shapes.keys()
        for key in self._blocks:
            check_block_adapter_name(adapter_name)
            refuse_own_forward(model.get_submodule(key), key)
        config.check_shapes(shapes)
        settings = self.layer_settings(config, model, shapes)
        sources = self.sources(config, model, shapes)
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            pool = self.make_shared(config, shapes)
        if pool is not None:
            self.refuse_without_tuner("its layers share tensors, which the tuner has")
            # here, before it becomes a name of a module; without shared tensors, with the injection
            check_adapter_name(adapter_name, model, type(self))
            check_tensor_names(adapter_name, pool)
            self.shared[adapter_name] = pool  # `AdapterLayer.add` moves it to the device
        no_lora = without_lora(self.lacks, config)
        self._infos[adapter_name] = {
            key: (
                shape,
                LayerInfo(key, adapter_name, self.context, pool, settings.get(key, {}), no_lora),
            )
            for key, shape in shapes.items()
        }
        return sources

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:
        """Return True for the modules in `_infos` during `inject_adapter`; else ask PEFT."""
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
        refuse_other_kind(base, key)
        refuse_fused(model, key)
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
        # created on the CPU, or on meta with low_cpu_mem_usage
        adapter = self.adapter_cls(shape, peft_config, info)
        check_tensor_names(adapter_name, adapter)
        self.placed.setdefault(adapter_name, {})[current_key] = adapter
        inference_mode = peft_config.inference_mode
        if current_key in self._blocks:  # which stays in its place
            add_to_block(
                target, adapter, self.prefix, self.shared, shape, inference_mode=inference_mode
            )
            return
        # a second adapter on a layer that has one
        if isinstance(target, AdapterLayer):
            layer = target
        else:
            quantization = get_quantization_kwargs(self.model)
            layer = AdapterLayer(target, self.prefix, self.shared, shape, **quantization)
        layer.add(adapter_name, adapter, inference_mode=inference_mode)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    # Casting, switching, mixing

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast the adapter to float32; without autocast, to the base layer's half precision.

        A method with `Adapter.keep_float32` stays in float32 either way.
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
        """Pass `adapter_names`, one per row of the batch, to all layers; evaluation mode only."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise InputError(
                f"adapter_names is for inference and model.training is {self.training}; call "
                "model.eval() first"
            )
        # `__base__` is PEFT's name for no adapter
        unknown = sorted(set(names) - set(self.peft_config) - {"__base__"})
        if unknown:
            raise UnknownNameError(
                f"no adapter {unknown[0]!r}" + did_you_mean(unknown[0], self.peft_config)
            )
        # `generate` repeats each row num_beams times, but not in the encoder, which runs before
        beams = kwargs.get("num_beams") or 1
        encoder = self._encoder_modules() if beams > 1 else set()
        # hooks instead of an argument: transformers' models do not pass unknown arguments to their
        # layers
        handles = []
        generates = is_generation_call(kwargs)
        once = beamed = self.rows_of(names, is_generation_call=generates)
        if beams > 1:
            repeated = [name for name in names for _ in range(beams)]
            beamed = AdapterRows(repeated, is_generation_call=generates)
        for host in hosts_of(self.model):
            hook = partial(_inject_names, once if host in encoder else beamed)
            handles.append(host.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _encoder_modules(self) -> set[nn.Module]:
        """Return the modules of the encoder of an encoder-decoder; beam search repeats no rows."""
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
        config: Any = self.peft_config[self.active_adapters[0]]
        reason = reason_of(self.lacks, Capability.MERGE, config)
        if reason:
            raise UnsupportedError(reason)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate these adapters; several only if none of them has to be alone.

        Raises:
            UnsupportedError: one of several adapters cannot be active beside another one.
        """
        self._refuse_combination(adapter_name)
        super().set_adapter(adapter_name, inference_mode)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge these adapters (the active ones if None) into the base weights.

        Raises:
            UnsupportedError: the method cannot merge, or not these adapters together.
        """
        # all layers before the first one changes
        self._refuse_combination(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _refuse_combination(self, names: str | list[str] | None) -> None:
        several = self.active_adapters if names is None else names
        if not isinstance(several, str) and len(several) > 1:
            for layer in layers_of(self.model):
                layer.refuse_combination(several)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        # before unloading, which removes the layers that hold them
        captures = list(_captures(self.model))
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for capture in captures:
            capture.detach()
        return model

    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        if isinstance(child, BlockAdapters):
            child.detach()
        # a head may be of any class, a mixture of experts has no weight of its own: just replace
        elif isinstance(child, AuxiliaryTrainingWrapper) or not hasattr(child, "weight"):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, the tensors that its layers share included."""
        # PEFT raises for an unknown name, so first
        super().delete_adapter(adapter_name)
        self.placed.pop(adapter_name, None)

    # Auxiliary losses

    def aux_loss(self) -> Tensor:
        """Return the weighted auxiliary loss of the last training forward, 0-d, detached, or 0."""
        return self.context.total()

    # Loading

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Rename keys as PEFT does, and check the adapter's tensors.

        Raises:
            InputError: tensors are missing or unexpected, or differ from the model's in shape or
                kind of dtype; values are not finite, or a table has values that it cannot have.
        """
        remapped = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        check_loaded(model, adapter_name, remapped, cls.prefix, cls.free_dims)
        return remapped


def _both(width: int | LayerShape) -> LayerShape:
    return width if isinstance(width, LayerShape) else LayerShape(width, width)


def _inject_names(rows: AdapterRows, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    kwargs["adapter_names"] = rows
    return args, kwargs


def _cast(module: nn.Module, base_dtype: torch.dtype | None, autocast: bool) -> None:
    """Replace floating-point parameters by ones of another dtype, if theirs has to change."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            # PEFT casts to float32 only what is in half precision; float64 stays
            half = parameter.dtype in HALF
            dtype = torch.float32 if autocast and half else None
            if not autocast and base_dtype in HALF and parameter.is_floating_point():
                dtype = base_dtype
            if dtype is not None and dtype != parameter.dtype:
                cast = nn.Parameter(parameter.data.to(dtype), requires_grad=parameter.requires_grad)
                setattr(owner, name, cast)


def _captures(model: nn.Module) -> list[InputCapture]:
    return [capture for layer in layers_of(model) for capture in layer.captures.values()]
