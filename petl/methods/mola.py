"""MoLA: a top-k mixture of LoRA experts on each linear layer, with more experts in some layers.

Gao et al. 2025, "MoLA: MoE LoRA with Layer-wise Expert Allocation", Findings of NAACL
(arXiv:2402.08562). The recurrent router is that of Qiu et al. 2025, "Layerwise Recurrent Router for
Mixture-of-Experts", ICLR (arXiv:2408.06793).

Shapes: I in, O out, R rank of one expert, E experts of the layer, K picked, P router width,
T tokens. The experts of a layer are stacked, expert e owning rows (columns of B) e R to
(e+1) R - 1, so that MoLA is a LoRA of rank E R with a gate per token.

Where the sources disagree: A and the router start Kaiming-uniform as in the authors' code, not
Gaussian; the update is scaled by alpha / r as in the code; the balance loss is taken per router as
in the paper, averaged inside a transformer layer and summed over layers as in the code, over the
tokens of all processes.

The recurrent router keeps the states of the last training forward. Under gradient checkpointing
they are read again, so there each forward needs its backward before the next training forward.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petl.core.layers.context import add_gradient, is_encoder_decoder
from petl.core.layers.layer import Adapter, LayerInfo, LayerShape
from petl.core.model.targets import place
from petl.core.registry import register
from petl.core.serving.mixed_batch import BatchedAdapter
from petl.core.spec.config import MethodConfig, config_field, require
from petl.core.tuners.tuner import MethodTuner
from petl.errors import InputError, UnknownNameError, did_you_mean
from petl.ops.low_rank import (
    add_up,
    frozen_weight_and_bias,
    low_rank_linear,
    product_dtype,
    project_down,
)
from petl.ops.routing import (
    RoutedRows,
    balance_weights,
    busiest,
    expert_sums,
    float_linear,
    top_k_gates,
)

SHAPES = {
    "triangle": [8, 6, 4, 2],
    "inverted_triangle": [2, 4, 6, 8],
    "hourglass": [8, 2, 2, 8],
    "diamond": [2, 8, 8, 2],
    "rectangle": [5, 5, 5, 5],
}


def expert_pattern(num_experts: int | str | list[int]) -> list[int]:
    """The numbers behind `num_experts`: 5, "2468", "10,2,2,2", a name of `SHAPES`, or a list.

    Digits that a command line made a number of, such as 2468, are digits here too.

    Raises:
        InputError: it is none of these, or an entry is below 1.
    """
    if isinstance(num_experts, str) or (isinstance(num_experts, int) and num_experts >= 1000):
        pattern = _read_pattern(str(num_experts))
    else:
        pattern = list(num_experts) if isinstance(num_experts, list | tuple) else [num_experts]
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in pattern)
    require(
        bool(pattern) and whole,
        f"num_experts={num_experts!r} is not a whole number or a list of them",
    )
    require(min(pattern) >= 1, f"num_experts={num_experts!r} has an entry below 1")
    return pattern


def _read_pattern(text: str) -> list[int]:
    if text in SHAPES:
        return SHAPES[text]
    try:
        return [int(n) for n in (text.split(",") if "," in text else text)]
    except ValueError:
        raise UnknownNameError(
            f"num_experts={text!r} is not a number, digits such as '2468', a list such as "
            "'10,2,2,2', or a named shape" + did_you_mean(text, SHAPES)
        ) from None


def experts_by_layer(num_experts: int | str | list[int], num_layers: int) -> list[int]:
    """Experts of each of `num_layers` layers: layer j of L takes `pattern[floor(j G / L)]`.

    Raises:
        InputError: a list has more entries than there are layers.
    """
    pattern = expert_pattern(num_experts)
    if isinstance(num_experts, list) and len(pattern) > num_layers:
        raise InputError(
            f"num_experts has {len(pattern)} entries but the model has {num_layers} layers"
        )
    return [pattern[j * len(pattern) // num_layers] for j in range(num_layers)]


@dataclass
class MolaConfig(MethodConfig):
    """See the module's docstring; `router_aux_loss_coef` is the weight c of the balance loss."""

    r: int = config_field("rank of one expert", 8)
    lora_alpha: int = config_field("the update is scaled by lora_alpha / r", 16)
    lora_dropout: float = config_field("dropout of the experts' input, in [0, 1); paper 0.05", 0.0)
    num_experts: int | str | list[int] = config_field(
        "experts per layer: 5, '2468', '10,2,2,2', a list, or triangle, inverted_triangle, "
        "hourglass, diamond, rectangle",
        "inverted_triangle",
    )
    top_k: int = config_field("experts per token", 2)
    router_type: str = config_field("linear, or recurrent over depth (RMoE)", "linear")
    router_hidden_size: int = config_field("width of the recurrent router", 32)
    router_aux_loss_coef: float = config_field(
        "weight of the balance loss; 0 switches it off", 0.001
    )
    use_rslora: bool = config_field("scale by lora_alpha / sqrt(r) instead", False)
    init_weights: bool = config_field(
        "start at the base model; false: B random, for debugging", True
    )
    bias: str = config_field("PEFT's name; only 'none' is supported", "none")
    fan_in_fan_out: bool = config_field(
        "PEFT's name; Conv1D layers are recognised by themselves", False
    )

    def check(self) -> None:
        if isinstance(self.num_experts, tuple):
            self.num_experts = list(self.num_experts)
        pattern = expert_pattern(self.num_experts)
        for name in ("r", "top_k", "router_hidden_size"):
            value = getattr(self, name)
            require(
                isinstance(value, int) and value >= 1,
                f"{name}={value!r} is not a whole number from 1",
            )
        require(self.lora_alpha > 0, f"lora_alpha={self.lora_alpha} is not above 0")
        require(0 <= self.lora_dropout < 1, f"lora_dropout={self.lora_dropout} is not in [0, 1)")
        coef = self.router_aux_loss_coef
        require(coef >= 0, f"router_aux_loss_coef={coef} is negative; 0 switches the term off")
        require(
            self.router_type in ("linear", "recurrent"),
            f"router_type={self.router_type!r} is not linear or recurrent",
        )
        require(self.bias == "none", f"bias={self.bias!r} is not 'none', the only one supported")
        require(
            self.top_k <= max(pattern),
            f"top_k ({self.top_k}) exceeds the number of experts ({max(pattern)}) of every layer",
        )

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def _uniform(rows: int, fan_in: int) -> nn.Parameter:
    """[rows, fan_in] from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), Kaiming-uniform with a = sqrt(5)."""
    bound = fan_in**-0.5
    return nn.Parameter(torch.empty(rows, fan_in).uniform_(-bound, bound))


