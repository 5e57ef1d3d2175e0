"""SHERL: a side network over frozen blocks that feeds the last ones; backward ends at it.

Diao et al. 2024, "SHERL: Synthesizing High Accuracy and Efficient Memory for Resource-Limited
Transfer Learning", ECCV (arXiv:2407.07523).

Shapes: N rows, T tokens, K width of the stream, H of the side network, S features. Feature 0 is the
input of the first block, the others are the outputs of the blocks in `side_layers`, x_i [N, T, K],
all detached; the last one is the guide g. With a tier of matrices for each feature:

    u_i = relu(x_i D_i^T + d_i)            z_i = (u_i M_i^T + m_i + u_i) sigmoid(u_i G_i^T + g_i)
    e_i = z_i / (|z_i| + eps)              R_i = sum_j relu(e_i . e_j)      (without the guide)
    a_i = relu(w . (z_i z_g) + b) / R_i    a_i <- a_i / (sum_j |a_j| + eps)
    f = z_g + sum_i a_i z_i                y = relu(f) U^T + c + tanh(q / temperature) last

y replaces the input of the first of the `late_layers` last blocks, `last` is what it would have
got. In an encoder-decoder that is so in the decoder; a second side network makes `norm(y)` of the
encoder's blocks, which the late decoder blocks see instead of the encoder's output.

Where we depart from the authors' code: the norm of e_i has a gradient of zero, not NaN, at z_i = 0,
and R is at least 1e-6. Their decoder ends in a new norm; here it is the model's own, which trains
with `train_final_norm`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petl.core.layers.block import adapters_of
from petl.core.layers.class_swap import original_class
from petl.core.layers.context import ForwardContext, is_encoder_decoder
from petl.core.layers.layer import Adapter, LayerInfo, LayerShape
from petl.core.model.heat_map import HeatMap, of_layers
from petl.core.model.structure import block_widths
from petl.core.parameters import is_norm
from petl.core.registry import register
from petl.core.spec.config import MethodConfig, config_field, require
from petl.core.tuners.tuner import MethodTuner
from petl.errors import InputError

EPS = 1e-6
TIERS = ("down", "mix", "gate")


@dataclass
class SherlConfig(MethodConfig):
    """Fields of SHERL; the targets are always the blocks that the other fields determine."""

    target_modules: set[str] | list[str] | str | None = config_field(
        "the blocks that hold the side networks; null, as the other fields determine them", None
    )
    side_layers: list[int] | None = config_field(
        "indices of the blocks whose outputs are read, from 0; null: all below the late blocks",
        None,
    )
    late_layers: int = config_field("number of last blocks that run with a gradient", 1, ge=1)
    r: int | None = config_field("width of the side network; null: by reduction_factor", None, ge=1)
    reduction_factor: float = config_field("the side network is width / reduction_factor", 8, gt=0)
    gate_temperature: float = config_field("divides the gate of the late block's input", 0.1, gt=0)
    encoder_memory: bool = config_field(
        "encoder-decoders: a second side network reads the encoder; false: it is left alone", True
    )
    train_final_norm: bool = config_field("also train and save the model's last norm", False)

    def check(self) -> None:
        sides = self.side_layers
        require(
            sides is None or bool(sides), "side_layers=[] is empty; name blocks, or leave it null"
        )
        require(
            sides is None or all(type(side) is int and side >= 0 for side in sides),
            f"side_layers={sides} has entries that are no block indices from 0",
        )
        require(
            self.exclude_modules is None, f"exclude_modules={self.exclude_modules}: leave it null"
        )
        if sides is not None:
            self.side_layers = sorted(set(sides))

    def width(self, stream: int) -> int:
        """Return H for a stream of this width."""
        return self.r or max(1, int(stream // self.reduction_factor))


class SherlAdapter(Adapter):
    """Side network of one stack: tiers stacked over features, a score, and a way back.

    `down_weight` [S, H, K], `mix_weight` and `gate_weight` [S, H, H] with biases [S, H],
    `score_weight` [1, H], `up_weight` [K, H], `residual_gate` [1]; of an encoder also
    `norm_weight` [K], and `norm_bias` where its norms have one.
    """

    down_weight: Tensor
    down_bias: Tensor
    mix_weight: Tensor
    mix_bias: Tensor
    gate_weight: Tensor
    gate_bias: Tensor

    merge_refusal = (
        "SHERL's side network is no update of a weight and cannot be merged; keep the adapter, or "
        "call unload() for the base model"
    )

    def __init__(self, shape: LayerShape, config: SherlConfig, info: LayerInfo) -> None:
        super().__init__(shape, config, info)
        K, H = shape.in_features, config.width(shape.in_features)
        self.sides: list[int] = info.settings["sides"]
        self.temperature = config.gate_temperature
        S = len(self.sides) + 1
        for name, inner in zip(TIERS, (K, H, H), strict=True):
            self.register_parameter(f"{name}_weight", _uniform(inner, S, H, inner))
            self.register_parameter(f"{name}_bias", _uniform(inner, S, H))
        self.score_weight, self.score_bias = _uniform(H, 1, H), _uniform(H, 1)
        self.up_weight, self.up_bias = _uniform(H, K, H), _uniform(H, K)
        self.residual_gate = nn.Parameter(torch.zeros(1))
        self.norm: tuple[float, bool] | None = info.settings["norm"]
        if self.norm is not None:
            self.norm_weight = nn.Parameter(torch.ones(K))
            if self.norm[1]:
                self.norm_bias = nn.Parameter(torch.zeros(K))

    def tier(self, i: int, x: Tensor) -> Tensor:
        """Return z_i [..., H] of feature `x` [..., K]."""
        (D, d), (M, m), (G, g) = (
            (getattr(self, f"{n}_weight")[i].to(x.dtype), getattr(self, f"{n}_bias")[i].to(x.dtype))
            for n in TIERS
        )
        u = F.relu(F.linear(x, D, d))
        return (F.linear(u, M, m) + u) * F.linear(u, G, g).sigmoid()

    def fuse(self, features: Sequence[Tensor], last: Tensor) -> Tensor:
        """Return y [N, T, K] of S features [N, T, K] and what the late block would have got."""
        tiers = [self.tier(i, x) for i, x in enumerate(features)]
        guide, z = tiers[-1], torch.stack(tiers[:-1], -2)  # [..., H], [..., S-1, H]
        f = guide + (self.weights(z, guide).to(z.dtype).unsqueeze(-1) * z).sum(-2)
        up, bias = self.up_weight.to(f.dtype), self.up_bias.to(f.dtype)
        gate = torch.tanh(self.residual_gate / self.temperature).to(last.dtype)
        return F.linear(F.relu(f), up, bias).to(last.dtype) + gate * last

    def weights(self, z: Tensor, guide: Tensor) -> Tensor:
        """Return a [..., S-1]: relevance to the guide over redundancy, in float32."""
        with torch.autocast(z.device.type, enabled=False):
            z, guide = z.float(), guide.float()
            e = z / (torch.linalg.vector_norm(z, dim=-1, keepdim=True) + EPS)
            redundancy = F.relu(e @ e.mT).sum(-1).clamp(min=EPS)
            score = F.linear(
                z * guide.unsqueeze(-2), self.score_weight.float(), self.score_bias.float()
            )
            a = F.relu(score.squeeze(-1)) / redundancy
            return a / (a.sum(-1, keepdim=True) + EPS)

    def normalize(self, y: Tensor) -> Tensor:
        """Return norm(y), in the dtype of `y`: layer norm, or RMS norm where there is no bias."""
        assert self.norm is not None
        eps, has_bias = self.norm
        v, shape = y.float(), (y.shape[-1],)
        if has_bias:
            v = F.layer_norm(v, shape, self.norm_weight.float(), self.norm_bias.float(), eps)
        else:
            v = F.rms_norm(v, shape, self.norm_weight.float(), eps)
        return v.to(y.dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y  # hooks of the stack have changed what the block gets


def _uniform(fan_in: int, *shape: int) -> nn.Parameter:
    """Return a tensor with the distribution of torch's Linear."""
    bound = fan_in**-0.5
    return nn.Parameter(torch.empty(*shape, dtype=torch.float32).uniform_(-bound, bound))


