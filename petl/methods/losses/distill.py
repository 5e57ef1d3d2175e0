"""Self-distillation: a term that keeps a model close to itself without its adapter.

Guo, Wang, Kankanhalli 2024, "PELA: Learning Parameter-Efficient Models with Low-Rank
Approximation", CVPR (arXiv:2310.10700), which trains low-rank layers with the original model as
teacher. Here the teacher is the model with its adapters disabled, in evaluation mode, without
gradients; it needs no second copy of the weights, and any method can be the student.

Shapes: B rows, T tokens, D width, V classes, N positions (B T of a language model, else B).

    term = feature_weight * mean over blocks of MSE(student's output, teacher's output)
           + logit_weight * (MSE of the logits, or temperature^2 KL(teacher || student))

Every block counts equally, as do all positions, padding included. The gradient is added to the
outputs of the blocks and to the logits in the backward pass, in any trainer (see
`petl.core.layers.context`); `outputs.loss` includes the term's value for logging. For it one
difference is kept per block, in the dtype of the block's output.

Departures from the reference code (guoyang9/PELA): its weight of the features multiplies the mean
over all blocks and stages, as here, but its teacher is a second model, and its task loss may be
scaled down; here the task loss stays as it is.
"""

import inspect
import logging
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from petl.core.compat import AuxiliaryTrainingWrapper
from petl.core.layers.class_swap import original_class
from petl.core.layers.context import ForwardContext, is_encoder_decoder
from petl.core.losses import LossConfig, extra_losses, loss_list, register_loss
from petl.core.model.heat_map import HeatMap
from petl.core.model.modes import (
    checkpoints_reentrantly,
    evaluation_mode,
    has_enabled_adapter,
    without_adapters,
)
from petl.core.model.structure import blocks
from petl.core.registry import METHODS
from petl.core.spec.config import config_field, require
from petl.core.support import Capability
from petl.core.types import Arguments, Batch
from petl.efficiency.segment_loss import SegmentLoss
from petl.errors import InputError, UnsupportedError, choose
from petl.ops import Ctx

__all__ = ["DistillConfig", "Distillation"]

LOGITS = ("mse", "kl")
NEARBY = 1000  # nodes of the graph of a loss among which its logits are looked for
logger = logging.getLogger(__name__)


@dataclass
class DistillConfig(LossConfig):
    """Fields of the distillation term: what is compared, and the weights."""

    feature_weight: float = config_field(
        "weight of the mean squared difference of the blocks' outputs, at least 0", 1.0, ge=0
    )
    logit_weight: float = config_field(
        "weight of the difference of the logits, at least 0", 0.0, ge=0
    )
    logits: str = config_field(
        "difference of the logits: mse (mean square), or kl (temperature^2 times the divergence "
        "of the student's probabilities from the teacher's)",
        "mse",
        choices=LOGITS,
        acts=("logit_weight above 0", lambda config: config.logit_weight > 0),
    )
    temperature: float = config_field(
        "divisor of the logits in kl, above 0",
        1.0,
        gt=0,
        acts=("logits=kl", lambda config: config.logits == "kl"),
    )
    layers: list[int] | None = config_field(
        "indices of the blocks whose outputs are compared, from 0, the encoder's first; null: all",
        None,
    )

    def check(self) -> None:
        # `method` belongs to petl.wrap(model, "distill")
        choose(METHODS, self.method, "method")
        require(
            self.feature_weight > 0 or self.logit_weight > 0,
            "feature_weight=0 and logit_weight=0 leave no term; set one of them above 0",
        )
        if self.layers is None:
            return
        require(bool(self.layers), "layers=[] names no block; pass indices, or null for all blocks")
        wrong = [i for i in self.layers if not isinstance(i, int) or isinstance(i, bool) or i < 0]
        require(
            not wrong and len({*self.layers}) == len(self.layers),
            f"layers={self.layers} is no list of distinct indices from 0",
        )


