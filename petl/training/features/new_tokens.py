"""New tokens (`data.new_tokens`): rows of the embedding that train beside the adapter."""

import logging

from petl.core.support import Capability
from petl.core.types import Fields
from petl.data.models.new_tokens import added_rows, indices_of, numbers_of
from petl.data.tasks.base import tokenizer_in
from petl.errors import InputError
from petl.training.features import RunFeature, Setup

logger = logging.getLogger(__name__)
SHOWN = 8  # tokens that a line names


class NewTokens(RunFeature):
    """Trains the rows of new tokens, which the task adds to tokenizer and model."""

    key = "new_tokens"
    settings: list[str]
    uses = (Capability.NEW_TOKENS,)
    lacks = {
        Capability.ZERO: "PEFT reads the rows from tables that DeepSpeed may divide",
    }

    def before_wrapping(self, setup: Setup, fields: Fields) -> Fields:
        """Return the fields with the rows that train."""
        shapes, tokenizer = setup.shapes(), tokenizer_in(setup.splits.processor)
        numbers = numbers_of(tokenizer, self.settings)
        indices = indices_of(shapes, numbers)
        given = fields.get("trainable_token_indices")
        if given not in (None, indices):
            raise InputError(
                f"trainable_token_indices={given} and data.new_tokens={self.settings}, which are "
                f"{indices}, both say which rows train: give one of them"
            )
        added = added_rows(shapes)
        known = [t for t, row in zip(self.settings, numbers, strict=True) if row not in added]
        line = said(len(self.settings) - len(known), known)
        if setup.run is None:
            setup.notes.append(line)
        else:
            logger.info(line)
        return {**fields, "trainable_token_indices": indices}


def said(added: int, known: list[str]) -> str:
    """Return how the rows of new tokens start, of those that were added and those there were."""
    start = "start at the mean of the tokens that each was divided into"
    parts = [f"the rows of {added} new tokens {start}"] if added else []
    if known:
        more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
        names = f"{', '.join(known[:SHOWN])}{more}"
        parts.append(f"the tokenizer has {names} already, whose rows start as they are")
    return "; ".join(parts)
