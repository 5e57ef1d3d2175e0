"""The call of `generate` that is decoded: its checks, its rows, and when it is decoded plainly.

Shapes: L tokens of the prompts.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import (
    DynamicCache,
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    GenerationConfig,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteriaList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.utils import GENERATION_MODES_MAPPING, GenerationMode

from petl.core.layers.context import is_encoder_decoder
from petl.efficiency.drafting.cache import cache_argument, refusal
from petl.errors import InputError, UnsupportedError
from petl.system.collectives import is_sharded

# processors that hold the prompts of all rows, a cache of theirs, or take the number of the row
OF_ALL_ROWS = (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)


@dataclass(frozen=True)
class GenerateCall:
    """What `generate` prepares: the model, ids [rows, L], and what decides on each token."""

    model: Any
    ids: Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig


def check_arguments(nodes: Any, rows: Any, pack: Any, config: GenerationConfig) -> None:
    """Raise InputError for an argument of `decode` that is out of range."""
    if nodes is not None and (isinstance(nodes, bool) or not isinstance(nodes, int) or nodes < 0):
        raise InputError(f"nodes={nodes!r} is no number of drafts: None, or 0 and more")
    if rows not in (None, "sequential"):
        raise InputError(f"rows={rows!r} is neither None nor 'sequential'")
    if pack not in (True, False, "auto"):
        raise InputError(f"pack={pack!r} is none of True, False, 'auto'")
    if config.get_generation_mode() == GenerationMode.ASSISTED_GENERATION:
        raise InputError(
            f"prompt_lookup_num_tokens={config.prompt_lookup_num_tokens} and "
            f"assistant_early_exit={config.assistant_early_exit} draft as well; leave them out, or "
            "leave out custom_generate"
        )


# Plain decoding


def plain_reason(given: GenerateCall, kwargs: dict[str, Any]) -> str:
    """Return why a call is decoded plainly; "" if drafts are possible.

    Args:
        given: of the call.
        kwargs: further inputs of the model, with its cache.
    """
    # rows would accept paths of unlike lengths, and a cache has one length for all
    if len(given.ids) != 1 and _is_sampling(given.config):
        count = len(given.ids)
        return f"{count} rows are decoded together; pass rows='sequential' for one at a time"
    return reason_of_row(given, kwargs)


def reason_of_row(given: GenerateCall, kwargs: dict[str, Any]) -> str:
    """Return why a row of a call is decoded plainly, if it is alone; "" if drafts are possible."""
    model, config = given.model, given.config
    if not _is_sampling(config):
        return f"{config.get_generation_mode().value} keeps several texts"
    if is_encoder_decoder(model):
        return f"{type(model).__name__} is an encoder-decoder"
    if is_sharded(model):
        return "the weights are sharded over processes, which must make the same passes"
    if not kwargs.get("use_cache", True):
        return "use_cache=False"
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        return "attentions or hidden states are asked for"
    if config.prefill_chunk_size is not None:
        return f"prefill_chunk_size={config.prefill_chunk_size}"
    return refusal(kwargs.get(cache_argument(model)))


def _is_sampling(config: GenerationConfig) -> bool:
    """Return True if one text is kept; greedy search is `_sample` as well, do_sample=False."""
    return GENERATION_MODES_MAPPING[config.get_generation_mode()] == "_sample"


def plainly(given: GenerateCall, stream: Any, kwargs: dict[str, Any]) -> Any:
    """Decode as `generate` does without `custom_generate`."""
    mode = given.config.get_generation_mode()
    method = GENERATION_MODES_MAPPING[mode]
    if "/" in method:
        raise UnsupportedError(f"{mode.value} is not part of transformers any more: see {method}")
    if stream is not None:
        # `generate` itself hands the prompt to a streamer, `_sample` only what follows
        stream.put(given.ids.cpu())
        kwargs = {**kwargs, "streamer": stream}
    return getattr(given.model, method)(
        given.ids,
        logits_processor=given.processors,
        stopping_criteria=given.criteria,
        generation_config=given.config,
        synced_gpus=is_sharded(given.model),
        **kwargs,
    )


# Rows one after the other


def check_rows(given: GenerateCall, kwargs: dict[str, Any], stream: Any) -> None:
    """Raise InputError if rows cannot be decoded one after the other."""
    if stream is not None or given.config.return_dict_in_generate:
        raise InputError(
            f"rows='sequential' returns ids only: leave out stream={stream} and "
            f"return_dict_in_generate={given.config.return_dict_in_generate}"
        )
    shared = next((each for each in given.processors if isinstance(each, OF_ALL_ROWS)), None)
    if shared is not None:
        raise InputError(
            f"rows='sequential' takes no {type(shared).__name__}, which holds all rows together: "
            "leave out rows, or give the prompts one by one"
        )
    name = cache_argument(given.model)
    known = kwargs[name].get_seq_length()
    if known > 0:
        raise InputError(
            f"rows='sequential' begins with the prompts, and {name} has {known} tokens"
        )


def each_row(
    given: GenerateCall, kwargs: dict[str, Any]
) -> Iterator[tuple[GenerateCall, dict[str, Any]]]:
    """Yield a call for each row, and the inputs of the model for it, with an empty cache.

    In sampling, rows draw in another order than in a batch: other tokens of the same law.
    """
    name, count = cache_argument(given.model), len(given.ids)
    for i in range(count):
        own = {key: _row(key, value, i, count) for key, value in kwargs.items()}
        own[name] = copy.deepcopy(kwargs[name])
        # shallow copies: some criteria remember how far they have read
        processors = LogitsProcessorList(map(copy.copy, given.processors))
        criteria = StoppingCriteriaList(map(copy.copy, given.criteria))
        ids = given.ids[i : i + 1]
        yield replace(given, ids=ids, processors=processors, criteria=criteria), own


def _row(name: str, value: Any, i: int, rows: int) -> Any:
    # [3, rows, L] in models with positions in an image; all others have the rows first
    if name == "position_ids" and isinstance(value, Tensor) and value.dim() == 3:
        return value[:, i : i + 1]
    if isinstance(value, Tensor) and value.dim() and len(value) == rows:
        return value[i : i + 1]
    return value[i : i + 1] if isinstance(value, list) and len(value) == rows else value


def stacked(answers: Sequence[Tensor], config: GenerationConfig) -> Tensor:
    """Return ids of prompts and answers, [rows, longest], padded on the right as by `generate`."""
    pad = config._pad_token_tensor
    shape = (len(answers), max(map(len, answers)))
    found = answers[0].new_full(shape, 0 if pad is None else int(pad))
    for row, answer in zip(found, answers, strict=True):
        row[: len(answer)] = answer
    return found


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
        return (
            f"{name} is sharded over processes, which must make the same passes: use a merged "
            "base, or one that each process has as a whole"
        )
    reason = refusal(DynamicCache(config=base.config))
    return reason and f"{name} cannot be decoded with drafts: {reason}; use --drafter none"
