"""Names trained tensors without gradient or in half precision, and methods never updated.

It does so in any training loop.

A tensor without a gradient is named after the first step. One whose gradient is zero is named after
the second, since the zeros of B make that of A zero in the first; steps with a learning rate of 0
do not count. Experts, rows of tokens, and towers beside the language model, have ten steps: the
first batches may have no token, or no image, for them.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel

from petl.core.layers.layer import HALF
from petl.core.model.calls import place_of
from petl.core.model.names import LANGUAGE, language_path, part_in

logger = logging.getLogger(__name__)
FEW, MANY = 2, 10  # steps until a tensor is named
SHOWN = 6  # kinds of tensors that a line names
# types whose blocks are one autograd function of their inputs, the weights not among them
REVERSIBLE = ("reformer",)
ROWS = "trainable_tokens"  # in PEFT's name of the trained rows of an embedding
REMEDY = "leave their modules out with exclude_modules"
# PEFT copies norms and heads in the dtype of their base
ROUNDED = (
    "%d of %d trained tensors are of half precision, which rounds away a step that is small "
    "against the value, as of norms: %s; before the optimizer is made, set parameter.data = "
    "parameter.data.float(), and compute under torch.autocast, as petl train does"
)
UNREAD = "no batch had these tokens: see whether the training rows have them"


class AbsentGradients(NamedTuple):
    """Names of trained tensors without a gradient, of `total`, in the first `steps` steps."""

    names: frozenset[str]
    total: int
    steps: int

    def __str__(self) -> str:
        return (
            f"{len(self.names)} of {self.total} trained tensors got no gradient in "
            f"{'the first step' if self.steps == 1 else f'{self.steps} steps'}, so they do not "
            f"train: {kinds_of(self.names)}"
        )


class GradientCheck:
    """Finds the tensors of a model that get no gradient in its first optimizer steps.

    Attributes:
        steps: optimizer steps so far that had a learning rate and a gradient.
        is_over: True once all is known.
        sizes: the largest value of each gradient of the last step, of those that are known.
        without: names of tensors that had no gradient in any step; None before the first.
    """

    def __init__(self) -> None:
        self.steps = self._empty = 0
        self.is_over = False
        self.sizes: dict[str, float] = {}
        self.without: set[str] | None = None
        self._named: set[str] = set()

    def after_step(self, model: nn.Module, optimizer: Optimizer) -> AbsentGradients | None:
        """Look at the gradients of a step; return the tensors of which it is now known."""
        if self.is_over or not has_rate(optimizer):
            return None
        # FSDP1 leaves an empty tensor in a process that has no part of it
        trained = {name: p for name, p in stepped(model, optimizer).items() if p.numel()}
        # an optimizer that frees the gradients in its step shows none
        if all(p.grad is None for p in trained.values()):
            return None
        sizes = self.sizes = _sizes({n: p.grad for n, p in trained.items()})
        # rewards that are all alike, as in GRPO, give a step without any
        if self._empty < MANY and len(sizes) > 1 and not any(sizes.values()):
            self._empty += 1
            return None
        self.steps += 1
        candidates = trained.keys() if self.without is None else self.without & trained.keys()
        absent = {name for name in candidates if trained[name].grad is None}
        self.without = absent | {name for name in candidates - absent if sizes.get(name) == 0}
        waits = _patient(model, self.without)
        due = self.without if self.steps >= FEW else absent
        due = (due if self.steps >= MANY else due - waits) - self._named
        self._named |= due
        self.is_over = self.steps >= MANY or (self.steps >= FEW and not waits)
        return AbsentGradients(frozenset(due), len(trained), self.steps) if due else None


def has_reversible_blocks(base: nn.Module) -> bool:
    """Return True if the blocks of a model compute their inputs from their outputs in backward."""
    return isinstance(base, PreTrainedModel) and base.config.model_type in REVERSIBLE


def reach_reversible_blocks(base: nn.Module) -> None:
    """Let the inputs of reversible blocks require a gradient, or their weights would get none."""
    if isinstance(base, PreTrainedModel) and has_reversible_blocks(base):
        base.enable_input_require_grads()


# called after each optimizer step with model and optimizer; returns True once all is said
AfterStep = Callable[[nn.Module, Optimizer], bool]
_WATCHED: WeakKeyDictionary[nn.Module, AfterStep | None] = WeakKeyDictionary()  # None: all is said


def watch_gradients(model: PeftModel) -> None:
    """Name the trained tensors of `model` that get no gradient in its first optimizer steps."""
    _WATCHED.setdefault(model, partial(_log_gradients, GradientCheck()))


def watch_steps(model: nn.Module, after_step: AfterStep | None) -> None:
    """Call `after_step` after each step of an optimizer, in place of `watch_gradients`.

    None ends it.
    """
    _WATCHED[model] = after_step


def _log_gradients(check: GradientCheck, model: nn.Module, optimizer: Optimizer) -> bool:
    before = check.steps
    absent = check.after_step(model, optimizer)
    if before == 0 < check.steps:
        trained = stepped(model, optimizer)
        half = [name for name, parameter in trained.items() if parameter.dtype in HALF]
        if half:
            logger.warning(ROUNDED, len(half), len(trained), kinds_of(half))
    if absent is not None:
        are_rows = all(ROWS in name for name in absent.names)
        logger.warning("%s; %s", absent, UNREAD if are_rows else REMEDY)
    return check.is_over


def stepped(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """Return the trained tensors of a model that an optimizer steps, by name."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) in held}


