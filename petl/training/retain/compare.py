"""What a model has lost: on texts if it writes, of its features if it does not."""

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedTokenizerBase

from petl.core.model.names import input_embedding
from petl.core.parameters import max_positions
from petl.core.types import base_of
from petl.data.models.new_tokens import added_rows
from petl.errors import InputError
from petl.training.retain import drift
from petl.training.retain.drift import Drift
from petl.training.retain.measure import MAX_LENGTH, Retained, compare, encode_texts
from petl.training.retain.rows import Processor, RetainedRow, longest_for


def retained(
    model: nn.Module,
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase | Processor,
    *,
    base: nn.Module | None = None,
    max_length: int = MAX_LENGTH,
    batch_size: int = 8,
) -> Retained | Drift:
    """Measure what a model has lost on texts that it was not trained on.

    The model's mode, adapters, `requires_grad` and the random states are as before afterwards. Of
    a model that does not write, such as a classifier, it is the drift of its features.

    Args:
        model: with its active adapters; or any model, with its `base`.
        texts: plain texts.
        tokenizer: of the model, or its processor.
        base: the model to compare with; None: `model` without its adapters.
        max_length: tokens of a text, at least 2; no more than the model has positions.
        batch_size: texts in a pass.

    Raises:
        InputError: a text is no string, none has two tokens, the tokenizer is another model's,
            adapters are merged, or an argument is out of range.
        UnsupportedError: the model without its adapters is not the base it was trained on (CorDA,
            PiSSA), or it has no adapters, and there is no `base`.
    """
    return measured(
        model, texts, tokenizer, base=base, max_length=max_length, batch_size=batch_size
    )[0]


def measured(
    model: nn.Module,
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase | Processor,
    *,
    base: nn.Module | None = None,
    max_length: int = MAX_LENGTH,
    batch_size: int = 8,
) -> tuple[Retained | Drift, list[RetainedRow]]:
    """Return what `retained` does, and the encoded texts."""
    length = longest_for(tokenizer, max_length, max_positions(base_of(model)))
    # a model without a vocabulary has no loss on texts
    of_features = not writes(model)
    rows = encode_texts(texts, tokenizer, length, special=of_features)
    check_vocabulary(model, rows)
    if of_features:
        of_texts = drift.of_texts(rows, tokenizer, batch_size)
        return drift.compare(model, of_texts, base=base), rows
    return compare(model, rows, tokenizer, base=base, batch_size=batch_size), rows


def check_vocabulary(model: nn.Module, rows: Iterable[RetainedRow]) -> None:
    """Raise InputError if a text has a token that the model or its base has no embedding of."""
    own, added = {token for row in rows for token in row.ids}, added_rows(base_of(model))
    new = next((token for token in added if token in own), None)
    if new is not None:
        raise InputError(
            f"the tokenizer gives token {new}, which the base did not have: pass the tokenizer of "
            "the base, with which it is compared"
        )
    known = getattr(input_embedding(base_of(model)), "num_embeddings", None)
    most = max(own, default=0)
    if known is not None and most >= known:
        raise InputError(
            f"the tokenizer gives token {most}, and the model has {known}: it is that of another "
            "model; pass the tokenizer of the base"
        )


def writes(model: nn.Module) -> bool:
    """Return True unless a model is known to have no head that predicts the next token."""
    can_generate = getattr(base_of(model), "can_generate", None)
    return not callable(can_generate) or bool(can_generate())
