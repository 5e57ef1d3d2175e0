"""What the head alone reaches on the frozen model: the score that an adapter has to beat.

The features are what the model's head reads, computed once in evaluation mode; a copy of the head
is trained on them for as long as the run is, at the best of a few rates.

Shapes: N rows, B rows of a batch, T tokens, H features, C classes.
"""

import copy
import logging
import math
from contextlib import nullcontext
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from petl.batches import SPLIT_SEED, Splits, chunks, load, longest_first, permutation, to_device
from petl.core.registry import keeps_base
from petl.optim import make_optimizer, set_rates, share_of_peak
from petl.settings import HELD_OUT, TrainConfig
from petl.sharding import is_sharded

HEAD_NAMES = ("classifier", "score")  # PEFT too finds the head of a classifier by these
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
logger = logging.getLogger(__name__)


def frozen_head(
    model: PeftModel, splits: Splits, settings: TrainConfig, accelerator: Accelerator
) -> dict[str, float] | None:
    """Test scores of the head trained alone, before the adapter is; None with the reason logged.

    The rate is chosen on rows held out from train; test is scored once. The model stays as it is,
    and so do the random states.
    """
    if splits.task.labels is None or not settings.frozen_head:
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
        logger.info("no frozen-head score: the head needs more than one vector a row")
        return None
    plain = head.original_module if isinstance(head, ModulesToSaveWrapper) else head
    head = copy.deepcopy(plain).float().requires_grad_(True)
    probe = Probe(head, *train, settings)
    device = accelerator.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # its dropout draws
        trained, lr = probe.train_at_best_rate()
    with torch.no_grad():
        outputs = SimpleNamespace(logits=trained(test[0]))
        scores = splits.task.summarize(splits.task.score(outputs, {"labels": test[1]}))
    return {**scores, "lr": lr}


def find_head(base: nn.Module) -> nn.Module | None:
    """The child of a classifier that makes its logits, by name."""
    children = base.named_children()
    return next((m for name, m in children if any(word in name for word in HEAD_NAMES)), None)


@torch.no_grad()
def features(
    base: nn.Module, head: nn.Module, splits: Splits, rows: Dataset, accelerator: Accelerator
) -> tuple[Tensor, Tensor] | None:
    """What the head reads of each row, [N, H] or [N, 1, H] float32, and the labels [N], on device.

    None if the head does not make the model's logits of one vector a row.
    """
    processes, device = accelerator.num_processes, accelerator.device
    order = longest_first(splits.task.lengths(rows))
    # every process computes equally many rows; the surplus is cut off below
    mine = [order[i % len(order)] for i in range(accelerator.process_index, len(order), processes)]
    each = -(-len(order) // processes)
    mine += order[: each - len(mine)]
    read: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    base.eval()
    vectors, labels = [], []
    try:
        for batch in load(rows, splits.collate, chunks(mine, 64), device, workers=0):
            batch = to_device(batch, device)
            labels.append(batch.pop("labels"))
            read.clear()
            with accelerator.autocast():
                logits = base(**batch).logits
                vectors.append(one_vector(head, read[0], logits))
                if len(vectors) == 1 and not reproduces(head, vectors[0], logits, accelerator):
                    return None
    finally:
        hook.remove()
    found = torch.cat(vectors).float(), torch.cat(labels)
    return tuple(in_order(accelerator.gather(part), order, processes) for part in found)  # ty: ignore


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


def in_order(gathered: Tensor, order: list[int], processes: int) -> Tensor:
    """Rows in the order of the data set: process p sent those at p, p + P, ... of `order`."""
    dealt = gathered.unflatten(0, (processes, -1)).transpose(0, 1).flatten(0, 1)[: len(order)]
    placed = torch.empty_like(dealt)
    placed[torch.tensor(order, device=dealt.device)] = dealt
    return placed


class Probe:
    """Trains copies of a head on cached features."""

    def __init__(self, head: nn.Module, x: Tensor, y: Tensor, settings: TrainConfig) -> None:
        self.head, self.x, self.y, self.settings = head, x, y, settings

    def train_at_best_rate(self) -> tuple[nn.Module, float]:
        """A head trained on all rows at the rate that did best on some that were held out."""
        order = torch.tensor(permutation(len(self.x), SPLIT_SEED, 1), device=self.x.device)
        held = order[: max(1, round(HELD_OUT * len(order)))]
        rest = order[len(held) :] if len(held) < len(order) else order
        hits = {lr: self.hits(self.train(rest, lr), held) for lr in RATES}
        best = max(RATES, key=hits.__getitem__)
        return self.train(order, best), best

    def train(self, rows: Tensor, lr: float) -> nn.Module:
        head = copy.deepcopy(self.head).train()
        settings = self.settings
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
                F.cross_entropy(head(self.x[batch]), self.y[batch]).backward()
                optimizer.step()
                optimizer.zero_grad()
        return head.eval()

    @torch.no_grad()
    def hits(self, head: nn.Module, rows: Tensor) -> float:
        return (head(self.x[rows]).argmax(-1) == self.y[rows]).float().mean().item()
