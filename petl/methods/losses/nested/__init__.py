"""Nested widths: one training of an adapter whose first k components work alone, for each k.

The largest width of a step teaches a smaller one, drawn at random, as in Aich, Schulter,
Roy-Chowdhury, Chandraker and Suh 2023, "Efficient Controllable Multi-Task Architectures", ICCV
(arXiv:2308.11744); kin are Matryoshka representations (arXiv:2205.13147) and DyLoRA
(arXiv:2210.07558), which draws one rank a step and never trains the full one beside it. The
authors have no code for adapters: this is our reading.

    config.py    the fields
    passes.py    the pass of the smaller width: its rows, and what of it is compared
    run.py       the scores of a run at each width

Shapes: R rows, W width of the adapter, k a smaller one, V classes, N positions that count.

    loss = L_W(R rows) + weight * L_k(rows') + distill * D_k(rows'),  rows' the first ceil(share R)

L is the model's own loss, the mean over the items of rows'. D_k is the mean over the positions that
count (by labels, else by the attention mask) of KL(p_W || p_k), without a gradient through p_W; or
of the mean square of the logits' difference; or, of features, the mean over blocks and positions of
|y_k - y_W|^2 / |y_W|^2. The smaller width runs first, in a pass of its own whose random numbers
leave the state alone, so that the full width computes as in training without the term. Its
gradient enters in the backward pass of the full one, at the output of the last block, whatever loss
is computed from the outputs; `outputs.loss` shows the value.

k is drawn by a generator of the seed and the optimizer step alone: it is the same in all processes
and micro-batches of a step, and nothing is stored to resume. The seed is torch's at the first
training forward; the step is that of `petl.lifecycle`, and without one it is counted by the writes
to the first tensor that trains.

Departure from the method's plan: the rows of the smaller width do not ride in the pass of the full
one, so that the base's weights are read twice.
"""

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from petl.core.adapter_widths.cuts import step_of
from petl.core.adapter_widths.record import Nested, remember
from petl.core.adapter_widths.switch import Narrowed, active_name, widths_of
from petl.core.layers.context import ForwardContext
from petl.core.losses import extra_losses, loss_list, register_loss
from petl.core.model.heat_map import HeatMap
from petl.core.model.modes import checkpoints_reentrantly, has_enabled_adapter
from petl.core.model.structure import blocks
from petl.core.support import Capability
from petl.efficiency.segment_loss import SegmentLoss
from petl.errors import InputError, UnsupportedError
from petl.methods.losses.nested.config import NestedConfig
from petl.methods.losses.nested.passes import SmallPass, inputs_of, no_classes, outputs_in
from petl.ops import Ctx
from petl.system.collectives import made_by

__all__ = ["NestedConfig", "NestedWidths"]

logger = logging.getLogger(__name__)
ONE_PASS = "rows of a smaller width run in a pass of their own"


def comparing_logits(config: NestedConfig) -> str:
    """Why all logits must be kept; "": it compares none."""
    if config.distill and config.distance != "features":
        return "it compares logits, of which segments keep none"
    return ""