class Stack:
    """The hooks of one list of blocks, for the adapters of one of them, the host.

    They run outside of the checkpointed calls of the blocks, so that nothing is computed twice
    and the late blocks get an input with a gradient.

    Attributes:
        host: the block that holds the adapters.
        memories: by adapter name, norm(y) of the encoder's last pass.
    """

    def __init__(self, path: str, host: nn.Module, context: ForwardContext) -> None:
        self.path, self.host, self.context = path, host, context
        self.memories: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        # a memory is a part of a graph, which cannot be copied
        return {**self.__dict__, "memories": {}}

    def active(self) -> SherlAdapter | None:
        """Return the adapter that computes now, or None."""
        layer = adapters_of(self.host)
        if layer is None or layer.disable_adapters:
            return None
        found = [adapter for _, adapter in layer.pick(layer.active_adapters)]
        return cast(SherlAdapter, found[0]) if found else None

    def start(self, block: nn.Module, args: Any, kwargs: Any) -> Any:
        """Pre-hook of block 0: cut the graph, and begin to collect features."""
        if self.active() is None:
            return None
        x, args, kwargs = _detached(args, kwargs)
        self.context.state[self.path] = [x]
        return args, kwargs

    def cut(self, block: nn.Module, args: Any, kwargs: Any) -> Any:
        """Pre-hook of block 0 of a stack without a side network: cut the graph."""
        return None if self.active() is None else _detached(args, kwargs)[1:]

    def taken(self) -> list[Tensor]:
        """Return the collected features, and forget them."""
        features = self.context.state.pop(self.path, None)
        if features is None:
            raise InputError(
                f"{self.path} has a side network that reads the blocks before it, which have not "
                "run; call the model"
            )
        return features


