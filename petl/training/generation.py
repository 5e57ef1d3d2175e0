"""Answers of a model in evaluation mode, decoded greedily.

Shapes: B rows, T tokens of the longest prompt.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, cast
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from petl.core.parameters import max_positions
from petl.core.types import Arguments, CausalModel, Processor, base_of
from petl.data.tasks import IDS
from petl.data.tasks.base import pad_id, tokenizer_in
from petl.data.tasks.chat import ChatTokenizer, answer_ends
from petl.data.tasks.image_text.prompt import ConversationEncoder, ImagePrompt, prompt_inputs
from petl.errors import InputError
from petl.system.collectives import is_sharded

if TYPE_CHECKING:
    from petl.efficiency.drafting.registry import Drafter


@torch.no_grad()
def written(
    model: PreTrainedModel | PeftModel,
    processor: Processor,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    task_ids: Sequence[int] | None = None,
    *,
    is_chat: bool = False,
    prefix: str = "",
) -> list[str]:
    """Return the text that a model in evaluation mode writes after each prompt, greedily.

    Args:
        max_new_tokens: of an answer; fewer where its prompt leaves fewer positions (in a sharded
            model the longest prompt).
        task_ids: the task of each prompt, for a method that serves several.
        is_chat: prompts are turns of the chat template.
        prefix: with which the texts of an encoder-decoder begin.

    Raises:
        InputError: the model has a table of positions, and a prompt leaves none for an answer.
    """
    # imported only where rows are generated
    from petl.efficiency.cast_once import cast_for_decoding
    from petl.efficiency.in_place_cache import cache_arguments

    base, tokenizer = base_of(model), tokenizer_in(processor)
    longest = 0 if is_pair(model) else max(map(len, prompts))
    room = positions_behind(base, longest) or max_new_tokens
    if room < max_new_tokens and len(prompts) > 1 and not is_sharded(model):
        # each alone, or the longest prompt would cut the answers to the others
        alone = partial(written, model, processor, is_chat=is_chat, prefix=prefix)
        ids = [None if task_ids is None else [task_ids[i]] for i in range(len(prompts))]
        pairs = zip(prompts, ids, strict=True)
        return [alone([prompt], max_new_tokens, own)[0] for prompt, own in pairs]
    max_new_tokens = min(max_new_tokens, room)
    inputs = batched_prompts(prompts, pad_id(tokenizer), on_left=not is_pair(model))
    chat = encoder_in(processor) if is_chat else None
    more = {} if task_ids is None else {IDS: torch.tensor(task_ids)}
    if len(prompts) == 1 and task_ids is None and not isinstance(prompts[0], ImagePrompt):
        more = free_drafts(model)
        if more and is_pair(model) and prefix:
            more["encoder_input_ids"] = behind_prefix(tokenizer, prompts[0], prefix)
    if "custom_generate" not in more:  # which does so itself
        more |= cache_arguments(model)
    with cast_for_decoding(model):
        generated = cast(CausalModel, model).generate(
            **more,
            **{name: tensor.to(model.device) for name, tensor in inputs.items()},
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=answer_ends(tokenizer.eos_token_id, base, chat),
            pad_token_id=pad_id(tokenizer),
            synced_gpus=is_sharded(model),
        )
    # a decoder returns the prompt as well
    new = generated if is_pair(model) else generated[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new, skip_special_tokens=True)


def positions_behind(base: CausalModel, longest: int) -> int | None:
    """Return how many tokens a model has positions for behind a prompt; None without a limit.

    Raises:
        InputError: there are none.
    """
    # imported only where rows are generated
    from petl.efficiency.drafting.passes import has_position_table

    limit = max_positions(base) if has_position_table(base) else None
    if limit is not None and limit <= longest:
        raise InputError(
            f"a prompt has {longest:,} tokens, and the model has {limit:,} positions, for prompt "
            "and answer together: shorten it"
        )
    return None if limit is None else limit - longest


_drafters: "WeakKeyDictionary[CausalModel, Drafter]" = WeakKeyDictionary()  # by base model


def free_drafts(model: PreTrainedModel | PeftModel) -> Arguments:
    """Return arguments of `generate` that draft, see petl.drafting; empty if that is not possible.

    Below float32, where drafts may change an answer where two tokens are nearly equally likely,
    scores are those of plain decoding.
    """
    # imported only where rows are generated
    from petl.efficiency.drafting.calls import why_plain
    from petl.efficiency.drafting.engine import decode
    from petl.efficiency.drafting.registry import drafter

    base = base_of(model)
    is_half = base.dtype != torch.float32 or torch.is_autocast_enabled(base.device.type)
    if is_half or why_plain(base):
        return {}
    if base not in _drafters:
        _drafters[base] = drafter("free", model=base)
    return {"custom_generate": decode, "drafter": _drafters[base]}


def behind_prefix(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], prefix: str
) -> list[int]:
    """Return the tokens of a prompt behind a prefix, which no answer copies."""
    known = tokenizer(prefix)["input_ids"]
    # its last token may be another one before a text
    pairs = enumerate(zip(prompt, known, strict=False))
    end = next((i for i, (given, own) in pairs if given != own), len(known))
    return [*prompt[end:]]


def is_pair(model: PreTrainedModel | PeftModel) -> bool:
    """Return True if the model is an encoder with a decoder."""
    base = base_of(model)
    return base.config.is_encoder_decoder


def encoder_in(processor: Processor) -> ChatTokenizer:
    """What encodes conversations without images: a tokenizer, or it with the template of images."""
    if isinstance(processor, PreTrainedTokenizerBase):
        return processor
    return ConversationEncoder(processor)


def batched_prompts(
    prompts: Sequence[Sequence[int]], pad: int, *, on_left: bool
) -> dict[str, Tensor]:
    """Return the inputs of a model for prompts in a batch, with the pixels of their images."""
    pictured = [prompt for prompt in prompts if isinstance(prompt, ImagePrompt)]
    if not pictured:
        return padded(prompts, pad, on_left=on_left)
    assert len(pictured) == len(prompts), "prompts of one processor"
    if len(pictured) == 1:
        return pictured[0].inputs()
    return prompt_inputs(pictured, on_left=on_left)


def padded(rows: Sequence[Sequence[int]], pad: int, *, on_left: bool) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask`, each [B, T]; decoders need padding on the left."""
    ids = torch.full((len(rows), max(map(len, rows))), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(ids.shape[1] - len(row), None) if on_left else slice(len(row))
        ids[i, place] = torch.as_tensor(row)
        mask[i, place] = 1
    return {"input_ids": ids, "attention_mask": mask}
