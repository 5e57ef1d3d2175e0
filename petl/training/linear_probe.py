"""Linear probe: the score of the head alone on the frozen model, which an adapter has to beat.

The features, which are the inputs of the model's head, are computed once in evaluation mode; other
runs on the same base and rows read them (`FeatureCache`). A copy of the head is trained on them for
as many steps as the run, at the best of a few learning rates. The same pass over the test rows
scores the frozen model (`BaselineScores`).

Shapes: N rows, B rows of a batch, T tokens, H features.
"""

import copy
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from petl.core.registry import keeps_base
from petl.data.batch_sampler import chunks, permutation
from petl.data.tasks import SET
from petl.data.tasks.base import IGNORED, Task, not_finite
from petl.data.tasks.encoding_cache import content_hash
from petl.data.tasks.scores import named
from petl.system.collectives import is_sharded
from petl.system.progress import Pass, ProgressItems
from petl.training.dataloader import SPLIT_SEED, Batch, Splits, load, longest_first
from petl.training.evaluate import in_order
from petl.training.feature_cache import FeatureCache, computation
from petl.training.features import Context, RunFeature
from petl.training.optimizer import fraction_of_peak, make_optimizer, set_lr
from petl.training.runs.settings import VALIDATION_FRACTION, TrainConfig

HEAD_NAMES = ("classifier", "score", "qa_outputs")  # PEFT finds heads by these as well
ROWS = 64  # per batch
MAX_TOKEN_BYTES = 2e9  # assumption: features of all tokens that fit next to a model
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
logger = logging.getLogger(__name__)


@dataclass
class BaselineScores:
    """The frozen model's scores on the test rows, of the pass that computed the head's inputs.

    Attributes:
        sets: the names of the data sets that are mixed, which are scored one by one as well.
        scores: None before such a pass.
        parts: results of `Task.score`, batch by batch, of each set by number; 0 without sets.
        inputs: the first batch of this process, without labels.
        logits: the frozen model's for this batch.
    """

    sets: Sequence[str] = ()
    scores: dict[str, float] | None = None
    parts: dict[int, list[Tensor]] = field(default_factory=dict)
    inputs: Batch = field(default_factory=dict)
    logits: Tensor | None = None

    def add(
        self, task: Task, batch: Batch, logits: Tensor, rows: int, sets: Sequence[int] = ()
    ) -> None:
        """Score the first `rows` of a batch, those that no other process scores.

        Args:
            sets: the number of the set of each row of the batch, if there are several.
        """
        if self.logits is None:
            self.inputs = {k: v for k, v in batch.items() if k not in task.label_columns}
            self.logits = logits
        # values of rows, which a surplus row has twice, are put in order by `end`
        count = len(logits) if task.by_row else rows
        of_set = torch.tensor([*sets] if sets and not task.by_row else [0] * len(logits))[:count]
        for number in of_set.unique().tolist() or [0]:  # no row is a part of zeros
            picked = torch.nonzero(of_set == number)[:, 0].to(logits.device)
            scored = {name: values[picked] for name, values in batch.items()}
            score = task.score(task.outputs_from_logits(logits[picked]), scored)
            self.parts.setdefault(number, []).append(score)

    def end(self, task: Task, rows: Dataset, order: list[int], accelerator: Accelerator) -> None:
        """Make the scores of what was added, by all processes; of each set too."""
        own = rows_by_set(rows, self.sets)
        if task.by_row:
            values = accelerator.gather(torch.cat(self.parts[0]))
            in_place = in_order(values, order, accelerator.num_processes)
            self.scores = task.summarize_rows(in_place, rows)
            of_set = {
                name: task.summarize_rows(in_place[positions], rows.select(positions))
                for name, positions in own.items()
            }
        else:
            zero = torch.zeros_like(next(iter(self.parts.values()))[0])
            sums = [sum(self.parts.get(i, []), zero) for i in range(max(1, len(self.sets)))]
            totals = accelerator.reduce(torch.stack(sums), reduction="sum")
            self.scores = task.summarize(totals.sum(0))
            numbered = zip(self.sets, totals, strict=False)  # without sets, there is one total
            of_set = {name: task.summarize(total) for name, total in numbered if name in own}
        for name, scores in of_set.items():
            self.scores |= named(name, scores, task.metric)

    @torch.no_grad()
    def scores_of(
        self, model: nn.Module, task: Task, accelerator: Accelerator
    ) -> dict[str, float] | None:
        """Return the scores if `model` computes what the frozen one did; None if they are unknown.

        One batch tells: an adapter that has a part in the outputs changes those of any batch. All
        processes call it.
        """
        if self.scores is None:
            return None
        was_training = model.training
        model.eval()
        with accelerator.autocast():
            logits = task.head_logits(model(**self.inputs))
        model.train(was_training)
        assert self.logits is not None
        if not agree(torch.equal(logits, self.logits), accelerator):
            return None
        logger.info("before training: scored in the pass of the linear probe")
        return self.scores


