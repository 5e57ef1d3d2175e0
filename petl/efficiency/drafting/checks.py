"""Checks that drafts can be verified: a pass over several tokens must give what single ones give.

Shapes: L tokens of prompt and answer, T tokens of the answer, V tokens of the vocabulary.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from petl.core.layers.context import is_encoder_decoder
from petl.core.model.modes import evaluation_mode
from petl.core.types import CausalModel, Fields, base_of
from petl.efficiency.drafting import tree
from petl.efficiency.drafting.cache import compact
from petl.efficiency.drafting.calls import why_plain
from petl.efficiency.drafting.engine import decode
from petl.efficiency.drafting.pairs import (
    decoder_positions,
    ids_argument,
    sample_inputs,
    vocabulary_size,
)
from petl.efficiency.drafting.passes import takes_trees
from petl.efficiency.drafting.registry import Drafter
from petl.efficiency.in_place_cache import cache_argument
from petl.errors import InputError, UnsupportedError

LARGEST = 1e-3  # difference of logits in float32
STEPS = 16  # in 16 bits: differences in steps of the dtype, relative to the largest logit
PROMISE = (
    "Every token is the one the model chose for exactly the text before it. In fp32 the answer is "
    "that of plain decoding; in 16 bits it may be another, equally good one."
)


def verify(model: nn.Module, *, tokens: int = 32, cache_length: int = 32) -> float:
    """Compare passes over several tokens with passes over one, on random text.

    The tokens are a chain and, where the model can compute one, a tree with two children at each
    node, with its mask and positions.

    Args:
        model: with its adapters, as they are active now; its random state and its modes are not
            changed. An encoder's outputs are random, too.
        tokens: of the pass.
        cache_length: tokens before them, and of an encoder.

    Returns:
        The largest difference of logits.

    Raises:
        UnsupportedError: the model has no decoder, its cache cannot be cropped, or the difference
            is larger than rounding (1e-3 in float32): answers would not be those of plain decoding.
    """
    base = _decoder(model)
    limit = decoder_positions(base)
    if limit is not None and limit < cache_length + tokens:
        cache_length = tokens = limit // 2
    chain = list(range(tokens - 1))
    kinds = {"chain": chain}
    if takes_trees(base):
        kinds["tree"] = [i // 2 for i in range(tokens - 1)]
    found = 0.0
    for kind, parents in kinds.items():
        gap, largest = _differences(model, base, cache_length, parents)
        bits = torch.finfo(base.dtype).eps
        allowed = LARGEST if bits < 1e-5 else STEPS * bits * largest
        # not `>`: NaN is to be refused, too
        if not gap <= allowed:
            raise UnsupportedError(
                f"{type(base).__name__} cannot be decoded with drafts: logits of a pass over a "
                f"{kind} of {tokens} tokens differ from those of single passes by {gap:.2g}, and "
                f"{allowed:.2g} is allowed; an adapter or the model looks along the tokens. Use "
                "--drafter none"
            )
        found = max(found, gap)
    return found


def check_answer(
    model: nn.Module, ids: Sequence[int], drafter: Drafter | str = "free", *, tokens: int = 64
) -> float:
    """Answer a prompt greedily with drafts, and check the answer by what is promised.

    In float32 it is compared with that of plain decoding. Below, each token's logit, computed by
    one pass over the whole answer, may be below the largest one by twice `rounding(model)`.

    Args:
        model: with its adapters, as they are active now.
        ids: of the prompt, which an encoder reads if there is one.
        drafter: that guesses, or its name.
        tokens: of the answer at most; fewer if the model has fewer positions.

    Returns:
        How far the logit of any token is below the largest one.

    Raises:
        UnsupportedError: an answer with drafts is not what is promised.
    """
    base = _decoder(model)
    limit = decoder_positions(base)
    # an answer of an encoder-decoder is behind the token that begins it
    start = 1 if is_encoder_decoder(base) else len(ids)
    room = tokens if limit is None else min(tokens, limit - start)
    if room < 1:
        raise InputError(f"the prompt has {len(ids)} tokens, and the model {limit} positions")
    prompt = torch.tensor([list(ids)], device=base.device)
    settings: Fields = {
        "attention_mask": torch.ones_like(prompt), "max_new_tokens": room, "do_sample": False,
        "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "use_cache": True,
        "pad_token_id": 0,
    }  # fmt: skip
    writer = cast(CausalModel, model)
    with evaluation_mode(model):
        found = writer.generate(prompt, **settings, custom_generate=decode, drafter=drafter)[0]
        encoder = prompt if is_encoder_decoder(base) else None
        gap = float(shortfalls(model, found, start, encoder).max())
        if torch.finfo(base.dtype).eps < 1e-5:
            plain = writer.generate(prompt, **settings)[0]
            if not torch.equal(found, plain):
                place = _first_difference(found.tolist(), plain.tolist()) - start
                raise UnsupportedError(
                    f"with drafts, token {place} of the answer is another than in plain decoding; "
                    f"its logit is up to {gap:.2g} below the largest. Use --drafter none"
                )
        else:
            allowed = 2 * rounding(model)
            if not gap <= allowed:
                raise UnsupportedError(
                    f"with drafts, the logit of a token of the answer is {gap:.2g} below the "
                    f"largest, and twice the rounding is {allowed:.2g}. Use --drafter none"
                )
    return gap


def _first_difference(ours: list[int], theirs: list[int]) -> int:
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


def rounding(model: nn.Module, *, positions: int = 256) -> float:
    """Return the largest difference of logits between one pass and token after token.

    Args:
        model: with its adapters.
        positions: tokens that are compared; fewer if the model has fewer positions.
    """
    base = _decoder(model)
    limit = decoder_positions(base)
    positions = positions if limit is None else min(positions, limit - 1)
    return _differences(model, base, 1, list(range(positions - 1)))[0]


@torch.no_grad()
def shortfalls(model: nn.Module, ids: Tensor, start: int, encoder: Tensor | None = None) -> Tensor:
    """Return how far the logit of each token of a greedy answer is below the largest one, [T].

    A token of an answer in 16 bits may lie up to twice `rounding(model)` below; one that was not
    verified lies further. Settings that change logits, as a repetition penalty does, do not belong
    to such an answer.

    Args:
        model: that wrote the answer.
        ids: prompt and answer, [L] or [1, L]; of an encoder-decoder what its decoder has read.
        start: the number of tokens of the prompt in them.
        encoder: tokens that an encoder reads, without padding, [1, S].

    Raises:
        InputError: there is no answer.
    """
    ids = ids.reshape(1, -1).to(base_of(model).device)
    if not 0 < start < ids.shape[1]:
        raise InputError(f"start={start} is not from 1 to {ids.shape[1] - 1}: no token to check")
    inputs = {ids_argument(base_of(model)): ids}
    if encoder is not None:
        inputs["input_ids"] = encoder
    with evaluation_mode(model):
        logits = model(**inputs).logits[0, start - 1 : -1].float()
    own = logits.gather(-1, ids[0, start:, None])[:, 0]
    return logits.amax(-1) - own


def _decoder(model: nn.Module) -> CausalModel:
    """Return the model of transformers, or raise UnsupportedError."""
    reason = why_plain(model)
    if reason:
        raise UnsupportedError(reason)
    return base_of(model)


@torch.no_grad()
def _differences(
    model: nn.Module, base: CausalModel, cache_length: int, parents: Sequence[int]
) -> tuple[float, float]:
    """Return the largest difference of logits between one pass and many, and the largest logit.

    Args:
        model: with its adapters.
        base: the model of transformers in it.
        cache_length: tokens before the root.
        parents: of the nodes behind the root, as in a draft.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary, count = vocabulary_size(base), len(parents) + 1
    shape = (1, cache_length + count)
    ids = torch.randint(vocabulary, shape, generator=generator).to(base.device)
    name, tokens = cache_argument(base), ids_argument(base)
    nodes = ids[:, cache_length:]
    common = {"use_cache": True, **sample_inputs(base, cache_length)}
    inputs: dict[str, Tensor] = {}
    if not tree.is_chain(parents):
        inputs["attention_mask"] = tree.tree_mask(parents, cache_length, base.dtype, base.device)
        depths = torch.tensor([tree.depths(parents)], device=base.device)
        inputs["position_ids"] = cache_length + depths

    def logits(part: Tensor, cache: object, **more: Tensor) -> Tensor:
        return model(**{tokens: part, name: cache}, **common, **more).logits[0].float()

    with evaluation_mode(model):
        cache = model(**{tokens: ids[:, :cache_length]}, **common)[name]
        together = logits(nodes, cache, **inputs)
        compact(cache, [], count)
        single: dict[int, Tensor] = {}
        # depth first, so that the cache holds the ancestors of each node
        waiting, path = [0], []
        while waiting:
            node = waiting.pop()
            above = parents[node - 1] if node else None
            while path and path[-1] != above:
                path.pop()
                compact(cache, [], 1)
            single[node] = logits(nodes[:, node : node + 1], cache)
            path.append(node)
            waiting += [i for i, parent in enumerate(parents, start=1) if parent == node]
        one_by_one = torch.cat([single[node] for node in range(count)])
    return float((together - one_by_one).abs().max()), float(one_by_one.abs().max())
