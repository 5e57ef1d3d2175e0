"""The call of `generate` that is decoded: its checks, and when it is decoded plainly.

Shapes: L tokens of the prompts.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import BaseStreamer
from transformers.generation.utils import GENERATION_MODES_MAPPING, GenerationMode

from petl.core.layers.context import is_encoder_decoder
from petl.core.types import CausalModel, base_of
from petl.efficiency.drafting.cache import refusal
from petl.efficiency.drafting.pairs import ModelInputs, why_unverified
from petl.efficiency.in_place_cache import cache_argument
from petl.errors import InputError, UnsupportedError
from petl.system.collectives import is_sharded


@dataclass(frozen=True)
class GenerateCall:
    """What `generate` prepares: the model, ids [rows, L], and what decides on each token."""

    model: CausalModel
    ids: Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig


def check_arguments(nodes: object, pack: object, config: GenerationConfig) -> None:
    """Raise InputError for an argument of `decode` that is out of range."""
    if nodes is not None and (isinstance(nodes, bool) or not isinstance(nodes, int) or nodes < 0):
        raise InputError(f"nodes={nodes!r} is no number of drafts: None, or 0 and more")
    if pack not in (True, False, "auto"):
        raise InputError(f"pack={pack!r} is none of True, False, 'auto'")
    if config.get_generation_mode() == GenerationMode.ASSISTED_GENERATION:
        raise InputError(
            f"prompt_lookup_num_tokens={config.prompt_lookup_num_tokens} and "
            f"assistant_early_exit={config.assistant_early_exit} draft as well; leave them out, or "
            "leave out custom_generate"
        )


# Plain decoding


def plain_reason(given: GenerateCall, kwargs: ModelInputs) -> str:
    """Return why a call is decoded plainly; "" if drafts are possible.

    Args:
        given: of the call.
        kwargs: further inputs of the model, with its cache.
    """
    model, config, count = given.model, given.config, len(given.ids)
    # greedy search is `_sample` as well, with do_sample=False
    if GENERATION_MODES_MAPPING[config.get_generation_mode()] != "_sample":
        return f"{config.get_generation_mode().value} keeps several texts"
    # rows would accept paths of unlike lengths, and a cache has one length for all
    if count != 1:
        return f"{count} rows are decoded together; give the prompts one by one"
    if why_unverified(model):
        return why_unverified(model)
    if is_sharded(model):
        return "the weights are sharded over processes, which must make the same passes"
    if not kwargs.get("use_cache", True):
        return "use_cache=False"
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        return "attentions or hidden states are asked for"
    if config.prefill_chunk_size is not None:
        return f"prefill_chunk_size={config.prefill_chunk_size}"
    return refusal(kwargs.get(cache_argument(model)))


def plainly(given: GenerateCall, stream: BaseStreamer | None, kwargs: ModelInputs) -> object:
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


def why_plain(model: nn.Module) -> str:
    """Return why a model is decoded without drafts; "" if drafts are possible.

    It is read from the class and the config; `verify` runs the model.
    """
    base = base_of(model)
    name = type(base).__name__
    if not (hasattr(base, "can_generate") and base.can_generate()):
        return f"{name} does not generate text, so there is nothing to draft"
    if why_unverified(base):
        return f"{why_unverified(base)}; it is decoded without drafts"
    if is_sharded(base):
        return (
            f"{name} is sharded over processes, which must make the same passes: use a merged "
            "base, or one that each process has as a whole"
        )
    reason = refusal(DynamicCache(config=base.config))
    return reason and f"{name} cannot be decoded with drafts: {reason}; use --drafter none"


def why_untrained(model: nn.Module) -> str:
    """Return why no drafter is trained for a model; "" if one can be."""
    base = base_of(model)
    if is_encoder_decoder(base):
        return (
            f"{type(base).__name__} is an encoder-decoder, whose drafters need no training: "
            "petl generate uses aggressive and recycling by itself"
        )
    return why_plain(base)
