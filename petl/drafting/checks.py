"""Checks that drafts can be verified: a pass over several tokens must give what single ones give.

Shapes: L tokens of prompt and answer, T tokens of the answer, V tokens of the vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from petl.core.distributed import is_sharded
from petl.core.layers.context import is_encoder_decoder
from petl.core.model.modes import evaluation_mode
from petl.core.parameters import max_positions
from petl.drafting.cache import cache_argument, compact, refusal
from petl.errors import InputError, UnsupportedError

LARGEST = 1e-3  # difference of logits in float32
STEPS = 16  # in 16 bits: differences in steps of the dtype, relative to the largest logit
PROMISE = (
    "Every token is the one the model chose for exactly the text before it. In fp32 the answer is "
    "that of plain decoding; in 16 bits it may be another, equally good one."
)


def verify(model: Any, *, tokens: int = 32, cache_length: int = 32) -> float:
    """Compare a pass over several tokens with passes over one, on random text.

    Args:
        model: a decoder with its adapters, as they are active now; its random state and its modes
            are not changed.
        tokens: of the pass.
        cache_length: tokens before them.

    Returns:
        The largest difference of logits.

    Raises:
        UnsupportedError: the model is no decoder, its cache cannot be cropped, or the difference is
            larger than rounding (1e-3 in float32): answers would not be those of plain decoding.
    """
    base = _decoder(model)
    limit = max_positions(base)
    if limit is not None and limit < cache_length + tokens:
        cache_length = tokens = limit // 2
    found, largest = _differences(model, base, cache_length, tokens)
    bits = torch.finfo(base.dtype).eps
    allowed = LARGEST if bits < 1e-5 else STEPS * bits * largest
    # not `>`: NaN is to be refused, too
    if not found <= allowed:
        raise UnsupportedError(
            f"{type(base).__name__} cannot be decoded with drafts: logits of a pass over {tokens} "
            f"tokens differ from those of single passes by {found:.2g}, and {allowed:.2g} is "
            "allowed; an adapter or the model looks along the tokens. Use --drafter none"
        )
    return found


def rounding(model: Any, *, positions: int = 256) -> float:
    """Return the largest difference of logits between one pass and token after token.

    Args:
        model: a decoder with its adapters.
        positions: tokens that are compared; fewer if the model has fewer positions.
    """
    base = _decoder(model)
    limit = max_positions(base)
    positions = positions if limit is None else min(positions, limit - 1)
    return _differences(model, base, 1, positions)[0]


@torch.no_grad()
def shortfalls(model: Any, ids: Tensor, start: int) -> Tensor:
    """Return how far the logit of each token of a greedy answer is below the largest one, [T].

    A token of an answer in 16 bits may lie up to twice `rounding(model)` below; one that was not
    verified lies further. Settings that change logits, as a repetition penalty does, do not belong
    to such an answer.

    Args:
        model: that wrote the answer.
        ids: prompt and answer, [L] or [1, L].
        start: the number of tokens of the prompt.

    Raises:
        InputError: there is no answer.
    """
    ids = ids.reshape(1, -1).to(model.device)
    if not 0 < start < ids.shape[1]:
        raise InputError(f"start={start} is not from 1 to {ids.shape[1] - 1}: no token to check")
    with evaluation_mode(model):
        logits = model(input_ids=ids).logits[0, start - 1 : -1].float()
    own = logits.gather(-1, ids[0, start:, None])[:, 0]
    return logits.amax(-1) - own


def why_plain(model: Any) -> str:
    """Return why a model is decoded without drafts; "" if drafts are possible.

    It is read from the class and the config; `verify` runs the model.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = type(base).__name__
    if not (hasattr(base, "can_generate") and base.can_generate()):
        return f"{name} does not generate text, so there is nothing to draft"
    if is_encoder_decoder(base):
        return f"{name} is an encoder-decoder, which is decoded without drafts"
    if is_sharded(base):
        return f"{name} is sharded over processes, which must make the same passes"
    reason = refusal(DynamicCache(config=base.config))
    return reason and f"{name} cannot be decoded with drafts: {reason}; use --drafter none"


def _decoder(model: Any) -> Any:
    """Return the model of transformers, or raise UnsupportedError."""
    reason = why_plain(model)
    if reason:
        raise UnsupportedError(reason)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def _differences(model: Any, base: Any, cache_length: int, tokens: int) -> tuple[float, float]:
    """Return the largest difference of logits between one pass and many, and the largest logit."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = base.config.get_text_config().vocab_size
    shape = (1, cache_length + tokens)
    ids = torch.randint(vocabulary, shape, generator=generator).to(base.device)
    name = cache_argument(base)

    def logits(part: Tensor, cache: Any) -> Tensor:
        return model(input_ids=part, use_cache=True, **{name: cache}).logits[0].float()

    with evaluation_mode(model):
        cache = model(input_ids=ids[:, :cache_length], use_cache=True)[name]
        together = logits(ids[:, cache_length:], cache)
        compact(cache, [], tokens)
        one_by_one = torch.cat(
            [logits(ids[:, i : i + 1], cache) for i in range(cache_length, shape[1])]
        )
    return float((together - one_by_one).abs().max()), float(one_by_one.abs().max())
