"""Polyhistor: one hypernetwork writes the bottleneck adapters of all tasks and layers.

Liu, Ma, Tian, He and Kira 2022, "Polyhistor: Parameter-Efficient Multi-Task Adaptation for Dense
Vision Tasks", NeurIPS (arXiv:2210.03265), an extension of HyperFormer (arXiv:2106.04489) and
Compacter (arXiv:2106.04647).

Shapes: K0 the smallest width of the adapted layers, S K0 the width of a layer, D0 bottleneck of
width K0, R `rank`, M `task_dim`, H `hidden_dim`, C `code_dim`, G tasks or groups of rows, T tokens.
For a task with embedding E [M] and a layer with embeddings L [S, M], template i of S has the code

    c_i = LN(W_out relu(W_in [E; L_i] + b_in) + b_out),    eps 1e-6

and linear maps of c_i write the factors P [K0, R] and Q [R, D0] of T_i = P Q for the up projection
(P [D0, R], Q [R, K0] for down), both biases, and weight and bias of the norm after the network. A
layer of width K0 uses its template; a wider one enlarges its S templates by a kernel of its own,

    W = sum_i kernel[i] (x) T_i,    f(h) = LN(W_up act(W_down h + b_down) + b_up),    eps 1e-5

or T_i (x) kernel[i] without `kernel_first`; biases and norm likewise, with kernels [S, S] whose row
i is the column of term i. Placements are those of `petl.methods.families.sublayers`.

Where we depart from the code: the two lists of embeddings (per layer, and per kind of sub-layer)
are one embedding per adapted module. The variant with a set of generators for each width is left
out: it has more parameters. Kernels are standard normal, so that a layer of width S K0 starts with
outputs of S times the variance: published, and kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petl.core.layers.layer import LayerInfo, LayerShape
from petl.core.layers.mixed_batch import PreparedBatch
from petl.core.layers.task_rows import TaskGroups, TaskRows
from petl.core.method import Method, Target, TrainContext, WrapContext
from petl.core.model.heat_map import HeatMap, layers_of, role_of
from petl.core.register import register
from petl.core.spec.checks import check_rank
from petl.core.spec.config import config_field, require
from petl.core.support import Capability
from petl.core.tuners.adapter import AdapterTuner
from petl.errors import UnknownNameError, did_you_mean
from petl.methods.families.stacked import layer_norm, linear
from petl.methods.families.sublayers import (
    BY_FACTOR,
    SubLayerAdapter,
    SubLayerConfig,
    sublayer_places,
    sublayer_targets,
)
from petl.methods.polyhistor.tasks import (
    check_ids,
    check_tasks,
    require_tasks,
)
from petl.system.collectives import num_processes

CODE_EPS = 1e-6  # of the norm of codes; that after the network has torch's 1e-5
GENERATOR_STD = 0.01


@dataclass
class PolyhistorConfig(SubLayerConfig):
    """Fields of Polyhistor; D0 of the module's docstring is `r`, or K0 // `reduction_factor`."""

    tasks: list[str] = config_field("names of the tasks, in the order of their ids", [])
    reduction_factor: float | None = config_field(
        "bottleneck of the narrowest layer = its width / reduction_factor; wider layers have as "
        "many times more",
        8,
        acts=BY_FACTOR,
    )
    rank: int = config_field("rank of the templates", 2, ge=1)
    task_dim: int = config_field("width of the embeddings of tasks and layers", 64, ge=1)
    hidden_dim: int = config_field("hidden width of the network that makes codes", 128, ge=1)
    code_dim: int = config_field("width of a code", 64, ge=1)
    non_linearity: str = config_field("a name in transformers' ACT2FN", "swish")
    locations: list[str] = config_field(
        "subset of attn, cross_attn, ffn, and block for one adapter beside each whole block",
        ["ffn"],
        choices=("attn", "cross_attn", "ffn", "block"),
    )
    post_norm: bool = config_field("layer norm after the network, with generated weights", True)
    kernel_first: bool = config_field(
        "enlarge a template as kernel (x) template; false: template (x) kernel", True
    )
    zero_init_norm: bool = config_field(
        "start at the base model's outputs: the generators of the norm start at zero",
        False,
        acts=("post_norm=true", lambda config: config.post_norm),
    )

    def check(self) -> None:
        """Raise InputError for values that are wrong together."""
        super().check()
        check_tasks(self.tasks)

    def check_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise InputError for widths that are no multiples of the smallest, or without tasks."""
        require_tasks(self.tasks)
        narrow = min(width for _, width in shapes.values())
        for key, (_, width) in shapes.items():
            require(
                width % narrow == 0,
                f"the width {width} of {key} is no multiple of {narrow}, the smallest of the "
                "adapted layers; leave it out with exclude_modules",
            )
        D0 = self.bottleneck(narrow)
        ranks = {key: D0 * (width // narrow) for key, (_, width) in shapes.items()}
        check_rank(self, "r", shapes, linear=False, ranks=ranks)


class Generators(nn.Module):
    """The tensors that all layers and tasks share; `<name>_weight` and `<name>_bias` are maps.

    `task_embedding` [tasks, M]; maps of codes to `up` and `down` [(K0 + D0) R], `up_shift` [K0],
    `down_shift` [D0], `norm_scale` and `norm_shift` [K0].
    """

    task_embedding: Tensor
    code_norm_weight: Tensor
    code_norm_bias: Tensor

    def __init__(self, config: PolyhistorConfig, narrow: int) -> None:
        super().__init__()
        M, H, C, D0 = config.task_dim, config.hidden_dim, config.code_dim, config.bottleneck(narrow)
        self.config, self.narrow, self.bottleneck = config, narrow, D0
        self.task_embedding = nn.Parameter(torch.randn(len(config.tasks), M))
        self._add("hyper_in", H, 2 * M)
        self._add("hyper_out", C, H)
        self.code_norm_weight = nn.Parameter(torch.ones(C))
        self.code_norm_bias = nn.Parameter(torch.zeros(C))
        for side, width in (("up", narrow), ("down", D0)):
            self._add(side, (narrow + D0) * config.rank, C)
            if config.use_bias:
                self._add(f"{side}_shift", width, C)
        for name in ("norm_scale", "norm_shift") if config.post_norm else ():
            self._add(name, narrow, C, std=0.0 if config.zero_init_norm else GENERATOR_STD)

    def _add(self, name: str, rows: int, columns: int, std: float = GENERATOR_STD) -> None:
        weight = nn.Parameter(torch.empty(rows, columns).normal_(std=std))
        self.register_parameter(f"{name}_weight", weight)
        self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(rows)))


class HyperWeights(NamedTuple):
    """Weights of the networks of G tasks: [G, O, I], and vectors [G, W] or None."""

    down: Tensor
    down_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None

    def to(self, dtype: torch.dtype) -> "HyperWeights":
        """Return the weights in another dtype."""
        return HyperWeights._make(None if t is None else t.to(dtype) for t in self)

    def of(self, index: Tensor) -> "HyperWeights":
        """Return the weights of each group by the place of its task, with vectors [G, 1, W]."""
        picked = (None if t is None else t.index_select(0, index) for t in self)
        return HyperWeights._make(
            t if t is None or t.dim() == 3 else t.unsqueeze(1) for t in picked
        )

    def first(self) -> "HyperWeights":
        """Return the weights of the first task: matrices, and vectors [W]."""
        return HyperWeights._make(None if t is None else t[0] for t in self)


class KeptWeights:
    """Generated weights of one layer between forward passes in evaluation, by task ids and dtype.

    They are valid as long as all tensors that they were made from are the same objects, of the same
    version and address. Not copied or saved with the layer.
    """

    def __init__(self) -> None:
        self.weights: dict[object, HyperWeights] = {}
        self.sources: list[tuple[Tensor, int, int]] = []

    def __reduce__(self) -> tuple[type["KeptWeights"], tuple[()]]:
        return KeptWeights, ()

    def valid(self, tensors: Sequence[Tensor]) -> bool:
        """Return True if weights made from these tensors may be kept; forget those that are old."""
        # others have no version, or are views of shards that change without a new one
        if any(type(t) is not nn.Parameter or t.is_inference() for t in tensors):
            self.clear()
            return False
        same = len(tensors) == len(self.sources) and all(
            t is kept and t._version == version and t.data_ptr() == address
            for t, (kept, version, address) in zip(tensors, self.sources, strict=True)
        )
        if not same:
            self.clear()
            self.sources = [(t, t._version, t.data_ptr()) for t in tensors]
        return True

    def clear(self) -> None:
        """Forget all weights."""
        self.weights.clear()
        self.sources = []


class PolyhistorAdapter(SubLayerAdapter):
    """What a layer has of its own: `layer_embedding` [S, M], and for S > 1 its kernels.

    `kernel` [S, S, S] for both projections, `shift_kernel` and `norm_kernel` [S, S] for vectors.
    """

    layer_embedding: Tensor
    kernel: Tensor

    keep_float32 = True  # codes and generators of sd 0.01 are multiplied three times

    def __init__(self, shape: LayerShape, config: PolyhistorConfig, info: LayerInfo) -> None:
        super().__init__(shape, config, info)
        generators = cast(Generators, info.shared)
        S = self.width // generators.narrow
        self.bottleneck = S * generators.bottleneck
        self.layer_embedding = nn.Parameter(torch.randn(S, config.task_dim))
        if S > 1:
            self.kernel = nn.Parameter(torch.randn(S, S, S))
            if config.use_bias:
                self.shift_kernel = nn.Parameter(torch.randn(S, S))
            if config.post_norm:
                self.norm_kernel = nn.Parameter(torch.randn(S, S))
        self.kept = KeptWeights()

    def train(self, mode: bool = True) -> "PolyhistorAdapter":
        """Set the mode; generated weights are not kept into a training."""
        if mode:
            self.kept.clear()
        return super().train(mode)

    # Forward pass

    def network(self, h: Tensor) -> Tensor:
        """f(h) of the module docstring, [..., K] for h [..., K], by the task of each row."""
        context, tasks = self.info.context, self.info.context.tasks
        # the segments' separate backward passes would trigger DDP's reduction too early
        require(
            torch.is_grad_enabled() or not context.recording or num_processes() == 1,
            f"method 'polyhistor' cannot run under reentrant checkpointing in {num_processes()} "
            "processes: the gradients of its shared network would be reduced before they are "
            "complete; pass gradient_checkpointing_kwargs={'use_reentrant': False}",
        )
        check_ids(tasks, self.config.tasks, self.info.key)
        if tasks is not None and isinstance(tasks.ids, Tensor):
            return self._by_row(h, tasks)
        ids = (0,) if tasks is None else tuple(tasks.distinct)
        weights = self.generated(ids, h.dtype)
        if tasks is None or len(ids) == 1:
            return self._compute(h, weights.first())
        return self._by_group(h, weights, tasks.grouped(h))

    def _by_group(self, h: Tensor, weights: HyperWeights, tasks: TaskGroups) -> Tensor:
        """Apply the weights of several tasks to rows in groups, as one batched product."""
        of_group = weights.of(tasks.index)
        batch = PreparedBatch(tasks.groups, lambda x, _: self._compute(x, of_group))
        return batch.compute(h, h, is_own=True)

    def _by_row(self, h: Tensor, tasks: TaskRows) -> Tensor:
        """Apply weights to each row where the ids cannot be read: a group for each row."""
        ids = tasks.per_row(len(h))
        weights = self.generate(self._read("task_embedding", shared=True)[ids]).to(h.dtype)
        of_row = weights.of(torch.arange(len(h), device=h.device))
        return self._compute(h.reshape(len(h), -1, h.shape[-1]), of_row).view(h.shape)

    def _compute(self, h: Tensor, weights: HyperWeights) -> Tensor:
        """f(h) with these weights: h [..., K], or [G, T, K] for stacked ones."""
        z = self.act(linear(h, weights.down, weights.down_bias))
        z = F.dropout(z, self.config.bneck_dropout, self.training)
        f = linear(z, weights.up, weights.up_bias)
        if weights.norm_weight is None or weights.norm_bias is None:
            return f
        return layer_norm(f, weights.norm_weight, weights.norm_bias).to(h.dtype)

    def matrices(self, task: int = 0) -> tuple[Tensor, Tensor]:
        weights = self.generated((task,), torch.float32).first()
        return weights.down, weights.up

    # Generation

    def generated(self, ids: tuple[int, ...], dtype: torch.dtype) -> HyperWeights:
        """Return the weights of these tasks; without gradients, in evaluation, they are kept."""
        # several processes: sharding fills weights without a new version
        keeps = not (
            torch.is_grad_enabled()
            or self.training
            or torch.compiler.is_compiling()
            or num_processes() > 1
        )
        if not keeps:
            self.kept.clear()
            return self._make(ids, dtype)
        owners = (self, cast(nn.Module, self.info.shared))
        tensors = [cast(Tensor, t) for owner in owners for t in owner._parameters.values()]
        if not self.kept.valid(tensors):
            return self._make(ids, dtype)
        if (ids, dtype) not in self.kept.weights:
            self.kept.weights[ids, dtype] = self._make(ids, dtype)
        return self.kept.weights[ids, dtype]

    def _make(self, ids: tuple[int, ...], dtype: torch.dtype) -> HyperWeights:
        E = self._read("task_embedding", shared=True)
        # slices, not an index: a list of Python numbers would be copied to the device
        return self.generate(torch.cat([E[i : i + 1] for i in ids])).to(dtype)

    def generate(self, embeddings: Tensor) -> HyperWeights:
        """Return the weights for embeddings of G tasks [G, M], in float32."""
        with torch.autocast(embeddings.device.type, enabled=False):
            code = self._code(embeddings)
            norm = [self._vector(name, "norm", code) for name in ("norm_scale", "norm_shift")]
            biases = {side: self._vector(f"{side}_shift", "shift", code) for side in ("down", "up")}
            down, up = (self._matrix(side, code) for side in ("down", "up"))
            return HyperWeights(down, biases["down"], up, biases["up"], *norm)

    def _code(self, embeddings: Tensor) -> Tensor:
        """Return the codes [G, S, C]."""
        L, G = self._read("layer_embedding"), len(embeddings)
        S, M = L.shape
        inputs = torch.cat([embeddings[:, None].expand(G, S, M), L.expand(G, S, M)], dim=-1)
        code = self._map("hyper_out", F.relu(self._map("hyper_in", inputs)))
        weight, bias = (self._read(f"code_norm_{name}", shared=True) for name in ("weight", "bias"))
        return F.layer_norm(code, weight.shape, weight, bias, CODE_EPS)

    def _matrix(self, side: str, code: Tensor) -> Tensor:
        """Return the projection "up" [G, K, D] or "down" [G, D, K]."""
        generators, R = cast(Generators, self.info.shared), self.config.rank
        K0, D0 = generators.narrow, generators.bottleneck
        rows, columns = (K0, D0) if side == "up" else (D0, K0)
        P, Q = self._map(side, code).split([rows * R, columns * R], dim=-1)
        templates = P.unflatten(-1, (rows, R)) @ Q.unflatten(-1, (R, columns))  # [G, S, ...]
        S = templates.shape[1]
        if S == 1:
            return templates[:, 0]
        formula = "iab,gixy->gaxby" if self.config.kernel_first else "iab,gixy->gxayb"
        product = torch.einsum(formula, self._read("kernel"), templates)
        return product.reshape(len(code), S * rows, S * columns)

    def _vector(self, name: str, kind: str, code: Tensor) -> Tensor | None:
        """Return a generated vector [G, W], or None if the config has none of this kind."""
        if not hasattr(self.info.shared, f"{name}_weight"):
            return None
        templates = self._map(name, code)  # [G, S, W / S]
        if templates.shape[1] == 1:
            return templates[:, 0]
        formula = "ia,gix->gax" if self.config.kernel_first else "ia,gix->gxa"
        return torch.einsum(formula, self._read(f"{kind}_kernel"), templates).flatten(1)

    def _map(self, name: str, x: Tensor) -> Tensor:
        weight, bias = (self._read(f"{name}_{part}", shared=True) for part in ("weight", "bias"))
        return F.linear(x, weight, bias)

    def _read(self, name: str, *, shared: bool = False) -> Tensor:
        """Return a tensor in float32, also if the model was cast as a whole, on this device."""
        tensor: Tensor = getattr(self.info.shared if shared else self, name)
        # a model may be spread over devices
        return tensor.to(self.layer_embedding.device, torch.float32)


@register
class Polyhistor(Method[PolyhistorConfig, PolyhistorAdapter]):
    """One network that writes the bottlenecks of all tasks and layers."""

    name = "polyhistor"
    config_cls, adapter_cls = PolyhistorConfig, PolyhistorAdapter
    summary = "one network writes the bottleneck adapters of several tasks; an embedding per task"
    paper = (
        "Liu et al. 2022, Polyhistor: Parameter-Efficient Multi-Task Adaptation for Dense Vision "
        "Tasks, NeurIPS, arXiv:2210.03265"
    )
    need = "several tasks"
    recommended = "a row of the batch names its task; a further task costs one embedding"
    takes_task_ids = True
    lr = 1e-4  # a step moves each generated weight by up to code_dim steps of a generator's weight
    lacks = {
        Capability.MERGE: (
            "Polyhistor's adapters are not linear and cannot be merged; keep the adapter, or take "
            "one task as a plain adapter with petl.methods.polyhistor.export_task(model, task)"
        ),
        Capability.RANKS: "one network writes the adapters of all layers",
    }

    def targets(self, c: WrapContext[PolyhistorConfig]) -> list[Target]:
        """The ends of sub-layers, or whole blocks."""
        return sublayer_targets(c, sublayer_places(c))

    def shared(self, c: WrapContext[PolyhistorConfig]) -> nn.Module | None:
        """The generators of an adapter."""
        return Generators(c.config, min(shape.out_features for shape in c.shapes.values()))

    @torch.no_grad()
    def heat_maps(self, t: TrainContext[PolyhistorConfig, PolyhistorAdapter]) -> list[HeatMap]:
        """The size of each task's networks, by layer."""
        placed = dict(t.active[0].adapters) if t.active else {}
        if not placed:
            return []
        tasks = t.active[0].config.tasks
        columns = list(dict.fromkeys(layers_of(t.model, placed).values()))
        roles = list(dict.fromkeys(role_of(t.model, key) for key in placed))
        cells: dict[tuple[str, str, str], float] = {}
        for key, adapter in placed.items():
            place = role_of(t.model, key), layers_of(t.model, placed)[key]
            for i, task in enumerate(tasks):
                down, up = adapter.matrices(i)
                cells[task, *place] = float((up @ down).norm()) / adapter.width**0.5
        rows = [(task, role) for role in roles for task in tasks]
        labels = [task if len(roles) == 1 else f"{task}: {role}" for task, role in rows]
        return [
            HeatMap(
                "update_norm",
                "Size of each task's adapters",
                "norm of up x down",
                labels,
                columns,
                [[cells.get((*row, column)) for column in columns] for row in rows],
                "The Frobenius norm of the product of the two projections that the network writes "
                "for a task and a layer, over the root of the width. Rows that differ show that "
                "tasks are told apart.",
                "task",
            )
        ]


