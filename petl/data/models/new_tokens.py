"""New tokens of a run or a user: in the tokenizer, and as rows of the model that train.

A token of the form <|NAME|> is a special one, which decoded answers leave out; others are words. A
token that the tokenizer lacks gets the next number, first those of spare rows that a base has after
its last token; then its tables grow. Its rows start at the mean of the rows of the tokens that it
was divided into before, in the embedding and in a head that is not tied to it. The rows of a token
that the tokenizer has start as they are.

The rows themselves train by PEFT's `trainable_token_indices`, with any method whose config has it.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from petl.data.tasks import NEW_TOKENS
from petl.errors import InputError

CONTROL = re.compile(r"<\|.*\|>")
Indices = list[int] | dict[str, list[int]]
Pieces = Mapping[str, Sequence[int]]  # by new token, the tokens that it was divided into
ADDED = "petl_added_rows"  # attribute of a model
PLAIN = "petl_plain"  # attribute of a tokenizer


def add_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]
) -> Indices:
    """Give a tokenizer and its model new tokens; return their `trainable_token_indices`.

    >>> rows = petl.add_tokens(base, tokenizer, ["<|tool|>", "myocarditis"])
    >>> model = petl.wrap(base, "mola", trainable_token_indices=rows)
    >>> tokenizer.save_pretrained("adapter")  # beside the adapter

    Call it in the same way before `petl.load`, on the base and its own tokenizer.

    Args:
        model: not wrapped yet; its tables grow in place if they have no rows left.
        tokenizer: that of the model; changed in place.
        tokens: texts, all of which may be known; <|NAME|> is a special token.

    Raises:
        InputError: a token is empty or there twice, or the model has no tables that can grow.
    """
    NEW_TOKENS.check("tokens", [*tokens] if isinstance(tokens, tuple) else tokens, list[str])
    pieces = pieces_of(tokenizer, tokens)
    extend_tokenizer(tokenizer, tokens)
    extend_tables(model, tokenizer, pieces)
    return indices_of(model, numbers_of(tokenizer, tokens))


def pieces_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> Pieces:
    """Return what a tokenizer divides those of the tokens into that it does not have."""
    known = tokenizer.get_vocab()
    new = [token for token in tokens if token not in known]
    return {token: tokenizer(token, add_special_tokens=False)["input_ids"] for token in new}


def extend_tokenizer(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Add those of the tokens that a tokenizer does not have."""
    known = tokenizer.get_vocab()
    new = [token for token in tokens if token not in known]
    if new and not hasattr(tokenizer, PLAIN):
        setattr(tokenizer, PLAIN, copy.deepcopy(tokenizer))
    special = [token for token in new if CONTROL.fullmatch(token)]
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.add_tokens([token for token in new if token not in special])


def plain_of(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a tokenizer as it was before it got new tokens, if it got them in this process."""
    return getattr(tokenizer, PLAIN, tokenizer)


def numbers_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Return the numbers of tokens that a tokenizer has.

    Raises:
        InputError: it does not have one.
    """
    known = tokenizer.get_vocab()
    missing = [token for token in tokens if token not in known]
    if missing:
        raise InputError(
            f"the tokenizer has no token {missing[0]!r}, whose row is trained: use the tokenizer "
            "that was saved with the adapter, or petl.add_tokens"
        )
    return [known[token] for token in tokens]


@torch.no_grad()
def extend_tables(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pieces: Pieces
) -> None:
    """Give a model rows for all tokens of its tokenizer, and new tokens their initial rows.

    Args:
        model: changed in place; on the meta device, only its shapes.
        tokenizer: with the new tokens.
        pieces: of the new tokens.
    """
    # some models raise it, which have no table or one of their own kind
    try:
        before = len(next(iter(weights_of(model).values())))
        if len(tokenizer) > before:
            # new rows are drawn before they are replaced
            with torch.random.fork_rng(devices=[]):
                model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    except NotImplementedError as error:
        raise InputError(f"{type(model).__name__} has no table of tokens that can grow") from error
    known = tokenizer.get_vocab()
    starts = {known[token]: [*parts] for token, parts in pieces.items()}
    for weight in {id(weight): weight for weight in weights_of(model).values()}.values():
        if weight.is_meta:
            continue
        for row in {*range(before, len(weight)), *starts}:
            # of a tokenizer that had the token, or a text that is divided into none: of all rows
            own = weight[starts.get(row) or slice(before)]
            weight[row] = own.float().mean(0).to(weight.dtype)
    setattr(model, ADDED, sorted({*added_rows(model), *range(before, len(tokenizer)), *starts}))


def added_rows(model: nn.Module) -> list[int]:
    """Return the rows of a model that are of tokens which it did not have when it was loaded."""
    return getattr(model, ADDED, [])


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tables of a model by path: that of its embedding, and of a head for tokens."""
    own = (model.get_input_embeddings(), model.get_output_embeddings())
    tables = {name: m for name, m in model.named_modules() if any(m is each for each in own)}
    return {name: cast(Tensor, table.weight) for name, table in tables.items()}


def indices_of(model: PreTrainedModel, numbers: Sequence[int]) -> Indices:
    """Return the `trainable_token_indices` of tokens: also those of a head that is not tied."""
    weights = weights_of(model)
    if len({id(weight) for weight in weights.values()}) == 1:
        return [*numbers]
    return {name: [*numbers] for name in weights}