# why its teacher is not the pretrained model
NO_TEACHER = (
    "its teacher is the pretrained model, and this adapter changes weights of the base (an "
    "initialization such as corda or pissa, or trained biases); choose another initialization, or "
    "bias='none'"
)


def reading_blocks_alone(config: DistillConfig) -> str:
    """Why it has no effect where only a head trains; "": it compares logits too."""
    return "" if config.logit_weight else "it compares blocks, and the head behind them trains"


def comparing_logits(config: DistillConfig) -> str:
    """Why all logits must be kept; "": it compares none."""
    return "it compares logits, of which segments keep none" if config.logit_weight else ""


@register_loss(
    "distill",
    summary="keeps the blocks' outputs, or the logits, near those without the adapter",
    paper="Guo et al. 2024, PELA: Learning Parameter-Efficient Models with Low-Rank Approximation, "
    "CVPR, arXiv:2310.10700",
    charts=(
        ("distill_features", "Distance of the blocks' outputs", "mean square, to the teacher's"),
        ("distill_logits", "Distance of the logits", "difference from the teacher's"),
    ),
)
class Distillation:
    """The distillation term of a PeftModel, available as `model.distillation`.

    Attributes:
        values: by name (`distill_features`, `distill_logits`), the unweighted terms of the last
            training forward, detached; only those with a weight.
        distances: by index of a block, the distance of its output from the teacher's relative to
            the norm of the teacher's, in the last training forward.

    Raises:
        InputError: the model has no such blocks, or has the term already.
        UnsupportedError: the model without its adapter is not the pretrained one.
    """

    config_cls = DistillConfig
    lacks = {
        # whether hooks of a block run inside its checkpoint, without a graph, depends on the model
        Capability.REENTRANT: (
            "the first pass of a block may have no graph to add to; set "
            "train.gradient_checkpointing=true"
        ),
        Capability.NEW_HEAD: reading_blocks_alone,
        Capability.SEGMENTS: comparing_logits,
        Capability.PROMPTS: (
            "tokens or attention that it adds cannot be left out for the teacher; choose a method "
            "with adapters in layers, such as lora"
        ),
        Capability.CHANGED_BASE: NO_TEACHER,
        Capability.BIASES: NO_TEACHER,
    }

    def __init__(self, model: PeftModel, config: DistillConfig) -> None:
        if any(isinstance(part, Distillation) for part in extra_losses(model)):
            raise InputError(
                f"{type(model).__name__} already has a distillation term; call "
                "model.distillation.remove() first"
            )
        # hooks on the base model: PEFT's own forward is not called for all task types
        base = model.get_base_model()
        self.model, self.base, self.config = model, base, config
        self.blocks = chosen_blocks(base, config)
        if comparing_logits(config):
            SegmentLoss().undo(model)
        unswapped: Any = original_class(base)
        self.parameters = frozenset(inspect.signature(unswapped.forward).parameters)
        self.context = ForwardContext()
        self.is_teaching = False
        self.features: dict[int, list[Tensor]] = {}  # of the teacher, by block, one per call
        self.calls: dict[int, int] = {}  # of the teacher's blocks
        self.teacher_logits: Tensor | None = None
        self.terms: list[Tensor] = []
        self.has_gradient = self.checked_graph = False
        self.values: dict[str, Tensor] = {}
        self.distances: dict[int, Tensor] = {}
        self.hooks = [
            base.register_forward_pre_hook(self._begin, with_kwargs=True),
            *(
                base.get_submodule(path).register_forward_hook(partial(self._compare, index))
                for index, path in self.blocks.items()
            ),
            base.register_forward_hook(self._end, with_kwargs=True),
        ]
        # an instance attribute: PeftModel looks up unknown attributes in the base model
        model.__dict__["distillation"] = self
        loss_list(model).append(self)

    @staticmethod
    def check(model: nn.Module, config: DistillConfig) -> None:
        """Raise InputError unless a base model and the method of `config` can have the term."""
        chosen_blocks(model, config)

    def remove(self) -> None:
        """Remove the term from the model."""
        for handle in self.hooks:
            handle.remove()
        loss_list(self.model).remove(self)
        del self.model.__dict__["distillation"]

    # For the lifecycle

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Do nothing: the term needs no data before training."""

    def series(self) -> dict[str, float]:
        """`distill_features` and `distill_logits` of the last training forward, unweighted."""
        return {name: float(value) for name, value in self.values.items()}

    def report(self, batches: Iterable[Batch]) -> dict[str, float]:
        """No metrics: the log has the term."""
        return {}

    def heat_maps(self) -> list[HeatMap]:
        """The distance of each block's output from the teacher's in the last training forward."""
        if not self.distances:
            return []
        percent = {i: 100 * float(distance) for i, distance in self.distances.items()}
        return [
            HeatMap(
                "distillation",
                "Distance from the model without its adapter",
                "% of the teacher's norm",
                ["output"],
                list(map(str, percent)),
                [list(percent.values())],
                "How far the output of each block is from that of the same block without the "
                "adapter, in the last training batch.",
                "block",
                "index of the block, from 0",
            )
        ]

    # The teacher

    @torch.compiler.disable
    def _begin(self, model: nn.Module, args: object, kwargs: Mapping[str, object]) -> None:
        """Forward pre-hook of the base model: in a training forward, run the teacher."""
        self.context.begin(model, args, kwargs)
        # what an aborted forward pass left
        self.features, self.calls, self.teacher_logits = {}, {}, None
        if not self.context.recording:
            return
        self.terms, self.values, self.distances, self.has_gradient = [], {}, {}, False
        if not has_enabled_adapter(self.base):
            return
        if self.blocks and checkpoints_reentrantly(self.base):
            raise UnsupportedError(
                f"distill cannot add its gradient to the blocks of {type(self.base).__name__} "
                "under reentrant checkpointing; pass gradient_checkpointing_kwargs="
                "{'use_reentrant': False}"
            )
        self._run_teacher(args, kwargs)

    def _run_teacher(self, args: Any, kwargs: Mapping[str, object]) -> None:
        if kwargs.get("past_key_values") is not None:
            raise UnsupportedError(
                "distill runs the model twice on each batch, which would extend past_key_values "
                "twice; leave them out of training"
            )
        self.features = {index: [] for index in self.blocks}
        self.is_teaching = True
        try:
            with torch.no_grad(), teaching(self.base):
                # not by a call: hooks of the base model, with which the contexts of method and
                # losses follow forward passes, are for the student
                output = self.base.forward(*args, **self._teacher_inputs(kwargs))
        finally:
            self.is_teaching = False
        self.calls = {index: len(found) for index, found in self.features.items() if found}
        if self.blocks and not self.calls:
            raise UnsupportedError(
                f"none of the blocks was called by {type(self.base).__name__}, so their outputs "
                "cannot be compared; set feature_weight=0 and logit_weight above 0"
            )
        if self.config.logit_weight > 0:
            self.teacher_logits = logits_of(output, self.base)

    def _teacher_inputs(self, kwargs: Mapping[str, object]) -> Arguments:
        """The keyword arguments of the teacher: without what only its loss needs."""
        inputs = dict(kwargs)
        if "use_cache" in self.parameters:
            inputs["use_cache"] = False
        # an encoder-decoder makes inputs of its labels
        if "logits_to_keep" in self.parameters and not is_encoder_decoder(self.base):
            inputs["labels"] = None
            if self.config.logit_weight == 0:
                inputs["logits_to_keep"] = 1  # 0 means all positions
        return inputs

    # The student

    @torch.compiler.disable
    def _compare(self, index: int, module: nn.Module, args: object, output: Any) -> object:
        """Forward hook of a block: keep the teacher's output, add the gradient to the student's."""
        y = output[0] if isinstance(output, tuple) else output
        if self.is_teaching:
            self.features[index].append(y)
            return None
        # a pass that checkpointing repeats has no nodes to add: they save nothing
        if not self.context.recording or not self.calls:
            return None
        if not self.features.get(index):
            raise UnsupportedError(
                f"{self.blocks[index]} was called more often in training than in evaluation, so "
                "its outputs cannot be compared; leave it out of layers"
            )
        teacher = self.features[index].pop(0)
        require_same_shape(y, teacher, f"the output of {self.blocks[index]}")
        y = self._pulled(y, teacher, index)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def _pulled(self, y: Tensor, teacher: Tensor, index: int) -> Tensor:
        """Return a block's output `y`; its backward pass adds the gradient of the block's MSE."""
        difference = difference_of(y, teacher)
        square = difference.square().mean()
        norm = teacher.to(difference.dtype).square().mean()
        self.distances[index] = (square / norm.clamp(min=torch.finfo(norm.dtype).tiny)).sqrt()
        weight = 1 / (len(self.calls) * self.calls[index])
        self.terms.append(square * weight)
        if not (torch.is_grad_enabled() and y.requires_grad):
            return y
        self.has_gradient = True
        assert self.context.scale is not None
        factor = self.context.scale * (2 * weight * self.config.feature_weight / y.numel())
        return _AddSlope.apply(y, difference.to(y.dtype), factor.to(y.device))

    @torch.compiler.disable
    def _end(
        self, model: nn.Module, args: object, kwargs: Mapping[str, object], output: object
    ) -> object:
        """Forward hook of the base model: compare the logits, add the value to the loss."""
        context, config = self.context, self.config
        is_on = bool(self.calls) or self.teacher_logits is not None
        if not context.recording or not is_on:
            return context.end(model, args, kwargs, output)
        total = torch.zeros(())
        if self.blocks:
            found = [term.to(self.terms[0].device) for term in self.terms]
            # none: the student skipped all blocks, as layer drop may
            features = torch.stack(found).sum() if found else total
            self.values["distill_features"] = features
            total = config.feature_weight * features
        if self.teacher_logits is not None:
            value = self._compare_logits(output, self.teacher_logits)
            self.values["distill_logits"] = value
            total = total.to(value.device) + config.logit_weight * value
        self.features, self.teacher_logits = {}, None
        if not self.has_gradient:
            context.recording = False
            raise UnsupportedError(
                f"nothing that distill compares depends on what trains: the adapter is above "
                f"layers={list(self.blocks)}; choose other blocks, or logit_weight above 0"
            )
        # for logging: the gradient is added in the backward pass
        context.record("distill", total)
        return context.end(model, args, kwargs, output)

    def _compare_logits(self, output: object, teacher: Tensor) -> Tensor:
        """The difference of the logits; their backward pass adds its gradient."""
        y = logits_of(output, self.base)
        require_same_shape(y, teacher, "the logits")
        if self.config.logits == "mse":
            slope = difference_of(y, teacher)
            value, factor = slope.square().mean(), 2 / y.numel()
        else:
            T = self.config.temperature
            value, slope = divergence(y.detach(), teacher, T)
            factor = T * y.shape[-1] / y.numel()  # T^2 / N, times 1 / T of the slope
        if y.requires_grad:
            self.has_gradient = True
            self._check_graph(output, y)
            assert self.context.scale is not None
            scale = self.context.scale * (factor * self.config.logit_weight)
            # a hook, since the loss has been computed from these logits already
            y.register_hook(partial(plus_slope, slope.to(y.dtype), scale.to(y.device)))
        return value

    def _check_graph(self, output: Any, logits: Tensor) -> None:
        """Raise UnsupportedError unless the loss depends on the logits; once a model."""
        loss = output.get("loss")
        if self.checked_graph or loss is None or not loss.requires_grad:
            return
        if not depends_on(loss, logits):
            raise UnsupportedError(
                f"the loss of {type(self.base).__name__} is not computed from the logits that it "
                "returns, so distill cannot add its gradient; set logit_weight=0"
            )
        self.checked_graph = True


class _AddSlope(torch.autograd.Function):
    """Identity on `y` whose backward adds `factor * slope` to the gradient.

    The slope is an attribute, not a saved tensor: checkpointing would compute it again, without the
    teacher.
    """

    @staticmethod
    def forward(ctx: Ctx, y: Tensor, slope: Tensor, factor: Tensor) -> Tensor:
        ctx.slope, ctx.factor = slope, factor
        # a new tensor, so that autograd calls this node's backward; no view: models may change it
        return y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return plus_slope(ctx.slope, ctx.factor, grad), None, None


def plus_slope(slope: Tensor, factor: Tensor, grad: Tensor) -> Tensor:
    """The gradient plus `factor * slope`; the product is formed in float32 at least."""
    return grad + (slope.to(wide(slope)) * factor).to(grad.dtype)


def wide(tensor: Tensor) -> torch.dtype:
    """Float32, or float64 if the tensor has that."""
    return torch.promote_types(tensor.dtype, torch.float32)


def difference_of(y: Tensor, teacher: Tensor) -> Tensor:
    """The student's values minus the teacher's, detached, in float32 at least."""
    return y.detach().to(wide(y)) - teacher.to(wide(y))


def divergence(y: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The value of `T^2 KL(teacher || student)`, mean over positions, and `p_student - p_teacher`.

    Args:
        y: logits of the student, [..., V].
        teacher: those of the teacher, [..., V].
        temperature: T, divisor of both.
    """
    log_p = (teacher.to(wide(y)) / temperature).log_softmax(-1)
    log_q = (y.to(wide(y)) / temperature).log_softmax(-1)
    p = log_p.exp()
    value = temperature**2 * (p * (log_p - log_q)).sum(-1).mean()
    return value, log_q.exp() - p