@torch.no_grad()
def export_task(
    model: nn.Module, task: str, adapter_name: str | None = None
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Return one task as method `adapter`: its fields, and tensors by module path.

    `petl.wrap(base, "adapter", **fields)`, with the tensors copied into its adapters, computes what
    the model computes for rows of the task. What trains in full beside the adapters, such as a head
    and layer norms (`modules_to_save`), is not among the tensors: copy it from the model.

    Args:
        model: a PeftModel of this method.
        task: one of its config's `tasks`.
        adapter_name: of the adapter; None: the active one.

    Raises:
        UnknownNameError: no such task or adapter.
    """
    tuner: Any = getattr(model, "base_model", None)
    is_ours = isinstance(tuner, AdapterTuner) and isinstance(tuner.method, Polyhistor)
    require(is_ours, f"{type(model).__name__} has no Polyhistor adapter")
    name = tuner.active_adapters[0] if adapter_name is None else adapter_name
    if name not in tuner.placed:
        raise UnknownNameError(f"no adapter {name!r}" + did_you_mean(name, tuner.placed))
    config: PolyhistorConfig = tuner.peft_config[name]
    if task not in config.tasks:
        raise UnknownNameError(f"no task {task!r}" + did_you_mean(task, config.tasks))
    adapters = cast(Mapping[str, PolyhistorAdapter], tuner.placed[name])
    names = ("down_weight", "down_bias", "up_weight", "up_bias")
    names += ("norm_after_weight", "norm_after_bias")
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, adapter in adapters.items():
        weights = adapter.generated((config.tasks.index(task),), torch.float32).first()
        made = zip(names, weights, strict=True)
        tensors[key] = {n: tensor.clone() for n, tensor in made if tensor is not None}
        if config.scaling == "learned":
            tensors[key]["scale"] = adapter.scale.detach().clone()
    fields = {
        "target_modules": sorted(adapters),
        "rank_pattern": {key: adapter.bottleneck for key, adapter in adapters.items()},
        "ln_after": config.post_norm,
    }
    same = ("placement", "residual", "non_linearity", "scaling", "bneck_dropout", "use_bias")
    fields |= {field: getattr(config, field) for field in (*same, "input_modules")}
    return fields, tensors
