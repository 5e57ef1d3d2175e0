"""What is chosen for a run, as parts of which none may lack what another uses."""

from collections.abc import Iterable

from petl.core.registry import build_config, method_part
from petl.core.spec.method import loss_part
from petl.core.support import BASES, Capability, Part
from petl.core.types import Fields, Settings
from petl.data.models.quantization import PACKAGES
from petl.training.runs.config import RunConfig
from petl.training.runs.settings import TrainConfig

SCHEMES = dict(zip(PACKAGES, BASES, strict=True))
FLATTENED = "it flattens the parameters and their state; use +launch=fsdp, or ddp"


def choice_of(fields: Fields, run: RunConfig, features: Iterable[Part]) -> list[Part]:
    """Return what is chosen for a run: method, loss, launch, quantization, features, settings.

    Args:
        fields: of the method, its name included, with the steps of the run.
    """
    launch, scheme = run.launch, run.model.quantization
    parts = [
        method_part(build_config(**fields)),
        Part(f"launch={launch.name}", (Capability(launch.name),), launch.lacks, launch),
        *features,
        *_settings(run.train, run.resolved["data"]),
    ]
    if run.loss is not None:
        parts.append(loss_part(run.loss))
    if scheme is not None:
        parts.append(Part(f"model.quantization={scheme}", (SCHEMES[scheme],)))
    return parts


def _settings(train: TrainConfig, data: Settings) -> list[Part]:
    """Return the settings that exclude others."""
    parts, kind, tokens = [], train.gradient_checkpointing, train.loss_segment
    if train.optimizer == "adamr":
        lacks = {Capability.ZERO: FLATTENED}
        parts.append(Part(f"train.optimizer={train.optimizer}", (Capability.ADAMR,), lacks))
    if kind:
        used = Capability.REENTRANT if kind == "reentrant" else Capability.CHECKPOINTING
        parts.append(Part(f"train.gradient_checkpointing={str(kind).lower()}", (used,)))
    if tokens not in (None, "auto"):
        parts.append(Part(f"train.loss_segment={tokens}", (Capability.SEGMENTS,)))
    if train.bucket_settings:
        parts.append(Part(train.bucket_settings, (Capability.BUCKETS,)))
    if train.eval_steps is not None:
        parts.append(Part(f"train.eval_steps={train.eval_steps}", (Capability.EVALUATION,)))
    several = data.get("tasks") or (data.get("source") == "tasks" and data.get("sets"))
    if several:
        parts.append(Part(f"data with {[*several]}", (Capability.TASKS,)))
    return parts
