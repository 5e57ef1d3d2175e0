"""The first steps of a training: gradients, calls, weights of micro-batches, changed tensors."""

import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from petl.core.compat import BaseTunerLayer
from petl.core.parameters import trainable
from petl.core.tuners.gradients import (
    FEW,
    REMEDY,
    AbsentGradients,
    GradientCheck,
    has_rate,
    kinds_of,
    stepped,
    watch_steps,
)
from petl.data.tasks.base import IGNORED
from petl.errors import InputError
from petl.training.watch.batches import Row, rows_of
from petl.training.watch.findings import Findings
from petl.training.watch.model import inspect_base, inspect_modes

UNEQUAL = 0.01  # share by which the weights of tokens may differ
PIECE = 256  # positions whose logits are read at a time
AT_ONCE = 2**20  # values of a tensor that are read at a time
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


@dataclass
class MicroBatch:
    """The loss of a micro-batch, and what it is the mean of.

    Attributes:
        loss: as the model returned it.
        sums: of the losses of tokens, with their number: labels shifted, and as they are.
        total: tokens that the loss is divided by, if the model was told; else None.
        weight: of this loss in the gradient.
    """

    loss: float
    sums: list[tuple[float, int]]
    total: float | None
    weight: float = 0.0


class Steps:
    """Watches the first optimizer steps of a model.

    Hooks are removed after the first complete step, but for the one of optimizers, which stays
    until all gradients are known: two steps, ten for experts.

    Args:
        looks: put hooks on modules; False: gradients and optimizer alone are watched.
        accumulates: a step may have several micro-batches.
        evaluates: the loop is not known, so that its first pass without gradients is waited for.
        when_first: called with the rows of the first step.
    """

    def __init__(
        self,
        model: nn.Module,
        findings: Findings,
        *,
        looks: bool = True,
        accumulates: bool = True,
        evaluates: bool = False,
        when_first: Callable[[list[Row]], None] = lambda rows: None,
    ) -> None:
        self.findings = findings
        self.accumulates, self.evaluates, self.when_first = accumulates, evaluates, when_first
        self.gradients = GradientCheck()
        self.looks = looks and _is_plain(model)
        self.layers = dict(_adapted(model)) if self.looks else {}
        self.called: set[str] = set()
        self.uncalled: set[str] = set()  # of `layers`, in the first step
        self.micro: list[MicroBatch] = []
        self.rows: list[Row] = []
        self.model = ref(model)  # `watch_steps` keeps this object as long as the model
        self.sums = checksums(dict(trainable(model)))
        self.unchanged: set[str] | None = None  # tensors that no step has changed
        self.has_moved = self.is_judged = False  # any tensor has changed; all is known of changes
        self.passes = 0  # in training, before the first step
        self.idle = 0  # steps that found no gradient and changed nothing
        self.has_rate, self.without_rate = False, 0  # a step with a learning rate; steps before it
        self.is_first, self.is_over = True, False
        self.of_layers: list[RemovableHandle] = [
            layer.register_forward_pre_hook(self._caller(name))
            for name, layer in self.layers.items()
        ]
        self.of_model: list[RemovableHandle] = []
        if self.looks:
            self.of_model.append(model.register_forward_hook(self._after_forward, with_kwargs=True))
        watch_steps(model, self._after_step)

    def close(self) -> None:
        """Remove all hooks; nothing is said of later steps."""
        self.is_over = True
        _remove(self.of_layers)
        _remove(self.of_model)

    # Passes

    def _caller(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: object) -> None:
            if torch.is_grad_enabled() and module.training:
                self.called.add(name)

        return note

    def _after_forward(self, model: nn.Module, args: object, kwargs: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            # a pass without labels may sample
            scores = self.evaluates and kwargs.get("labels") is not None
            inspect_modes(model, self.findings, "warning" if scores else None)
            self.findings.settle()
            if not self.is_first:
                _remove(self.of_model)
            return
        if not self.is_first:
            return
        self.passes += model.training
        loss = output.get("loss") if isinstance(output, Mapping) else None
        self.rows += rows_of(kwargs)
        if not self.accumulates or not isinstance(loss, Tensor) or not loss.requires_grad:
            return
        logits, labels = output.get("logits"), kwargs.get("labels")
        is_text = isinstance(logits, Tensor) and isinstance(labels, Tensor)
        if is_text and logits.dim() == 3 and logits.shape[:2] == labels.shape and not loss.dim():
            total = kwargs.get("num_items_in_batch")
            micro = MicroBatch(
                float(loss.detach()),
                [_token_losses(logits[:, :-1], labels[:, 1:]), _token_losses(logits, labels)],
                None if total is None else float(total),
            )
            loss.register_hook(lambda gradient: setattr(micro, "weight", float(gradient)))
            self.micro.append(micro)

    # Steps

    def _after_step(self, model: nn.Module, optimizer: Optimizer) -> bool:
        trained = {} if self.is_over else stepped(model, optimizer)
        # set while a GradScaler lets the optimizer itself skip a step
        skipped = getattr(optimizer, "found_inf", None)
        if not trained or (skipped is not None and bool(skipped)):
            return self.is_over
        findings = self.findings
        if self.is_first:
            self._after_first()
        inspect_base(model, trained, findings)
        # whole models have tensors that a task does not use
        severity = "error" if isinstance(model, PeftModel) else "warning"
        self._say_gradients(self.gradients.after_step(model, optimizer), severity)
        if not has_rate(optimizer):
            self.without_rate += not self.has_rate
        else:
            self.has_rate = True
            self._inspect_changes(trained, optimizer)
        try:
            findings.settle()
        except InputError:
            self.close()
            raise
        findings.is_early &= self.gradients.steps < FEW
        return self.gradients.is_over

    def _after_first(self) -> None:
        self.is_first = False
        self.uncalled = self.layers.keys() - self.called
        if self.called:
            self.findings.wants("input")
        _remove(self.of_layers)
        if not self.evaluates:
            _remove(self.of_model)
        if len(self.micro) > 1:
            inspect_weights(self.micro, self.findings)
        self.micro.clear()
        self.when_first(self.rows)
        self.rows = []

    def _say_gradients(self, absent: AbsentGradients | None, severity: str) -> None:
        findings = self.findings
        broken = {n for n, size in self.gradients.sizes.items() if not math.isfinite(size)}
        if self.gradients.steps >= FEW:
            findings.wants("gradient")
        if broken:
            findings.add(
                "gradient",
                "error",
                f"{len(broken)} gradients are not finite: {kinds_of(broken)}",
                "lower the learning rate, or train in bfloat16 instead of float16",
            )
        if absent is None:
            return
        idle = {n for n in absent.names if any(n.startswith(f"{m}.") for m in self.uncalled)}
        if idle:
            modules = {m for m in self.uncalled if any(n.startswith(f"{m}.") for n in idle)}
            findings.add(
                "input",
                "error",
                f"{len(modules)} adapted modules are never called, so their adapters do nothing: "
                f"{kinds_of(modules)}",
                REMEDY,
            )
        if absent.names - idle:
            rest = absent._replace(names=absent.names - idle)
            findings.add("gradient", severity, str(rest), REMEDY)

    def _inspect_changes(self, trained: dict[str, nn.Parameter], optimizer: Optimizer) -> None:
        """Check that steps change what they are to change, by more than rounding takes."""
        if self.is_judged:
            return
        now = checksums(trained)
        known = now.keys() & self.sums.keys()
        same = {name for name in known if now[name] == self.sums[name]}
        self.has_moved |= same != known
        if all(p.grad is None for p in trained.values()):
            self._count_idle(known, len(trained))
            return
        sizes = self.gradients.sizes
        rates = {
            id(p): float(group.get("lr") or 0)
            for group in optimizer.param_groups
            for p in group["params"]
        }
        due = {
            name
            for name in same & sizes.keys()
            if rates[id(trained[name])] * sizes[name]
            > 8 * torch.finfo(trained[name].dtype).eps * float(trained[name].detach().abs().max())
        }
        self.unchanged = due if self.unchanged is None else self.unchanged & due
        if self.gradients.steps < FEW or not (self.has_moved or self.unchanged):
            return
        self.is_judged = True
        self.findings.wants("optimizer")
        if self.unchanged:
            self.findings.add(
                "optimizer",
                "error",
                f"{len(self.unchanged)} of {len(trained)} trained tensors have the values of the "
                f"start after {self.gradients.steps} steps: {kinds_of(self.unchanged)}",
                "make the optimizer of the tensors that the model has now",
            )

    def _count_idle(self, known: Set[str], total: int) -> None:
        """Count a step without any gradient; an optimizer that frees them changes tensors."""
        if self.gradients.steps or self.has_moved or not known:
            return
        self.idle += 1
        if self.idle == FEW:
            self.findings.add(
                "gradient",
                "error",
                f"none of the {total} trained tensors had a gradient in {FEW} steps, so nothing is "
                "trained",
                "call loss.backward() before optimizer.step(), and optimizer.zero_grad() after it",
            )

    def conclude(self) -> None:
        """Say of a loop that has ended if no step could train anything; nothing is raised."""
        if self.is_over or self.has_rate or not self._is_as_begun():
            return
        self.findings.is_early = False
        if self.without_rate >= FEW:
            self.findings.add(
                "optimizer",
                "error",
                f"the learning rate was 0 in all {self.without_rate} steps, so nothing was trained",
                "set a learning rate above 0",
            )
        elif self.is_first and self.passes >= FEW:
            self.findings.add(
                "optimizer",
                "error",
                f"no optimizer has stepped the model in {self.passes} passes, so nothing was "
                "trained",
                "call optimizer.step() after loss.backward()",
            )

    def _is_as_begun(self) -> bool:
        """Return True if every trained tensor has the values of the start, as far as is known."""
        model = self.model()
        now = {} if model is None else checksums(dict(trainable(model)))
        return bool(now) and now == self.sums


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()


def checksums(trained: dict[str, nn.Parameter]) -> dict[str, int]:
    """Return for each tensor a number that changes with any of its values; none for sharded."""
    dense = {n: p.detach() for n, p in trained.items() if type(p.data) is Tensor and p.numel()}
    return {n: _checksum(t) for n, t in dense.items() if t.element_size() in INTEGERS}


def _checksum(tensor: Tensor) -> int:
    total = 0
    for piece in tensor.contiguous().view(INTEGERS[tensor.element_size()]).view(-1).split(AT_ONCE):
        # by position: changes of opposite signs would cancel
        places = torch.arange(1, len(piece) + 1, device=piece.device)
        total = (31 * total + int((piece * places).sum())) % 2**64
    return total


def _adapted(model: nn.Module) -> Any:
    """Yield the adapted modules that have trained tensors of their own, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and any(p.requires_grad for p in module.parameters()):
            yield name, module


def _is_plain(model: nn.Module) -> bool:
    """Return False for a model that is compiled, or rewritten to call modules in another way."""
    return not any(
        type(m).__module__.startswith(("petl.efficiency", "torch._dynamo"))
        or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    )


@torch.no_grad()
def _token_losses(logits: Tensor, labels: Tensor) -> tuple[float, int]:
    """Return the sum of the losses of labelled tokens, and their number."""
    places = labels.reshape(-1).ne(IGNORED).nonzero()[:, 0]
    flat, wanted = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for piece in places.split(PIECE):
        total += cross_entropy(flat[piece].float(), wanted[piece].to(flat.device), reduction="sum")
    return float(total), len(places)


def inspect_weights(micro: list[MicroBatch], findings: Findings) -> None:
    """Check that each token has the same weight in the gradient, whatever its micro-batch."""
    for which in (0, 1):
        sums = [each.sums[which] for each in micro]
        if not all(_is_mean(m, *s) for m, s in zip(micro, sums, strict=True)):
            continue
        if not findings.wants("weights"):
            return
        # weight of one token's loss in the gradient of each micro-batch
        weights = [m.weight * m.loss / total for m, (total, _) in zip(micro, sums, strict=True)]
        counts = [count for _, count in sums]
        mean = sum(w * n for w, n in zip(weights, counts, strict=True)) / sum(counts)
        off = sum(abs(w - mean) * n for w, n in zip(weights, counts, strict=True))
        if mean and off / sum(counts) > UNEQUAL * abs(mean):
            findings.add(
                "weights",
                "warning",
                f"tokens of {len(micro)} accumulated micro-batches with {min(counts)} to "
                f"{max(counts)} labels weigh {min(weights) / mean:.2f} to "
                f"{max(weights) / mean:.2f} times as much as in a mean over all of them",
                "divide the sum over tokens by the labels of the whole step (num_items_in_batch)",
            )
        return


def _is_mean(micro: MicroBatch, total: float, count: int) -> bool:
    """Return True if a loss is the mean of these tokens, over the micro-batch or the step."""
    if not count or not total:
        return False
    means = [total / count, *([total / micro.total] if micro.total else [])]
    return any(abs(micro.loss - mean) <= UNEQUAL * mean for mean in means)
