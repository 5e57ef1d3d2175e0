"""What the head alone reaches on the frozen model: the score that an adapter has to beat.

The features are what the model's head reads, computed once in evaluation mode; a copy of the head
is trained on them for as long as the run is, at the best of a few rates.

Shapes: N rows, B rows of a batch, T tokens, H features.
"""

import copy
import logging
import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from petl.core.registry import keeps_base
from petl.data.batch_sampler import chunks, permutation
from petl.data.streaming import StreamedRows
from petl.distributed.engine import is_sharded
from petl.runs.settings import HELD_OUT, TrainConfig
from petl.tasks.base import Task
from petl.tasks.rows import IGNORED
from petl.training.dataloader import SPLIT_SEED, Batch, Splits, load, longest_first, to_device
from petl.training.evaluate import in_order
from petl.training.optimizer import make_optimizer, set_rates, share_of_peak

HEAD_NAMES = ("classifier", "score", "qa_outputs")  # PEFT too finds heads by these
ROWS = 64  # of a batch
TOKEN_BYTES = 2e9  # most that is kept of what a head reads of tokens
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
logger = logging.getLogger(__name__)


def frozen_head(
    model: PeftModel, splits: Splits, settings: TrainConfig, accelerator: Accelerator
) -> dict[str, float] | None:
    """Test scores of the head trained alone, before the adapter is; None with the reason logged.

    The rate is chosen on rows held out from train; test is scored once. The model stays as it is,
    and so do the random states.
    """
    if not splits.task.new_head or not settings.frozen_head:
        return None
    if isinstance(splits.train, StreamedRows):
        logger.info("no frozen-head score: the train rows are a stream")
        return None
    if is_sharded(model):
        logger.info("no frozen-head score: the model is sharded")
        return None
    base = model.get_base_model()
    head = find_head(base)
    if head is None:
        logger.info("no frozen-head score: the model has no %s", " or ".join(HEAD_NAMES))
        return None
    # a start that changes the base weights equals the frozen model only while it is switched on
    kept = keeps_base(model.active_peft_config)
    with model.disable_adapter() if kept else nullcontext():
        train = features(base, head, splits, splits.train, accelerator)
        test = features(base, head, splits, splits.test, accelerator) if train else None
    if train is None or test is None:
        return None
    plain = head.original_module if isinstance(head, ModulesToSaveWrapper) else head
    head = copy.deepcopy(plain).float().requires_grad_(True)
    probe = Probe(head, train, splits.task, settings)
    device = accelerator.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # its dropout draws
        trained, lr = probe.train_at_best_rate()
    return {**head_scores(trained, test, splits.task), "lr": lr}


@dataclass(frozen=True)
class Features:
    """What the head reads of each row, with what it should make of it, on the device.

    Attributes:
        x: [N, H] or [N, 1, H], float32; of a head that speaks of every token [N, T, H].
        truths: of the rows, [N] or [N, T] each; of such a head with the attention mask.
        rows: the encoded rows, N of them.
    """

    x: Tensor
    truths: Batch
    rows: Dataset

    def take(self, picked: Tensor) -> "Features":
        """Some of the rows."""
        truths = {name: truth[picked] for name, truth in self.truths.items()}
        return Features(self.x[picked], truths, self.rows.select(picked.tolist()))


def find_head(base: nn.Module) -> nn.Module | None:
    """The child of a classifier that makes its logits, by name."""
    children = base.named_children()
    return next((m for name, m in children if any(word in name for word in HEAD_NAMES)), None)


