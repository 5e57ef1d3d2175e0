"""Chat encoding with the model's chat template, and labels on the assistant's turns.

A chat template is a program of whoever published the tokenizer. transformers runs it in jinja's
sandbox, which allows nested loops of any length; `petl.data.tasks.chat_template` bounds its time.
"""

import json
import re
from collections.abc import Callable, Container
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from transformers import BatchEncoding

from petl.core.types import Arguments, CausalModel
from petl.data.tasks import TOOLS, Message
from petl.data.tasks.base import IGNORED
from petl.data.tasks.chat_template import check_template, within_deadline
from petl.data.validation import RefusedRow
from petl.errors import InputError, first_line

# keys of messages that a template must mention, since it would leave them out without an error
OPTIONAL_KEYS = ("tool_calls", "reasoning_content")
EXCERPT = 60  # characters of a conversation in messages
printed_roles: set[tuple[str, str]] = set()  # a template, and a role whose turns it prints
GENERATION_BLOCK = re.compile(
    r"\{%[-+]?\s*generation\b"
)  # marks the assistant's text in a template


class ChatTokenizer(Protocol):
    """What is used of a tokenizer, or of what encodes conversations with images as well."""

    @property
    def chat_template(self) -> object:
        """The template, or several by name; None: there is none."""

    @property
    def name_or_path(self) -> object:
        """For messages."""

    @property
    def is_fast(self) -> object:
        """True if the template may mark the assistant's text."""

    @property
    def all_special_ids(self) -> Container[int]:
        """Tokens that are no text."""

    @property
    def get_chat_template(self) -> Callable[..., str]:
        """See the tokenizers of transformers, as the next two."""

    @property
    def apply_chat_template(self) -> Callable[..., object]:
        """Encodes a conversation."""

    @property
    def decode(self) -> Callable[..., object]:
        """Gives the text of tokens."""


