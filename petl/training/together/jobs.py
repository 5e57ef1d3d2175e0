"""Train many adapters at once in a program of one's own: `petl.train_together`.

Small steps leave a processor idle: the base's products have few rows and each layer is called for
each adapter. Together the rows of K adapters are one batch. Each adapter has its own loss, gradient
norm, learning rate, schedule, early stopping, head, order of rows and random numbers, so that it is
the adapter that a training of its own would have made.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from accelerate.utils import set_seed
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor, nn

from petl.core.lifecycle import lifecycle
from petl.core.model.copies import share_weights
from petl.core.parameters import check_module
from petl.core.registry import METHODS, build_config, method_of, method_part, wrap
from petl.core.support import require_compatible
from petl.core.types import Settings
from petl.efficiency.fused_lora.switching import fuse_lora
from petl.efficiency.together.batches import LABELS, Batch, check_loss, room_for
from petl.efficiency.together.group import TOGETHER, Member, check_alike
from petl.errors import InputError, did_you_mean
from petl.system.values import read_fields
from petl.training.dataloader import to_device
from petl.training.optimizer import fraction_of_peak, make_optimizer, set_lr
from petl.training.runs.settings import TrainConfig
from petl.training.together.driver import Together, Training

# settings of `petl train` that a job has; the others are about data, evaluation and run folders
SETTINGS = (
    "steps",
    "lr",
    "head_lr",
    "loraplus_ratio",
    "weight_decay",
    "betas",
    "max_grad_norm",
    "schedule",
    "warmup",
    "eval_steps",
    "early_stopping",
    "seed",
)


@dataclass
class Job:
    """One adapter to train.

    Attributes:
        method: a name of `petl.list_methods()`, or a config of PEFT.
        batches: inputs of the model with labels, one for each optimizer step, in this job's order;
            iterated again when they end.
        train: settings of `petl train` by name, see `SETTINGS`; `steps` is needed. A rate that is
            not given is the method's default.
        fields: of the method's config, such as `r`; none next to a config.
        evaluate: called every `eval_steps` with the model in evaluation mode; returns a score, of
            which the highest is the best. The adapter ends with the weights of the best score.
    """

    method: str | PeftConfig
    batches: Iterable[Batch]
    train: Settings
    fields: Settings = field(default_factory=dict)
    evaluate: Callable[[PeftModel], float] | None = None

    def settings(self, config: PeftConfig) -> TrainConfig:
        """Return the checked settings, with the method's learning rate if none is given.

        Raises:
            InputError: as `checked`.
        """
        settings, entry = self.checked(), method_of(config)
        if entry is None or self.train.get("lr") is not None:
            return settings
        return replace(settings, lr=entry.default_lr(dict(self.fields)))

    def checked(self) -> TrainConfig:
        """Return the settings, without a method's learning rate, after a check of all fields.

        Raises:
            InputError: a value of another type or out of range, a setting that a job does not have,
                or no number of steps.
        """
        self._check_types()
        for name, value in self.train.items():
            if name not in SETTINGS:
                raise InputError(f"a job has no setting {name!r}" + did_you_mean(name, SETTINGS))
            if isinstance(value, str) and name != "schedule":  # a command line's words are read
                raise InputError(f"train.{name}={value!r} is a string: give the number itself")
        # numbers of NumPy, as its ranges of rates have them
        given = {k: v.item() if isinstance(v, np.generic) else v for k, v in self.train.items()}
        steps = given.get("steps")
        if not is_count(steps):
            raise InputError(
                f"steps={steps!r} is no number of optimizer steps: set train={{'steps': 100}} or "
                "another integer from 1"
            )
        if (given.get("eval_steps") is None) != (self.evaluate is None):
            raise InputError(
                f"eval_steps={given.get('eval_steps')} and evaluate={self.evaluate!r} need "
                "each other: the steps between two scores, and the function that returns one"
            )
        settings = read_fields(TrainConfig, given, "train")
        settings.warmup_steps(settings.steps or 0)
        return settings

    def _check_types(self) -> None:
        for name in ("train", "fields"):
            value = getattr(self, name)
            if not isinstance(value, Mapping):
                raise InputError(
                    f"{name}={value!r} of a job is not a dict: give {name}={{NAME: VALUE}}"
                )
        if isinstance(self.batches, Mapping):
            raise InputError(
                f"batches of a job is a dict of {', '.join(map(str, self.batches))}, which is one "
                "batch: give a list of batches, batches=[batch]"
            )
        if isinstance(self.batches, str | Tensor) or not isinstance(self.batches, Iterable):
            raise InputError(
                f"batches of a job is of type {type(self.batches).__name__}: give a list of "
                "batches, or a DataLoader"
            )
        if self.evaluate is not None and not callable(self.evaluate):
            raise InputError(
                f"evaluate={self.evaluate!r} of a job is no function: give one that takes a model "
                "and returns its score"
            )


@dataclass
class TrainResult:
    """A trained adapter.

    Attributes:
        model: its PeftModel, which shares the weights of the base with those of the other jobs:
            save it, or copy the model, before merging the adapter.
        losses: the loss of each step, before the optimizer changed the weights.
        steps: the steps that were made, fewer than asked for after early stopping.
        score: the best score; None without evaluation, or if every score was NaN.
        best_step: the step after which it was reached.
    """

    model: PeftModel
    losses: list[float]
    steps: int
    score: float | None = None
    best_step: int | None = None


def train_together(
    model: nn.Module, jobs: Sequence[Job], *, together: int | None = None
) -> list[TrainResult]:
    """Train the adapters of several jobs at once over one base model.

    Each adapter is what `petl.wrap` and a loop of its own would give: equal to the bit where the
    batches of all jobs have one shape; else up to rounding, and with other dropout masks, since
    those are drawn for the padding as well. A job that ends makes room for the next
    one.

    Args:
        model: the base, a model of transformers whose loss is known from its logits. Its modules
            stay as they are, and its parameters are frozen, as by `petl.wrap`.
        jobs: of one method (LoRA, rsLoRA, MoS, MoLA, adapter, Compacter, IncreLoRA) and on the same
            modules. Rates, schedules, seeds, alphas, dropouts and ranks may differ.
        together: the number of adapters in a pass. None: as many as have about 512 tokens in a
            pass, from where on there is nothing to gain.

    Returns:
        The trained adapter of each job, in the order of the jobs.

    Raises:
        InputError: jobs of several methods or on other modules, or wrong settings.
        UnsupportedError: the method or the model cannot train together; the message says why.
    """
    check_module(model, "petl.train_together")
    if isinstance(model, PeftModel):
        raise InputError(
            f"petl.train_together needs the base model, and got {type(model).__name__}: each job "
            "makes an adapter of its own"
        )
    check_jobs(jobs)
    if together is not None and not is_count(together):
        raise InputError(
            f"together={together!r} is not a number of adapters: give an integer from 1, or None"
        )
    waiting, live = deque(enumerate(jobs)), dict[int, _TrainingJob]()
    finished: dict[int, TrainResult] = {}
    driver = Together()
    while waiting or live:
        while waiting and len(live) < (together or slots([*live.values()])):
            number, job = waiting.popleft()
            live[number] = _TrainingJob(model, job)
            check_alike(next(iter(live.values())).adapter, live[number].adapter)
            if not number:
                check_loss(live[number].model, live[number].next_batch())
        driver.step([*live.values()])
        for number, running in list(live.items()):
            if running.is_over:
                finished[number] = live.pop(number).end()
    driver.step([])
    return [finished[number] for number in range(len(jobs))]


def check_jobs(jobs: object) -> None:
    """Raise InputError unless these are jobs with right settings: before the first one trains."""
    if isinstance(jobs, Job):
        raise InputError("petl.train_together got one petl.Job: give it a list of jobs, [job]")
    if not isinstance(jobs, Sequence) or not jobs or isinstance(jobs, str):
        shown = repr(jobs) if isinstance(jobs, Sequence) else type(jobs).__name__
        raise InputError(
            f"petl.train_together got jobs={shown}: give it a list of at least one petl.Job"
        )
    for number, job in enumerate(jobs):
        if not isinstance(job, Job):
            raise InputError(
                f"jobs[{number}] is of type {type(job).__name__}: make it a petl.Job(method, "
                "batches, train)"
            )
        job.checked()
        require_together(job)


def require_together(job: Job) -> None:
    """Raise UnsupportedError for a job whose adapter cannot train with others."""
    config = job.method
    if isinstance(config, str) and config in METHODS:
        fields = {k: v for k, v in job.fields.items() if k not in ("adapter_name", "calibration")}
        config = build_config(config, **fields)
    if isinstance(config, PeftConfig):
        require_compatible([TOGETHER, method_part(config)])


def is_count(value: object) -> bool:
    """Return True for an integer from 1."""
    # True is an int, too
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def slots(live: "Sequence[_TrainingJob]") -> int:
    """Return how many adapters have room in a pass, by the next batch of the first."""
    return room_for([live[0].next_batch()]) if live else 1


def check_batch(batch: object) -> None:
    """Raise InputError unless this is a dict of inputs with labels."""
    if not isinstance(batch, Mapping):
        raise InputError(
            f"a batch of a job is of type {type(batch).__name__}: make it a dict of the model's "
            "inputs, with labels"
        )
    if not any(name in batch for name in LABELS):
        raise InputError(
            f"a batch of a job has {', '.join(map(str, batch))} and no labels, so it has no loss: "
            "add its labels"
        )


class _TrainingJob(Training):
    """A job that trains."""

    def __init__(self, base: nn.Module, job: Job) -> None:
        self.job = job
        device = next(base.parameters()).device
        super().__init__(device)
        seed = job.checked().seed
        # the initial values of a job do not depend on the jobs before it
        with self.own():
            set_seed(seed)
            self.model = wrap(share_weights(base), job.method, **job.fields)
            self.settings = job.settings(self.model.active_peft_config)
            # does nothing for other methods
            fuse_lora(self.model)
            self.model.to(device).train()
            self.lifecycle = lifecycle(self.model)
            self.optimizer = make_optimizer(self.model, self.settings, self.lifecycle)
            self.total = self.settings.steps or 0
            self.lifecycle.attach_optimizer(self.optimizer, 0, self.total)
            set_seed(seed)
        self.warmup = self.settings.warmup_steps(self.total)
        self.adapter = self.member = Member(self.model, self.random.generator)
        self.steps = self.stale = 0
        self.losses: list[Tensor] = []
        self.best: tuple[float, int, dict[str, Tensor]] | None = None
        self._batches = self._endless()
        self._next: Batch | None = None

    def next_step(self) -> list[tuple[Batch, float]]:
        """Return the batch of the next step."""
        batch, self._next = self.next_batch(), None
        self.steps += 1
        return [(batch, 1.0)]

    def add(self, loss: Tensor, weight: float) -> None:
        """Note the loss of a step."""
        self.losses.append(loss.detach())

    def _endless(self) -> Iterator[Batch]:
        while True:
            batches = iter(self.job.batches)
            first = next(batches, None)
            if first is None:
                raise InputError(
                    f"the batches of a job have ended after {self.steps} of {self.total} steps: "
                    "pass a list, or another iterable that can be iterated again"
                )
            yield first
            yield from batches

    def next_batch(self) -> Batch:
        """Return the batch of the next step, without taking it."""
        if self._next is None:
            batch = next(self._batches)
            check_batch(batch)
            self._next = to_device(batch, self.device)
        return self._next

    @property
    def is_over(self) -> bool:
        """True after the last step, or if early stopping ends the job."""
        patience = self.settings.early_stopping
        return self.steps == self.total or (patience is not None and self.stale >= patience)

    def update(self) -> None:
        """Clip, step and evaluate; the gradients are there."""
        settings = self.settings
        fraction = fraction_of_peak(self.steps, self.total, self.warmup, settings.schedule)
        set_lr(self.optimizer, fraction)
        if settings.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.adapter.trained, settings.max_grad_norm)
        self.optimizer.step()
        self.lifecycle.after_step(self.steps, self.optimizer)
        self.optimizer.zero_grad()
        every = settings.eval_steps
        # the last weights too, or they could not be the best
        if every is not None and (self.steps % every == 0 or self.steps == self.total):
            self.score()

    def score(self) -> None:
        """Evaluate, and keep the weights if they are the best so far."""
        assert self.job.evaluate is not None
        self.model.eval()
        with torch.no_grad():
            score = float(self.job.evaluate(self.model))
        self.model.train()
        # NaN, as of a correlation with a constant, is the worst: no score is above it
        if not math.isnan(score) and (self.best is None or score > self.best[0]):
            self.stale = 0
            # ranks too, which a method may change while it trains
            with self.lifecycle.resumable():
                state = get_peft_model_state_dict(self.model, save_embedding_layers=False)
            kept = {name: tensor.detach().clone() for name, tensor in state.items()}
            self.best = score, self.steps, kept
        else:
            self.stale += 1

    def end(self) -> TrainResult:
        """Restore the best weights; return the result."""
        # read at the end: each transfer would synchronize with the device
        losses = torch.stack(self.losses).tolist()
        self.model.eval()
        if self.best is None:
            return TrainResult(self.model, losses, self.steps)
        score, best_step, kept = self.best
        set_peft_model_state_dict(self.model, kept)
        return TrainResult(self.model, losses, self.steps, score, best_step)