def kinds_of(names: Iterable[str]) -> str:
    """Return the kinds of tensors among these names, with their counts, the most frequent first."""
    kinds = Counter(place_of(name.removeprefix("base_model.model.")) for name in sorted(names))
    shown = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common(SHOWN))
    return shown + (f" and {len(kinds) - SHOWN} others" if len(kinds) > SHOWN else "")


def has_rate(optimizer: Optimizer) -> bool:
    """Return True unless every learning rate is 0, as in the first step of a warm-up."""
    # None: Adafactor chooses it
    return any(group.get("lr") != 0 for group in optimizer.param_groups)


# of each optimizer, the modules of which it holds no tensor, and how many tensors it holds
_FOREIGN: WeakKeyDictionary[Optimizer, WeakKeyDictionary[nn.Module, int]] = WeakKeyDictionary()


def _steps(optimizer: Optimizer, module: nn.Module) -> bool:
    """Return True if an optimizer holds a trained tensor of a module."""
    foreign = _FOREIGN.setdefault(optimizer, WeakKeyDictionary())
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    # a walk over a model takes as long as the step of a small head, whose optimizer is another
    if foreign.get(module) == count:
        return False
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    stepped = [p for p in module.parameters() if id(p) in held]
    if not stepped:
        foreign[module] = count
    return any(p.requires_grad for p in stepped)


def _after_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
    for model, after_step in list(_WATCHED.items()):
        if after_step is None or not _steps(optimizer, model):
            continue
        if after_step(model, optimizer):
            _WATCHED[model] = None


def _sizes(gradients: dict[str, Tensor | None]) -> dict[str, float]:
    """Return the largest value of each gradient; of sharded and sparse ones it is not known."""
    dense = {n: g for n, g in gradients.items() if g is not None and type(g) is Tensor}
    dense = {name: g for name, g in dense.items() if g.layout == torch.strided and g.numel()}
    if not dense:
        return {}
    with torch.no_grad():
        largest = [g.abs().amax().float() for g in dense.values()]
        values = torch.stack([value.to(largest[0].device) for value in largest]).tolist()
    return dict(zip(dense, values, strict=True))


def _patient(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return the names of tensors that a batch may leave out."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    language, prefix = language_path(base), "base_model.model."
    return {
        name
        for name in names
        if "expert" in name
        or ROWS in name
        or (language is not None and part_in(name.removeprefix(prefix), language) != LANGUAGE)
    }


# Methods that are never updated


# optimizer steps without an update, by tuner; one that was updated is no longer watched
_WITHOUT_UPDATE: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_NEVER_UPDATED: WeakSet[nn.Module] = WeakSet()  # tuners after `PATIENCE` such steps
PATIENCE = 2  # steps; the first update may come after the first one


def watch_updates(tuner: nn.Module) -> None:
    """Warn if two optimizer steps change this tuner's parameters before `updated` is called."""
    _WITHOUT_UPDATE[tuner] = 0


def updated(tuner: nn.Module) -> None:
    """Stop watching a tuner, whose update was called, or whose steps need none."""
    _WITHOUT_UPDATE.pop(tuner, None)
    _NEVER_UPDATED.discard(tuner)


def never_updated(tuner: nn.Module) -> bool:
    """Return True if two optimizer steps have changed this tuner's parameters without an update."""
    return tuner in _NEVER_UPDATED


def _count_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
    for tuner in list(_WITHOUT_UPDATE):
        if not _steps(optimizer, tuner):
            continue
        _WITHOUT_UPDATE[tuner] += 1
        if _WITHOUT_UPDATE[tuner] >= PATIENCE:
            del _WITHOUT_UPDATE[tuner]
            _NEVER_UPDATED.add(tuner)
            if getattr(tuner, "needs_updates", True):
                logger.warning(
                    "%s has taken %d optimizer steps without an update, so it selects nothing: "
                    "call petl.lifecycle(model).after_step(step, optimizer) after each "
                    "optimizer.step(), or pass callbacks=[petl.Callback()] to a Trainer",
                    type(tuner).__name__,
                    PATIENCE,
                )


# PyTorch calls them after each step of any optimizer, after the reduction over processes; they cost
# nothing while no model is watched
register_optimizer_step_post_hook(_after_step)
register_optimizer_step_post_hook(_count_step)