class LinearProbe(RunFeature):
    """Scores the head trained alone, unless a stopped run has done so."""

    key = "linear_probe"

    def before_training(self, context: Context) -> None:
        """Train and score the head; the pass over the test rows gives the scores before."""
        settings, untrained = context.settings, BaselineScores(context.splits.sets)
        if self.key in context.run.scores:
            return
        scores = None
        if settings.test:
            model, splits = context.model, context.splits
            scores = linear_probe(model, splits, settings, context.accelerator, untrained)
            context.known = untrained.scores_of
        context.add({self.key: scores}, "linear probe")


def linear_probe(
    model: PeftModel,
    splits: Splits,
    settings: TrainConfig,
    accelerator: Accelerator,
    untrained: BaselineScores | None = None,
) -> dict[str, float] | None:
    """Return test scores of the head trained alone; None, with the reason logged, if impossible.

    Call it before the adapter is trained. The learning rate is chosen on rows held out from train;
    test is scored once. The model and the random states do not change.

    Args:
        untrained: gets the scores of the frozen model.
    """
    if not (splits.task.new_head and splits.task.tensors_by_row):
        return None
    if not isinstance(splits.train, Dataset):
        logger.info("no linear probe: the train rows are a stream")
        return None
    if is_sharded(model):
        logger.info("no linear probe: the model is sharded")
        return None
    base = model.get_base_model()
    head = find_head(base)
    if head is None:
        logger.info("no linear probe: the model has no %s", " or ".join(HEAD_NAMES))
        return None
    # if the method takes initial values from base weights, the frozen model is base and adapter
    base_is_pretrained = keeps_base(model.active_peft_config)
    size = settings.eval_batch_size
    reader = HeadReader(base, head, splits.task, accelerator, keeps=base_is_pretrained)
    with model.disable_adapter() if base_is_pretrained else nullcontext():
        train = features(reader, splits, splits.train, size)
        # rows of several tasks are scored by task, in passes of their own; an adapter that was
        # trained before may differ from the frozen model in few rows
        known = not splits.task.tasks and settings.init_from is None
        found = untrained if known else None
        test = train and features(reader, splits, splits.test, size, found)
    if train is None or test is None:
        return None
    original = head.original_module if isinstance(head, ModulesToSaveWrapper) else head
    # PEFT keeps the original head next to the trained copy
    head = copy.deepcopy(original).float().requires_grad_(True)
    task = copy.copy(splits.task)  # which settles on what suits this head
    probe = ProbeTrainer(head, train, task, settings, splits.sampler(settings).steps)
    device = accelerator.device
    with torch.random.fork_rng(
        [device] if device.type == "cuda" else []
    ):  # a head may have dropout
        trained, lr = probe.train_at_best_lr()
    scores = head_scores(trained, test, task)
    for name, own in rows_by_set(test.rows, splits.sets).items():
        part = test.take(torch.tensor(own, device=device))
        scores |= named(name, head_scores(trained, part, task), task.metric)
    if not_finite(scores):
        logger.warning("no linear probe: its outputs on the test examples are not finite")
        return None
    return {**scores, "lr": lr}