class Collect:
    """Forward hook of a block: append its output to the features, and after the last fuse them."""

    def __init__(self, stack: Stack, index: int, *, ends: bool = False) -> None:
        self.stack, self.index, self.ends = stack, index, ends

    def __call__(self, block: nn.Module, args: Any, output: Any) -> None:
        stack, adapter = self.stack, self.stack.active()
        if adapter is None or self.index not in adapter.sides:
            return
        last = (output[0] if isinstance(output, tuple) else output).detach()
        stack.context.state[stack.path].append(last)
        if self.ends:  # the encoder's
            memory = adapter.normalize(adapter.fuse(stack.taken(), last))
            stack.memories[adapter.info.adapter_name] = memory


class Feed:
    """Forward pre-hook of a late block: replace the first one's input, and the encoder's output."""

    def __init__(self, stack: Stack, encoder: Stack | None, *, is_host: bool) -> None:
        self.stack, self.encoder, self.is_host = stack, encoder, is_host

    def __call__(self, block: nn.Module, args: Any, kwargs: Any) -> Any:
        adapter = self.stack.active()
        if adapter is None:
            return None
        if self.is_host:
            x, args, kwargs = _detached(args, kwargs)
            args = (adapter.fuse(self.stack.taken(), x), *args[1:])
        memories = self.encoder.memories if self.encoder is not None else {}
        memory = memories.get(adapter.info.adapter_name)
        return (args, kwargs) if memory is None else _with_memory(block, args, kwargs, memory)


def _detached(args: Any, kwargs: Any) -> tuple[Tensor, Any, Any]:
    """Return the hidden states, and the arguments of a block, without their graph."""
    if not args:  # the first keyword argument
        name, *_ = kwargs
        args, kwargs = (kwargs[name],), {k: v for k, v in kwargs.items() if k != name}
    x = args[0].detach()
    return x, (x, *args[1:]), kwargs