def encode_chat(tokenizer: ChatTokenizer, messages: list[Message]) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and its labels, which are IGNORED outside assistant turns.

    The labels of a turn are the tokens that the model generates itself: from the end of the
    generation prompt (which ends with the turn's header) to the end-of-turn token, inclusive.

    Raises:
        RefusedRow: the chat template refuses the conversation, would leave out a part of it, or
            renders a turn differently when more turns follow.
        InputError: there is no chat template, or it takes too long.
    """
    chat = unpacked(messages)
    template = checked_template(tokenizer, chat)
    is_marked = tokenizer.is_fast and GENERATION_BLOCK.search(template)
    # marks are on all of the assistant's turns
    all_learned = chat.learned == [turn["role"] == "assistant" for turn in chat.turns]
    encode = labels_from_template if is_marked and all_learned else labels_from_prefixes

    def encoded() -> tuple[list[int], list[int]]:
        refuse_lost_parts(tokenizer, chat, template)
        return encode(tokenizer, chat)

    return within_deadline(encoded, name_of(tokenizer))


@dataclass(frozen=True)
class Chat:
    """A conversation as chat templates take it.

    Attributes:
        turns: with all of their keys.
        learned: for each turn, True if the loss is computed on it.
        options: of the template, such as the functions that may be called.
    """

    turns: list[Message]
    learned: list[bool]
    options: Arguments


def unpacked(messages: list[Message]) -> Chat:
    """The conversation of messages, which the source of the rows has packed."""
    options = {}
    if messages and messages[0]["role"] == TOOLS:
        options = {"tools": json.loads(messages[0]["content"])}
        messages = messages[1:]
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    turns = [
        turn | json.loads(m.get("more") or "{}") for turn, m in zip(plain, messages, strict=True)
    ]
    weights = [turn.pop("weight", 1) for turn in turns]
    learned = [t["role"] == "assistant" and w != 0 for t, w in zip(turns, weights, strict=True)]
    return Chat(turns, learned, options)


def checked_template(tokenizer: ChatTokenizer, chat: Chat) -> str:
    """The template that renders a conversation, after `check_template`.

    Raises:
        InputError: there is none.
    """
    if not tokenizer.chat_template:
        raise InputError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template: choose an "
            "instruct-tuned model (model=smollm2), or data with plain text (data.text=...)"
        )
    template = tokenizer.get_chat_template(tools=chat.options.get("tools"))
    check_template(template, name_of(tokenizer))
    return template


def name_of(tokenizer: ChatTokenizer) -> str:
    """The name of a tokenizer's template in messages."""
    return f"the chat template of {tokenizer.name_or_path}"


def refuse_lost_parts(tokenizer: ChatTokenizer, chat: Chat, template: str) -> None:
    """Raise InputError if the chat template would leave out a part of a conversation."""
    turns = chat.turns
    used = [*chat.options, *(key for key in OPTIONAL_KEYS if any(key in turn for turn in turns))]
    for key in used:
        # Jinja reads a part of a turn by its name, so the source must have the word
        if key not in template:
            raise lost_part(tokenizer, key, turns)
    for role in {turn["role"] for turn in turns} - {"user", "assistant"}:
        # once a template and role: rendering each conversation twice would double the time
        if (template, role) not in printed_roles and not prints(tokenizer, chat, role):
            raise lost_part(tokenizer, f"turns of the role {role}", turns)
        printed_roles.add((template, role))


def prints(tokenizer: ChatTokenizer, chat: Chat, role: str) -> bool:
    """Return True if the chat template prints the turns of a role, or refuses what is left."""
    others = [turn for turn in chat.turns if turn["role"] != role]
    try:
        without = render(tokenizer, others, **chat.options)
    except InputError:
        return True
    # equal texts: the template skips turns of this role
    return without != render(tokenizer, chat.turns, **chat.options)


def lost_part(tokenizer: ChatTokenizer, what: str, turns: list[Message]) -> RefusedRow:
    """The error for a conversation with something that the template leaves out."""
    return RefusedRow(
        f"{name_of(tokenizer)} leaves out {what}, which {excerpt(turns)} has: choose a model whose "
        "template prints them, or remove them from the data"
    )


def labels_from_template(tokenizer: ChatTokenizer, chat: Chat) -> tuple[list[int], list[int]]:
    """Encode a chat with a template that marks the assistant's text by `{% generation %}`."""
    rendered = render(tokenizer, chat.turns, **chat.options, return_assistant_tokens_mask=True)
    # the mask includes the end-of-turn token if it is inside the template's block
    ids, mask = rendered["input_ids"], rendered["assistant_masks"]
    return ids, [token if is_own else IGNORED for token, is_own in zip(ids, mask, strict=True)]


def labels_from_prefixes(tokenizer: ChatTokenizer, chat: Chat) -> tuple[list[int], list[int]]:
    """Encode a chat and find the learned turns by rendering prefixes of the conversation."""
    turns, options = chat.turns, chat.options
    ids = render(tokenizer, turns, **options)["input_ids"]
    labels = [IGNORED] * len(ids)
    for i, is_learned in enumerate(chat.learned):
        if not is_learned:
            continue
        if i == 0:
            raise RefusedRow(
                f"{excerpt(turns)} begins with an assistant turn: begin with a turn of the user "
                "or the system"
            )
        # with the header of the turn, which the model does not generate
        prompt = render(tokenizer, turns[:i], **options, add_generation_prompt=True)["input_ids"]
        answered = render(tokenizer, turns[: i + 1], **options)["input_ids"]
        # both must be prefixes of the full text, else positions do not match
        for shorter, longer in pairwise((prompt, answered, ids)):
            if longer[: len(shorter)] != shorter:
                raise RefusedRow(
                    f"{name_of(tokenizer)} renders turn {i + 1} of "
                    f"{excerpt(turns)} differently when more turns follow, so its tokens "
                    "cannot be identified: use conversations of one answer, or a template with "
                    "{% generation %} marks"
                )
        end = len(answered)
        # some templates put a line break after the end token, which the model does not generate
        while end > len(prompt) and not str(tokenizer.decode([ids[end - 1]])).strip():
            end -= 1
        labels[len(prompt) : end] = ids[len(prompt) : end]
    return ids, labels


def last_answer(tokenizer: ChatTokenizer, messages: list[Message]) -> tuple[list[int], str]:
    """The prompt tokens of the last answer with a loss, if any has, and the text of that answer."""
    chat = unpacked(messages)
    turns, options = chat.turns, chat.options
    last = last_learned(chat)
    checked_template(tokenizer, chat)

    def question_and_answer() -> tuple[list[int], str]:
        prompt = render(tokenizer, turns[:last], **options, add_generation_prompt=True)["input_ids"]
        if "tool_calls" not in turns[last]:
            return prompt, turns[last]["content"]
        answered = render(tokenizer, turns[: last + 1], **options)["input_ids"]
        return prompt, str(tokenizer.decode(answered[len(prompt) :], skip_special_tokens=True))

    return within_deadline(question_and_answer, name_of(tokenizer))


def last_learned(chat: Chat) -> int:
    """The number of the turn of the last answer, from 0; of those with a loss, if any has one."""
    # later user turns, if any, are not part of the question
    answers = [i for i, turn in enumerate(chat.turns) if turn["role"] == "assistant"]
    return max([i for i in answers if chat.learned[i]] or answers)


def question(tokenizer: ChatTokenizer, messages: list[Message]) -> list[int]:
    """The tokens of a conversation up to the header of the assistant's next turn.

    Raises:
        InputError: as `encode_chat`.
    """
    chat = unpacked(messages)
    template = checked_template(tokenizer, chat)

    def encoded() -> list[int]:
        refuse_lost_parts(tokenizer, chat, template)
        options = {**chat.options, "add_generation_prompt": True}
        return render(tokenizer, chat.turns, **options)["input_ids"]

    return within_deadline(encoded, name_of(tokenizer))


def end_of_turn(tokenizer: ChatTokenizer) -> int | None:
    """The special token by which the chat template ends an answer; None if it has none."""
    said = (("user", "a"), ("assistant", "b"))
    try:
        ids, labels = encode_chat(tokenizer, [{"role": r, "content": text} for r, text in said])
    except InputError:  # it takes other conversations only, such as those with a system prompt
        return None
    learned = [token for token, label in zip(ids, labels, strict=True) if label != IGNORED]
    return learned[-1] if learned and learned[-1] in tokenizer.all_special_ids else None


def answer_ends(end: int | None, base: CausalModel, chat: ChatTokenizer | None) -> list[int]:
    """The tokens at which an answer of a model ends, in ascending order.

    Args:
        end: the tokenizer's end of a text.
        chat: encodes prompts that are turns of the chat template; None: they are texts.
    """
    # chat models end a turn by a token of their generation config, not by the tokenizer's
    ends = {end, *as_list(base.generation_config.eos_token_id)}
    # a base model that was trained on a chat template knows the template's token only
    ends |= {end_of_turn(chat)} if chat else set()
    return sorted(token for token in ends if token is not None)


def as_list(ids: int | list[int] | None) -> list[int]:
    """Return end tokens as a list: a model may have one, several or none."""
    if ids is None:
        return []
    return ids if isinstance(ids, list) else [ids]


def render(
    tokenizer: ChatTokenizer, messages: list[Message], **options: object
) -> dict[str, list[int]]:
    """Render a conversation with the tokenizer's chat template, as token ids.

    Raises:
        RefusedRow: the template refuses the conversation, or fails.
    """
    try:
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, **options
        )
    except Exception as error:  # a template can raise any: it divides by zero, calls itself, ...
        reason = first_line(error) or type(error).__name__
        raise RefusedRow(f"{name_of(tokenizer)} refuses {excerpt(messages)}: {reason}") from error
    assert isinstance(rendered, BatchEncoding)
    return rendered.data


def excerpt(messages: list[Message]) -> str:
    """The beginning of a conversation, which identifies it in messages."""
    text = " ".join(f"{message['role']}: {message['content']}" for message in messages)
    return repr(text if len(text) <= EXCERPT else text[:EXCERPT] + "...")
