"""Training of a drafter on answers that its model has written."""

import math
from typing import Any

import torch

from petl.efficiency.drafting.answers import DraftAnswers
from petl.efficiency.drafting.registry import Drafter, FittedDrafter
from petl.errors import InputError, UnsupportedError
from petl.system.progress import Pass

WARMUP = 30  # steps
TARGETS = ("hard", "soft")
DECAY = 0.01  # of matrices
HELD_OUT = 10  # of as many answers the last is not trained on, for rank frequencies


def fit(
    drafter: Drafter,
    answers: DraftAnswers,
    *,
    epochs: int = 4,
    lr: float = 1e-3,
    batch: int = 128,
    target: str = "hard",
    seed: int = 0,
) -> float:
    """Train a drafter, in float32, and count its rank frequencies.

    The optimizer is AdamW, with a linear warm-up of 30 steps and a cosine to 0. Of ten answers or
    more, every tenth is held out for the frequencies.

    Args:
        drafter: with something to train.
        answers: of its model, see `petl.efficiency.drafting.answers`.
        epochs: passes over the answers; 0: nothing is trained or counted.
        lr: peak learning rate.
        batch: positions of a step.
        target: "hard": the tokens; "soft": the model's own distribution.
        seed: of the order.

    Returns:
        The loss over all answers, those held out included, at the end.

    Raises:
        InputError: a value is out of range, or no answer has two tokens.
        UnsupportedError: the drafter has nothing to train.
    """
    _check(drafter, answers, epochs, lr, batch, target)
    trained: Any = drafter
    # in 16 bits the steps of AdamW would be rounded away
    trained.float()
    answers = answers.to(next(trained.parameters()).device)
    trained.prepare(answers)
    numbers = range(len(answers))
    held = [i for i in numbers if i % HELD_OUT == HELD_OUT - 1]
    # frequencies of answers that were learned by heart would promise too much
    rest = answers.rows([i for i in numbers if i not in held]) if held else answers
    if not len(rest.positions):  # only the answers held out are long enough
        rest, held = answers, []
    if epochs:
        _train(trained, rest, epochs, lr, batch, target, seed)
        trained.count(answers.rows(held) if held else answers)
    with torch.no_grad():
        return float(trained.loss(answers, target=target))


@torch.enable_grad()
def _train(
    drafter: Any, answers: DraftAnswers, epochs: int, lr: float, batch: int, target: str, seed: int
) -> None:
    parameters = list(drafter.parameters())
    # biases and the vector of the norm do not decay
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    generator = torch.Generator().manual_seed(seed)
    with Pass("training the drafter", epochs, unit="epochs", quiet=True) as shown:
        # of the first epoch the number of steps of all
        order = list(drafter.batches(answers, batch, generator))
        steps = epochs * len(order)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, steps))
        for epoch in range(epochs):
            if epoch:
                order = list(drafter.batches(answers, batch, generator))
            for positions in order:
                optimizer.zero_grad()
                drafter.loss(answers, positions, target=target).backward()
                optimizer.step()
                schedule.step()
            shown.advance()
    optimizer.zero_grad()  # gradients take as much memory as the heads


def factor(step: int, steps: int) -> float:
    """Return what the learning rate is multiplied by: a linear warm-up, then a cosine to 0.

    Args:
        step: number, from 0.
        steps: in total.
    """
    # a short training would not reach its rate otherwise
    warmup = min(WARMUP, steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    part = (step - warmup) / max(1, steps - warmup)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * part)))


def _check(
    drafter: Drafter, answers: DraftAnswers, epochs: int, lr: float, batch: int, target: str
) -> None:
    if not isinstance(drafter, FittedDrafter):
        name = drafter.name or type(drafter).__name__
        raise UnsupportedError(f"{name} has nothing to train; hydra has")
    if epochs < 0:
        raise InputError(f"epochs={epochs} is not 0 or more")
    if not 0 < lr < math.inf:
        raise InputError(f"lr={lr} is not above 0")
    if batch < 1:
        raise InputError(f"batch={batch} is not 1 or more")
    if target not in TARGETS:
        raise InputError(f"target={target!r} is none of {', '.join(TARGETS)}")
    if not len(answers) or not len(answers.positions):
        raise InputError(
            f"none of {len(answers)} answers has two tokens: there is nothing to learn from them"
        )
