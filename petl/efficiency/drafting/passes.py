"""Forward passes of one row while it is decoded: the prompt, then a root with its drafts.

Shapes: L tokens of prompt and answer, N nodes of a pass, V tokens of the vocabulary, H width.
"""

import inspect
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, PreTrainedModel

from petl.core.layers.context import is_encoder_decoder
from petl.core.layers.layer import Adapter
from petl.core.types import CausalModel
from petl.efficiency.drafting import tree
from petl.efficiency.drafting.cache import compact, refusal
from petl.efficiency.drafting.calls import ModelInputs
from petl.efficiency.drafting.pairs import decoder_positions
from petl.efficiency.in_place_cache import cache_argument
from petl.errors import UnsupportedError

MASKED = ("sdpa", "eager")  # implementations of attention that take any mask
TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


def _reads_previous_token(module: nn.Module) -> bool:
    """Return True for an adapter with a router that reads the token before each one."""
    # in a pass it takes the node before for the previous token; in a tree that may be a sibling
    shared = module.info.shared if isinstance(module, Adapter) else None
    return bool(getattr(shared, "reads_previous_token", False))


def has_position_table(model: nn.Module) -> bool:
    """Return True if a model looks positions up, and so has none beyond its maximum."""
    # wpe: of GPT-2 and kin; rotary embeddings go on behind the length of training
    return any(
        isinstance(module, nn.Embedding) and ("position" in name or name.endswith("wpe"))
        for name, module in model.named_modules()
    )


def counts_places(model: nn.Module) -> bool:
    """Return True if distances between tokens go by places in the cache, padding among them.

    So it is with the window of GPT-Neo, and in models that take no positions (MPT, RoFormer).
    """
    return (
        "local" in getattr(model.config, "attention_layers", ())
        or "position_ids" not in inspect.signature(model.forward).parameters
    )


def takes_trees(model: PreTrainedModel) -> bool:
    """Return True if a model can compute a tree of tokens in one pass.

    Its attention then takes any mask, no bias or window of its attention goes by places in the
    cache (ALiBi of Falcon, `counts_places`), and no adapter reads the previous token.
    """
    return (
        model.config._attn_implementation in MASKED
        and not getattr(model.config, "alibi", False)
        and not counts_places(model)
        and not any(map(_reads_previous_token, model.modules()))
    )