def rows_by_set(rows: Dataset, sets: Sequence[str]) -> dict[str, list[int]]:
    """Return the positions of the rows of each of the mixed sets that has any."""
    numbers = list(rows[SET]) if sets else []
    found = {name: [at for at, n in enumerate(numbers) if n == i] for i, name in enumerate(sets)}
    return {name: positions for name, positions in found.items() if positions}


@dataclass(frozen=True)
class Features:
    """Inputs of the head for each row, with the row's labels, on the device.

    Attributes:
        x: [N, H] or [N, 1, H], float32; [N, T, H] for a head that labels every token.
        labels: of the rows, [N] or [N, T] each; with the attention mask for such a head.
        rows: the encoded rows, N of them.
    """

    x: Tensor
    labels: Batch
    rows: Dataset

    def take(self, picked: Tensor) -> "Features":
        """Return some of the rows, by index."""
        labels = {name: values[picked] for name, values in self.labels.items()}
        return Features(self.x[picked], labels, self.rows.select(picked.tolist()))


def find_head(base: nn.Module) -> nn.Module | None:
    """Return the child module that computes the logits, found by its name."""
    children = base.named_children()
    return next((m for name, m in children if any(word in name for word in HEAD_NAMES)), None)


class HeadReader:
    """What a model's head reads: computed, or read from petl's cache.

    Args:
        base: the model, in evaluation mode.
        keeps: whether vectors of rows are kept; of a model that computes with an adapter they are
            of no other run. Those of tokens never are.
    """

    def __init__(
        self,
        base: nn.Module,
        head: nn.Module,
        task: Task,
        accelerator: Accelerator,
        *,
        keeps: bool = False,
    ) -> None:
        self.base, self.head, self.task, self.keeps = base, head, task, keeps
        self.accelerator = accelerator
        self._cache: FeatureCache | None = None

    @cached_property
    def computation(self) -> str:
        """The name of what computes the vectors; it reads all weights, once."""
        return computation(self.base, self.head)

    def open(self, rows: Dataset, *parts: int) -> None:
        """Let `next` read the vectors of these rows, divided into batches as `parts` tells."""
        if self.keeps:
            precision = str(self.accelerator.mixed_precision)
            self._cache = FeatureCache(self.computation, precision, content_hash(rows), *parts)

    def close(self) -> None:
        """Keep the vectors that were computed."""
        if self._cache:
            self._cache.write()
        self._cache = None

    def first(self, inputs: Batch) -> tuple[Tensor, Tensor]:
        """Return the vectors of the first batch, and the model's logits, from a pass."""
        read: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        with hook, self.accelerator.autocast():
            logits = self.task.head_logits(self.base(**inputs))
            if logits.dim() == 3:  # [B, T, H] for a head that labels every token
                return read[0], logits
            return one_vector(self.head, read[0], logits, inputs.get("attention_mask")), logits

    def next(self, inputs: Batch) -> tuple[Tensor, Tensor]:
        """Return the vectors of a further batch, and the head's logits of them."""
        known = self._cache.find(inputs) if self._cache else None
        if known is not None:
            vectors = known.to(self.accelerator.device)
        else:
            vectors, logits = self.first(inputs)
            if logits.dim() == 3:
                return vectors, logits
            if self._cache:
                self._cache.add(inputs, vectors)
        # of the vectors in both cases: the first run and later ones have the same bits
        with self.accelerator.autocast():
            return vectors, self.head(vectors)


