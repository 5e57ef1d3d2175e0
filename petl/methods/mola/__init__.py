"""MoLA: a top-k mixture of LoRA experts on each linear layer, with more experts in some layers.

Gao et al. 2025, "MoLA: MoE LoRA with Layer-wise Expert Allocation", Findings of NAACL
(arXiv:2402.08562). Routers of the layers are linear by default; others, in files of their own:

    routing.py      RMoE: a GRU carries the routers' state from layer to layer
    pregate.py      Read-ME: one small model over token ids routes for all layers
    routes.py       hooks that run it before the first layer, and its cache
    tokens.py       its inputs, from the arguments of the model

Shapes: I in, O out, R rank of one expert, E experts of the layer, K picked per token, P router
width, T tokens. The experts of a layer are stacked: expert e has rows e R to (e+1) R - 1 of A and
the same columns of B, so that MoLA is a LoRA of rank E R with a gate per token.

Where the sources disagree: A and the router are initialized Kaiming-uniform as in the authors'
code, not Gaussian; the update is scaled by alpha / r as in the code; the balance loss is computed
per router as in the paper, averaged inside a transformer layer and summed over layers as in the
code, over the tokens of all processes.

The recurrent router stores the states of the last training forward. Gradient checkpointing reads
them during backward, so there each forward needs its backward before the next training forward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petl.core.layers.context import add_gradient, is_encoder_decoder
from petl.core.layers.layer import Adapter, LayerInfo, LayerShape
from petl.core.layers.mixed_batch import BatchedAdapter
from petl.core.method import Method, NewAdapters, Settings, TrainContext, WrapContext
from petl.core.model.heat_map import HeatMap, layers_of, means, of_layers
from petl.core.model.places import Place
from petl.core.model.structure import place_in
from petl.core.register import register
from petl.core.spec.components import Components
from petl.core.spec.config import MethodConfig, blocks_field, config_field, require
from petl.core.support import Capability
from petl.errors import InputError
from petl.methods.mola.grouped import GroupedMola
from petl.methods.mola.pregate import PreGate
from petl.methods.mola.routes import ROUTER, Routes, gates_of, refuse_unroutable
from petl.methods.mola.routing import (
    Gru,
    RoutedRows,
    balance_weights,
    busiest,
    expert_sums,
    float_linear,
    next_state,
    top_k_gates,
    uniform,
)
from petl.ops.low_rank import (
    add_up,
    cast_for_product,
    frozen_weight_and_bias,
    low_rank_linear,
    project_down,
)

SHAPES = {  # named expert counts of four groups of layers, from the lowest
    "triangle": [8, 6, 4, 2],  # more experts in low layers
    "inverted_triangle": [2, 4, 6, 8],  # more experts in high layers
    "hourglass": [8, 2, 2, 8],
    "diamond": [2, 8, 8, 2],
    "rectangle": [5, 5, 5, 5],  # equal
}


def expert_pattern(num_experts: int | str | list[int]) -> list[int]:
    """Parse `num_experts`: 5, "2468", "10,2,2,2", a name of `SHAPES`, or a list.

    Integers of at least 1000 are read digit by digit: the command line turns "2468" into 2468.

    Raises:
        InputError: there is no entry, or one is below 1.
    """
    if isinstance(num_experts, str) or (isinstance(num_experts, int) and num_experts >= 1000):
        text = str(num_experts)
        pattern = SHAPES.get(text) or [int(n) for n in (text.split(",") if "," in text else text)]
    else:
        pattern = list(num_experts) if isinstance(num_experts, list | tuple) else [num_experts]
    require(bool(pattern), "num_experts=[] is empty; give a number for each group of layers")
    require(
        min(pattern) >= 1,
        f"num_experts={num_experts!r} has an entry below 1 (numbers from 1000 on are read digit by "
        "digit, one for each part of the layers)",
    )
    return pattern


def experts_by_layer(num_experts: int | str | list[int], num_layers: int) -> list[int]:
    """Experts per layer: layer j of L has `pattern[floor(j G / L)]`, G the length of the pattern.

    Raises:
        InputError: a list has more entries than there are layers.
    """
    pattern = expert_pattern(num_experts)
    if isinstance(num_experts, list) and len(pattern) > num_layers:
        raise InputError(
            f"num_experts={num_experts} has {len(pattern)} entries, but the model has "
            f"{num_layers} layers; pass at most one entry per layer"
        )
    return [pattern[j * len(pattern) // num_layers] for j in range(num_layers)]


def layer_of_its_own(config: "MolaConfig", key: str) -> Place:
    """Return the place of a module outside all lists of layers: it counts as a layer.

    Raises:
        InputError: the number of experts depends on the index of the layer.
    """
    require(
        len(expert_pattern(config.num_experts)) == 1,
        f"cannot infer the layer index of {key!r}: it is in no list of layers, on whose index "
        f"num_experts={config.num_experts!r} depends; set one number, such as num_experts=4, or "
        "leave the module out with exclude_modules",
    )
    return Place(stack=key, index=0, length=1, name="")


PREGATED = ("router_type=pregated", lambda config: config.router_type == "pregated")


@dataclass
class MolaConfig(MethodConfig):
    """Fields of MoLA; `router_aux_loss_coef` is the weight c of the balance loss."""

    r: int = config_field("rank of one expert", 8, ge=1)
    lora_alpha: float = config_field("the update is scaled by lora_alpha / r", 16, gt=0)
    lora_dropout: float = config_field(
        "dropout probability at the experts' input, in [0, 1); paper: 0.05", 0.0, ge=0, lt=1
    )
    num_experts: int | str | list[int] = config_field(
        "experts per layer: one number (5), one per group of layers ('2468', '10,2,2,2' or a "
        "list), or a named shape: triangle, inverted_triangle, hourglass, diamond, rectangle",
        "inverted_triangle",
        ge=1,
        pattern="|".join(SHAPES) + r"|\d+(,\d+)*",
    )
    top_k: int = config_field("experts per token, at most the experts of any layer", 2, ge=1)
    router_type: str = config_field(
        "linear, recurrent over depth (RMoE), or pregated: one router over token ids for all "
        "layers (Read-ME)",
        "linear",
        choices=("linear", "recurrent", "pregated"),
    )
    router_hidden_size: int = config_field(
        "width of the recurrent or pre-gated router; of the latter a multiple of 2 router_heads",
        32,
        ge=1,
        acts=("router_type one of recurrent, pregated", lambda c: c.router_type != "linear"),
    )
    router_layers: int = config_field(
        "blocks of the pre-gated router; 0: logits depend on the token alone",
        1,
        ge=0,
        acts=PREGATED,
    )
    router_heads: int = config_field(
        "attention heads of the pre-gated router", 2, ge=1, acts=PREGATED
    )
    router_embedding: str = config_field(
        "input of the pre-gated router: projected from the base's frozen embedding, or its own "
        "table, which starts as columns of the base's",
        "projected",
        choices=("projected", "own"),
        acts=PREGATED,
    )
    router_lookahead: int = config_field(
        "of the pre-gated router; 1: a token uses the logits of the token before it",
        0,
        ge=0,
        le=1,
        acts=PREGATED,
    )
    router_aux_loss_coef: float = config_field(
        "weight of the load-balancing loss, at least 0; 0 disables it", 0.001, ge=0
    )
    use_rslora: bool = config_field("scale by lora_alpha / sqrt(r) instead", False)
    blocks: str | None = blocks_field()
    rank_pattern: dict[str, int] | None = config_field(
        "rank of an expert by module path, or by a regular expression for paths, as for PEFT's "
        "LoRA; the scaling stays lora_alpha / r",
        None,
    )
    init_weights: bool = config_field(
        "start at the base model's outputs (B = 0); false: random B, for debugging", True
    )
    bias: str = config_field(
        "field of PEFT's LoRA; only 'none' is supported", "none", choices=("none",)
    )
    fan_in_fan_out: bool = config_field(
        "field of PEFT's LoRA, without effect: Conv1D layers are recognized", False
    )

    def check(self) -> None:
        """Raise InputError for a wrong `num_experts`, or a `top_k` above it."""
        if isinstance(self.num_experts, tuple):  # JSON has lists only
            self.num_experts = list(self.num_experts)
        pattern = expert_pattern(self.num_experts)
        require(
            self.top_k <= max(pattern),
            f"top_k ({self.top_k}) exceeds the number of experts ({max(pattern)}) of every layer",
        )
        P, heads = self.router_hidden_size, self.router_heads
        require(
            self.router_type != "pregated" or P % (2 * heads) == 0,
            f"router_hidden_size={P} is not a multiple of {2 * heads}, twice router_heads={heads}: "
            "each head is rotated in halves",
        )


class MolaAdapter(Adapter):
    """Experts and router of a layer: `lora_A` [E R, I], `lora_B` [O, E R], `router` [E, I or P]."""

    def __init__(self, shape: LayerShape, config: MolaConfig, info: LayerInfo) -> None:
        super().__init__(shape, config, info)
        self.config = config
        self.num_experts = E = info.settings["num_experts"]  # of this layer
        self.rank, self.scale = config.rank_and_scaling(info.key, shape)
        R, (I, O) = self.rank, shape
        self.lora_A = uniform(E * R, I)  # stacked experts
        self.lora_B = nn.Parameter(torch.zeros(O, E * R))  # zero: training starts at the base model
        if not config.init_weights:
            nn.init.normal_(self.lora_B, std=0.02)
        if config.router_type == "recurrent":
            P = config.router_hidden_size
            self.router_proj = uniform(P, I)  # input of the GRU
            self.router = uniform(E, P)  # reads the recurrent state
        elif config.router_type == "linear":
            self.router = uniform(E, I)

    def with_base(self, x: Tensor, base: nn.Module, *args: object, **kwargs: object) -> Tensor:
        config = self.config
        frozen = None if args or kwargs else frozen_weight_and_bias(base, x)
        if frozen is None:  # the base layer has hooks or adapters of its own: call it
            return self(x, base(x, *args, **kwargs))
        gate_TE, x, balance = self.gates(x)
        y = low_rank_linear(
            cast_for_product(x),
            frozen,
            self.lora_A,
            self.lora_B,
            self.scale,
            gate=gate_TE,
            dropout=config.lora_dropout if self.training else 0.0,
        )
        return balance(y)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        config, R = self.config, self.rank
        gate_TE, x, balance = self.gates(x)
        # [T, E R]
        h_TER = project_down(F.dropout(x, config.lora_dropout, self.training), self.lora_A)
        # the gate scales each expert's R inner values; gates of experts not picked are zero
        h_TER = h_TER.view(-1, self.num_experts, R) * gate_TE.to(h_TER.dtype).unsqueeze(-1)
        y = add_up(y, h_TER.flatten(1), self.lora_B, self.scale)
        return balance(y)

    @classmethod
    def batched(cls, adapters: Sequence[Self], dtype: torch.dtype) -> BatchedAdapter | None:
        """The adapters' experts and routers, stacked; None if they differ in form.

        Ranks that differ are padded with zeros to the largest, unless more than half would be
        padding. Also None for routers that the layers share, which are not linear in the input.
        """
        first = adapters[0]
        # one batched product needs equal shapes and the same routing
        forms = [(a.config.router_type, a.config.top_k, a.num_experts) for a in adapters]
        if forms[0][0] != "linear" or any(form != forms[0] for form in forms):
            return None
        ranks = [adapter.rank for adapter in adapters]
        if max(ranks) * len(ranks) > 2 * sum(ranks):  # padding is computed like the rest
            return None
        tensors, scales = zip(*((a.tensors(), a.scale) for a in adapters), strict=True)
        return RoutedRows.stack(tensors, scales, first.num_experts, first.config.top_k, dtype)

    @classmethod
    def grouped(
        cls, adapters: Sequence[Self], base_layer: nn.Module, generators: Any, captured: Any
    ) -> nn.Module:
        """The layer that trains several adapters in one pass: together if their forms are equal."""
        if len({(a.num_experts, a.rank, a.config.top_k) for a in adapters}) == 1:
            return GroupedMola(base_layer, generators, adapters)
        return super().grouped(adapters, base_layer, generators, captured)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """Return the gates [T, E], the experts' input, and what adds the balance loss to an output.

        A pre-gated router has its balance loss where it runs, once for all layers.
        """
        if self.config.router_type == "pregated":
            return gates_of(self.info, self.num_experts, x), x, lambda y: y
        logit_TE, x = self.route(x)
        gate_TE, picked_TE, prob_TE = top_k_gates(logit_TE, self.config.top_k)
        return gate_TE, x, partial(self.balanced, picked_TE=picked_TE, prob_TE=prob_TE)

    def balanced(self, y: Tensor, picked_TE: Tensor, prob_TE: Tensor) -> Tensor:
        """Return `y`; in training, its backward pass adds the balance loss's gradient."""
        if self.training and self.config.router_aux_loss_coef > 0:
            return self.balance(y, picked_TE, prob_TE)
        return y

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Router logits [T, E] in float32 whatever the model's precision, and the experts' input.

        Float32 because close logits decide which experts are picked.
        """
        with torch.autocast(x.device.type, enabled=False):
            if self.config.router_type == "linear":
                return float_linear(x, self.router.float())
            z_TP, x = float_linear(x, self.router_proj.float())
            return F.linear(next_state(self.info, z_TP), self.router.float()), x

    def balance(self, y: Tensor, picked_TE: Tensor, prob_TE: Tensor) -> Tensor:
        """Return `y`; its backward pass adds the gradient of this layer's balance loss.

        The loss is c E sum_e f_e P_e, with f_e the fraction of picks and P_e the mean probability
        of expert e over the tokens that are no padding, divided by the routers of the same layer.
        """
        context, key = self.info.context, f"{self.info.key}.{self.info.adapter_name}"
        # padding does not count
        mask_T = context.mask_of(len(prob_TE), in_decoder=self.info.settings["in_decoder"])
        # counts, and sums of probabilities
        picks_E, prob_E = expert_sums(picked_TE, prob_TE, mask_T)
        factor = self.config.router_aux_loss_coef * self.info.settings["layer_weight"]
        to_weights = partial(balance_weights, k=self.config.top_k, factor=factor)
        term = context.weighted_term(key, prob_E, picks_E, to_weights, picks=picks_E)
        return y if context.scale is None else add_gradient(y, term, context.scale)


def across_layers(config: MolaConfig) -> str:
    """The setting with which layers pass on a state, which is of one adapter; "": none."""
    kind = config.router_type
    return "" if kind == "linear" else f"router_type={kind!r} has a state across layers"


def without_experts(config: MolaConfig) -> str:
    """Why it adapts no stacked experts: their rows are not in the order of tokens; "": it does."""
    reason = across_layers(config)
    return reason and f"{reason}, which belongs to a token; set router_type=linear"


@register
class Mola(Method[MolaConfig, MolaAdapter]):
    """A top-k mixture of LoRA experts, with more experts in some layers than in others."""

    name = "mola"
    config_cls, adapter_cls = MolaConfig, MolaAdapter
    summary = "a top-k mixture of LoRA experts, with more experts in some layers than in others"
    paper = "Gao et al. 2025, MoLA: MoE LoRA with Layer-wise Expert Allocation, arXiv:2402.08562"
    need = "capacity where it is needed"
    recommended = "experts per layer, chosen by token: for mixed data and many skills"
    charts = (("expert_load_max", "Busiest expert", "load relative to the mean (1: balanced)"),)
    lacks = {
        Capability.MERGE: (
            "MoLA adapters depend on the input through the router and cannot be merged; keep the "
            "adapter, or call unload() for the base model"
        ),
        Capability.TOGETHER: across_layers,
        Capability.EXPERTS: without_experts,
    }
    strength_tensors = ("lora_B",)
    # those of each expert
    components = MappingProxyType({"lora_A": Components(0, None), "lora_B": Components(1, None)})

    def settings(self, c: WrapContext[MolaConfig]) -> dict[str, Settings]:
        """Number of experts, weight in the balance loss and router chain of each target.

        Raises:
            InputError: a target is in no list of layers and the number of experts depends on the
                layer, or its layer has fewer experts than `top_k`.
            UnsupportedError: a pre-gated router cannot route for this model, or for a target.
        """
        config, model = c.config, c.model
        if config.router_type == "pregated":
            refuse_unroutable(model, c.targets)
        found = {key: place_in(model, key, config.blocks) for key in c.targets}
        places = {key: where or layer_of_its_own(config, key) for key, where in found.items()}
        settings: dict[str, Settings] = {}
        last: dict[tuple[str, str], int] = {}  # index of the highest layer so far, by chain
        layers = [(p.stack, p.index) for p in places.values()]
        decoder = model.get_decoder() if is_encoder_decoder(model) else nn.Module()  # ty: ignore
        in_decoder = set(decoder.modules())  # these have another padding mask
        for key, where in places.items():
            # per layer of the model, not of the targets: excluded layers keep their place
            experts = experts_by_layer(config.num_experts, where.length)[where.index]
            require(
                config.top_k <= experts,
                f"top_k ({config.top_k}) exceeds the number of experts ({experts}) "
                f"of layer {where.index}",
            )
            # one chain for each name in a stack
            chain = (where.stack, where.name)
            settings[key] = {
                "num_experts": experts,
                "layer_weight": 1 / layers.count((where.stack, where.index)),
                "in_decoder": model.get_submodule(key) in in_decoder,
                "chain": chain,
                "index": where.index,
                "below": last.get(chain),
            }
            last[chain] = where.index
        return settings

    def shared(self, c: WrapContext[MolaConfig]) -> nn.Module | None:
        """What all routers of an adapter share: a GRU, the pre-gated router, or None if linear."""
        if c.config.router_type == "recurrent":
            return Gru(c.config.router_hidden_size)
        if c.config.router_type == "linear":
            return None
        most = max(layer["num_experts"] for layer in self.settings(c).values())
        return PreGate(c.config, most, cast(Any, c.model).get_input_embeddings())

    def added(self, new: NewAdapters[MolaConfig, MolaAdapter]) -> None:
        """With the first pre-gated adapter, register the hooks that run routers."""
        if new.config.router_type == "pregated" and new.once("routes"):
            new.hooks += Routes(new).attach(new.model)

    def metrics(self, t: TrainContext[MolaConfig, MolaAdapter]) -> dict[str, float]:
        """`expert_load_max`: load of the busiest expert relative to 1/E, mean over layers."""
        picks = t.context.series.get("picks")  # by layer, of the last training forward
        if not picks:
            return {}
        loads = [busiest(picks_E) for picks_E in picks.values()]
        loads = [load.to(loads[0].device) for load in loads]  # a model may be spread over devices
        return {"expert_load_max": float(torch.stack(loads).mean())}

    def heat_maps(self, t: TrainContext[MolaConfig, MolaAdapter]) -> list[HeatMap]:
        """The load of the experts in the last training batch; none without the balance loss."""
        picks = t.context.series.get("picks", {})
        paths = {key: key.rpartition(".")[0] for key in picks}  # the keys end in the adapter's name
        shares = {
            key: (100 * picks_E / picks_E.sum().clamp(min=1.0))
            .sort(descending=True)
            .values.tolist()
            for key, picks_E in picks.items()
        }
        layers = layers_of(t.model, paths.values()) | {ROUTER: "all"}
        by_layer = means((layers[paths[key]], shares[key]) for key in picks)
        if not by_layer:
            return []
        most = max(map(len, by_layer.values()))
        load = HeatMap(
            "expert_load",
            "MoLA: load of the experts in the last training batch",
            "% of the tokens' picks",
            [f"expert {i + 1}" for i in range(most)],
            list(by_layer),
            [[s[i] if i < len(s) else None for s in by_layer.values()] for i in range(most)],
            "The share of a layer's picks that each expert gets, the busiest expert first, "
            "averaged over the modules of the layer. Equal numbers in a column: it is balanced.",
            "expert, by load",
        )
        uneven = of_layers(
            t.model,
            {paths[k]: float(busiest(n_E)) for k, n_E in picks.items() if paths[k] != ROUTER},
            "expert_balance",
            "MoLA: busiest expert of each module",
            "load, relative to the mean",
            "The load of the busiest expert relative to the mean over the experts of its router: 1 "
            "is balanced.",
        )
        return [load, *uneven]
