"""The task of each row of a batch (`task_ids`), for methods that serve several tasks.

Shapes: N rows, T tokens of each, G groups of rows of one task.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from petl.core.layers.mixed_batch import Groups, group_size, grouped
from petl.core.types import Arguments
from petl.errors import InputError

ARGUMENT = "task_ids"
# the same, past the task classes of PEFT, which name `task_ids` and drop it
PASSED = "petl_task_ids"
# arguments of models that have one entry for each row
ROWS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values", "inputs")


class TaskGroups(NamedTuple):
    """Rows in groups of one task each.

    Attributes:
        groups: the rows; its names are task ids.
        index: the place of each group's task in the sorted distinct ids, [G].
    """

    groups: Groups
    index: Tensor


class TaskRows:
    """The task ids of the rows of a batch, from 0.

    Attributes:
        ids: one for each row. A tensor [N] where its values cannot be read: under torch.compile,
            and where only shapes are computed.
        distinct: the ids without repetitions, sorted; empty if `ids` is a tensor.
    """

    def __init__(self, ids: Sequence[int] | Tensor) -> None:
        self.ids = ids
        self.distinct = [] if isinstance(ids, Tensor) else sorted(set(ids))
        self._groups: dict[tuple[int, int, torch.device], TaskGroups] = {}

    @classmethod
    def of(cls, ids: Tensor | Sequence[int]) -> "TaskRows":
        """Return the rows for the argument `task_ids`.

        Raises:
            InputError: it is no 1-D tensor or sequence of integers of at least 0.
        """
        if not isinstance(ids, Tensor):
            return cls(_checked(list(ids) if isinstance(ids, tuple | range) else ids))
        if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise InputError(
                f"task_ids is a {ids.dtype} tensor of shape {[*ids.shape]}; pass a torch.long "
                "tensor [N], with one id for each row of the batch"
            )
        # values that cannot be read: of torch.compile, of a dry run
        if torch.compiler.is_compiling() or isinstance(ids, FakeTensor) or ids.is_meta:
            return cls(ids)
        return cls(_checked(ids.tolist()))

    def __len__(self) -> int:
        return len(self.ids)

    def check_batch(self, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        """Raise InputError unless there is one id for each row of a model's inputs."""
        inputs = (kwargs.get(name) for name in ROWS)
        first = next((t for t in (*inputs, *args) if isinstance(t, Tensor)), None)
        if first is not None and len(first) != len(self):
            raise InputError(
                f"task_ids has {len(self)} entries for a batch of {len(first)} rows; pass one id "
                "for each row"
            )

    def repeats(self, rows: int) -> int:
        """Return how often a layer's input of `rows` rows repeats each row of the batch.

        Beam search repeats rows, attention in windows splits them; copies of a row are adjacent.
        """
        if not len(self) or rows % len(self):
            raise InputError(
                f"a layer has {rows} rows, which is no multiple of the {len(self)} task_ids of the "
                "batch; this model mixes rows, so each call must have rows of one task"
            )
        return rows // len(self)

    def select(self, rows: Sequence[int], of: int) -> "TaskRows":
        """Return the tasks of these rows of a layer's input, which has `of` rows."""
        repeats = self.repeats(of)
        picked = [row // repeats for row in rows]
        if isinstance(self.ids, Tensor):
            return TaskRows(self.ids[picked])
        return TaskRows([self.ids[row] for row in picked])

    def per_row(self, rows: int) -> Tensor:
        """Return the ids, [rows], of a layer's input, where `ids` is a tensor."""
        assert isinstance(self.ids, Tensor)
        return self.ids.repeat_interleave(self.repeats(rows))

    def grouped(self, x: Tensor) -> TaskGroups:
        """Return the rows of a layer's input [N, ..., I] in groups of one task."""
        repeats = self.repeats(len(x))
        of_task: dict[object, list[int]] = {}
        for row in range(len(x)):
            of_task.setdefault(self.ids[row // repeats], []).append(row)
        n = group_size(of_task, x[0, ..., 0].numel())
        # layers with equal inputs share the index tensors
        key = repeats, n, x.device
        if key not in self._groups:
            with torch.device(x.device):
                groups = grouped(of_task, len(x), n)
                index = torch.tensor([self.distinct.index(task) for task in groups.names])
            self._groups[key] = TaskGroups(groups, index)
        return self._groups[key]


def take_task_ids(args: Sequence[object], kwargs: Arguments) -> tuple[TaskRows | None, Arguments]:
    """Return the tasks of a model's rows, or None, and its keyword arguments without them.

    Raises:
        InputError: they are not one id for each row.
    """
    if ARGUMENT not in kwargs and PASSED not in kwargs:
        return None, kwargs
    given = [kwargs[name] for name in (ARGUMENT, PASSED) if kwargs.get(name) is not None]
    kwargs = {name: value for name, value in kwargs.items() if name not in (ARGUMENT, PASSED)}
    if not given:
        return None, kwargs
    tasks = TaskRows.of(given[0])
    tasks.check_batch(args, kwargs)
    return tasks, kwargs


def pass_task_ids(
    module: nn.Module, args: tuple[object, ...], kwargs: Arguments
) -> tuple[tuple[object, ...], Arguments]:
    """Forward pre-hook of a PeftModel: give `task_ids` the name that PEFT passes on."""
    if ARGUMENT in kwargs:
        kwargs = {PASSED if name == ARGUMENT else name: value for name, value in kwargs.items()}
    return args, kwargs


def _checked(ids: object) -> list[int]:
    is_list = isinstance(ids, list) and all(type(i) is int for i in ids)
    if not is_list or any(i < 0 for i in ids):
        raise InputError(
            f"task_ids={ids!r} is not a torch.long tensor [N] of ids from 0, one for each row"
        )
    return ids
