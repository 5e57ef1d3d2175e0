"""Names the trained tensors that get no gradient in the first optimizer steps, once, in any loop.

A tensor without a gradient is named after the first step. One whose gradient is zero is named after
the second, since the zeros of B make that of A zero in the first; steps with a learning rate of 0
do not count. Experts, and towers beside the language model, have ten steps: the first batches may
have no token, or no image, for them.
"""

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from petl.core.model.calls import place_of
from petl.core.model.parts import LANGUAGE, language_path, part_in

logger = logging.getLogger(__name__)
FEW, MANY = 2, 10  # steps until a tensor is named
SHOWN = 6  # kinds of tensors that a line names


class _Watch:
    """What is known of the gradients of one model.

    Attributes:
        steps: optimizer steps so far that had a learning rate.
        without: names of tensors that had no gradient in any of them.
        named: of those, the ones in the log.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.without: set[str] | None = None
        self.named: set[str] = set()


# None: all is said
_WATCHED: WeakKeyDictionary[PeftModel, _Watch | None] = WeakKeyDictionary()


def watch_gradients(model: PeftModel) -> None:
    """Name the trained tensors of `model` that get no gradient in its first optimizer steps."""
    _WATCHED.setdefault(model, _Watch())


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    stepped: set[int] | None = None
    for model, watch in list(_WATCHED.items()):
        if watch is None:
            continue
        if stepped is None:
            stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        trained = [
            (name, p)
            for name, p in model.named_parameters()
            if p.requires_grad and id(p) in stepped
        ]
        has_rate = any(group.get("lr", 1) for group in optimizer.param_groups)
        # an optimizer that frees the gradients in its step shows none
        if has_rate and any(p.grad is not None for _, p in trained):
            watch.steps += 1
            _judge(model, watch, dict(trained))


def _judge(model: PeftModel, watch: _Watch, trained: dict[str, nn.Parameter]) -> None:
    candidates = trained.keys() if watch.without is None else watch.without & trained.keys()
    absent = {name for name in candidates if trained[name].grad is None}
    watch.without = absent | _zero({n: trained[n].grad for n in candidates - absent})
    waits = _patient(model, watch.without)
    due = watch.without if watch.steps >= FEW else absent
    due = due if watch.steps >= MANY else due - waits
    if due - watch.named:
        _say(due - watch.named, len(trained), watch.steps)
    watch.named |= due
    if watch.steps >= MANY or (watch.steps >= FEW and not waits):
        _WATCHED[model] = None


def _zero(gradients: dict[str, Tensor | None]) -> set[str]:
    """Return the names of gradients that are zero; of sharded and sparse ones it is not known."""
    dense = {n: g for n, g in gradients.items() if g is not None and type(g) is Tensor}
    dense = {name: g for name, g in dense.items() if g.layout == torch.strided and g.numel()}
    if not dense:
        return set()
    with torch.no_grad():
        largest = [g.abs().amax().float() for g in dense.values()]
        values = torch.stack([value.to(largest[0].device) for value in largest]).tolist()
    return {name for name, value in zip(dense, values, strict=True) if value == 0}


def _patient(model: PeftModel, names: Iterable[str]) -> set[str]:
    """Return the names of tensors that a batch may leave out."""
    language = language_path(model.get_base_model())
    prefix = "base_model.model."
    return {
        name
        for name in names
        if "expert" in name
        or (language is not None and part_in(name.removeprefix(prefix), language) != LANGUAGE)
    }


def _say(names: Iterable[str], total: int, steps: int) -> None:
    kinds = Counter(place_of(name.removeprefix("base_model.model.")) for name in sorted(names))
    shown = [f"{kind} ({count})" for kind, count in kinds.most_common(SHOWN)]
    more = f" and {len(kinds) - SHOWN} more kinds" if len(kinds) > SHOWN else ""
    logger.warning(
        "%d of %d trained tensors got no gradient in %s, so they do not train: %s%s; leave their "
        "modules out with exclude_modules",
        kinds.total(),
        total,
        "the first step" if steps == 1 else f"{steps} steps",
        ", ".join(shown),
        more,
    )


# PyTorch calls it after each step of any optimizer, after the reduction over processes
register_optimizer_step_post_hook(_after_step)
