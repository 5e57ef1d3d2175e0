"""The settings of a run, checked before anything is loaded.

`TrainConfig` has one field for each line under `train` in configs/train.yaml.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from petl import losses
from petl.config.schema import plain, read_fields
from petl.core.registry import list_methods, method
from petl.core.spec.losses import LossConfig
from petl.core.spec.method import LR
from petl.errors import InputError, UnknownNameError, did_you_mean
from petl.imports.plugins import import_modules
from petl.tracking import read_tracker

GROUPS = ("method", "model", "data", "train", "tracker")  # what a configuration consists of
ADDED = ("loss", "launch", "recipe", "imports")  # and may
CALLED_BY = ("method", "loss", "model", "data")


@dataclass(frozen=True)
class Rule:
    """What values a setting may take, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]

    def or_null(self) -> "Rule":
        return Rule(f"{self.words}, or null", lambda value: value is None or self.holds(value))


def whole(low: int) -> Rule:
    return Rule(f"a whole number from {low}", lambda value: value >= low)


def real(low: float, high: float = math.inf, *, above: bool = False) -> Rule:
    """From `low` (or, with `above`, greater than it) to `high`, and finite."""
    words = f"a number {'above' if above else 'from'} {low:g}"
    words += f" to {high:g}" if high < math.inf else ""
    return Rule(
        words,
        lambda x: math.isfinite(x) and (low < x if above else low <= x) and x <= high,
    )


def one_of(*options: Any) -> Rule:
    words = ", ".join("true" if o is True else "false" if o is False else o for o in options)
    return Rule(f"one of {words}", lambda value: value in options)


def setting(default: Any, rule: Rule) -> Any:
    """A dataclass field with the rule for its values."""
    return field(default=default, metadata={"rule": rule})


ANY_PATH = Rule("a path", lambda value: bool(value))
BETAS = Rule(
    "two numbers from 0 to below 1", lambda v: len(v) == 2 and all(0 <= beta < 1 for beta in v)
)
SIZES = Rule(
    "a file of scripts/find_batch_sizes.py, or rows of a step by the longest length: {16: 64}",
    lambda sizes: len(sizes) > 0 and min(*sizes, *sizes.values()) >= 1,
)
HELD_OUT = 0.1  # of the train rows, when evaluation steers and no share is given


@dataclass(frozen=True)
class TrainConfig:
    """How a run trains. What each setting means stands in configs/train.yaml."""

    epochs: float = setting(3.0, real(0, above=True))
    steps: int | None = setting(None, whole(1).or_null())
    batch_size: int = setting(32, whole(1))
    micro_batch_size: int | None = setting(None, whole(1).or_null())
    buckets: int | None = setting(None, whole(1).or_null())
    max_tokens: int | None = setting(None, whole(1).or_null())
    quadratic: float | None = setting(None, real(1).or_null())
    batch_sizes: dict[int, int] | None = field(default=None, metadata={"rule": SIZES.or_null()})

    budget: int | None = setting(None, whole(1).or_null())

    lr: float = setting(LR, real(0, above=True))
    find_lr: bool = setting(False, one_of(True, False))
    find_lr_steps: int = setting(100, whole(10))
    head_lr: float | None = setting(1e-2, real(0, above=True).or_null())
    loraplus_ratio: float | None = setting(None, real(0, above=True).or_null())
    weight_decay: float = setting(0.01, real(0))
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999], metadata={"rule": BETAS})
    max_grad_norm: float | None = setting(1.0, real(0, above=True).or_null())
    schedule: str = setting("linear", one_of("linear", "cosine", "constant"))
    warmup: float = setting(0.06, real(0))

    precision: str = setting("no", one_of("no", "bf16"))
    gradient_checkpointing: bool | str = setting(False, one_of(False, True, "reentrant"))
    fuse_lora: bool = setting(True, one_of(True, False))
    recompute_mlp: bool = setting(False, one_of(True, False))
    num_workers: int = setting(0, whole(0))

    eval_batch_size: int = setting(64, whole(1))
    eval_steps: int | None = setting(None, whole(1).or_null())
    validation_share: float | None = setting(None, real(0, 0.9, above=True).or_null())
    early_stopping: int | None = setting(None, whole(1).or_null())
    frozen_head: bool = setting(True, one_of(True, False))
    test: bool = setting(True, one_of(True, False))

    save_steps: int | None = setting(100, whole(1).or_null())
    keep_checkpoints: int = setting(2, whole(1))
    log_steps: int = setting(10, whole(1))

    seed: int = setting(0, Rule("a whole number from 0 to 2^32 - 1", lambda x: 0 <= x < 2**32))
    output: str = setting("runs", ANY_PATH)
    run: str | None = setting(None, ANY_PATH.or_null())
    resume: str | None = setting(None, ANY_PATH.or_null())

    def __post_init__(self) -> None:
        for entry in fields(self):
            rule, value = entry.metadata["rule"], getattr(self, entry.name)
            if not rule.holds(value):
                raise InputError(f"train.{entry.name}={value!r} is not {rule.words}")
        for dependent in ("early_stopping", "validation_share"):
            given = getattr(self, dependent)
            if given is not None and self.eval_steps is None:
                raise InputError(
                    f"train.{dependent}={given} needs train.eval_steps: how many steps "
                    "between evaluations on the rows held out"
                )
        self._check_buckets()
        if not self.test and self.eval_steps is None:
            raise InputError(
                "train.test=false leaves nothing to score a run by; add train.eval_steps: how many "
                "steps between evaluations on rows held out from train"
            )
        if self.warmup > 1 and self.warmup % 1:
            raise InputError(
                f"train.warmup={self.warmup} is neither a share of the steps below 1 "
                "nor a whole number of steps"
            )

    def _check_buckets(self) -> None:
        if self.batch_sizes is not None and self.buckets is not None:
            raise InputError(
                f"train.buckets={self.buckets} and train.batch_sizes both say where buckets end; "
                "leave one of them out"
            )
        if self.max_tokens is not None and self.buckets is None:
            raise InputError(
                f"train.max_tokens={self.max_tokens} needs train.buckets: of how many lengths "
                "steps are made, such as 30"
            )
        if self.quadratic is not None and self.max_tokens is None:
            raise InputError(
                f"train.quadratic={self.quadratic:g} needs train.max_tokens: what long rows count "
                "more against"
            )

    @property
    def bucketed(self) -> bool:
        """Whether the rows of a step are of similar length."""
        return self.buckets is not None or self.batch_sizes is not None

    @property
    def held_out(self) -> float:
        """Share of the train rows on which evaluation steers; 0 without `eval_steps`."""
        return 0.0 if self.eval_steps is None else self.validation_share or HELD_OUT

    def steps_of_run(self, per_epoch: int) -> int:
        """Optimizer steps of the whole run, when one pass over the train rows takes `per_epoch`."""
        return self.steps or math.ceil(self.epochs * per_epoch)

    def warmup_steps(self, total: int) -> int:
        """Optimizer steps over which the rate rises, of `total`.

        Raises:
            InputError: no step would be left after the warm-up.
        """
        steps = round(self.warmup * total) if self.warmup < 1 else round(self.warmup)
        if steps >= total > 1:
            raise InputError(
                f"train.warmup={self.warmup:g} is {steps} steps, and the run has only {total}; "
                "give fewer, or a share below 1"
            )
        return steps

    def computes_in(self, dtype: str) -> str:
        """The precision of products, "no" or "bf16", for a model of this dtype.

        A bf16 model trains with float32 adapters and head, which only autocast brings together.
        """
        return "bf16" if dtype == "bfloat16" else self.precision


