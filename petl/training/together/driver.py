"""The driver of adapters that train together: a step of each training, in passes of all.

`Together.step` makes one optimizer step of the trainings that it is given. Between steps the caller
decides which go on: it may add, stop or drop any of them.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from petl.efficiency.together.batches import TOKENS, Batch
from petl.efficiency.together.group import AdapterGroup, Member, check_alike
from petl.errors import InputError
from petl.system.random_states import RandomStates, restore, states
from petl.training.dataloader import to_device


class Training:
    """One of several trainings in a process, which advances step by step.

    Attributes:
        device: where its passes are made.
        random: its random numbers.
        member: its adapter; None: it cannot share passes, and makes its own.
        tokens: of its first batch; 0: passes have room for it whatever else is in them.
        error: what has ended it, if anything has.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.random = device, RandomNumbers(device)
        self.member: Member | None = None
        self.tokens = 0
        self.error: Exception | None = None

    def own(self) -> AbstractContextManager[None]:
        """Inside the block, work for this training, with its random numbers."""
        return self.random.drawn()

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context of a pass in its precision."""
        return nullcontext()

    def next_step(self) -> Sequence[tuple[Batch, float]]:
        """Return the micro-batches of the next step, with their weights in its loss."""
        raise NotImplementedError

    def weigh(self, weight: float) -> None:
        """Take the weight of the next micro-batch, before its pass."""

    def add(self, loss: Tensor, weight: float) -> None:
        """Count the weighted loss of a micro-batch, whose gradients are there."""
        raise NotImplementedError

    def backward(self, weighted: Sequence[tuple[Batch, float]]) -> None:
        """Add the gradients of micro-batches in passes of its own."""
        raise NotImplementedError

    def update(self) -> None:
        """End the step: clip, and step the optimizer."""
        raise NotImplementedError


class Together:
    """Makes the steps of several trainings, in passes of as many adapters as a pass has room for.

    Attributes:
        groups: the groups of the last pass, by their trainings; kept as long as these stay.
    """

    def __init__(self) -> None:
        self.groups: dict[tuple[Training, ...], AdapterGroup] = {}

    def step(self, trainings: Sequence[Training]) -> None:
        """Make one optimizer step of each of these, in any order that differs from call to call.

        An error in the work of one ends that one, if its `own` keeps errors, and is raised else.
        """
        due: dict[Training, Sequence[tuple[Batch, float]]] = {}
        for training in trainings:
            with training.own():
                due[training] = training.next_step()
        self._arrange([training for training in due if training.member is not None])
        for members, group in self.groups.items():
            # micro-batches that only some have are passes of their own
            shared = min(len(due[training]) for training in members)
            for i in range(shared):
                self._pass(group, {training: due[training][i] for training in members})
            due |= {training: due[training][shared:] for training in members}
        for training, rest in due.items():
            if training.error is None:
                with training.own():
                    if rest:
                        training.backward(rest)
                    training.update()

    def _pass(self, group: AdapterGroup, batches: Mapping[Training, tuple[Batch, float]]) -> None:
        """Add the gradients of a micro-batch of each member of a group."""
        for training, (_, weight) in batches.items():
            training.weigh(weight)
        try:
            with next(iter(batches)).autocast():
                own = [to_device(batch, each.device) for each, (batch, _) in batches.items()]
                losses = group.losses(own)
                weights = [weight for _, weight in batches.values()]
                weighted = [loss * w for loss, w in zip(losses, weights, strict=True)]
            group.backward(weighted)
        except Exception as error:  # all of the pass fail with it
            for training in batches:
                with training.own():
                    raise error
            return
        for training, loss, weight in zip(batches, weighted, weights, strict=True):
            training.add(loss, weight)

    def _arrange(self, trainings: Sequence[Training]) -> None:
        """Divide trainings into groups that have room in a pass; those that stay keep stacks."""
        parts: list[list[Training]] = []
        for training in trainings:
            fitting = next((part for part in parts if has_room(part, training)), None)
            if fitting is None:
                parts.append([training])
            else:
                fitting.append(training)
        wanted = [tuple(part) for part in parts]
        for key, group in self.groups.items():
            if key not in wanted:
                group.dissolve()
        self.groups = {key: self.groups.get(key) or group_of(key) for key in wanted}


def has_room(part: Sequence[Training], training: Training) -> bool:
    """Return True if a pass of these has room for one more, whose adapter is alike."""
    tokens = sum(each.tokens for each in (*part, training))
    first, member = part[0].member, training.member
    if tokens > TOKENS or first is None or member is None:
        return False
    try:
        check_alike(first, member)
    except InputError:
        return False
    return True


def group_of(trainings: Sequence[Training]) -> AdapterGroup:
    """Return the group of these trainings' adapters."""
    group = AdapterGroup(checked=True)
    for training in trainings:
        if training.member is not None:
            group.join(training.member)
    return group


class RandomNumbers:
    """The random numbers of one training, from all generators that a process has once.

    Attributes:
        generator: torch's, of the device: that of the training's dropout in shared passes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.generator = device, torch.Generator(device)
        self._kept: RandomStates | None = None

    @contextmanager
    def drawn(self) -> Generator[None]:
        """Inside the block, random numbers are drawn from these generators."""
        before = states(self.device)
        if self._kept is not None:
            restore(self._kept._replace(device=self.generator.get_state()), self.device)
        try:
            yield
        finally:
            self._kept = states(self.device)
            self.generator.set_state(self._kept.device)
            restore(before, self.device)