@torch.no_grad()
def features(
    reader: HeadReader,
    splits: Splits,
    rows: Dataset,
    batch_size: int = ROWS,
    untrained: BaselineScores | None = None,
) -> Features | None:
    """Return the inputs of the head for each row; None, with the reason logged, if impossible.

    The head has to compute the model's logits from one vector per row, or per token.

    Args:
        batch_size: rows of a forward pass of a process.
        untrained: gets the scores of the model on the rows, computed as `evaluate` does.
    """
    accelerator, task = reader.accelerator, splits.task
    processes = accelerator.num_processes
    order = longest_first(task.lengths(rows))
    # token features of all batches get one width, that of the longest row
    width = task.width(splits.collate([rows[order[0]]]))
    # every process computes equally many rows; `in_order` drops the surplus
    own = order[accelerator.process_index :: processes]
    parts = chunks(own + order[: -(-len(order) // processes) - len(own)], batch_size)
    reader.base.eval()  # features without dropout
    vectors: list[Tensor] = []
    masks: list[Tensor] = []
    labels: dict[str, list[Tensor]] = {name: [] for name in task.label_columns}
    numbers = list(rows[SET]) if untrained is not None and untrained.sets else []
    loaded = load(rows, splits.collate, parts, accelerator.device)
    what = f"linear probe: features of {len(rows):,} examples"
    for batch in ProgressItems(loaded, what, len(parts)):
        # without labels the model computes no loss of its own
        inputs = {name: batch[name] for name in batch if name not in labels}
        read, logits = reader.next(inputs) if vectors else reader.first(inputs)
        by_token = logits.dim() == 3
        if not vectors:  # the first batch has the longest rows
            size = 4 * len(rows) * read[0].numel()
            with accelerator.autocast():
                usable = is_usable(reader.head, read, logits, size, accelerator)
            if not usable:
                return None
            if not by_token:
                reader.open(rows, batch_size, accelerator.process_index, processes)
        vectors.append(padded_to(read, width, 0) if by_token else read)
        for name, values in labels.items():
            given = batch[name]
            values.append(padded_to(given, width, IGNORED) if by_token else given)
        if by_token:
            masks.append(padded_to(inputs["attention_mask"], width, 0))
        if untrained is not None:
            at = len(vectors) - 1
            of_set = [numbers[row] for row in parts[at]] if untrained.sets else []
            untrained.add(task, batch, logits, len(own) - at * batch_size, of_set)

    reader.close()
    if untrained is not None:
        untrained.end(task, rows, order, accelerator)
    labels |= {"attention_mask": masks} if masks else {}

    def gather(parts: list[Tensor]) -> Tensor:
        return in_order(accelerator.gather(torch.cat(parts)), order, processes)

    x = gather([part.float() for part in vectors])
    return Features(x, {name: gather(parts) for name, parts in labels.items()}, rows)


def padded_to(values: Tensor, width: int | None, value: float) -> Tensor:
    """Pad values of tokens, [B, T, ...], to [B, width, ...]; values of rows, [B], stay as is."""
    missing = 0 if values.dim() == 1 or width is None else width - values.shape[1]
    return F.pad(values, (*(0, 0) * (values.dim() - 2), 0, missing), value=value)


def is_usable(
    head: nn.Module, vectors: Tensor, logits: Tensor, size: int, accelerator: Accelerator
) -> bool:
    """Return True if the head can be trained on such vectors, `size` bytes in all; log why not."""
    if not reproduces(head, vectors, logits, accelerator):
        logger.info("no linear probe: the head needs more than one vector per row")
        return False
    if logits.dim() == 3 and size > MAX_TOKEN_BYTES:
        logger.info(
            "no linear probe: the features of all tokens take up to %.0f GB, more than %.0f GB",
            size / 1e9,
            MAX_TOKEN_BYTES / 1e9,
        )
        return False
    return True


def one_vector(head: nn.Module, read: Tensor, logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the part of the head's input that gives the row's logits: [B, H] or [B, 1, H].

    Args:
        read: input of the head, [B, H] or [B, T, H]; of convolutional networks [B, H, 1, 1], which
            is returned as it is.
        mask: 0 at padding, [B, T]; None: there is none.

    The result is a guess, which `reproduces` confirms.
    """
    if read.dim() != 3:
        return read
    scores = head(read)
    if scores.dim() == 2:  # the head itself selects a token, usually the first
        return read[:, :1]
    # the head scores every token: take the one whose scores equal the logits
    distance = (scores - logits[:, None]).abs().amax(-1)
    every = torch.arange(len(read), device=read.device)
    mask = torch.ones_like(distance) if mask is None else mask
    last = mask.cumsum(1).argmax(1)  # the first of the largest
    # in few bits several tokens have the score: then the place that is one in all rows
    for place in (last, torch.zeros_like(last)):
        if torch.equal(distance[every, place], distance.amin(1)):
            return read[every, place]
    return read[every, distance.argmin(1)]


def reproduces(head: nn.Module, vectors: Tensor, logits: Tensor, accelerator: Accelerator) -> bool:
    """Return True if the head computes the model's logits from these vectors, on all processes."""
    # relative to float32 rounding; bfloat16 has 8 bits of mantissa
    tolerance = 1e-4 if logits.dtype == torch.float32 else 3e-2
    recomputed = head(vectors)
    same = recomputed.shape == logits.shape and torch.allclose(
        recomputed.float(), logits.float(), rtol=tolerance, atol=tolerance
    )
    return agree(same, accelerator)


def agree(vote: bool, accelerator: Accelerator) -> bool:
    """Return True if the votes of all processes are True; all must call it."""
    votes = torch.tensor(float(vote), device=accelerator.device)
    return int(accelerator.reduce(votes, reduction="sum")) == accelerator.num_processes


def head_scores(
    head: nn.Module, data: Features, task: Task, *, tunes: bool = False
) -> dict[str, float]:
    """Return the task's scores of a head.

    Args:
        tunes: as in `petl.training.evaluate.Evaluator.rows`.
    """
    parts = []
    with torch.no_grad():
        for start in range(0, len(data.x), ROWS):
            batch = slice(start, start + ROWS)
            labels = {name: values[batch] for name, values in data.labels.items()}
            parts.append(task.score(task.outputs_from_logits(head(data.x[batch])), labels))
    if task.by_row:
        return task.summarize_rows(torch.cat(parts), data.rows)
    total = torch.stack(parts).sum(0)
    return (task.tuned(total) if tunes else task).summarize(total)


class ProbeTrainer:
    """Trains copies of a head on cached features, each for the steps of the run."""

    def __init__(
        self, head: nn.Module, data: Features, task: Task, settings: TrainConfig, steps: int
    ) -> None:
        self.head, self.data, self.task = head, data, task
        self.settings, self.steps = settings, steps

    def train_at_best_lr(self) -> tuple[nn.Module, float]:
        """Train on all rows at the learning rate that is best on held-out ones; return both."""
        count, device = len(self.data.x), self.data.x.device
        # epoch 1 of the split seed: other rows than those of the validation split
        order = torch.tensor(permutation(count, SPLIT_SEED, 1), device=device)
        held = order[: max(1, round(VALIDATION_FRACTION * count))]
        # with a single row, train and validate on it
        remaining = order[len(held) :] if len(held) < count else order
        unseen = self.data.take(held)
        total = (len(LEARNING_RATES) + 1) * self.steps
        with Pass("linear probe: training the head", total, unit="steps") as shown:
            heads = {lr: self.train(remaining, lr, shown) for lr in LEARNING_RATES}
            scores = {
                lr: head_scores(head, unseen, self.task, tunes=True) for lr, head in heads.items()
            }
            best = max(LEARNING_RATES, key=lambda lr: self.task.quality(scores[lr]))
            self.task.settle(scores[best])
            return self.train(order, best, shown), best

    def train(self, rows: Tensor, lr: float, shown: Pass) -> nn.Module:
        """Return a copy of the head trained on some rows, by index."""
        head = copy.deepcopy(self.head).train()
        settings, data = self.settings, self.data
        # a head has no pretrained value to stay near, and no lora_B
        adamw = {"optimizer": "adamw", "delta_decay": 0.0, "delta_norm": "l2"}
        optimizer = make_optimizer(head, replace(settings, **adamw, loraplus_ratio=None))
        for group in optimizer.param_groups:
            group["initial_lr"] = lr  # instead of train.lr and train.head_lr
        # as many steps as the run, with a warm-up of a sixteenth (assumption)
        step, total = 0, self.steps
        while step < total:
            order = permutation(len(rows), settings.seed, step)
            for batch in rows[torch.tensor(order, device=rows.device)].split(settings.batch_size):
                step += 1
                if step > total:
                    break
                set_lr(optimizer, fraction_of_peak(step, total, total // 16, "linear"))
                labels = {name: values[batch] for name, values in data.labels.items()}
                self.task.head_loss(head(data.x[batch]), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
                shown.advance()
        return head.eval()