@torch.no_grad()
def features(
    base: nn.Module, head: nn.Module, splits: Splits, rows: Dataset, accelerator: Accelerator
) -> Features | None:
    """What the head reads of each row; None, the reason logged, if that cannot be had.

    The head has to make the model's logits of one vector a row, or of each token's own.
    """
    processes, device, task = accelerator.num_processes, accelerator.device, splits.task
    order = longest_first(task.lengths(rows))
    width = task.width(splits.collate([rows[order[0]]]))
    # every process computes equally many rows; the surplus is cut off below
    mine = [order[i % len(order)] for i in range(accelerator.process_index, len(order), processes)]
    each = -(-len(order) // processes)
    mine += order[: each - len(mine)]
    read: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    base.eval()
    vectors: list[Tensor] = []
    masks: list[Tensor] = []
    truths: dict[str, list[Tensor]] = {name: [] for name in task.label_columns}
    try:
        for batch in load(rows, splits.collate, chunks(mine, ROWS), device, workers=0):
            batch = to_device(batch, device)
            for name in task.label_columns:
                truths[name].append(filled(batch.pop(name), width, IGNORED))
            read.clear()
            with accelerator.autocast():
                logits = task.head_logits(base(**batch))
                by_token = logits.dim() == 3
                if by_token:
                    masks.append(filled(batch["attention_mask"], width, 0))
                vectors.append(read[0] if by_token else one_vector(head, read[0], logits))
                if len(vectors) == 1:
                    size = 4 * len(rows) * vectors[0][0].numel()  # of the longest rows
                    if not is_usable(head, vectors[0], logits, size, accelerator):
                        return None
                if by_token:
                    vectors[-1] = filled(vectors[-1], width, 0)
    finally:
        hook.remove()

    def whole(parts: list[Tensor]) -> Tensor:
        return in_order(accelerator.gather(torch.cat(parts)), order, processes)

    if masks:
        truths["attention_mask"] = masks
    x = whole([part.float() for part in vectors])
    return Features(x, {name: whole(parts) for name, parts in truths.items()}, rows)


def filled(values: Tensor, width: int | None, value: float) -> Tensor:
    """`values` of each token, [B, T, ...], as [B, width, ...]; those of a row, [B], as they are."""
    lacking = 0 if values.dim() == 1 or width is None else width - values.shape[1]
    return F.pad(values, (*(0, 0) * (values.dim() - 2), 0, lacking), value=value)


def is_usable(
    head: nn.Module, vectors: Tensor, logits: Tensor, size: int, accelerator: Accelerator
) -> bool:
    """Whether the head can be trained on such vectors, `size` bytes of them; why not is logged."""
    if not reproduces(head, vectors, logits, accelerator):
        logger.info("no frozen-head score: the head needs more than one vector a row")
        return False
    if logits.dim() == 3 and size > TOKEN_BYTES:
        logger.info(
            "no frozen-head score: what the head reads of all tokens is up to %.0f GB", size / 1e9
        )
        return False
    return True


def one_vector(head: nn.Module, read: Tensor, logits: Tensor) -> Tensor:
    """Of what the head read, [B, H] or [B, T, H], what makes the row's logits: [B, H] or [B, 1, H].

    A guess that `reproduces` confirms.
    """
    if read.dim() == 2:
        return read
    scores = head(read)
    if scores.dim() == 2:  # the head itself picks a token, by custom the first
        return read[:, :1]
    # the head scores every token: the row's own is the one whose scores are the logits
    distance = (scores - logits[:, None]).abs().amax(-1)
    return read[torch.arange(len(read), device=read.device), distance.argmin(1)]


def reproduces(head: nn.Module, vectors: Tensor, logits: Tensor, accelerator: Accelerator) -> bool:
    """Whether the head alone makes the model's logits of these vectors, on all processes."""
    tolerance = 1e-4 if logits.dtype == torch.float32 else 3e-2
    again = head(vectors)
    same = again.shape == logits.shape and torch.allclose(
        again.float(), logits.float(), rtol=tolerance, atol=tolerance
    )
    votes = torch.tensor(float(same), device=logits.device)
    return int(accelerator.reduce(votes, reduction="sum")) == accelerator.num_processes


def head_scores(head: nn.Module, data: Features, task: Task) -> dict[str, float]:
    """The task's scores of a head."""
    parts = []
    with torch.no_grad():
        for start in range(0, len(data.x), ROWS):
            some = slice(start, start + ROWS)
            truths = {name: truth[some] for name, truth in data.truths.items()}
            parts.append(task.score(task.outputs_from_logits(head(data.x[some])), truths))
    if task.by_row:
        return task.summarize_rows(torch.cat(parts), data.rows)
    return task.summarize(torch.stack(parts).sum(0))


class Probe:
    """Trains copies of a head on cached features."""

    def __init__(self, head: nn.Module, data: Features, task: Task, settings: TrainConfig) -> None:
        self.head, self.data, self.task, self.settings = head, data, task, settings

    def train_at_best_rate(self) -> tuple[nn.Module, float]:
        """A head trained on all rows at the rate that did best on some that were held out."""
        count, device = len(self.data.x), self.data.x.device
        order = torch.tensor(permutation(count, SPLIT_SEED, 1), device=device)
        held = order[: max(1, round(HELD_OUT * count))]
        rest = order[len(held) :] if len(held) < count else order
        unseen = self.data.take(held)
        found = {lr: self.quality(self.train(rest, lr), unseen) for lr in RATES}
        best = max(RATES, key=found.__getitem__)
        return self.train(order, best), best

    def train(self, rows: Tensor, lr: float) -> nn.Module:
        head = copy.deepcopy(self.head).train()
        settings, data = self.settings, self.data
        optimizer = make_optimizer(head, settings)
        for group in optimizer.param_groups:
            group["initial_lr"] = lr
        step, total = 0, settings.steps_of_run(math.ceil(len(rows) / settings.batch_size))
        while step < total:
            order = permutation(len(rows), settings.seed, step)
            for batch in rows[torch.tensor(order, device=rows.device)].split(settings.batch_size):
                step += 1
                if step > total:
                    break
                set_rates(optimizer, share_of_peak(step, total, total // 16, "linear"))
                truths = {name: truth[batch] for name, truth in data.truths.items()}
                self.task.head_loss(head(data.x[batch]), truths).backward()
                optimizer.step()
                optimizer.zero_grad()
        return head.eval()

    def quality(self, head: nn.Module, data: Features) -> float:
        """How well a head does by the task's metric; more is better."""
        score = head_scores(head, data, self.task)[self.task.metric]
        return score if self.task.higher_is_better else -score
