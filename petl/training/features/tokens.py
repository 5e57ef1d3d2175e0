"""Fewer tokens in the attention of a run's upper layers: `+tokens=lemo`."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel

from petl.core.model.modes import evaluation_mode
from petl.core.support import Capability
from petl.core.types import Fields
from petl.data.streaming import StreamedRows
from petl.data.validation import Row
from petl.efficiency.tokens import DropTokens
from petl.efficiency.tokens.settings import TokenSettings
from petl.errors import InputError
from petl.system.files.paths import file_of
from petl.system.values import field, one_of
from petl.training.dataloader import FirstBatches
from petl.training.features import Context, RunFeature, Setup

if TYPE_CHECKING:
    from petl.training.runs.config import RunConfig

MUCH = 0.5  # nats more of a loss, from which on it is a warning; assumption
logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class LemoConfig(TokenSettings):
    """The settings under `tokens`."""

    name: str = field("lemo", one_of("lemo"))


def has_several_texts(row: Row) -> bool:
    """Return True for a packed row of more than one text."""
    return row["position_ids"][-1] + 1 < len(row["input_ids"])


class DroppedTokens(RunFeature):
    """Leaves tokens out of the attention of upper layers, in training steps alone."""

    key = "dropped_tokens"
    Settings = LemoConfig
    settings: LemoConfig
    uses = (Capability.TOKENS,)

    def check(self, config: "RunConfig") -> None:
        """Raise InputError for settings that do not go together."""
        settings = self.settings
        if (settings.scorer == "predictor") != (settings.predictor is not None):
            raise InputError(
                f"tokens.scorer={settings.scorer} with tokens.predictor="
                f"{settings.predictor or 'null'!s}: scorer=predictor and a file that "
                "`petl train-predictors` has written go together"
            )
        if settings.predictor is not None:
            file_of("tokens.predictor", settings.predictor, [".safetensors"])

    def before_wrapping(self, setup: Setup, fields: Fields) -> Fields:
        """Let the wrapped model leave tokens out."""
        rows = setup.splits.train
        # the rows of a stream are not known yet
        streams = isinstance(rows, StreamedRows)
        if setup.splits.task.packs and (streams or any(map(has_several_texts, rows))):
            raise InputError(
                f"tokens={self.settings.name} leaves blocks of a text out, and data.pack=true puts "
                "several texts in a row: set data.pack=false"
            )
        setup.when_wrapped.append(self.drop)
        return fields

    def before_training(self, context: Context) -> None:
        """Say what leaving tokens out does to the loss of a training row; a resumed run has it."""
        if context.run.resume is not None:
            return
        device = context.accelerator.device
        batch = next(iter(FirstBatches(context.splits, context.settings, device)))
        row = {name: tensor[:1] for name, tensor in batch.items()}
        devices = [] if device.type == "cpu" else [device]
        # the run draws the same numbers as without these passes
        with (
            evaluation_mode(context.model),
            torch.random.fork_rng(devices),
            context.accelerator.autocast(),
        ):
            with torch.no_grad():
                whole = float(context.model(**row).loss)
            context.model.train()
            part = float(context.model(**row).loss.detach())
        context.add({self.key: {"loss_of_all": whole, "loss": part}}, "evaluation")
        is_much = part > whole + MUCH
        remedy = (
            f": tokens.keep={self.settings.keep:g} loses much of what these layers compute; raise "
            "it, or name fewer tokens.layers"
        )
        (logger.warning if is_much else logger.info)(
            "the loss of a training row is %.2f with tokens left out, and %.2f with all of them%s",
            part,
            whole,
            remedy if is_much else "",
        )

    def drop(self, model: PeftModel) -> None:
        """Rewrite the model of the run."""
        given = asdict(self.settings)
        given.pop("name")
        if self.settings.predictor is not None:
            given["predictor"] = str(Path(self.settings.predictor).expanduser())
        layers = DropTokens(TokenSettings(**given)).apply(model)
        logger.info(
            "attention of %d layers computes %.0f %% of the blocks of %d tokens (scorer %s)",
            layers,
            100 * self.settings.keep,
            self.settings.block,
            self.settings.scorer,
        )
