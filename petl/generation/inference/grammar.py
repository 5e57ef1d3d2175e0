"""Answers that follow a grammar, such as a JSON schema: a mask over the next token, by llguidance.

A schema may come from a stranger. Its size and depth are bounded here, and by limits of llguidance
the work to compile it, to compute a mask, and the memory of both. Nothing that it refers to is
fetched, and what llguidance cannot enforce is an error. Shapes: B rows, T tokens of prompt and
answer, V tokens of the vocabulary.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import AddedToken, LogitsProcessor, PreTrainedTokenizerBase

from petl.errors import InputError, UnsupportedError, first_line
from petl.system.imports.extras import optional

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

EXTRA = "serve"
MAX_SCHEMA = 2**16  # characters of its JSON text; assumption
MAX_DEPTH = 64
# states of a lexer at most: about 2 kB each, kept for one answer
LIMITS = {"max_lexer_states": 20_000, "verbose_errors": False}
# a run of line breaks and spaces is bounded, or a small model would write them until its limit
FORMAT = {"whitespace_pattern": r"[ \n\t]{0,20}", "lenient": False}
JSON_OBJECT: dict[str, object] = {"type": "object"}


def bounded_schema(schema: dict[str, object]) -> dict[str, object]:
    """Return a JSON schema.

    Raises:
        InputError: it is too large or too deep.
    """
    deepest = max(_depths(schema))
    if deepest > MAX_DEPTH:
        raise InputError(f"the schema is nested {deepest} deep; allowed are {MAX_DEPTH}")
    size = len(json.dumps(schema))
    if size > MAX_SCHEMA:
        raise InputError(f"the schema has {size:,} characters; allowed are {MAX_SCHEMA:,}")
    return schema


def _depths(value: object) -> Iterator[int]:
    """Yield the depths of all values inside of a value, without recursion."""
    left = [(0, value)]
    while left:
        depth, each = left.pop()
        yield depth
        inner = each.values() if isinstance(each, Mapping) else each
        if isinstance(inner, ValuesView | list):
            left += [(depth + 1, one) for one in inner]


def json_grammar(schema: dict[str, object]) -> str:
    """The grammar of the JSON texts that a schema allows.

    Raises:
        InputError: the schema is too large or too deep, or has an integer of more than 64 bits.
    """
    guidance = optional("llguidance", EXTRA)
    try:
        return guidance.LLMatcher.grammar_from_json_schema(bounded_schema(schema), overrides=FORMAT)
    except ValueError as error:
        raise InputError(f"the schema cannot be read: {first_line(error)}") from error


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer, as llguidance knows them."""

    tokenizer: PreTrainedTokenizerBase
    tokens: "LLTokenizer"

    def matcher(self, grammar: str) -> "LLMatcher":
        """Compile a grammar, which takes from a millisecond to a second.

        Args:
            grammar: from `json_grammar`, or in llguidance's variant of Lark.

        Raises:
            InputError: it is wrong, too large, or allows no text.
        """
        guidance = optional("llguidance", EXTRA)
        limits = guidance.LLParserLimits(**LIMITS)
        made = guidance.LLMatcher(self.tokens, grammar, log_level=0, limits=limits)
        if made.is_error():
            raise InputError(f"the schema cannot be followed: {_reason(made)}")
        made.compute_bitmask()
        if made.is_error():
            raise InputError(
                f"the schema allows no text, or its texts have too many forms ({_reason(made)})"
            )
        return made

    def literal(self, text: str) -> str:
        """A text in a grammar, in which special tokens are those, and not their letters."""
        added: dict[int, AddedToken] = self.tokenizer.added_tokens_decoder
        ids = {each.content: i for i, each in added.items() if self.tokens.is_special_token(i)}
        pattern = "|".join(map(re.escape, sorted(ids, key=len, reverse=True)))
        parts = re.split(f"({pattern})", text) if ids else [text]
        return " ".join(
            f"<[{ids[part]}]>" if part in ids else json.dumps(part) for part in parts if part
        )


_vocabularies: "WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[int, ...], LLTokenizer]]" = (
    WeakKeyDictionary()
)
_building = Lock()  # of `_vocabularies`: requests are read in several threads


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> Vocabulary:
    """The vocabulary of a tokenizer; the first time takes a second, for 50,000 tokens.

    Args:
        ends: tokens at which an answer ends.

    Raises:
        UnsupportedError: the texts of its tokens are not known, or no token ends an answer.
    """
    name = tokenizer.name_or_path
    if not tokenizer.is_fast or not ends:
        what = "no token that ends an answer" if tokenizer.is_fast else "no fast version"
        raise UnsupportedError(f"the tokenizer of {name} has {what}, which JSON schemas need")
    with _building:
        known = _vocabularies.setdefault(tokenizer, {})
        key = tuple(ends)
        if key not in known:
            hf = optional("llguidance.hf", EXTRA)
            try:
                known[key] = hf.from_tokenizer(tokenizer, eos_token=[*ends])
            except ValueError as error:
                raise UnsupportedError(
                    f"the tokenizer of {name} cannot follow a JSON schema: {first_line(error)}"
                ) from error
        return Vocabulary(tokenizer, known[key])


def _reason(state: "LLMatcher") -> str:
    """Why an answer cannot go on, in one line; empty: it can."""
    # without the place in a grammar that was made here, and its lines around it
    said = re.split(r"\n *\d+ \|", state.get_error().replace("<non-verbose/>", ""))[0]
    return " ".join(re.sub(r"^at \d+\(\d+\): ", "", said).split())[:300]


class GrammarMask(LogitsProcessor):
    """Leaves the tokens by which an answer can go on in a grammar; in each row its own answer."""

    def __init__(self, matcher: "LLMatcher", start: int) -> None:
        """Follow the grammar of `matcher` in what comes behind the first `start` tokens."""
        self.matcher, self.start = matcher, start
        self.matchers: list[LLMatcher] = []  # of the rows
        self.seen = start  # tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores, [B, V], minus infinity for tokens that the grammar does not allow.

        Raises:
            InputError: other settings forbid all tokens that it allows, or it has become too
                complex.
        """
        if not self.matchers:
            self.matchers = [self.matcher.deep_copy() for _ in input_ids]
        for row, ids in enumerate(input_ids[:, self.seen :].tolist()):
            # behind its end an answer has the end token, and a row of a batch padding
            if not self.matchers[row].is_stopped():
                self.matchers[row].consume_tokens(ids)
        self.seen = input_ids.shape[1]
        masked = scores.clone()
        for row, state in enumerate(self.matchers):
            masked[row, ~self._allowed(state, scores.shape[-1]).to(scores.device)] = -torch.inf
            if state.is_error() or masked[row].isneginf().all():
                reason = _reason(state) or "other settings forbid all tokens that it allows"
                raise InputError(f"the answer cannot follow its schema: {reason}")
        return masked

    @staticmethod
    def _allowed(state: "LLMatcher", tokens: int) -> Tensor:
        """Which tokens can come next, [V] bool."""
        bits = np.unpackbits(np.frombuffer(state.compute_bitmask(), np.uint8), bitorder="little")
        allowed = torch.zeros(tokens, dtype=torch.bool)
        # the model may have more outputs than the tokenizer has tokens, and the mask more bits
        count = min(tokens, len(bits))
        allowed[:count] = torch.from_numpy(bits[:count]).bool()
        return allowed
