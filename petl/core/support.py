"""What excludes what: one table of methods, losses, rewrites and features of a run.

Whatever can be chosen for a run declares what it `lacks`: by capability, the reason. A pair is
declared once, by the younger of the two. `conflicts` compares all that is chosen; the checks of
`petl.testing` prove a cell of the table either way, that it works or is refused with that reason.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from petl.errors import UnsupportedError

# why something lacks a capability: a sentence, or a function of its config that returns one; "":
# it has the capability
Reason = str | Callable[[Any], str]
Lacks = Mapping["Capability", Reason]


class Capability(StrEnum):
    """What a method, loss, rewrite or feature of a run works with, unless it `lacks` it."""

    # how processes divide the work
    DDP = "ddp"
    FSDP = "fsdp"
    FSDP1 = "fsdp1"  # not of a run, but of Trainer and Accelerate
    ZERO = "deepspeed"
    # quantization of the base model
    BASE_4BIT = "4bit"
    BASE_8BIT = "8bit"
    BASE_TORCHAO = "torchao"
    BF16 = "bf16"  # autocast: with what lacks it, train.precision=auto is float32
    EXPERTS = "experts"  # stacked in one parameter, see petl/core/experts
    # a training step, and the rewrites of `petl.efficiency`
    CHECKPOINTING = "checkpointing"
    REENTRANT = "reentrant"
    COMPILE = "compile"
    FUSE_LORA = "fuse_lora"
    RECOMPUTE = "recompute_mlp"
    SEGMENTS = "loss_segment"
    SKIP = "skip_unread"
    FAST_DROPOUT = "fast_dropout"
    CAST_ONCE = "cast_once"
    STORE = "cache_frozen"
    TOGETHER = "together"
    TOKENS = "tokens"
    # what a trained adapter can do
    MIXED_BATCH = "mixed"
    MERGE = "merge"
    LORA_EXPORT = "lora"
    # what a run does besides
    TRAIN = "train"
    ADAMR = "adamr"
    RANKS = "ranks"
    EXTRA_LOSS = "loss"
    BUCKETS = "buckets"
    EVALUATION = "eval_steps"
    FIND_LR = "find_lr"
    SIZE = "budget"
    TASKS = "tasks"
    NEW_TOKENS = "new_tokens"
    # what a method does to the model
    NEW_HEAD = "new_head"
    CHANGED_BASE = "changed_base"
    BIASES = "biases"
    PROMPTS = "prompts"


@dataclass(frozen=True)
class Part:
    """One of the things that are chosen together.

    Attributes:
        name: as it was chosen, such as "train.optimizer=adamr".
        uses: the capabilities that it needs of all others.
        lacks: its rows of the table.
        config: what reasons that are functions are called with.
    """

    name: str
    uses: Collection[Capability] = ()
    lacks: Lacks = field(default_factory=dict)
    config: object = None


class Conflict(NamedTuple):
    """Two things that are chosen together, of which one lacks the other."""

    wanted: str
    without: str
    reason: str

    def __str__(self) -> str:
        return f"{self.wanted} is not possible with {self.without}: {self.reason}"


def conflicts(choice: Iterable[Part]) -> list[Conflict]:
    """Return every pair of a choice of which one part lacks what the other uses."""
    parts = [*choice]
    return [
        Conflict(wanted.name, part.name, reason)
        for part in parts
        for wanted in parts
        for capability in wanted.uses
        if wanted is not part and (reason := reason_of(part.lacks, capability, part.config))
    ]


def require_compatible(choice: Iterable[Part]) -> None:
    """Raise UnsupportedError, with the reason, if a part of a choice lacks what another uses."""
    for conflict in conflicts(choice):
        raise UnsupportedError(str(conflict))


# of PEFT's methods without one
NO_CONVERSION = "PEFT has no conversion of it to LoRA; `petl merge` writes a merged model instead"
BASES = (Capability.BASE_4BIT, Capability.BASE_8BIT, Capability.BASE_TORCHAO)


def without_lora(lacks: Lacks, config: object) -> str:
    """Return why no LoRA has the outputs of an adapter: it is no sum of weights, or another one."""
    return reason_of(lacks, Capability.MERGE, config) or reason_of(
        lacks, Capability.LORA_EXPORT, config
    )


def reason_of(lacks: Lacks, capability: Capability, config: object) -> str:
    """Return why a capability is lacking with this config; "": it is there."""
    reason = lacks.get(capability, "")
    return reason if isinstance(reason, str) else reason(config)