class Gru(nn.Module):
    """Parameters of `torch.nn.GRUCell(P, P)` under flat names, shared by all layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name, value in nn.GRUCell(width, width).named_parameters():
            self.register_parameter(f"gru_{name}", value)

    def forward(self, z_TP: Tensor, h_TP: Tensor) -> Tensor:
        """The state after this layer, [T, P], from its projected input and the state below."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        weights = (getattr(self, f"gru_{name}").to(z_TP.dtype) for name in names)
        return torch.gru_cell(z_TP, h_TP, *weights)


class MolaAdapter(Adapter):
    """Experts and router of a layer: `lora_A` [E R, I], `lora_B` [O, E R], `router` [E, I or P]."""

    merge_refusal = (
        "MoLA adapters depend on the input through the router and cannot be merged; "
        "keep the adapter, or call unload() for the base model"
    )

    def __init__(self, shape: LayerShape, config: MolaConfig, info: LayerInfo) -> None:
        super().__init__(shape, config, info)
        self.config = config
        self.num_experts = E = info.settings["num_experts"]
        R, (I, O) = config.r, shape
        self.lora_A = _uniform(E * R, I)
        self.lora_B = nn.Parameter(torch.zeros(O, E * R))
        if not config.init_weights:
            nn.init.normal_(self.lora_B, std=0.02)
        if config.router_type == "recurrent":
            P = config.router_hidden_size
            self.router_proj = _uniform(P, I)
            self.router = _uniform(E, P)
        else:
            self.router = _uniform(E, I)

    def with_base(self, x: Tensor, base: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        config = self.config
        frozen = None if args or kwargs else frozen_weight_and_bias(base, x)
        if frozen is None:
            return self(x, base(x, *args, **kwargs))
        logit_TE, x = self.route(x)
        gate_TE, picked_TE, prob_TE = top_k_gates(logit_TE, config.top_k)
        y = low_rank_linear(
            x.to(product_dtype(x)),
            frozen,
            self.lora_A,
            self.lora_B,
            config.scale,
            gate=gate_TE,
            dropout=config.lora_dropout if self.training else 0.0,
        )
        return self.balanced(y, picked_TE, prob_TE)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        config, R = self.config, self.config.r
        logit_TE, x = self.route(x)
        gate_TE, picked_TE, prob_TE = top_k_gates(logit_TE, config.top_k)
        h_TER = project_down(F.dropout(x, config.lora_dropout, self.training), self.lora_A)
        h_TER = h_TER.view(-1, self.num_experts, R) * gate_TE.to(h_TER.dtype).unsqueeze(-1)
        y = add_up(y, h_TER.flatten(1), self.lora_B, config.scale)
        return self.balanced(y, picked_TE, prob_TE)

    @classmethod
    def batched(cls, adapters: Sequence[Any], dtype: torch.dtype) -> BatchedAdapter | None:
        """None for recurrent routers, whose states are of an adapter's own rows."""
        first = adapters[0]
        forms = [
            (a.config.router_type, a.config.top_k, a.config.r, a.num_experts) for a in adapters
        ]
        if forms[0][0] == "recurrent" or any(form != forms[0] for form in forms):
            return None
        E, R, (I, O) = first.num_experts, first.config.r, first.shape
        own = {adapter: adapter.tensors() for adapter in adapters}
        router, A, B = (
            [own[adapter][name] for adapter in adapters] for name in ("router", "lora_A", "lora_B")
        )
        scales = torch.tensor([adapter.config.scale for adapter in adapters], dtype=dtype)
        return RoutedRows(
            torch.stack(router).float(),
            torch.stack(A).to(dtype).view(-1, E, R, I),
            torch.stack([B_OQ.mT for B_OQ in B]).to(dtype).view(-1, E, R, O),
            scales.to(B[0].device).view(-1, 1, 1),
            first.config.top_k,
        )

    def balanced(self, y: Tensor, picked_TE: Tensor, prob_TE: Tensor) -> Tensor:
        """`y`, with the balance loss in its backward pass where that is on."""
        if self.training and self.config.router_aux_loss_coef > 0:
            return self.balance(y, picked_TE, prob_TE)
        return y

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Router logits [T, E], in float32 whatever the model's precision; and `x` for the rest."""
        with torch.autocast(x.device.type, enabled=False):
            if self.config.router_type == "linear":
                return float_linear(x, self.router.float())
            z_TP, x = float_linear(x, self.router_proj.float())
            return F.linear(self.recur(z_TP), self.router.float()), x

    def recur(self, z_TP: Tensor) -> Tensor:
        """The router state of this layer, [T, P], from that of the layer below in its chain."""
        info = self.info
        context, chain = info.context, (info.adapter_name, info.settings["chain"])
        if context.recording and not torch.is_grad_enabled():
            raise InputError(
                "router_type='recurrent' cannot run under reentrant checkpointing, which cuts the "
                "router's path through depth; pass gradient_checkpointing_kwargs="
                "{'use_reentrant': False}"
            )
        below = context.state.get((*chain, info.settings["below"]))
        assert info.shared is not None
        h_TP = info.shared(z_TP, torch.zeros_like(z_TP) if below is None else below)
        context.state[(*chain, info.settings["index"])] = h_TP
        return h_TP

    def balance(self, y: Tensor, picked_TE: Tensor, prob_TE: Tensor) -> Tensor:
        """`y`, with the layer's share of the balance loss sent into the backward pass."""
        context, key = self.info.context, f"{self.info.key}.{self.info.adapter_name}"
        mask_T = context.mask_of(len(prob_TE), in_decoder=self.info.settings["in_decoder"])
        picks_E, prob_E = expert_sums(picked_TE, prob_TE, mask_T)
        factor = self.config.router_aux_loss_coef * self.info.settings["share"]
        weigh = partial(balance_weights, k=self.config.top_k, factor=factor)
        term = context.weighed(key, prob_E, picks_E, weigh, picks=picks_E)
        return y if context.scale is None else add_gradient(y, term, context.scale)


@register(
    "mola",
    summary="a top-k mixture of LoRA experts per layer, more experts where they pay",
    paper="Gao et al. 2025, MoLA: MoE LoRA with Layer-wise Expert Allocation, arXiv:2402.08562",
)
class MolaModel(MethodTuner):
    """The tuner of `MolaConfig`."""

    config_cls, adapter_cls = MolaConfig, MolaAdapter

    def layer_settings(
        self, config: MolaConfig, model: nn.Module, shapes: Mapping[str, LayerShape]
    ) -> dict[str, dict[str, Any]]:
        """Experts, weight in the balance loss and router chain of each target."""
        places = {key: place(model, key) for key in shapes}
        plans: dict[str, dict[str, Any]] = {}
        last: dict[tuple[str, str], int] = {}  # the highest layer seen so far, by chain
        layers = [(p.stack, p.index) for p in places.values() if p]
        decoder: Any = model.get_decoder() if is_encoder_decoder(model) else nn.Module()  # ty: ignore
        in_decoder = set(decoder.modules())
        for key, where in places.items():
            if where is None:
                raise InputError(
                    f"cannot infer the layer index of {key!r}, which stands in no module list; "
                    "leave it out with exclude_modules, or name other target_modules"
                )
            experts = experts_by_layer(config.num_experts, where.length)[where.index]
            require(
                config.top_k <= experts,
                f"top_k ({config.top_k}) exceeds the number of experts ({experts}) "
                f"of layer {where.index}",
            )
            chain = (where.stack, where.name)
            plans[key] = {
                "num_experts": experts,
                "share": 1 / layers.count((where.stack, where.index)),
                "in_decoder": model.get_submodule(key) in in_decoder,
                "chain": chain,
                "index": where.index,
                "below": last.get(chain),
            }
            last[chain] = where.index
        return plans

    def make_shared(self, config: MolaConfig, shapes: Mapping[str, LayerShape]) -> nn.Module | None:
        """The GRU that all recurrent routers of an adapter share."""
        return Gru(config.router_hidden_size) if config.router_type == "recurrent" else None

    def series(self) -> dict[str, float]:
        """`expert_load_max`: picks of the busiest expert over a fair share, mean over layers."""
        picks = self.context.series.get("picks")
        if not picks:
            return {}
        loads = [busiest(picks_E) for picks_E in picks.values()]
        return {"expert_load_max": float(torch.stack(loads).mean())}