def names_of(config: Mapping[str, Any]) -> list[str]:
    """What a run is called by: its recipe or method, an extra loss, the model, the data."""
    named = {group: config[group]["name"] for group in CALLED_BY if config.get(group)}
    if config.get("recipe"):
        named["method"] = config["recipe"]
    return [str(name) for name in named.values()]


def read_loss(cfg: DictConfig) -> LossConfig | None:
    """The checked settings of the extra loss that `+loss=NAME` adds; None without it.

    Raises:
        InputError: an unknown loss or setting, or a value out of range.
    """
    return losses.read(plain(cfg.loss)) if cfg.get("loss") is not None else None


def read_imports(cfg: DictConfig) -> None:
    """Import the modules of the setting `imports`, which register methods.

    Raises:
        InputError: one of them cannot be imported.
    """
    names = cfg.get("imports")  # None in runs from before there was such a setting
    import_modules(OmegaConf.to_container(names) if OmegaConf.is_config(names) else names)


def read_settings(cfg: DictConfig) -> TrainConfig:
    """The checked settings under `train`; all that can be said of `cfg` without data or model.

    Raises:
        InputError: an unknown name, a value of another type or out of range, no method, a module
            of `imports` that cannot be imported.
    """
    for key in cfg:
        if key not in (*GROUPS, *ADDED):
            raise UnknownNameError(f"no setting {key}{did_you_mean(str(key), (*GROUPS, *ADDED))}")
    read_imports(cfg)
    read_loss(cfg)
    read_tracker(plain(cfg.tracker))
    if not isinstance(cfg.get("method"), DictConfig) or "name" not in cfg.method:
        names = ", ".join(list_methods())
        raise InputError(f"no method is chosen: add +method=NAME; there are {names}")
    settings = read_train(cfg)
    try:
        entry = method(cfg.method.name)
    except UnknownNameError as error:  # and yet there is a YAML for it
        raise UnknownNameError(
            f"{error} (a method of your own: install its package, or add imports=[MODULE])"
        ) from error
    return settings if cfg.train.get("lr") is not None else replace(settings, lr=entry.lr)


def read_train(cfg: DictConfig) -> TrainConfig:
    """The checked settings under `train`, without asking for a method.

    Raises:
        InputError: as `read_settings`.
    """
    given = plain(cfg.train)
    if isinstance(given.get("batch_sizes"), str):
        given["batch_sizes"] = read_batch_sizes(Path(given["batch_sizes"]))
    return read_fields(TrainConfig, given, "train")


def read_batch_sizes(file: Path) -> dict[int, int]:
    """By the longest length of a bucket, the rows of its steps: what find_batch_sizes.py wrote.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    try:
        buckets: Any = OmegaConf.to_container(OmegaConf.load(file))
        return {bucket["longest"]: bucket["batch_size"] for bucket in buckets["buckets"]}
    except OSError as error:
        raise InputError(
            f"train.batch_sizes={file} cannot be read ({error.strerror}); "
            "scripts/find_batch_sizes.py makes such a file"
        ) from error
    except (TypeError, KeyError, YAMLError) as error:
        raise InputError(
            f"train.batch_sizes={file} holds no `buckets` with `longest` and `batch_size`; "
            "scripts/find_batch_sizes.py makes such a file"
        ) from error
