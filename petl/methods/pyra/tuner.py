"""The tuner of PYRA: a generated subclass of the inner method's tuner, or one of its own."""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import cache
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from petl.core.layers.block import (
    BlockAdapters,
    adapters_of,
    add_to_block,
    check_block_adapter_name,
    rebind,
    refuse_own_forward,
)
from petl.core.layers.class_swap import AdapterDict, restore_class, swap_class
from petl.core.layers.layer import LayerInfo, LayerShape
from petl.core.method import Method, Settings, Target, WrapContext
from petl.core.model.heat_map import HeatMap, of_layers
from petl.core.model.weight_changes import change_map
from petl.core.register import register
from petl.core.spec.config import require
from petl.core.support import Capability
from petl.core.switching.tuner import SwitchingTuner
from petl.core.tuners.adapter import AdapterTuner
from petl.core.tuners.base import ForwardContextTuner, check_loaded
from petl.errors import InputError, UnsupportedError
from petl.methods.families.inner import ON_THEIR_WAY, tuner_class_of, undo_injection
from petl.methods.pyra.adapter import MERGED_TOKENS, ONE_ACTIVE, PyraAdapter
from petl.methods.pyra.blocks import KeyedAttention
from petl.methods.pyra.config import ALONE, PyraConfig, config_of, inner_method, plan_of

PREFIX = "petl_pyra_"


def variant(entry: Method, given: Mapping[str, Any]) -> Method:
    """Return the registry's entry for the fields `given`: with the inner method's capabilities."""
    inner = given.get("inner")
    classes = {"config_cls": config_of(inner), "tuner_cls": tuner_of(inner)}
    if inner is None:
        return entry.changed(**classes)
    inner_entry = inner_method(inner)
    return inner_entry.changed(
        **classes,
        name=entry.name,
        summary=entry.summary,
        paper=entry.paper,
        defaults={**inner_entry.defaults, "inner": inner},
        variant=entry.variant,
        inner=inner,
        lacks={**inner_entry.lacks, **entry.lacks, Capability.TOGETHER: ON_THEIR_WAY},
    )


