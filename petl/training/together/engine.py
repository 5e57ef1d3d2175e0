"""The engine of a run that trains together with others: its passes are those of all of them."""

import logging
import signal
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from petl.efficiency.frozen.feed import autocast_of
from petl.efficiency.together.batches import check_loss, room_for
from petl.efficiency.together.group import AdapterGroup, Member, check_alike
from petl.errors import InputError, UnsupportedError
from petl.system.processes import ASKS, current_lane
from petl.training.distributed.launch import Engine
from petl.training.together.lanes import Lane, Lanes

FORWARD, BACKWARD = "forward", "backward"
KINDS = (BACKWARD, FORWARD)  # a run that has a loss frees its activations first
logger = logging.getLogger(__name__)


def run_in_lanes(width: int, jobs: Sequence[Callable[[], None]]) -> int:
    """Make runs of `petl train`, at most `width` at a time, whose adapters train together.

    SIGINT and SIGTERM end each of them after its step.

    Args:
        jobs: the runs; each handles its own errors.

    Returns:
        The signal that ended them, or 0.
    """
    lanes = Lanes(min(width, len(jobs)), Passes().perform, KINDS, LaneEngine)
    # a run in a thread gets no signals
    before = {
        number: signal.signal(number, lambda number, _: lanes.stop(number)) for number in ASKS
    }
    try:
        lanes.run(jobs)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return lanes.asked_to_stop


class LaneEngine(Engine):
    """Asks for passes. A run that cannot train together, as the log says, makes its own."""

    def wrap(self) -> Any:
        """Return what computes the forward pass."""
        lane: Lane = current_lane()
        self.lane, self.member = lane, None
        # set again where it draws: its state is the run's
        generator = torch.Generator(self.accelerator.device)
        try:
            self.member = Member(self.model, generator)
        except UnsupportedError as error:
            logger.warning("this run trains alone: %s", error)
            return super().wrap()
        lane.device = self.accelerator.device
        self._checked = False
        return self.forward

    def forward(self, **batch: Any) -> Any:
        """Return the loss of a batch, in a pass of all runs."""
        if not self._checked:
            self._checked = True
            try:
                check_loss(self.model, batch)
            except UnsupportedError as error:
                logger.warning("this run trains alone: %s", error)
                self.member, self.wrapped = None, super().wrap()
                return self.wrapped(**batch)
        member = self.member
        assert member is not None, "without one, `wrapped` is not this function"
        member.precision = autocast_of(member.base)
        return SimpleNamespace(loss=self.lane.ask(FORWARD, (member, batch)))

    def backward(self, loss: Tensor) -> None:
        if self.member is None:
            super().backward(loss)
        else:
            self.lane.ask(BACKWARD, loss)

    def release(self) -> None:
        if self.member is None:
            super().release()


class Passes:
    """Makes the passes of lanes, in groups of as many adapters as a pass has room for.

    Attributes:
        groups: by the members, in their order; made again when they change.
        room: adapters in a group, by the first batches.
    """

    def __init__(self) -> None:
        self.groups: dict[tuple[Member, ...], AdapterGroup] = {}
        self.room: int | None = None
        self._losses: dict[Lane, Member] = {}

    def perform(self, kind: str, lanes: Sequence[Lane]) -> Sequence[Any]:
        """Make the passes that lanes wait for; return a result for each of them."""
        return self.forward(lanes) if kind == FORWARD else self.backward(lanes)

    def forward(self, lanes: Sequence[Lane]) -> list[Tensor]:
        """Return the loss of each lane's batch."""
        asked = {lane: request_of(lane) for lane in lanes}
        if self.room is None:
            self.room = room_for([batch for _, batch in asked.values()])
        self._group([member for member, _ in asked.values()])
        batches = dict(asked.values())
        lane_of = {member: lane for lane, (member, _) in asked.items()}
        self._losses = {lane: member for lane, (member, _) in asked.items()}
        # a loss keeps its graph until the run asks for the backward pass
        losses: dict[Member, Tensor] = {}
        for members, group in self.groups.items():
            for member in members:
                copy_state(lane_of[member], member)
            # the thread is one of the lanes, in the precision of its own run
            with autocast(members[0], lanes[0].device):
                own = group.losses([batches[member] for member in members])
            losses |= dict(zip(members, own, strict=True))
            for member in members:
                return_state(lane_of[member], member)
        return [losses[member] for member, _ in asked.values()]

    def backward(self, lanes: Sequence[Lane]) -> list[None]:
        """Add the gradients of each lane's loss."""
        # a run with a loss asks for nothing else next, so `lanes` has all members of each group
        losses = {self._losses[lane]: request_of(lane) for lane in lanes}
        for members, group in self.groups.items():
            group.backward([losses[member] for member in members])
        return [None] * len(lanes)

    def _group(self, members: Sequence[Member]) -> None:
        """Divide the members into groups of equal size; groups that stay keep their stacks."""
        assert self.room is not None
        parts: list[list[Member]] = []
        for member in members:
            fitting = next((p for p in parts if len(p) < self.room and alike(p[0], member)), None)
            if fitting is None:
                parts.append([member])
            else:
                fitting.append(member)
        # members that ended have left, so a part may have changed
        wanted = [tuple(part) for part in parts]
        kept = {key: group for key, group in self.groups.items() if key in wanted}
        for key, group in self.groups.items():
            if key not in kept:
                group.dissolve()
        for key in wanted:
            if key not in kept:
                kept[key] = AdapterGroup(checked=True)
                for member in key:
                    kept[key].join(member)
        self.groups = {key: kept[key] for key in wanted}


def request_of(lane: Lane) -> Any:
    """Return what a lane gives to the pass that it waits for."""
    assert lane.request is not None
    return lane.request[1]


def alike(one: Member, other: Member) -> bool:
    """Return True if two adapters can be in one group."""
    if one.precision != other.precision:
        return False
    try:
        check_alike(one, other)
    except InputError:
        return False
    return True


def autocast(member: Member, device: torch.device) -> torch.autocast:
    """Return the context of a pass in the precision of a member's run."""
    if not member.precision:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, getattr(torch, member.precision))


# A member draws its dropout from the random numbers of its run


def state_of(lane: Lane) -> Tensor:
    """Return the state of the random numbers from which a run draws dropout."""
    assert lane.random is not None
    return lane.random[0][_name(lane)]


def copy_state(lane: Lane, member: Member) -> None:
    """Set the generator of a member to the state that the run's own is in."""
    assert member.generator is not None
    member.generator.set_state(state_of(lane))


def return_state(lane: Lane, member: Member) -> None:
    """Let the run go on with the state that the generator of its member is in."""
    assert lane.random is not None
    assert member.generator is not None
    tensors, others = lane.random
    lane.random = {**tensors, _name(lane): member.generator.get_state()}, others


def _name(lane: Lane) -> str:
    """The key of `rng_state` for the device on which a run computes."""
    return "cpu" if lane.device.type == "cpu" else "device"
