"""Which settings are tried, in the order of their worth, and what constraints exclude."""

import logging
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from petl.core.adapter_file import safetensors_bytes, saved_shapes
from petl.core.registry import METHODS, build_config, refusal
from petl.core.support import Capability
from petl.data.models.loading import load_base
from petl.errors import InputError, UnsupportedError
from petl.experiments.advice.evidence import Setting
from petl.experiments.planning.shapes import model_on_shapes
from petl.system.settings.command_line import preset_of
from petl.training.compose import compose
from petl.training.dataloader import Splits
from petl.training.features import Setup, features_of
from petl.training.runs.config import method_fields
from petl.training.runs.run_config import read_config

SIMPLEST, RANK = "lora", 8  # of the plain run
RANKS = (2, 4, 8, 16, 32)  # of LoRA
OTHERS = {"mola": 8, "adapter": 16, "mos": 16, "compacter": 16}  # methods and the rank of each
STEPS = 1000  # of a run, for methods with a schedule; assumption
STEP = 3.0  # from one learning rate to the next
# the best rate falls with the length to this power (Bjorck et al. 2024, arXiv:2409.19913, of the
# pretraining of language models; of adapters: assumption)
LAW = 0.32
# formats of `petl export` and the engine behind them, and what they need of a method
FORMATS = {
    "gguf": Capability.LORA_EXPORT,
    "vllm": Capability.LORA_EXPORT,
    "onnx": Capability.MERGE,
}
WRITERS = ("gguf", "vllm")  # of language models


def words_of(setting: Setting) -> list[str]:
    """Return the settings of `petl train` that choose a setting; seven digits name a rate."""
    return [f"+method={setting.method}", f"method.r={setting.rank}", f"train.lr={setting.rate:g}"]


def at(method: str, rank: int, power: int = 0) -> Setting:
    """Return a setting at the method's default rate times a power of `STEP`."""
    return Setting(method, rank, float(f"{METHODS[method].default_lr({}) * STEP**power:.3g}"))


