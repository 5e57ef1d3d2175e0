"""AdapterTuner, petl's tuner: it puts the adapters of a `Method` on a model, and asks it."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from re import Match
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftConfig
from torch import Tensor, nn

from petl.core.compat import (
    AuxiliaryTrainingWrapper,
    cast_adapter_dtype,
    get_quantization_kwargs,
    read_by_kernels,
)
from petl.core.experts.layer import ExpertLayer, collapse, expand
from petl.core.experts.rows import repeat_names, row_hosts, token_layers
from petl.core.layers.block import (
    BlockAdapters,
    add_to_block,
    check_block_adapter_name,
    refuse_own_forward,
)
from petl.core.layers.class_swap import AdapterDict
from petl.core.layers.context import InputCapture
from petl.core.layers.layer import HALF, AdapterLayer, LayerInfo
from petl.core.layers.mixed_batch import AdapterRows, is_generation_call
from petl.core.layers.norms import original_norms
from petl.core.layers.task_rows import take_task_ids
from petl.core.method import WrapContext
from petl.core.model.targets import resolve_blocks
from petl.core.spec.checks import check_adapter_name, check_tensor_names
from petl.core.spec.config import MethodConfig
from petl.core.support import Capability, without_lora
from petl.core.tuners.asking import AskingTuner
from petl.core.tuners.switching import hosts_of, layers_of
from petl.core.types import Arguments, Fields
from petl.errors import InputError, UnknownNameError, did_you_mean
from petl.ops.expert_linear import ExpertLinear


class AdapterTuner(AskingTuner):
    """Tuner that puts an adapter of its `method` on every target.

    `register` generates a subclass for each method, since PEFT maps types to classes.
    """

    tuner_layer_cls = AdapterLayer
    target_module_mapping: dict[str, list[str]] = {}  # read by PEFT; petl resolves targets itself

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # of the adapter that `inject_adapter` adds now
        self._wrapping: WrapContext[PeftConfig] | None = None
        self._infos: dict[str, LayerInfo] = {}
        super().__init__(*args, **kwargs)

    # Shared tensors

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        # under a name with the method's prefix, by which PEFT finds the tensors to save
        setattr(self, self.shared_name, AdapterDict())
        if self.method.takes_task_ids:  # after `begin`, which clears the state
            hook = model.register_forward_pre_hook(self.context.take_tasks, with_kwargs=True)
            self.hooks.append(hook)

    @property
    def shared_name(self) -> str:
        """Attribute of `shared`, a part of saved keys: `petl_<method>_pools`."""
        return f"{self.prefix}pools"

    @property
    def shared(self) -> AdapterDict:
        """By adapter name, the tensors that its layers share."""
        return getattr(self, self.shared_name)

    # Injection

    @contextmanager
    def _injection(self, c: WrapContext[Any], low_cpu_mem_usage: bool) -> Generator[None]:
        """Let the method check the model, and describe the adapters that PEFT injects."""
        model, adapter_name, config = c.model, c.adapter_name, c.config
        try:
            self._prepare(c, low_cpu_mem_usage)
        except Exception:
            collapse(model)
            raise
        is_special = any(target.is_block or target.stack for target in c.targets.values())
        # PEFT deep-copies modules of modules_to_save, and would copy the capture hooks too
        for capture in _captures(model):
            capture.detach()
        targets = config.target_modules
        try:
            yield
        except Exception:  # PEFT forgets the config of a refused adapter
            if adapter_name in self.shared:
                del self.shared[adapter_name]
            collapse(model)
            raise
        finally:
            for capture in _captures(model):
                capture.attach(model)
            self._wrapping, self._infos = None, {}
        if config.layers_to_transform is not None or is_special:
            # PEFT shortens long lists of names to suffixes, and with layers_to_transform it would
            # then read layer indices from names, which fails for models it does not know; of a
            # block, nothing but its index would be left, and stacks are no modules
            config.target_modules = targets

    def _prepare(self, c: WrapContext[Any], low_cpu_mem_usage: bool) -> None:
        method, config = self.method, cast(MethodConfig, c.config)
        model, adapter_name = c.model, c.adapter_name
        resolve_blocks(config, model)
        c.targets = {target.path: target for target in method.targets(c)}
        for path, target in c.targets.items():
            if target.is_block:
                check_block_adapter_name(adapter_name)
                refuse_own_forward(model.get_submodule(path), path)
        if any(target.stack for target in c.targets.values()):
            self.refuse_without_tuner("its file has one tensor for all experts of a layer")
        expand(model, [*dict.fromkeys(t.stack for t in c.targets.values() if t.stack)])
        config.check_shapes(c.shapes)
        settings = method.settings(c)
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            pool = method.shared(c)
        if pool is not None:
            self.refuse_without_tuner("its layers share tensors, which the tuner has")
            # here, before it becomes a name of a module; without shared tensors, with the injection
            check_adapter_name(adapter_name, model, type(self))
            check_tensor_names(adapter_name, pool)
            self.shared[adapter_name] = pool  # `AdapterLayer.add` moves it to the device
        no_lora, self._wrapping = without_lora(method.lacks, config), c
        self._infos = {
            path: LayerInfo(path, adapter_name, self.context, pool, settings.get(path, {}), no_lora)
            for path in c.targets
        }
        for path, why in read_by_kernels(LoraConfig(), model, c.targets).items():
            self._infos[path].no_lora = no_lora or f"{path}: {why}"

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool | Match[str] | None:
        """Return True for the targets during `inject_adapter`; else ask PEFT."""
        if self._wrapping is not None and key in self._wrapping.targets:
            return True
        if self._wrapping is not None and not peft_config.exclude_modules:
            return False
        answer = super()._check_target_module_exists(peft_config, key)
        # PEFT's mark of an excluded module is false, too
        return answer if self._wrapping is None or not answer else False

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: Fields) -> PeftConfig:
        return peft_config  # `inject_adapter` has resolved the targets

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert self._wrapping is not None
        assert self.method.adapter_cls is not None
        goal, info = self._wrapping.targets[current_key], self._infos[current_key]
        # created on the CPU, or on meta with low_cpu_mem_usage
        adapter = self.method.adapter_cls(goal.shape, peft_config, info)
        check_tensor_names(adapter_name, adapter)
        self.placed.setdefault(adapter_name, {})[current_key] = adapter
        inference_mode = peft_config.inference_mode
        if goal.is_block:  # which stays in its place
            add_to_block(
                target,
                adapter,
                self.prefix,
                self.shared,
                goal.shape,
                inference_mode=inference_mode,
            )
            return
        # a second adapter on a layer that has one
        if isinstance(target, AdapterLayer):
            layer = target
        else:
            quantization = get_quantization_kwargs(self.model)
            kind = ExpertLayer if goal.stack else AdapterLayer
            layer = kind(target, self.prefix, self.shared, goal.shape, **quantization)
        layer.add(adapter_name, adapter, inference_mode=inference_mode)
        if goal.source:
            layer.captures[adapter_name] = self.method.capture_cls(
                self.context, current_key, adapter_name, goal.source
            )
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    # Casting, mixing

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast the adapter to float32; without autocast, to the base layer's half precision.

        Those of a method with `Adapter.keep_float32` stay in float32 either way.
        """
        autocast = autocast_adapter_dtype or self.method.keep_float32
        for layer in layers_of(self.model):
            for _, adapter in layer.pick([adapter_name]):
                dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())[1]
                _cast(adapter, dtype, autocast or adapter.keep_float32)
        for host in hosts_of(self.model):
            if isinstance(host, AuxiliaryTrainingWrapper):  # those with rows of tokens
                cast_adapter_dtype(host, adapter_name, autocast)
        if adapter_name in self.shared:
            dtype = next((p.dtype for p in self.model.parameters()), None)
            _cast(self.shared[adapter_name], dtype, autocast)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: object, **kwargs: Any) -> Generator[None]:
        """Keep what a call of the PeftModel says about its rows: `generate` calls the model often.

        These are `adapter_names`, in evaluation mode only, and `task_ids`.
        """
        context, tasks = self.context, None
        if self.method.takes_task_ids:
            tasks, kwargs = take_task_ids(args, kwargs)
        names, before = kwargs.pop("adapter_names", None), (context.given_tasks, context.is_mixed)
        with nullcontext() if names is None else self._passing(names, kwargs):
            context.given_tasks, context.is_mixed = tasks, names is not None
            try:
                yield
            finally:
                context.given_tasks, context.is_mixed = before

    @contextmanager
    def _passing(self, names: Sequence[str], kwargs: Mapping[str, Any]) -> Generator[None]:
        """Pass `adapter_names`, one per row of the batch, to all layers."""
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
            beamed = once.repeated(beams)
        for host in row_hosts(self.model):
            hook = partial(_inject_names, once if host in encoder else beamed)
            handles.append(host.register_forward_pre_hook(hook, with_kwargs=True))
        handles += [
            layer.register_forward_pre_hook(repeat_names, with_kwargs=True)
            for layer in token_layers(self.model)
        ]
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

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, **lossy: bool
    ) -> None:
        """Merge these adapters (the active ones if None) into the base weights.

        Raises:
            UnsupportedError: the method cannot merge, or not these adapters together.
        """
        # all layers before the first one changes
        self.refuse_together(self.active_adapters if adapter_names is None else adapter_names)
        super().merge_adapter(adapter_names, safe_merge, **lossy)

    def refuse_together(self, names: Sequence[str]) -> None:
        """Raise UnsupportedError if adapters of these names cannot be active together."""
        super().refuse_together(names)
        for layer in layers_of(self.model) if len(names) > 1 else ():
            layer.refuse_combination(names)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        # before unloading, which removes the layers that hold them
        captures = list(_captures(self.model))
        # norms that trained beside adapters which are no part of the weights
        with original_norms(self.model) if Capability.MERGE in self.method.lacks else nullcontext():
            model = super()._unload_and_optionally_merge(*args, **kwargs)
        for capture in captures:
            capture.detach()
        collapse(self.model)
        return model

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # a head may be of any class, a mixture of experts has no weight of its own: just replace
        is_plain = isinstance(child, AuxiliaryTrainingWrapper | ExpertLayer)
        is_plain = is_plain or isinstance(child, ExpertLinear) or not hasattr(child, "weight")
        if is_plain and not isinstance(child, BlockAdapters):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, the tensors that its layers share included."""
        # PEFT raises for an unknown name, so first
        super().delete_adapter(adapter_name)
        if adapter_name in self.shared:
            del self.shared[adapter_name]

    # Auxiliary losses

    def aux_loss(self) -> Tensor:
        """Return the weighted auxiliary loss of the last training forward, 0-d, detached, or 0."""
        return self.context.total()


def _inject_names(
    rows: AdapterRows, module: nn.Module, args: tuple[object, ...], kwargs: Arguments
) -> tuple[tuple[object, ...], Arguments]:
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