class DraftPasses:
    """The passes of a model over one row, and its cache.

    Attributes:
        chains_only: True if the model cannot compute a tree.
        states: outputs of the final norm in the last pass, [N, H]; None unless they are captured.
    """

    def __init__(self, model: CausalModel, ids: Tensor, kwargs: ModelInputs) -> None:
        """Prepare passes.

        Args:
            model: of transformers, with its adapters.
            ids: of the prompt, [1, L].
            kwargs: further inputs of the model, with its cache.
        """
        self.model, self.ids, self.kwargs = model, ids, kwargs
        self.cache_name = cache_argument(model)
        self.states: Tensor | None = None
        self.is_own = False  # inside a pass of ours: processors and measurements make others
        self.limit = decoder_positions(model) if has_position_table(model) else None
        self.is_pair = is_encoder_decoder(model)
        self.has_keep = model._supports_logits_to_keep()  # ty: ignore[invalid-argument-type]
        # without position_ids, positions are taken from the number of tokens
        self.chains_only = kwargs.get("position_ids") is None or not takes_trees(model)

    @property
    def cache(self) -> Cache:
        """The cache."""
        return self.kwargs[self.cache_name]

    @property
    def inputs(self) -> ModelInputs:
        """Inputs of a pass besides tokens and cache: the outputs of an encoder, and their mask."""
        names = ("encoder_outputs", "attention_mask") if self.is_pair else ()
        return {name: self.kwargs.get(name) for name in names}

    @contextmanager
    def capturing(self, *, states: bool) -> Generator[None]:
        """Keep the outputs of the final norm inside the block, if `states`.

        Raises:
            UnsupportedError: the model has no body apart from its head.
        """
        if not states:
            yield
            return
        body = self.model.base_model
        if body is self.model:
            raise UnsupportedError(
                f"{type(self.model).__name__} has no body apart from its head, whose states a "
                "drafter could read; choose a drafter that reads tokens only"
            )
        handle = body.register_forward_hook(self._capture)
        try:
            yield
        finally:
            handle.remove()

    def _capture(self, module: nn.Module, args: object, output: Sequence[Tensor]) -> None:
        if self.is_own:
            # the last hidden state is first in tuples and outputs alike, [1, N, H]
            self.states = output[0][0]

    @contextmanager
    def _own(self) -> Generator[None]:
        """Capture the states of the pass inside the block, if states are captured."""
        self.is_own = True
        try:
            yield
        finally:
            self.is_own = False

    def all_ids(self, tokens: Sequence[int]) -> Tensor:
        """Return tokens that begin with those of earlier calls, [1, L]."""
        missing = len(tokens) - self.ids.shape[1]
        if missing:
            self.ids = torch.cat([self.ids, self.ids.new_tensor([tokens[-missing:]])], 1)
        return self.ids

    def prefill(self, config: GenerationConfig) -> Tensor:
        """Compute the prompt, and return the logits of its last tokens, [1 or L, V]."""
        with self._own():
            ids: Any = self.ids
            outputs = self.model._prefill(  # ty: ignore[invalid-argument-type]
                ids, config, self.kwargs, is_first_iteration=not config.is_assistant
            )
        self._update(outputs, 1)
        return outputs.logits[0]

    def refusal(self, length: int) -> str:
        """Return why drafts are not possible after the pass over `length` tokens; "": they are."""
        reason = refusal(self.cache)
        known = 0 if reason else self.cache.get_seq_length()
        # embeddings and virtual tokens of a prompt have entries but no ids: L would not fit S
        if not reason and known != length:
            reason = f"its cache has {known} entries for {length} tokens"
        return reason

    def has_room(self, count: int) -> bool:
        """Return True if there are positions for a pass over `count` tokens."""
        # entries, not positions, are counted: a tree is less deep than long, so this is cautious
        return self.limit is None or self.cache.get_seq_length() + count <= self.limit

    def run(
        self, ids: Sequence[int], tokens: Sequence[int], parents: Sequence[int], count: int
    ) -> Tensor:
        """Return the logits of a root and its drafts, [N, V]; see `Passes` of rounds.py."""
        kwargs, nodes = dict(self.kwargs), len(tokens) + 1
        input_ids = self.all_ids(ids)
        if count > 1:
            extra = [*tokens, *[0] * (count - nodes)]
            input_ids = torch.cat([input_ids, input_ids.new_tensor([extra])], 1)
            self._extend(kwargs, parents, count)
        if self.has_keep:
            kwargs["logits_to_keep"] = count
        inputs = self.model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=count if kwargs["use_cache"] else None, **kwargs
        )
        with self._own():
            outputs = self.model(**inputs, return_dict=True)
        self.kwargs[self.cache_name] = outputs[self.cache_name]
        self.outputs = outputs
        if self.states is not None:
            self.states = self.states[:nodes]
        return outputs.logits[0, -count:][:nodes]

    def _extend(self, kwargs: ModelInputs, parents: Sequence[int], count: int) -> None:
        """Extend the inputs that have an entry per token by the drafts and what fills them up."""
        # of an encoder-decoder, those without a prefix are the encoder's, which stay as they are
        prefix = "decoder_" if self.is_pair else ""
        name = f"{prefix}position_ids"
        positions = kwargs.get(name)
        if positions is not None:
            depth = tree.padded_depths(parents, count)[1:]
            # [1, L], or [axes, 1, L] in models with images; text moves along all axes alike
            added = positions.new_tensor(depth).expand(*positions.shape[:-1], -1)
            kwargs[name] = torch.cat([positions, positions[..., -1:] + added], -1)
        for name in TYPES:
            if kwargs.get(name) is not None:
                last = kwargs[name][..., -1:]
                kwargs[name] = torch.cat(
                    [kwargs[name], last.expand(*last.shape[:-1], count - 1)], -1
                )
        past = self.cache.get_seq_length()
        name = f"{prefix}attention_mask"
        mask = tree.extended_mask(kwargs.get(name), parents, count, past, self.model)
        if mask is not None:
            kwargs[name] = mask

    def keep(self, path: Sequence[int], count: int) -> None:
        """Keep the accepted nodes of the last pass in the cache; see `Passes` of rounds.py."""
        if count > 1:
            compact(self.cache, path, count)
        self._update(self.outputs, len(path))

    def _update(self, outputs: Any, tokens: int) -> None:
        """Take over the cache, and extend masks and positions by new tokens."""
        # token types get copies of the last `tokens` entries; later passes read the very last only
        self.kwargs = self.model._update_model_kwargs_for_generation(
            outputs, self.kwargs, is_encoder_decoder=self.is_pair, num_new_tokens=tokens
        )
        self.outputs = None