def order(ranks: Sequence[int], others: Iterable[str]) -> list[Setting]:
    """Return settings to try, the plain run first, each before what is worth less.

    Args:
        ranks: of LoRA that may be tried, ascending; none: LoRA may not.
        others: methods that may be tried.
    """
    rest = [at(method, OTHERS[method]) for method in others]
    if not ranks:
        return [at(s.method, s.rank, power) for power in (0, 1, -1) for s in rest]
    # the plain run's rank, or the largest below it that may be tried
    usual = max((rank for rank in ranks if rank <= RANK), default=ranks[0])
    wider = [at(SIMPLEST, rank) for rank in (4 * usual,) if rank in ranks]
    narrower = [at(SIMPLEST, rank) for rank in (usual // 4,) if rank in ranks]
    rates = [at(SIMPLEST, usual, power) for power in (0, 1, -1)]
    return [*rates, *wider, *rest[:2], *narrower, *rest[2:]]


def neighbor(best: Setting, tried: Iterable[Setting], longer: float) -> Setting | None:
    """Return the setting whose rate may be better than that of the best one in longer trainings.

    That is the next lower rate if the law says so, else the next one outward, if the best is at an
    end of those that were tried; else None.

    Args:
        longer: the full length, in lengths of the trials in which it was the best.
    """
    rates = [s.rate for s in tried if (s.method, s.rank) == (best.method, best.rank)]
    if longer**LAW < STEP**0.5:  # nearer to its own rate than to the next one
        if len(rates) < 2 or min(rates) < best.rate < max(rates):
            return None
        if best.rate == max(rates):
            return best._replace(rate=float(f"{best.rate * STEP:.3g}"))
    return best._replace(rate=float(f"{best.rate / STEP:.3g}"))


@dataclass(frozen=True)
class Constraint:
    """What an option asks for.

    Attributes:
        words: the option, as it was given.
        why: returns why a method of a rank does not meet it; "": it does.
        nearest: says, once all were asked, what comes nearest to meeting it; "": not known.
    """

    words: str
    why: Callable[[str, int], str]
    nearest: Callable[[], str] = str


def needs(names: Sequence[str], task_type: str | None) -> list[Constraint]:
    """Return the constraints of --need.

    Raises:
        InputError: a format that no adapter of such a model has.
    """
    for name in names:
        if name in WRITERS and task_type != "CAUSAL_LM":
            raise InputError(
                f"--need {name} is for adapters of language models (data.task=causal_lm), and this "
                f"one has the type {task_type}; leave it out, or take lora, merge or onnx"
            )

    def needed(name: str) -> Constraint:
        capability = FORMATS.get(name) or Capability(name)

        def why(method: str, rank: int) -> str:
            fields = method_fields({**preset_of(method), "r": rank}, task_type, STEPS)
            return refusal(build_config(**fields), capability)

        return Constraint(f"--need {name}", why)

    return [needed(name) for name in names]


def within(limit: int, base: Sequence[str], splits: Splits) -> Constraint:
    """Return the constraint of --bytes, on the size of the file of the adapter with its head.

    Args:
        base: settings of `petl train` that all runs have.
    """
    names: dict[int, str] = {}  # by size
    errors: list[InputError | UnsupportedError] = []

    def why(method: str, rank: int) -> str:
        words = [*words_of(at(method, rank)), *base]
        try:
            with unlogged() if names or errors else nullcontext():
                size = file_bytes(words, splits)
        except (InputError, UnsupportedError) as error:  # not for this model
            errors.append(error)
            return str(error)
        names[size] = f"{method} of rank {rank}"
        return f"{size:,} bytes" if size > limit else ""

    def smallest() -> str:
        if not names:  # no limit would help
            raise errors[0]
        return f"the smallest file is that of {names[min(names)]}, {min(names):,} bytes"

    return Constraint(f"--bytes {limit:,}", why, smallest)


@contextmanager
def unlogged() -> Generator[None]:
    """Inside the block, log errors alone: what is said of one candidate holds for the others."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def file_bytes(words: Sequence[str], splits: Splits) -> int:
    """Return the size of adapter_model.safetensors of a run, from shapes."""
    config = read_config(compose(words))
    fields = Setup(load_base, config, splits, features_of(config.resolved)).fields()
    return safetensors_bytes(saved_shapes(model_on_shapes(config, splits.task, fields)[0]))


@dataclass(frozen=True)
class Shortlist:
    """The settings that may be advised, and those that constraints exclude.

    Attributes:
        allowed: in the order in which they are tried.
        excluded: by the words of a constraint, what it alone excludes, as far as it is tried to see
            what the constraint costs.
        reasons: by the words of a constraint, method and rank of what it excludes, with the reason.
    """

    allowed: list[Setting]
    excluded: dict[str, list[Setting]]
    reasons: dict[str, dict[tuple[str, int], str]]


def shortlist(constraints: Sequence[Constraint]) -> Shortlist:
    """Return which of the known settings meet the constraints.

    Raises:
        InputError: none; the message names the constraint that excludes most.
    """
    pairs = [*((SIMPLEST, rank) for rank in RANKS), *OTHERS.items()]
    reasons = {
        each.words: {pair: why for pair in pairs if (why := each.why(*pair))}
        for each in constraints
    }
    # those that all constraints leave
    left = [pair for pair in pairs if not any(pair in found for found in reasons.values())]
    if not left:
        most = max(reasons, key=lambda words: len(reasons[words]))
        (method, rank), why = next(iter(reasons[most].items()))
        nearest = "".join(f"; {text}" for each in constraints if (text := each.nearest()))
        raise InputError(
            f"no method meets {' and '.join(reasons)}: {most} excludes {len(reasons[most])} of "
            f"{len(pairs)} choices, such as {method} of rank {rank} ({why}); relax that one"
            f"{nearest}"
        )
    every = order(RANKS, OTHERS)
    allowed = order(
        [rank for method, rank in left if method == SIMPLEST],
        [method for method, _ in left if method != SIMPLEST],
    )
    # what two constraints exclude is the price of neither
    alone = {
        words: [
            setting
            for setting in every
            if (pair := setting[:2]) in found
            and not any(pair in others for name, others in reasons.items() if name != words)
        ][:1]
        for words, found in reasons.items()
    }
    return Shortlist(allowed, {k: v for k, v in alone.items() if v}, reasons)
