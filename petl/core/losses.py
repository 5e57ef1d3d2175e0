"""Extra loss terms: read from the settings of a run, attached to a wrapped model, found on it."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from peft import PeftModel
from torch import nn

from petl.core.layers.context import ForwardContext
from petl.core.model.heat_map import HeatMap
from petl.core.spec.config import require
from petl.core.spec.method import WRAP_ONLY, LossConfig, build_loss
from petl.core.support import Lacks
from petl.core.types import Batch, Settings

LOSSES = "petl_extra_losses"  # attribute of a PeftModel


class TrainingPart(Protocol):
    """Interface of what the lifecycle drives: an `AskingTuner`, or an extra loss on the model."""

    context: ForwardContext

    def series(self) -> dict[str, float]:
        """Return metrics of the last training forward for the log."""

    def heat_maps(self) -> list[HeatMap]:
        """Return maps of what it did, for the folder of a run."""


class ExtraLoss(TrainingPart, Protocol):
    """Interface of a loss term that is on a model in addition to its method."""

    @property
    def lacks(self) -> Lacks:
        """Its rows of the table of petl/core/support.py."""

    @property
    def config(self) -> LossConfig:
        """The loss's config."""

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Use training batches once, before the optimizer exists."""

    def report(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Return metrics over validation batches, to compare before and after training."""


def read(settings: Settings | None) -> LossConfig | None:
    """Build the loss config from `cfg.loss` (a name and fields); None if there is no extra loss.

    Raises:
        InputError: an unknown loss or field, an invalid value, or a field that sets the method,
            which a run sets by `+method=`.
    """
    if settings is None:
        return None
    fields = {str(key): value for key, value in settings.items()}
    for key in WRAP_ONLY:
        require(
            key not in fields,
            f"loss.{key}={fields.get(key)!r} is for petl.wrap only; here +method=NAME sets the "
            "method: leave it out",
        )
    config = build_loss(fields.pop("name", ""), **fields)
    config.check_driven()
    return config


def extra_losses(model: nn.Module) -> Sequence[ExtraLoss]:
    """Return the extra losses on a model."""
    return model.__dict__.get(LOSSES, ())


def loss_list(model: PeftModel) -> list[ExtraLoss]:
    """Return the list of extra losses on a PeftModel, to which one is attached by adding it."""
    # in `__dict__`: PeftModel looks up unknown attributes in the base model
    return model.__dict__.setdefault(LOSSES, [])
