"""How a run trains: its settings under `train` in configs/train.yaml."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from omegaconf import DictConfig

from petl.errors import InputError, did_you_mean
from petl.system.files.paths import file_of, why_impossible
from petl.system.files.read import read_yaml
from petl.system.imports.tables import METHODS
from petl.system.settings.schema import plain
from petl.system.values import (
    BETAS,
    LARGEST,
    LR,
    Rule,
    check_rules,
    field,
    integer,
    one_of,
    read_fields,
    real,
)

if TYPE_CHECKING:
    from petl.core.types import Settings

ANY_PATH = Rule("a path", lambda value: not why_impossible(value))
AUTO = "auto"  # of `train.precision`: what `RunConfig.precision` finds
AUTO_OR_COUNT = Rule(
    "auto or an integer from 1",
    lambda v: v == "auto" or (isinstance(v, int) and not isinstance(v, bool) and v >= 1),
)
SIZES = Rule(
    "a file of `petl batch-sizes`, or batch sizes by longest length such as {16: 64}",
    lambda sizes: bool(sizes) and all(1 <= n <= LARGEST for n in (*sizes, *sizes.values())),
)
WEIGHTS = Rule(
    "balanced, or weights from 0 by class, such as {rare: 5}",
    lambda value: value == "balanced" if isinstance(value, str) else are_weights(value),
)
SEED = Rule("an integer from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32)
LOG_POINTS, MOST_LOG_STEPS = 20, 10  # points of a short run's curve; steps between them otherwise
VALIDATION_FRACTION = 0.1  # of the training examples, with eval_steps and no validation_share


def are_weights(value: dict[str | int, float]) -> bool:
    """True if a mapping has numbers from 0, not all of them 0."""
    weights = [*value.values()]
    return all(0 <= weight < math.inf for weight in weights) and any(weights)


@dataclass(frozen=True)
class TrainConfig:
    """How a run trains: the settings under `train`, which configs/train.yaml lists."""

    epochs: float = field(3.0, real(0, above=True), "passes over the training examples")
    steps: int | None = field(None, integer(0), "number of optimizer steps, instead of epochs")
    """0 is for methods that compute the adapter without training (icv), and for them alone."""
    batch_size: int = field(32, integer(1), "global batch size: examples per optimizer step")
    """It counts all processes and all micro-batches of a step."""
    micro_batch_size: int | None = field(
        None, integer(1), "maximum examples per forward pass of a process; null: no limit"
    )
    """A smaller value than a process's part of batch_size means gradient accumulation."""
    buckets: int | str | None = field(
        "auto",
        AUTO_OR_COUNT,
        "length-bucketed batching: about how many lengths to sort examples into, or auto",
    )
    """Each step holds examples of similar length, which reduces padding. Auto: the fewest that
    leave at most 2 % more positions than the best number, with 3 steps each or more; none where
    that saves nothing, where an epoch has fewer than 16 steps, and where rows are packed,
    streamed, ordered by class or sampled by class or at a temperature. Null: none.
    """
    max_tokens: int | None = field(
        None, integer(1), "with buckets, instead of batch_size: maximum tokens per step, padded"
    )
    quadratic: float | None = field(
        None, real(1), "with max_tokens: length at which an example counts twice, for attention"
    )
    batch_sizes: dict[int, int] | None = field(
        None, SIZES, "instead of batch_size and buckets: a file of petl batch-sizes"
    )

    budget: int | None = field(
        None, integer(1), "maximum number of adapter parameters, from which the rank is chosen"
    )
    """The head does not count. Null: the rank that the method's fields give."""

    lr: float = field(
        LR, real(0, above=True), "peak learning rate of the adapter; null: the method's default"
    )
    """`petl show METHOD` prints the default of a method."""
    head_lr: float | None = field(
        1e-2, real(0, above=True), "peak learning rate of a fully trained head; null: lr"
    )
    find_lr: bool = field(
        False,
        one_of(True, False),
        "choose lr by a range test before training; head_lr is scaled alike",
    )
    find_lr_steps: int = field(100, integer(10), "steps of the range test")
    loraplus_ratio: float | None = field(
        None, real(0, above=True), "LoRA+: learning rate of lora_B tensors divided by lr (2 to 16)"
    )
    optimizer: str = field(
        "adamw",
        one_of("adamw", "adamr"),
        "optimizer: adamw, or adamr, which decays towards the weights at the start",
    )
    """Methods that need an optimizer of their own, or add and exchange entries, refuse adamr."""
    delta_decay: float = field(
        0.0, real(0), "with adamr: decay towards the weights at the start of training"
    )
    delta_norm: str = field(
        "l2",
        one_of("l2", "l1"),
        "with adamr: l2 decays in proportion to the change, l1 by its sign",
    )
    weight_decay: float = field(
        0.01, real(0), "of matrices, except initial values taken from base weights (CorDA)"
    )
    betas: list[float] = field([0.9, 0.999], BETAS, "decay rates of the optimizer's two moments")
    max_grad_norm: float | None = field(
        1.0, real(0, above=True), "gradient clipping: maximum L2 norm; null: no clipping"
    )
    schedule: str = field(
        "linear",
        one_of("linear", "cosine", "constant"),
        "after the warm-up: linear or cosine decay to 0, or constant",
    )
    warmup: float = field(
        0.06, real(0), "warm-up: a fraction of all steps if below 1, else a number of steps"
    )

    precision: str = field(
        "auto",
        one_of("no", "bf16", "auto"),
        "autocast: bf16 for matrix products in bfloat16, no for float32, or auto",
    )
    """Auto: bf16 where the device computes such products in hardware, a trial of a second, kept for
    later runs, finds steps of the model's width at least a tenth faster, and nothing of the run
    needs float32, else no; or what `accelerate launch` was told. A run keeps what it began with,
    also when it is resumed on another machine.
    """
    gradient_checkpointing: bool | str = field(
        False,
        one_of(False, True, "reentrant"),
        "recompute activations of each block; reentrant: the old variant",
    )
    fuse_lora: bool = field(
        True, one_of(True, False), "fused forward and backward passes for PEFT's LoRA layers"
    )
    cache_frozen: bool | str = field(
        "auto",
        one_of("auto", True, False),
        "output of frozen blocks below the first trained one, kept on disk",
    )
    """Auto: where it changes nothing but rounding and the run reads its examples more than
    once. True also leaves out the base model's dropout below the first trained block, and is an
    error where the output cannot be kept.
    """
    recompute_mlp: bool = field(
        False,
        one_of(True, False),
        "activation recomputation in MLP blocks: stores half the activations",
    )
    skip_unread: bool = field(
        True,
        one_of(True, False),
        "leave out positions that nothing reads: in the last block, in the head of language models",
    )
    """A classifier reads one position of its last block; the loss of a language model reads
    those that predict a token with a label. The result is the same up to rounding; dropout in
    that block draws other masks. Models, methods and losses that read more positions are left
    alone.
    """
    fast_dropout: bool = field(
        True,
        one_of(True, False),
        "on a CPU, dropout of the base model from 16 random bits a value",
    )
    """Of the same distribution as torch's dropout, in a quarter of its time, but other masks. The
    probability is rounded to a multiple of 1/65,536.
    """
    cast_once: bool = field(
        True,
        one_of(True, False),
        "on a CPU with autocast, keep a copy of frozen weights in its dtype",
    )
    """Where they are multiplied with adapters, and in the head. The result is the same to the bit;
    the copies take half as much memory as the weights in float32.
    """
    loss_segment: int | str | None = field(
        "auto",
        AUTO_OR_COUNT,
        "positions whose logits exist at a time in training (causal LM); null: all",
    )
    """Auto: 2048 where the head is frozen."""
    together: int = field(1, integer(1), "runs of a sweep that train in one pass over one base")
    """Each is the run that it would be alone, up to rounding. Dropout, of the base model and of
    adapters, draws the masks of a run alone where the batches of a pass have one shape; else it
    draws for the padding as well.
    """
    num_workers: int = field(
        0, integer(0), "data loader processes; 0: the training process makes batches"
    )

    eval_batch_size: int = field(64, integer(1), "examples per forward pass of an evaluation")
    eval_steps: int | None = field(
        None, integer(1), "steps between evaluations on validation examples; null: none"
    )
    validation_share: float | None = field(
        None, real(0, 0.9, above=True), "fraction of the training examples held out for validation"
    )
    """Null: 0.1 with eval_steps, else none."""
    early_stopping: int | None = field(
        None, integer(1), "evaluations without improvement after which training stops"
    )
    """An improvement is one of the task's metric; of equal metrics, the lower loss is kept."""
    class_weights: str | dict[str | int, float] | None = field(
        None, WEIGHTS, "weights of classes in the loss: balanced, or {NAME: WEIGHT}; null: all 1"
    )
    """Balanced: rare classes count as much as frequent ones. See also data.sampling."""
    linear_probe: bool = field(
        True, one_of(True, False), "also train and score the head alone on the frozen model"
    )
    score_before: bool = field(
        True, one_of(True, False), "score the test examples before training as well"
    )
    test: bool = field(
        True,
        one_of(True, False),
        "score the test examples; false: for tuning on validation examples",
    )

    save_steps: int | None = field(
        100, integer(1), "steps between checkpoints; null: only when the run is stopped"
    )
    keep_checkpoints: int = field(
        2, integer(1), "latest checkpoints to keep, in addition to the best"
    )
    log_steps: int | None = field(
        None, integer(1), "steps between lines of metrics.jsonl; null: by the length, at most 10"
    )
    """Null is a twentieth of the run, from 1 to 10, so that a short run has a curve as well. A line
    has means over the steps since the one before it, at most the last 1,000.
    """

    seed: int = field(0, SEED, "seed of all random numbers of a run")
    output: str = field("runs", ANY_PATH, "directory in which each run gets a folder")
    run: str | None = field(
        None, ANY_PATH, "folder of this run, which must be empty or new; null: a name in output"
    )
    resume: str | None = field(
        None, ANY_PATH, "checkpoint or run to resume, or auto: the latest with these settings"
    )
    resume_schedule: str = field(
        "longer",
        one_of("longer", "fresh"),
        "resumed with more steps: as one longer run, or fresh for the added ones",
    )
    """Resuming a run with a larger train.steps or train.epochs trains it further, also when it
    was finished. With longer, the learning rate is that of a run which had the new length from
    its beginning; with fresh, warm-up and decay are those of a run of the added steps.
    """
    init_from: str | None = field(
        None, ANY_PATH, "adapter or run whose weights a new run starts from, with any data"
    )
    """The method and its fields are those of the saved adapter, so +method is not needed."""
    init_head: str | None = field(
        None,
        one_of("keep", "new"),
        "task head with init_from: keep or new; null: keep it for equal labels",
    )
    other_base: bool = field(
        False,
        one_of(True, False),
        "resume, or start from init_from, also on other base weights than saved",
    )

    def __post_init__(self) -> None:
        # the rule of each field first, then rules between fields
        check_rules(self, "train")
        for name in ("output", "run", "resume", "init_from"):
            given = getattr(self, name)
            if given is not None and given.startswith("~"):  # in a YAML; a shell replaces it
                home = Path(given).expanduser()
                raise InputError(f"train.{name}={given}: ~ is not replaced here; write {home}")
        for dependent in ("early_stopping", "validation_share"):
            given = getattr(self, dependent)
            if given is not None and self.eval_steps is None:
                raise InputError(
                    f"train.{dependent}={given} needs train.eval_steps: the number of steps "
                    "between evaluations on validation examples"
                )
        self._check_optimizer()
        self._check_buckets()
        if self.init_head is not None and self.init_from is None:
            raise InputError(
                f"train.init_head={self.init_head} needs train.init_from: the adapter to start from"
            )
        if not self.test and self.eval_steps is None:
            raise InputError(
                f"train.test={str(self.test).lower()} and train.eval_steps=null leave no score "
                "for the run: set train.eval_steps, the number of steps between evaluations on "
                "validation examples"
            )
        # 1.0 is one step, 1.5 is neither a fraction nor a number of steps
        if self.warmup > 1 and self.warmup % 1:
            raise InputError(
                f"train.warmup={self.warmup} is neither a fraction of the steps below 1 "
                "nor an integer number of steps"
            )

    def _check_optimizer(self) -> None:
        if self.optimizer == "adamw":
            for name in ("delta_decay", "delta_norm"):
                if getattr(self, name) != getattr(TrainConfig, name):
                    raise InputError(
                        f"train.{name}={getattr(self, name)} needs train.optimizer=adamr: AdamW "
                        "has no decay towards the weights at the start"
                    )
        elif self.weight_decay not in (0.0, TrainConfig.weight_decay):
            raise InputError(
                f"train.weight_decay={self.weight_decay:g} has no effect with "
                "train.optimizer=adamr: set train.delta_decay, and leave train.weight_decay out"
            )

    def _check_buckets(self) -> None:
        if self.batch_sizes is not None and isinstance(self.buckets, int):
            raise InputError(
                f"train.buckets={self.buckets} and train.batch_sizes both define buckets; "
                "leave one of them out"
            )
        if self.max_tokens is not None and self.buckets is None:
            raise InputError(
                f"train.max_tokens={self.max_tokens} needs train.buckets: auto, or the number of "
                "lengths to sort examples into, such as 30"
            )
        if self.quadratic is not None and self.max_tokens is None:
            raise InputError(
                f"train.quadratic={self.quadratic:g} needs train.max_tokens, the limit that "
                "long examples count more against"
            )

    @property
    def optimizer_state(self) -> tuple[int, str]:
        """Tensors that the optimizer keeps of each trained one, in float32, and what they are."""
        if self.optimizer == "adamr":
            return 3, "AdamR's two moments and reference"
        return 2, "AdamW's two moments"

    @property
    def bucket_settings(self) -> str:
        """The settings for which the examples of a step must be of similar length; "" without any.

        With train.buckets=auto alone they may be.
        """
        given = {name: getattr(self, name) for name in ("buckets", "max_tokens", "batch_sizes")}
        chosen = {name: value for name, value in given.items() if value not in (None, "auto")}
        return " and ".join(f"train.{name}={value}" for name, value in chosen.items())

    @property
    def validation_fraction(self) -> float:
        """Fraction of the training examples held out for validation; 0 without `eval_steps`."""
        if self.eval_steps is None:
            return 0.0
        return self.validation_share or VALIDATION_FRACTION

    def steps_of_run(self, per_epoch: int) -> int:
        """Return the optimizer steps of the run, of which one epoch takes `per_epoch`.

        Raises:
            InputError: there are more than any run could make.
        """
        steps = self.epochs * per_epoch if self.steps is None else self.steps
        if steps > LARGEST:
            raise InputError(
                f"train.epochs={self.epochs:g} is {steps:g} steps: no run has more than {LARGEST:,}"
            )
        return math.ceil(steps)

    def log_interval(self, total: int) -> int:
        """Return the steps between log lines of a run of `total` steps."""
        if self.log_steps is not None:
            return min(self.log_steps, total)  # the last step has a line at any interval
        return min(MOST_LOG_STEPS, max(1, total // LOG_POINTS))

    def warmup_steps(self, total: int) -> int:
        """Return the number of warm-up steps, out of `total` optimizer steps.

        Raises:
            InputError: no step would be left after the warm-up.
        """
        steps = round(self.warmup * total) if self.warmup < 1 else round(self.warmup)
        # a run of one step cannot warm up, whatever the setting
        if steps >= total > 1:
            raise InputError(
                f"train.warmup={self.warmup:g} is {steps} steps, and the run has only {total}; "
                "set fewer, or a fraction below 1"
            )
        return steps


def read_train(cfg: "DictConfig | Settings") -> TrainConfig:
    """Check the settings under `train` of a configuration that may have no method.

    Raises:
        InputError: an unknown setting, a value of another type or out of range.
    """
    given = plain(cfg["train"])
    # a file's name, or the sizes themselves, as a resumed run has them in its config
    if isinstance(given.get("batch_sizes"), str):
        given["batch_sizes"] = read_batch_sizes(given["batch_sizes"])
    return read_fields(TrainConfig, given, "train")


def require_method(cfg: DictConfig | Mapping[str, object]) -> None:
    """Raise InputError if no method is chosen, also by no adapter that the run starts from."""
    settings = plain(cfg)
    chosen = settings.get("method")
    if isinstance(chosen, Mapping) and "name" in chosen:
        return
    if settings["train"].get("init_from") is None:
        resumed = settings["train"].get("resume")
        if chosen is None and resumed and Path(str(resumed), "config.yaml").is_file():
            raise InputError(
                f"train.resume={resumed} without the settings of that run: write petl train "
                f"{resumed}/config.yaml train.resume={resumed}"
            )
        missing = (
            "no method is chosen: add +method=NAME"
            if chosen is None
            else "the YAML of the method has no `name`"
        )
        raise InputError(f"{missing}; available: {', '.join(METHODS)}")


def no_class(name: str, known: Sequence[str]) -> InputError:
    """Return the error for a name in train.class_weights that is none of the classes."""
    return InputError(
        f"train.class_weights names {name!r}, which is no class of the data"
        f"{did_you_mean(name, known)}"
    )


def adamr_text(train: "Settings") -> str | None:
    """Describe AdamR for the report of a run with these settings; None for AdamW."""
    if train["optimizer"] != "adamr":
        return None
    return f"AdamR, decay {train['delta_decay']:g} ({train['delta_norm']}) towards the start"


class Bucket(TypedDict):
    """The batch size of the examples up to a length in tokens."""

    longest: int
    batch_size: int


class BatchSizes(TypedDict):
    """The content of a file of batch sizes."""

    buckets: list[Bucket]


def read_batch_sizes(file: str) -> dict[int, int]:
    """Read batch sizes by the longest length of their bucket from a file of `petl batch-sizes`.

    Raises:
        InputError: the file cannot be read or has other content.
    """
    path = file_of("train.batch_sizes", file)
    try:
        buckets = read_yaml(path, BatchSizes)["buckets"]
    except InputError as error:
        raise InputError(
            f"train.batch_sizes: {error}; `petl batch-sizes` writes such a file"
        ) from error
    return {bucket["longest"]: bucket["batch_size"] for bucket in buckets}