def chosen_blocks(model: nn.Module, config: DistillConfig) -> dict[int, str]:
    """The paths of the compared blocks by index; empty if their outputs have no weight.

    Raises:
        InputError: there are none, or not so many.
        UnsupportedError: a module of `modules_to_save` is in one of them.
    """
    if config.feature_weight == 0:
        return {}
    paths = [path for path, _ in blocks(model)]
    require(
        bool(paths),
        f"{type(model).__name__} has no transformer blocks whose outputs could be compared; set "
        "feature_weight=0 and logit_weight above 0",
    )
    wanted = range(len(paths)) if config.layers is None else sorted(config.layers)
    for index in wanted:
        require(
            index < len(paths),
            f"layers={config.layers}: {index} is not in 0..{len(paths) - 1}, the blocks of "
            f"{type(model).__name__}",
        )
    chosen = {index: paths[index] for index in wanted}
    inside = tuple(f"{path}." for path in chosen.values())
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and name.startswith(inside):
            raise UnsupportedError(
                f"modules_to_save has {name}, inside a block that distill compares: the teacher "
                "has another one; leave its block out of layers, or the module out of "
                "modules_to_save"
            )
    return chosen


@contextmanager
def teaching(model: nn.Module) -> Generator[None]:
    """Inside the block the model is the teacher; what it draws leaves the random state alone."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng([*devices]), evaluation_mode(model), without_adapters(model):
        yield


def logits_of(output: object, model: nn.Module) -> Tensor:
    """The logits in a model's output.

    Raises:
        UnsupportedError: there are none.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else None
    if not isinstance(logits, Tensor):
        raise UnsupportedError(
            f"{type(model).__name__} returned no logits in a dictionary, which logit_weight above "
            "0 needs; set logit_weight=0, or return_dict=True"
        )
    return logits


def require_same_shape(y: Tensor, teacher: Tensor, what: str) -> None:
    """Raise UnsupportedError if student and teacher differ in shape."""
    if y.shape != teacher.shape:
        raise UnsupportedError(
            f"{what} has shape {list(y.shape)} with the adapter and {list(teacher.shape)} without "
            "it, so they cannot be compared; choose other layers, or only logits"
        )


def depends_on(loss: Tensor, logits: Tensor) -> bool:
    """True if the graph of a loss has the node of the logits, near the loss."""
    nodes, seen = [loss.grad_fn], set()
    while nodes and len(seen) < NEARBY:
        node = nodes.pop(0)
        if node is logits.grad_fn:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    return False
