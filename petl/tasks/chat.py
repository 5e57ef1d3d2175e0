"""Conversations in the model's own words: its chat template, labels on the assistant's turns."""

import re
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError
from transformers import BatchEncoding, PreTrainedTokenizerBase

from petl.errors import InputError
from petl.tasks.rows import IGNORED

Message = dict[str, Any]
MARKED = re.compile(r"\{%[-+]?\s*generation\b")  # a template that marks what the assistant writes


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message]
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and its labels, which are IGNORED outside assistant turns.

    An assistant's turn is what the model itself has to write: from behind the header that a
    generation prompt ends with, to the token that ends the turn, that token included.

    Raises:
        InputError: no chat template, one that refuses the conversation, or one that words an
            earlier turn differently once the conversation goes on.
    """
    if not tokenizer.chat_template:
        raise InputError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template: choose an "
            "instruct-tuned model, or data with plain text (data.text=...)"
        )
    if tokenizer.is_fast and MARKED.search(tokenizer.get_chat_template()):
        return from_template(tokenizer, messages)
    return from_prefixes(tokenizer, messages)


def from_template(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message]
) -> tuple[list[int], list[int]]:
    """Labels where the template itself marks what the assistant writes."""
    rendered = render(tokenizer, messages, return_assistant_tokens_mask=True)
    ids, mask = rendered["input_ids"], rendered["assistant_masks"]
    return ids, [token if own else IGNORED for token, own in zip(ids, mask, strict=True)]


def from_prefixes(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message]
) -> tuple[list[int], list[int]]:
    """Labels found by rendering the conversation up to, and including, each assistant turn."""
    ids = render(tokenizer, messages)["input_ids"]
    labels = [IGNORED] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if i == 0:
            raise InputError(
                f"{excerpt(messages)} begins with the assistant, whom nobody asked: begin with a "
                "turn of the user or the system"
            )
        prompt = render(tokenizer, messages[:i], add_generation_prompt=True)["input_ids"]
        answered = render(tokenizer, messages[: i + 1])["input_ids"]
        for shorter, longer in pairwise((prompt, answered, ids)):
            if longer[: len(shorter)] != shorter:
                raise InputError(
                    f"the chat template of {tokenizer.name_or_path} words turn {i + 1} of "
                    f"{excerpt(messages)} differently once more turns follow, so its tokens "
                    "cannot be told apart: use conversations of one answer, or a template with "
                    "{% generation %} marks"
                )
        end = len(answered)
        # the line break that some templates put behind the end token is not the model's to write
        while end > len(prompt) and not str(tokenizer.decode([ids[end - 1]])).strip():
            end -= 1
        labels[len(prompt) : end] = ids[len(prompt) : end]
    return ids, labels


def last_answer(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message]
) -> tuple[list[int], str]:
    """The tokens that the model is asked with for the assistant's last turn, and that turn."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    prompt = render(tokenizer, messages[:last], add_generation_prompt=True)["input_ids"]
    return prompt, messages[last]["content"]


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], **options: Any
) -> dict[str, Any]:
    """The conversation as tokens, by the tokenizer's template."""
    try:
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, **options
        )
    except TemplateError as error:
        raise InputError(
            f"the chat template of {tokenizer.name_or_path} refuses {excerpt(messages)}: {error}"
        ) from error
    assert isinstance(rendered, BatchEncoding)
    return rendered.data


def excerpt(messages: list[Message], length: int = 60) -> str:
    """The beginning of a conversation, to find it by."""
    words = " ".join(f"{message['role']}: {message['content']}" for message in messages)
    return repr(words if len(words) <= length else words[:length] + "...")
