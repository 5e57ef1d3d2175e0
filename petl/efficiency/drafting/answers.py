"""Answers that a model writes itself, with the states that chose each token: what drafters learn.

Shapes: T tokens of all rows, L of one row, H width, P positions.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from petl.core.model.modes import evaluation_mode
from petl.core.parameters import max_positions
from petl.core.types import Arguments, CausalModel, base_of
from petl.efficiency.drafting.calls import why_untrained
from petl.efficiency.drafting.registry import DraftAnswers
from petl.efficiency.in_place_cache import cache_arguments
from petl.errors import InputError, UnsupportedError
from petl.system.collectives import made_by, num_processes, number, shared_out
from petl.system.progress import Pass


@torch.no_grad()
def answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int = 128,
    batch_size: int = 16,
    **generation: object,
) -> DraftAnswers:
    """Let an adapted model answer prompts, and keep its states.

    Several processes (`torchrun`, a `Trainer` under it) call this together, with the same prompts:
    each answers its share, and all of them return the rows that one process would return.

    Args:
        model: a decoder with its adapters, in the dtype in which it will be used: rounding to 16
            bits changes some tokens.
        prompts: ids of each.
        tokens: of an answer at most.
        batch_size: prompts that are answered at a time.
        generation: further arguments of `generate`; without them answers are greedy. Sampled ones
            depend on torch's random state, of which one number is drawn.

    Returns:
        The rows in the order of the prompts, on the CPU; the states are in the model's dtype if
        that has 16 bits, else in bfloat16.

    Raises:
        InputError: there is no prompt, one is empty or too long, or a number is out of range.
        UnsupportedError: the model is no decoder that can be decoded with drafts, or it is sharded.
    """
    _check_model(model)
    _check(model, prompts, tokens, batch_size)
    # of similar length together: little padding, and the most memory is needed first
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    # the batches of one process, whoever answers them: padding would change rounding
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    # the cache may be off in the config of a model in training
    settings = {"do_sample": False, **generation, "max_new_tokens": tokens, "use_cache": True}
    seed = made_by(0, lambda: int(torch.randint(2**31, ()))) if settings["do_sample"] else None
    own = sum(map(len, batches[number() :: num_processes()]))
    with (
        evaluation_mode(model),
        Pass("writing answers", own, unit="answers", quiet=True) as shown,
    ):

        def answered(place: int) -> list[tuple[Tensor, Tensor]]:
            part = [prompts[i] for i in batches[place]]
            with seeded(model, None if seed is None else seed + place):
                written = _written(model, part, settings)
            rows = [(row, _states(model, row)) for row in written]
            shown.advance(len(rows))
            return rows

        found = shared_out([partial(answered, place) for place in range(len(batches))])
    by_prompt = dict(zip(order, chain.from_iterable(found), strict=True))
    whole, states = zip(*(by_prompt[i] for i in range(len(prompts))), strict=True)
    return DraftAnswers(
        torch.cat(whole), torch.cat(states), tuple(map(len, whole)), tuple(map(len, prompts))
    )


@contextmanager
def seeded(model: CausalModel, seed: int | None) -> Generator[None]:
    """Draw from a seed inside the block, and leave the random state as it was; None: nothing."""
    if seed is None:
        yield
        return
    device = model.device
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed)
        yield


def _check_model(model: nn.Module) -> None:
    base = base_of(model)
    reason = why_untrained(base)
    if reason:
        raise UnsupportedError(reason)
    if base.base_model is base:
        raise UnsupportedError(
            f"{type(base).__name__} has no body apart from its head, whose states a drafter reads"
        )
    config = getattr(model, "active_peft_config", None)
    if config is not None and config.is_prompt_learning:
        raise UnsupportedError(
            f"{config.peft_type} puts virtual tokens before the prompt, and is decoded without "
            "drafts: there is nothing to train a drafter for"
        )


def _check(
    model: nn.Module, prompts: Sequence[Sequence[int]], tokens: int, batch_size: int
) -> None:
    for name, value in (("tokens", tokens), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name}={value} is not 1 or more")
    if not prompts:
        raise InputError(f"prompts={prompts!r}: there are no prompts to answer")
    # None: rotary positions of any number
    limit = max_positions(base_of(model))
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {i} is empty")
        if limit is not None and len(prompt) + tokens > limit:
            raise InputError(
                f"prompt {i} has {len(prompt)} tokens and its answer up to {tokens}, but the model "
                f"has {limit} positions: shorten it, or set tokens"
            )


def _written(model: Any, prompts: Sequence[Sequence[int]], settings: Arguments) -> list[Tensor]:
    """Return prompt and answer of each row, without padding."""
    ids = [torch.as_tensor(prompt, dtype=torch.long) for prompt in prompts]
    config = base_of(model).generation_config
    pad = settings.get("pad_token_id", config.pad_token_id)
    pad = 0 if pad is None else int(pad)
    whole = {"input_ids": ids, "attention_mask": [torch.ones_like(row) for row in ids]}
    inputs = {
        name: pad_sequence(rows, True, pad if name == "input_ids" else 0, "left").to(model.device)
        for name, rows in whole.items()
    }
    # behind its end a row is padded, with the pad token or with the end token itself
    settings = {**cache_arguments(model, **settings), **settings, "pad_token_id": pad}
    found = model.generate(**inputs, **settings).cpu()
    ends = settings.get("eos_token_id", config.eos_token_id)
    ends = torch.tensor([] if ends is None else [ends] if isinstance(ends, int) else [*ends])
    length = inputs["input_ids"].shape[1]
    rows = []
    for row, prompt in zip(found[:, length:], ids, strict=True):
        stops = torch.isin(row, ends).nonzero()
        rows.append(torch.cat([prompt, row[: int(stops[0]) + 1] if len(stops) else row]))
    return rows


def _states(model: nn.Module, row: Tensor) -> Tensor:
    """Return the outputs of the final norm of a row, [L, H], 16 bits."""
    base = base_of(model)
    dtype = base.dtype if base.dtype.itemsize == 2 else torch.bfloat16
    # row by row: padding would change rounding, and long rows need little besides their states
    outputs = base.base_model(input_ids=row[None].to(base.device), use_cache=False)
    # the first output is that of the final norm
    return outputs[0][0].to(dtype).cpu()
