"""PYRA's adapters of blocks: beside those of an inner method, or alone."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from petl.core.compat import adapter_weights
from petl.core.layers.block import (
    BlockAdapters,
    adapters_of,
    add_to_block,
    check_block_adapter_name,
    rebind,
    refuse_own_forward,
)
from petl.core.layers.class_swap import AdapterDict, restore_class, swap_class
from petl.core.layers.layer import Adapter, LayerInfo, LayerShape
from petl.core.method import A, C, Method, NewAdapters, Settings, Target, TrainContext, WrapContext
from petl.core.model.heat_map import HeatMap, of_layers
from petl.core.register import register
from petl.core.spec.config import MethodConfig, require
from petl.core.support import Capability
from petl.core.types import Fields
from petl.methods.families.outer import Outer
from petl.methods.pyra.adapter import MERGED_TOKENS, ONE_ACTIVE, PyraAdapter
from petl.methods.pyra.blocks import KeyedAttention
from petl.methods.pyra.config import UNSUPPORTED_INNER, PyraConfig, plan_of

PREFIX = "petl_pyra_"
Training = TrainContext[Any, Any]


class Blocks(Method[MethodConfig, PyraAdapter]):
    """What takes the place of an inner method: the adapters of blocks alone."""

    name, config_cls, adapter_cls, own = "blocks", MethodConfig, PyraAdapter, True

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


ALONE = Blocks(inner_defaults={"target_modules": None})


class KeyedBlocks:
    """Handle of the attention modules that return their keys to the blocks of an adapter."""

    def __init__(self, attentions: list[nn.Module]) -> None:
        self.attentions = attentions
        for attention in attentions:
            swap_class(attention, KeyedAttention)
            rebind(attention)

    def remove(self) -> None:
        """Let attention compute as before."""
        for attention in self.attentions:
            restore_class(attention, KeyedAttention)
            rebind(attention)


@register
class Pyra(Outer):
    """See the package."""

    name, config_cls = "pyra", PyraConfig
    summary = (
        "merges similar tokens of ViT, DeiT and AST: the adapted model is faster than the base"
    )
    need = "a faster model"
    recommended = "fewer tokens in each block of an image or audio encoder, beside an inner method"
    paper = (
        "Xiong et al. 2024, PYRA: Parallel Yielding Re-Activation for Training-Inference "
        "Efficient Task Adaptation, ECCV, arXiv:2403.09192"
    )
    lacks = {
        Capability.MERGE: MERGED_TOKENS,
        Capability.NEW_TOKENS: "it is for images",
        Capability.MIXED_BATCH: "rows of other adapters would have other numbers of tokens",
    }
    needs_tuner = "its blocks pass the sizes of merged tokens on through it"
    refused, purpose, alone = UNSUPPORTED_INNER, "trained beside pyra", ALONE

    def facts_over(self, inner: Method[C, A]) -> Fields:
        """Return the facts that differ from this inner method's."""
        own = {"need": self.need, "recommended": self.recommended} if inner is ALONE else {}
        return {**own, "lacks": Pyra.lacks}

    # Adding an adapter

    def settings(self, c: WrapContext[PyraConfig]) -> Mapping[str, Settings]:
        """Return those of the inner method.

        Raises:
            InputError: the model is of another kind.
        """
        plan = plan_of(c.config, c.model)
        check_block_adapter_name(c.adapter_name)
        for key in plan.hosts():
            refuse_own_forward(c.model.get_submodule(key), key)
            refuse_own_forward(c.model.get_submodule(f"{key}.attention"), f"{key}.attention")
        c.config.num_tokens = plan.tokens[0]
        return super().settings(c)

    def added(self, new: NewAdapters[PyraConfig, Adapter]) -> None:
        """Add the adapters of blocks beside those of the inner method.

        Raises:
            InputError: the inner method adapts whole blocks, too.
        """
        super().added(new)
        model, inner = new.model, new.config.inner
        hosts = plan_of(new.config, model).hosts()
        for key in hosts:
            layer = adapters_of(model.get_submodule(key))
            require(
                layer is None or layer.slot == f"{PREFIX}adapters",
                f"inner={inner!r} adapts whole blocks, such as {key}, and pyra runs the parts of a "
                "block itself; adapt its sub-layers instead",
            )
        if inner is not None:
            _add_to_blocks(new, hosts)
        attentions = [model.get_submodule(f"{key}.attention") for key in hosts]
        new.hooks.append(cast(Any, KeyedBlocks(attentions)))

    def joins(self, configs: object) -> str:
        """Return why no two adapters can be active together."""
        return ONE_ACTIVE

    # Training

    def rate(self, t: Training, name: str) -> float | None:
        """Return the learning rate of a vector, if the config sets one; else the inner method's."""
        _, mark, rest = name.partition(f".{PREFIX}adapters.")
        if not mark:
            return super().rate(t, name)
        return next((a.config.vector_lr for a in t.active if rest.startswith(f"{a.name}.")), None)

    # Pictures

    @torch.no_grad()
    def heat_maps(self, t: Training) -> list[HeatMap]:
        """Return maps of the tokens that are left and of the vectors, and those of the inner."""
        first, model = t.active[0], t.model
        plan = plan_of(first.config, model)
        left = [*plan.tokens[1:], plan.tokens[-1] - plan.removed[-1]]
        tokens = of_layers(
            model,
            {path: float(count) for path, count in zip(plan.blocks, left, strict=True)},
            "tokens",
            "Tokens behind each block",
            "tokens",
            f"The first block gets {plan.tokens[0]} tokens.",
        )
        adapters = {path: _adapter(model, path, first.name) for path in plan.hosts()}
        vectors = of_layers(
            model,
            {path: float(a.weight_b.norm()) for path, a in adapters.items() if a.reactivates},
            "vectors",
            "Size of the correction",
            "norm of b",
            "The norm of the vector that decides how far each merged token is corrected; 0 is "
            "plain merging.",
        )
        return [*tokens, *vectors, *super().heat_maps(t)]


def merged_sizes(model: nn.Module) -> Tensor | None:
    """Return of how many tokens each token of the last forward's output is the mean, [N, T].

    A mean over tokens must be weighted with them. None before the first forward pass.

    Args:
        model: a PeftModel with an active adapter of `pyra`.
    """
    tuner: Any = model.base_model
    name = tuner.active_adapters[0]
    hosts = [*plan_of(tuner.peft_config[name], tuner.model).hosts()]
    return tuner.context.passed_on.get((hosts[-1], name))


def _add_to_blocks(new: NewAdapters[PyraConfig, Adapter], hosts: Mapping[str, Settings]) -> None:
    config, inference = new.config, new.config.inference_mode
    # the inner method's are there already if values are assigned later
    weights = adapter_weights(new.tuner, new.name).values()
    is_empty = any(getattr(owner, name).is_meta for owner, name in weights)
    for key, settings in hosts.items():
        info = LayerInfo(key, new.name, new.context, None, settings, MERGED_TOKENS)
        shape = LayerShape(settings["width"], settings["width"])
        with init_empty_weights() if is_empty else nullcontext():
            adapter = PyraAdapter(shape, config, info)
        block = new.model.get_submodule(key)
        add_to_block(block, adapter, PREFIX, AdapterDict(), shape, inference_mode=inference)
        layer = cast(BlockAdapters, adapters_of(block))
        layer.set_adapter(new.tuner.active_adapters, inference_mode=inference)


def _adapter(model: nn.Module, path: str, name: str) -> PyraAdapter:
    layer = cast(BlockAdapters, adapters_of(model.get_submodule(path)))
    return cast(PyraAdapter, layer.adapters[name])
