"""Fewer tokens in the attention of a decoder's upper layers, in training on long rows.

    petl.drop_tokens(model, keep=0.4)                    # the blocks with the largest hidden states
    petl.drop_tokens(model, scorer="predictor", predictor="predictors.safetensors")

Of each row, blocks of 64 tokens are scored in each affected layer, and a share of them goes through
attention; the residual carries the others. It is an approximation, of the training forward alone.

Source: Wang et al., "LeMo: Enabling LEss Token Involvement for MOre Context Fine-tuning", arXiv
2501.09767, whose published code serves one model; and its later version, "Jenga", USENIX ATC 2025.

    scores.py         scores of blocks, the positions of those that are kept
    elimination.py    layers and their attention, at the kept positions
    layers.py         which layers of which models
    predictors.py     networks that predict scores, and how they are trained
    channels.py       MLPs that keep a part of their channels for backward
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import cast

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from petl.core.layers.class_swap import swap_class
from petl.core.parameters import check_module
from petl.core.support import Capability
from petl.core.tuners.asking import computes_by_position
from petl.core.types import Arguments, base_of
from petl.efficiency.recompute import gated_mlp
from petl.efficiency.rewrite import Rewrite, Value
from petl.efficiency.tokens.channels import KeptMlp, RecomputedNorm, norms_in
from petl.efficiency.tokens.elimination import (
    Scorer,
    TokenAttention,
    TokenBlock,
    oracle_map,
)
from petl.efficiency.tokens.layers import (
    SECOND_HALF,
    Layer,
    places_of,
    refusal_of_tokens,
    width_of_states,
)
from petl.efficiency.tokens.predictors import Predictors, train_predictors
from petl.efficiency.tokens.scores import Choice, column_sums, norm_scores
from petl.efficiency.tokens.settings import TokenSettings, layers_setting
from petl.errors import InputError, UnsupportedError
from petl.system.values import check_rules

__all__ = ["DropTokens", "drop_tokens", "train_predictors"]


def drop_tokens(  # noqa: PLR0913 (its settings are its interface)
    model: nn.Module,
    *,
    block: int = 64,
    layers: str | Sequence[int] = SECOND_HALF,
    keep: float = 0.4,
    scorer: str = "norm",
    predictor: str | Path | None = None,
    mlp_keep: float = 1.0,
    always_first: int = 1,
    always_last: int = 1,
) -> int:
    """Leave tokens out of the attention of a decoder's layers, from then on in training passes.

    Evaluation, generation, passes without gradients and compiled ones are as before. A second call
    replaces the first.

    Args:
        model: a PeftModel or a causal LM with rotary positions.
        block: tokens that are scored and kept together.
        layers: `second_half`, `all`, or numbers from 0.
        keep: share of the blocks that are kept, rounded up; 1: all.
        scorer: `norm`: mean norm of the hidden states; `predictor`: networks of `predictor`;
            `oracle`: what attention finds in a block, at the cost of attention to all tokens.
        predictor: file that `petl train-predictors` has written.
        mlp_keep: share of the channels of gated MLPs whose values are kept for backward, which
            takes the others for 0; 1: all.
        always_first, always_last: blocks at the ends of a row that are kept in any case.

    Returns:
        The number of layers.

    Raises:
        InputError: a value is not allowed, the file does not fit, or nothing reads it.
        UnsupportedError: the model is no such decoder, or its adapters read other positions.
    """
    check_module(model, "petl.drop_tokens")
    settings = TokenSettings(
        block=block,
        layers=layers_setting(layers),
        keep=keep,
        scorer=scorer,
        predictor=None if predictor is None else str(predictor),
        mlp_keep=mlp_keep,
        always_first=always_first,
        always_last=always_last,
    )
    check_rules(settings)
    return DropTokens(settings).apply(model)


class DropTokens(Rewrite):
    """`drop_tokens` as a rewrite, with its settings."""

    capability = Capability.TOKENS
    saves = "attention of upper layers computes a part of the tokens"
    only_trains = True
    mixins = (TokenBlock, TokenAttention, KeptMlp, RecomputedNorm)

    def __init__(self, settings: TokenSettings) -> None:
        self.settings = settings

    def refusal(self, model: nn.Module, value: Value = None) -> str:
        """Return why it is no such decoder, or that adapters read other positions than theirs."""
        reason = refusal_of_tokens(base_of(model)) or super().refusal(model, value)
        if reason or not isinstance(model, PeftModel) or computes_by_position(model):
            return reason and f"no tokens can be left out of attention: {reason}"
        return (
            f"no tokens can be left out of attention: adapters of {type(model.base_model).__name__}"
            " may read or count other positions than their own"
        )

    def change(self, model: nn.Module, value: Value = None) -> int:
        """Swap the classes of the layers, of their attention and MLPs."""
        settings = self.settings
        layers = places_of(base_of(model), settings.layers)
        scorers = self.scorers(base_of(model), [*layers])
        mlps = self.mlps(layers) if settings.mlp_keep < 1 else []
        # nothing was changed before all is known
        self.undo(model)
        choice = Choice(settings.block, settings.keep, settings.always_first, settings.always_last)
        for number, (layer, attention) in layers.items():
            swap_class(layer.get_submodule(attention), TokenAttention)
            swap_class(layer, TokenBlock)
            block = cast(TokenBlock, layer)
            block.choice, block.attention_path, block.scorer = choice, attention, scorers[number]
            block.reads_rows = number == min(layers)
        for mlp in mlps:
            swap_class(mlp, KeptMlp)
            cast(KeptMlp, mlp).mlp_keep = settings.mlp_keep
        for norm in (norm for layer in layers.values() for norm in norms_in(layer.module) if mlps):
            swap_class(norm, RecomputedNorm)
        return len(layers)

    def mlps(self, layers: Mapping[int, Layer]) -> list[nn.Module]:
        """Return the gated MLP of each layer."""
        found = {number: gated_mlp(layer.module) for number, layer in layers.items()}
        missing = [number for number, mlp in found.items() if mlp is None]
        if missing:
            raise UnsupportedError(
                f"mlp_keep={self.settings.mlp_keep} needs an MLP as Llama's (down_proj, act_fn, "
                f"gate_proj, up_proj) in each layer, and layer {missing[0]} has none"
            )
        return [mlp for mlp in found.values() if mlp is not None]

    def scorers(self, base: PreTrainedModel, numbers: Sequence[int]) -> dict[int, Scorer]:
        """Return the function of each layer that scores blocks."""
        settings = self.settings
        if (settings.scorer == "predictor") != (settings.predictor is not None):
            raise InputError(
                f"scorer={settings.scorer} with predictor={settings.predictor}: scorer=predictor "
                "and a file that `petl train-predictors` has written go together"
            )
        if settings.scorer == "norm":
            return dict.fromkeys(numbers, partial(by_norm, settings.block))
        if settings.scorer == "oracle":
            return dict.fromkeys(numbers, partial(by_oracle, settings.block))
        assert settings.predictor is not None
        heads = base.config.get_text_config().num_attention_heads
        file = Path(settings.predictor).expanduser()
        predictors = Predictors.load(file, numbers, settings.block, heads, width_of_states(base))
        predictors.to(base.device).eval()
        return {number: partial(by_predictor, predictors, number) for number in numbers}


def by_norm(size: int, block: TokenBlock, hidden: Tensor, valid: Tensor, _: Arguments) -> Tensor:
    """Return the mean norm of the hidden states of each block of tokens, [B, N]."""
    return norm_scores(hidden, valid, size)


def by_oracle(
    size: int, block: TokenBlock, hidden: Tensor, valid: Tensor, kwargs: Arguments
) -> Tensor:
    """Return what queries find in the keys of each block of tokens, [B, N]."""
    return column_sums(
        oracle_map(cast(nn.Module, block), block.attention_path, size, hidden, kwargs)
    )


def by_predictor(
    predictors: Predictors,
    number: int,
    block: TokenBlock,
    hidden: Tensor,
    valid: Tensor,
    _: Arguments,
) -> Tensor:
    """Return what the predictors of a layer expect that queries find, [B, N]."""
    return column_sums(predictors.map_of(number, hidden, valid))