@register_loss(
    "nested",
    summary="trains an adapter whose first k components work alone, for each k of a list",
    paper="Aich et al. 2023, Efficient Controllable Multi-Task Architectures, ICCV, "
    "arXiv:2308.11744",
    features=("petl.methods.losses.nested.run:WidthScores",),
    charts=(
        ("nested_loss", "Loss of a smaller width", "loss of the width of the step"),
        ("nested_distill", "Distance of a smaller width", "distance to the full width"),
    ),
)
class NestedWidths:
    """The term of a smaller width of a PeftModel, available as `model.nesting`.

    Attributes:
        widths: rising, the last is that of the adapter.
        width: k of the last training forward; None before it.
        values: `nested_loss` and `nested_distill` of that, unweighted and detached; only those with
            a weight, the first only with labels.

    Raises:
        InputError: the widths do not fit the adapter, the model has no blocks, or another extra
            loss.
        UnsupportedError: the components of the adapter have no order.
    """

    config_cls = NestedConfig
    lacks = {
        Capability.FSDP: "each process has parts of the components; use DDP",
        Capability.FSDP1: "each process has parts of the components; use DDP",
        Capability.ZERO: "each process has parts of the components; use DDP",
        Capability.REENTRANT: (
            "the smaller width would be repeated as the full one; set "
            "train.gradient_checkpointing=true"
        ),
        Capability.COMPILE: "it exchanges tensors between two passes",
        Capability.SEGMENTS: comparing_logits,
        Capability.SKIP: "the last block computes other positions of fewer rows",
        Capability.STORE: ONE_PASS,
        Capability.TOGETHER: "jobs and widths would both be rows of one pass",
        Capability.PROMPTS: "tokens or attention that it adds have no components",
    }

    def __init__(self, model: PeftModel, config: NestedConfig) -> None:
        if extra_losses(model):
            raise InputError(
                f"{type(model).__name__} already has the extra loss "
                f"{extra_losses(model)[0].config.name}; nested stands alone: remove() it first"
            )
        base: Any = model.get_base_model()
        self.check(base, config)
        self.model, self.base, self.config = model, base, config
        self.name = active_name(model)
        full = max(widths_of(model, self.name).values(), default=0)
        self.widths = config.widths_of(full, step_of(model.peft_config[self.name]))
        # before training: each of them is possible
        self.narrowed = {k: Narrowed(model, self.name, k, config.scale) for k in self.widths[:-1]}
        if comparing_logits(config):
            SegmentLoss().undo(model)
        paths = [path for path, _ in blocks(base)]
        self.compared = paths if config.distill and config.distance == "features" else []
        self.context = ForwardContext()
        self.small: SmallPass | None = None
        self.features: dict[str, Tensor] = {}  # of the full width, by block
        self.slopes: list[Tensor] = []
        self.is_joined = self.said = False
        self.width: int | None = None
        self.values: dict[str, Tensor] = {}
        self.seed: int | None = None
        self.counted, self.version = 0, -1
        self.hooks = [
            base.register_forward_pre_hook(self._begin, with_kwargs=True),
            *(
                base.get_submodule(path).register_forward_hook(partial(self._block, path))
                for path in dict.fromkeys([*self.compared, paths[-1]])
            ),
            base.register_forward_hook(self._end, with_kwargs=True),
        ]
        self.last = paths[-1]
        remember(model, self.name, Nested(tuple(self.widths), config.scale))
        # an instance attribute: PeftModel looks up unknown attributes in the base model
        model.__dict__["nesting"] = self
        loss_list(model).append(self)

    @staticmethod
    def check(model: nn.Module, config: NestedConfig) -> None:
        """Raise InputError unless a base model can have the term."""
        if not any(True for _ in blocks(model)):
            raise InputError(
                f"{type(model).__name__} has no transformer blocks, at whose last the widths join"
            )
        reason = no_classes(model)
        if config.distill and config.distance == "kl" and reason:
            raise InputError(
                f"distance=kl compares probabilities of classes, and {reason}; set distance=mse"
            )

    def remove(self) -> None:
        """Remove the term from the model; the adapter stays nested."""
        for handle in self.hooks:
            handle.remove()
        loss_list(self.model).remove(self)
        del self.model.__dict__["nesting"]

    # For the lifecycle

    def prepare(self, batches: Iterable[object]) -> None:
        """Do nothing: the term needs no data before training."""

    def series(self) -> dict[str, float]:
        """`nested_loss` and `nested_distill` of the last training forward, unweighted."""
        return {name: float(value) for name, value in self.values.items()}

    def report(self, batches: Iterable[object]) -> dict[str, float]:
        """No metrics: a run has the scores of each width, see run.py."""
        return {}

    def heat_maps(self) -> list[HeatMap]:
        """No maps."""
        return []

    # A training forward

    def draw(self, step: int) -> int:
        """Return the smaller width of an optimizer step, counted from 0."""
        return random.Random(f"{self.seed} {step}").choice(self.widths[:-1])

    def _step(self) -> int:
        if self.context.step is not None:
            return self.context.step
        trained = next((p for p in self.model.parameters() if p.requires_grad), None)
        version = -1 if trained is None else trained._version
        # an optimizer writes to it once a step, and nothing else does in training
        self.counted += self.version not in (-1, version)
        self.version = version
        return self.counted

    @torch.compiler.disable
    def _begin(
        self, model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> None:
        """Forward pre-hook of the base model: in a training forward, run the smaller width."""
        self.context.begin(model, args, kwargs)
        # what an aborted forward pass left
        self.small, self.features, self.is_joined = None, {}, False
        if not self.context.recording:
            return
        self.values = {}
        if not has_enabled_adapter(self.base) or self.name not in self.model.active_adapters:
            return
        if checkpoints_reentrantly(self.base):
            raise UnsupportedError(
                f"nested cannot repeat a smaller width of {type(self.base).__name__} under "
                "reentrant checkpointing; pass gradient_checkpointing_kwargs="
                "{'use_reentrant': False}"
            )
        if self.seed is None:
            self.seed = made_by(0, torch.initial_seed)
        self.width = self.draw(self._step())
        inputs = inputs_of(self.base, args, kwargs, self.config.share)
        if inputs.get("labels") is None and self.config.weight:
            self._say_unlabelled()
        narrowed, config = self.narrowed[self.width], self.config
        self.small = SmallPass(self.model, narrowed, inputs, config, self.compared)

    def _say_unlabelled(self) -> None:
        """Say once that there is no loss of a smaller width.

        Raises:
            UnsupportedError: then there is no term.
        """
        what = "a training forward has no labels, so that a smaller width has no loss of its own"
        if not self.config.distill:
            raise UnsupportedError(f"{what}, and distill=0: set distill above 0")
        if not self.said:
            self.said = True
            logger.warning("%s: it has its distance to the full one alone", what)

    @torch.compiler.disable
    def _block(self, path: str, module: nn.Module, args: object, output: Any) -> object:
        """Forward hook of a block: keep its output; join the widths at the last one."""
        # neither the pass of the smaller width, nor one that checkpointing repeats
        if self.small is None or not self.context.recording:
            return None
        y = output[0] if isinstance(output, tuple) else output
        if path in self.compared:
            self.features[path] = y[: self.small.rows]
        if path != self.last or self.is_joined or not self.small.joined:
            return None
        self.is_joined, self.slopes = True, []
        y = _Join.apply(y, self.slopes, *self.small.joined)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    @torch.compiler.disable
    def _end(
        self, model: nn.Module, args: object, kwargs: Mapping[str, object], output: object
    ) -> object:
        """Forward hook of the base model: compare the widths, and add the value to the loss."""
        small, context, config = self.small, self.context, self.config
        if not context.recording or small is None:
            return context.end(model, args, kwargs, output)
        if small.joined and not self.is_joined:
            context.recording = False
            raise UnsupportedError(
                f"{self.last}, at whose output the widths join, was not called in this pass of "
                f"{type(self.base).__name__}; leave out what skips blocks"
            )
        total, slopes = torch.zeros(()), []
        if small.loss is not None:
            self.values["nested_loss"] = small.loss.detach()
            total = config.weight * small.loss.detach()
            slopes = [torch.full_like(total, config.weight)]
        if config.distill:
            value, by_part = small.compare(self._parts(output))
            self.values["nested_distill"] = value
            total = total.to(value.device) + config.distill * value
            slopes += [config.distill * slope for slope in by_part]
        assert context.scale is not None
        outputs = [*small.parts] if small.loss is None else [small.loss, *small.parts]
        self.slopes += [
            slope * context.scale.to(slope)
            for slope, y in zip(slopes, outputs, strict=True)
            if y.requires_grad
        ]
        context.record("nested", total)
        self.small, self.features = None, {}
        return context.end(model, args, kwargs, output)

    def _parts(self, output: object) -> list[Tensor]:
        """What the full width has in the place of the parts of the smaller one."""
        assert self.small is not None
        if self.compared:
            return [self.features[path] for path in self.small.features]
        y = outputs_in(output, self.base)[: self.small.rows]
        if self.config.distance == "kl" and y.shape[-1] == 1:
            self.context.recording = False
            raise UnsupportedError(
                f"distance=kl compares probabilities of classes, and {type(self.base).__name__} "
                "returns one number; set distance=mse"
            )
        return [y]


class _Join(torch.autograd.Function):
    """Identity on `y`, whose backward gives outputs of another pass the gradients `slopes`.

    They are filled in at the end of the forward pass. An attribute, not saved tensors: those that
    checkpointing repeats must be as many, and it repeats the block without the other pass.
    """

    @staticmethod
    def forward(ctx: Ctx, y: Tensor, slopes: list[Tensor], *outputs: Tensor) -> Tensor:
        ctx.slopes = slopes
        return y.detach()  # no view: models may change it

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, *ctx.slopes