@register(
    "pyra",
    summary="merges similar tokens of ViT, DeiT and AST: the adapted model is faster than the base",
    need="a faster model",
    recommended="fewer tokens in each block of an image or audio encoder, beside an inner method",
    paper="Xiong et al. 2024, PYRA: Parallel Yielding Re-Activation for Training-Inference "
    "Efficient Task Adaptation, ECCV, arXiv:2403.09192",
    variant=variant,
)
class PyraModel(SwitchingTuner, ForwardContextTuner):
    """Tuner of `PyraConfig`; instances have the class that `tuner_of(inner)` generates."""

    config_cls = PyraConfig
    needs_tuner = "its blocks pass the sizes of merged tokens on through it"
    lacks = {
        Capability.MERGE: MERGED_TOKENS,
        Capability.MIXED_BATCH: "rows of other adapters would have other numbers of tokens",
    }

    peft_config: dict[str, Any]

    def __new__(
        cls, model: Any = None, peft_config: Any = None, adapter_name: str = "", **options: Any
    ) -> Any:
        if cls is PyraModel:
            config = peft_config[adapter_name] if isinstance(peft_config, dict) else peft_config
            # PEFT instantiates the registered class: return the generated one
            cls = tuner_of(config.inner)
        return super().__new__(cls)

    @property
    def sizes(self) -> Tensor | None:
        """Of how many tokens each token of the last forward's output is the mean, [N, T].

        A mean over tokens must be weighted with them. None before the first forward pass.
        """
        name = self.active_adapters[0]
        hosts = [*plan_of(self.peft_config[name], self.model).hosts()]
        return self.context.passed_on.get((hosts[-1], name))

    def learning_rate_of(self, name: str) -> float | None:
        """Return the peak learning rate of a vector, if the config sets one; else None."""
        _, mark, rest = name.partition(f".{PREFIX}adapters.")
        adapter = rest.partition(".")[0]
        return self.peft_config[adapter].vector_lr if mark and adapter in self.peft_config else None

    # Adding an adapter

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Let the inner method add its adapter, if there is one, then add those of the blocks.

        Raises:
            InputError: the model's adapters have another inner method, or the model is of another
                kind; it is left unchanged.
        """
        self.refuse_without_tuner(self.needs_tuner)
        config = self.peft_config[adapter_name]
        for other in self.peft_config.values():
            require(
                other.inner == config.inner,
                f"inner={config.inner!r} cannot be added to a model with an adapter of "
                f"inner={other.inner!r}; wrap another copy of the model",
            )
        plan = plan_of(config, model)
        hosts = plan.hosts()
        check_block_adapter_name(adapter_name)
        for key in hosts:
            refuse_own_forward(model.get_submodule(key), key)
            refuse_own_forward(model.get_submodule(f"{key}.attention"), f"{key}.attention")
        config.num_tokens = plan.tokens[0]
        trained = [p for p in model.parameters() if p.requires_grad]
        with self.only_visible({adapter_name}):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            try:
                self._refuse_other_hosts(model, hosts, config.inner)
            except InputError:
                undo_injection(self, adapter_name, trained)
                raise
            if config.inner is not None:
                self._add_to_blocks(model, adapter_name, hosts, **kwargs)
        for key in hosts:
            attention = model.get_submodule(f"{key}.attention")
            swap_class(attention, KeyedAttention)
            rebind(attention)

    def _refuse_other_hosts(self, model: nn.Module, hosts: Iterable[str], inner: Any) -> None:
        for key in hosts:
            layer = adapters_of(model.get_submodule(key))
            require(
                layer is None or layer.slot == f"{PREFIX}adapters",
                f"inner={inner!r} adapts whole blocks, such as {key}, and pyra runs the parts of a "
                "block itself; adapt its sub-layers instead",
            )

    def _add_to_blocks(
        self,
        model: nn.Module,
        adapter_name: str,
        hosts: Mapping[str, dict[str, Any]],
        *,
        low_cpu_mem_usage: bool = False,
        **_: Any,
    ) -> None:
        config, placed = self.peft_config[adapter_name], {}
        for key, settings in hosts.items():
            info = LayerInfo(key, adapter_name, self.context, None, settings, MERGED_TOKENS)
            shape = LayerShape(settings["width"], settings["width"])
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                placed[key] = PyraAdapter(shape, config, info)
            block, inference = model.get_submodule(key), config.inference_mode
            add_to_block(block, placed[key], PREFIX, AdapterDict(), shape, inference_mode=inference)
            layer = cast(BlockAdapters, adapters_of(block))
            layer.set_adapter(self.active_adapters, inference_mode=inference)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate an adapter.

        Raises:
            UnsupportedError: several are given.
        """
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise UnsupportedError(f"adapters {list(adapter_name)}: {ONE_ACTIVE}")
        super().set_adapter(adapter_name, inference_mode)

    # Removing an adapter, merging, loading

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for module in model.modules():
            if isinstance(module, KeyedAttention):
                restore_class(module, KeyedAttention)
                rebind(module)
        return model

    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        if isinstance(child, BlockAdapters):
            child.detach()
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _check_merge_allowed(self) -> None:
        raise UnsupportedError(MERGED_TOKENS)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Rename keys as the inner method does, and check the tensors of the blocks.

        Raises:
            InputError: as of `check_loaded`.
        """
        tuner = tuner_of(config.inner)
        remapped = super(PyraModel, tuner)._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        check_loaded(model, adapter_name, remapped, PREFIX, {})
        return remapped

    # Pictures

    @torch.no_grad()
    def heat_maps(self) -> list[HeatMap]:
        """Return maps of the tokens that are left and of the vectors, and those of the inner."""
        name, model = self.active_adapters[0], self.model
        plan = plan_of(self.peft_config[name], model)
        left = [*plan.tokens[1:], plan.tokens[-1] - plan.removed[-1]]
        tokens = of_layers(
            model,
            {path: float(count) for path, count in zip(plan.blocks, left, strict=True)},
            "tokens",
            "Tokens behind each block",
            "tokens",
            f"The first block gets {plan.tokens[0]} tokens.",
        )
        adapters = {path: self._adapter(path, name) for path in plan.hosts()}
        vectors = of_layers(
            model,
            {path: float(a.weight_b.norm()) for path, a in adapters.items() if a.reactivates},
            "vectors",
            "Size of the correction",
            "norm of b",
            "The norm of the vector that decides how far each merged token is corrected; 0 is "
            "plain merging.",
        )
        if self.peft_config[name].inner is None:
            return [*tokens, *vectors]
        inner: Any = super()
        own = inner.heat_maps() if hasattr(inner, "heat_maps") else None
        return [*tokens, *vectors, *(change_map(model, [name]) if own is None else own)]

    def _adapter(self, path: str, name: str) -> PyraAdapter:
        layer = cast(BlockAdapters, adapters_of(self.model.get_submodule(path)))
        return cast(PyraAdapter, layer.adapters[name])


class Merging(Method[PyraConfig, PyraAdapter]):
    """The blocks alone, without an inner method."""

    name, config_cls, adapter_cls = "pyra", PyraConfig, PyraAdapter
    lacks = PyraModel.lacks

    def targets(self, c: WrapContext[Any]) -> list[Target]:
        """Return the hosts.

        Raises:
            InputError: others are given.
        """
        config, hosts = c.config, plan_of(c.config, c.model).hosts()
        given = config.target_modules
        require(
            given is None or set(given) == {*hosts},
            f"target_modules={given} are not the blocks that schedule={config.schedule} gives in "
            f"{type(c.model).__name__}; leave it null, or load the adapter onto a model of its "
            "depth",
        )
        config.target_modules = {*hosts}
        widths = {path: has["width"] for path, has in hosts.items()}
        return [Target(path, LayerShape(W, W), is_block=True) for path, W in widths.items()]

    def settings(self, c: WrapContext[Any]) -> dict[str, Settings]:
        """Return what each host removes."""
        return plan_of(c.config, c.model).hosts()


class MergingModel(AdapterTuner):
    """Tuner of the blocks alone."""

    method = Merging()


@cache
def tuner_of(inner: str | None) -> type[PyraModel]:
    """Generate the subclass of `PyraModel` and of the tuner of the method `inner`, if any."""
    alone = inner is None
    tuner: Any = MergingModel if alone else tuner_class_of(inner_method(inner))
    layers: Any = getattr(tuner, "tuner_layer_cls", None)
    body = {
        "prefix": PREFIX if alone else tuner.prefix,
        # PEFT walks over these, to activate or delete an adapter
        "tuner_layer_cls": layers if alone else layers | BlockAdapters,
        "__module__": __package__,
        "__doc__": PyraModel.__doc__,
    }
    return type(f"PyraModel_{ALONE if alone else inner}", (PyraModel, tuner), body)