def _with_memory(block: nn.Module, args: Any, kwargs: Any, memory: Tensor) -> Any:
    """Return the arguments of a decoder block with `memory` in place of the encoder's output."""
    rows = len(args[0])
    if rows != len(memory):  # beam search repeats rows behind the encoder
        memory = memory.repeat_interleave(rows // len(memory), dim=0)
    if kwargs.get("encoder_hidden_states") is not None:
        return args, {**kwargs, "encoder_hidden_states": memory}
    cls: Any = original_class(block)
    names = list(signature(cls.forward).parameters)[1:]  # without self
    place = names.index("encoder_hidden_states")
    return (*args[:place], memory, *args[place + 1 :]), kwargs


@dataclass
class Plan:
    """What a config means in a model.

    Attributes:
        stacks: blocks of the decoder, or of a model with one stack, then of the encoder, if any.
        late: index of the first late block.
        sides: indices of the blocks that are read, of each stack with a side network.
    """

    stacks: list[list[str]]
    late: int
    sides: list[list[int]]

    @property
    def hosts(self) -> list[str]:
        """Paths of the blocks that hold the side networks, in the order of `sides`."""
        encoder = [self.stacks[1][sides[-1]] for sides in self.sides[1:]]
        return [self.stacks[0][self.late], *encoder]


def plan_of(config: SherlConfig, model: nn.Module) -> Plan:
    """Return the stacks of `model` and the blocks that the side networks read.

    Raises:
        InputError: the model has no such blocks.
    """
    lists: dict[str, list[str]] = {}
    for path in block_widths(model):
        lists.setdefault(path.rpartition(".")[0], []).append(path)
    has_encoder = is_encoder_decoder(model)
    require(
        len(lists) == (2 if has_encoder else 1),
        f"{type(model).__name__} has {len(lists)} lists of blocks ({', '.join(lists) or 'none'}); "
        f"sherl needs {'an encoder and a decoder' if has_encoder else 'one'}",
    )
    stacks = list(lists.values())
    if has_encoder:
        inside = set(cast(Any, model).get_encoder().modules())
        stacks.sort(key=lambda paths: model.get_submodule(paths[0]) in inside)
    L = len(stacks[0])
    require(
        config.late_layers < L,
        f"late_layers={config.late_layers} is not in [1, {L - 1}]: {type(model).__name__} has {L} "
        "blocks, of which one at least must be before the late ones",
    )
    late, given = L - config.late_layers, config.side_layers
    reads_encoder = has_encoder and config.encoder_memory
    end = len(stacks[1]) if reads_encoder else late
    require(
        given is None or given[-1] < max(end, late),
        f"side_layers={given} is not in [0, {max(end, late) - 1}]: {type(model).__name__} has {L} "
        f"blocks, of which the last {config.late_layers} are late",
    )
    sides = [[i for i in range(late) if given is None or i in given]]
    require(
        bool(sides[0]), f"side_layers={given} has no block of the decoder below {late}; add one"
    )
    if reads_encoder:
        sides.append([i for i in range(len(stacks[1])) if given is None or i in given])
    return Plan(stacks, late, sides)


@register(
    "sherl",
    summary="a side network over frozen blocks feeds the last ones; no backward through the stack",
    need="little memory in training",
    recommended="no backward through the frozen blocks: memory of a step does not grow with depth",
    paper="Diao et al. 2024, SHERL: Synthesizing High Accuracy and Efficient Memory for "
    "Resource-Limited Transfer Learning, ECCV, arXiv:2407.07523",
)
class SherlModel(MethodTuner):
    """Tuner of `SherlConfig`."""

    config_cls, adapter_cls = SherlConfig, SherlAdapter
    needs_tuner = "hooks of the blocks feed it, which the tuner has"
    unsupported = {"mixed": "one side network at a time feeds the late blocks"}

    def choose_targets(self, config: Any, model: nn.Module) -> None:
        """Set the targets to the hosts, and add the last norm to `modules_to_save` if it trains."""
        hosts, given = plan_of(config, model).hosts, config.target_modules
        require(
            given is None or set(given) == set(hosts),
            f"target_modules={given} are not the blocks {hosts} that side_layers="
            f"{config.side_layers} and late_layers={config.late_layers} give in "
            f"{type(model).__name__}; leave target_modules null, or load the adapter onto a model "
            "of its depth",
        )
        config.target_modules = set(hosts)
        if config.train_final_norm:
            norm, saved = final_norm(config, model), config.modules_to_save or []
            config.modules_to_save = [*saved, *({norm} - set(saved))]

    def block_modules(self, config: Any, model: nn.Module) -> Mapping[str, int]:
        """Return the blocks of the model."""
        return block_widths(model)

    def layer_settings(
        self, config: Any, model: nn.Module, shapes: Mapping[str, LayerShape]
    ) -> dict[str, dict[str, Any]]:
        """Return the blocks that each side network reads, and the norm of the encoder's."""
        plan = plan_of(config, model)
        norms = [None, *(_norm_of(model.get_submodule(stack[0])) for stack in plan.stacks[1:])]
        return {
            host: {"sides": sides, "norm": norm}
            for host, sides, norm in zip(plan.hosts, plan.sides, norms, strict=False)
        }

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Inject the adapter, and register the hooks of its hosts unless they are there."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        plan = plan_of(cast(Any, self.peft_config[adapter_name]), model)
        known = self.__dict__.setdefault("stacks", {})
        key = tuple(plan.hosts)
        if key not in known:
            known[key] = [Stack(p, model.get_submodule(p), self.context) for p in plan.hosts]
            self._register(plan, known[key], model)

    def _register(self, plan: Plan, readers: list[Stack], model: nn.Module) -> None:
        get, hooks = model.get_submodule, self.hooks
        main, *encoders = readers
        for reader, stack in zip(readers, plan.stacks, strict=False):
            hooks.append(get(stack[0]).register_forward_pre_hook(reader.start, with_kwargs=True))
            end = stack.index(reader.path)
            for i, path in enumerate(stack[: end + (reader is not main)]):
                collect = Collect(reader, i, ends=i == end)
                hooks.append(get(path).register_forward_hook(collect))
        for stack in plan.stacks[len(readers) :]:  # an encoder that is left alone
            hooks.append(get(stack[0]).register_forward_pre_hook(main.cut, with_kwargs=True))
        for i, path in enumerate(plan.stacks[0][plan.late :]):
            feed = Feed(main, encoders[0] if encoders else None, is_host=i == 0)
            hooks.append(get(path).register_forward_pre_hook(feed, with_kwargs=True))

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate an adapter.

        Raises:
            InputError: several are given.
        """
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise InputError(
                f"adapters {list(adapter_name)} cannot be active together: one side network at a "
                "time feeds the late blocks; activate one of them"
            )
        super().set_adapter(adapter_name, inference_mode)

    @torch.no_grad()
    def heat_maps(self) -> list[HeatMap]:
        """Return a map of the size of each tier: by how much a feature may move the output."""
        sizes: dict[str, float] = {}
        for name in self.active_adapters:
            for host, adapter in self.placed.get(name, {}).items():
                side, stack = cast(SherlAdapter, adapter), host.rpartition(".")[0]
                for i, D in zip(side.sides, side.down_weight.float()[1:], strict=True):
                    sizes[f"{stack}.{i}"] = float((side.up_weight.float() @ D).norm())
        return of_layers(
            self.model,
            sizes,
            "side_network",
            "Size of the side network",
            "norm of up x down",
            "The Frobenius norm of the product of the last matrix and the first one of each tier, "
            "by the block whose output the tier reads.",
        )


def final_norm(config: SherlConfig, model: nn.Module) -> str:
    """Return the norm behind the last block, of the decoder if there is one.

    Raises:
        InputError: there is none.
    """
    stack = plan_of(config, model).stacks[0][0].rpartition(".")[0]
    owner, _, name = stack.rpartition(".")
    children = list(model.get_submodule(owner).named_children())
    behind = children[[child for child, _ in children].index(name) + 1 :]
    norms = [child for child, module in behind if is_norm(module) and "embed" not in child]
    require(
        bool(norms),
        f"train_final_norm=True, and {type(model).__name__} has no norm behind its blocks "
        f"({stack}); leave it false",
    )
    return f"{owner}.{norms[0]}" if owner else norms[0]


def _norm_of(block: nn.Module) -> tuple[float, bool]:
    """Return epsilon of the norms of a block, and whether they have a bias."""
    norm: Any = next(module for module in block.modules() if is_norm(module))
    eps = next(getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name))
    return float(eps), getattr(norm, "bias", None) is not None
