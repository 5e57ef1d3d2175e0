"""New tokens of a run or a user: in the tokenizer, and as rows of the model that train.

A token of the form <|NAME|> is a special one, which decoded answers leave out; others are words. A
token that the tokenizer lacks gets the next number, first those of spare rows that a base has after
its last token; then its tables grow. Its rows start at the mean of the rows of the tokens that it
was divided into before, in the embedding and in a head that is not tied to it. The rows of a token
that the tokenizer has start as they are.

The rows themselves train by PEFT's `trainable_token_indices`, with any method whose config has it.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from petl.errors import InputError

CONTROL = re.compile(r"<\|.*\|>")
Indices = list[int] | dict[str, list[int]]
Pieces = Mapping[str, Sequence[int]]  # by new token, the tokens that it was divided into
ADDED = "petl_added_rows"  # attribute of a model


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
    check_tokens(tokens)
    pieces = pieces_of(tokenizer, tokens)
    extend_tokenizer(tokenizer, tokens)
    extend_tables(model, tokenizer, pieces)
    return indices_of(model, numbers_of(tokenizer, tokens))


def check_tokens(tokens: object) -> None:
    """Raise InputError unless these are texts to add to a tokenizer."""
    if not isinstance(tokens, list | tuple) or not tokens:
        raise InputError(f"new_tokens={tokens!r} is no list of texts, such as ['<|tool|>', 'word']")
    wrong = next((each for each in tokens if not isinstance(each, str) or not each.strip()), None)
    if wrong is not None:
        raise InputError(f"new_tokens has {wrong!r}, and a token is a text that is not blank")
    twice = next((each for each in tokens if tokens.count(each) > 1), None)
    if twice is not None:
        raise InputError(f"new_tokens has {twice!r} twice: leave one out")


def pieces_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> Pieces:
    """Return what a tokenizer divides those of the tokens into that it does not have."""
    known = tokenizer.get_vocab()
    new = [token for token in tokens if token not in known]
    return {token: tokenizer(token, add_special_tokens=False)["input_ids"] for token in new}


def extend_tokenizer(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Add those of the tokens that a tokenizer does not have."""
    known = tokenizer.get_vocab()
    new = [token for token in tokens if token not in known]
    special = [token for token in new if CONTROL.fullmatch(token)]
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.add_tokens([token for token in new if token not in special])


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
        if len(tokenizer) > rows_of(model.get_input_embeddings()):
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    except NotImplementedError as error:
        raise InputError(f"{type(model).__name__} has no table of tokens that can grow") from error
    known = tokenizer.get_vocab()
    tables = {id(table.weight): table.weight for table in (tables_of(model).values())}
    for weight in tables.values():
        for token, parts in pieces.items() if not weight.is_meta else ():
            # no text becomes no token: the mean of all
            own = weight[list(parts)] if parts else weight[: min(known[each] for each in pieces)]
            weight[known[token]] = own.float().mean(0).to(weight.dtype)
    setattr(model, ADDED, sorted({*added_rows(model), *(known[token] for token in pieces)}))


def added_rows(model: nn.Module) -> list[int]:
    """Return the rows of a model that are of tokens which it did not have when it was loaded."""
    return getattr(model, ADDED, [])


def rows_of(table: nn.Module) -> int:
    """Return the number of rows of a table, or of tokens that a head scores."""
    weight = table.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0]


def tables_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the embedding of a model's tokens, and a head that scores them, by path."""
    own = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name: m for name, m in model.named_modules() if any(m is each for each in own)}


def indices_of(model: PreTrainedModel, numbers: Sequence[int]) -> Indices:
    """Return the `trainable_token_indices` of tokens: also those of a head that is not tied."""
    tables = tables_of(model)
    if len({id(table.weight) for table in tables.values()}) == 1:
        return [*numbers]
    return {name: [*numbers] for name in tables}
