"""Chat encoding with the model's chat template, and labels on the assistant's turns.

A chat template is a program of whoever published the tokenizer. transformers runs it in jinja's
sandbox, which allows nested loops of any length; `petl.tasks.chat_template` bounds its time.
"""

import re
from itertools import pairwise
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

from petl.errors import InputError, first_line
from petl.tasks.chat_template import check_template, within_deadline
from petl.tasks.rows import IGNORED

Message = dict[str, Any]
GENERATION_BLOCK = re.compile(
    r"\{%[-+]?\s*generation\b"
)  # marks the assistant's text in a template


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message]
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and its labels, which are IGNORED outside assistant turns.

    The labels of a turn are the tokens that the model generates itself: from the end of the
    generation prompt (which ends with the turn's header) to the end-of-turn token, inclusive.

    Raises:
        InputError: there is no chat template, it refuses the conversation, takes too long, or
            renders a turn differently when more turns follow.
    """
    if not tokenizer.chat_template:
        raise InputError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template: choose an "
            "instruct-tuned model, or data with plain text (data.text=...)"
        )
    template = checked_template(tokenizer)
    is_marked = tokenizer.is_fast and GENERATION_BLOCK.search(template)
    encode = labels_from_template if is_marked else labels_from_prefixes
    return within_deadline(lambda: encode(tokenizer, messages), name_of(tokenizer))


def checked_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template of a tokenizer, after `check_template`."""
    template = tokenizer.get_chat_template()
    check_template(template, name_of(tokenizer))
    return template


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The name of a tokenizer's template in messages."""
    return f"the chat template of {tokenizer.name_or_path}"


def labels_from_template(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message]
) -> tuple[list[int], list[int]]:
    """Encode a chat with a template that marks the assistant's text by `{% generation %}`."""
    rendered = render(tokenizer, messages, return_assistant_tokens_mask=True)
    # the mask includes the end-of-turn token if it is inside the template's block
    ids, mask = rendered["input_ids"], rendered["assistant_masks"]
    return ids, [token if is_own else IGNORED for token, is_own in zip(ids, mask, strict=True)]


def labels_from_prefixes(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message]
) -> tuple[list[int], list[int]]:
    """Encode a chat and find the assistant's turns by rendering prefixes of the conversation."""
    ids = render(tokenizer, messages)["input_ids"]
    labels = [IGNORED] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if i == 0:
            raise InputError(
                f"{excerpt(messages)} begins with an assistant turn: begin with a turn of the user "
                "or the system"
            )
        # with the header of the turn, which the model does not generate
        prompt = render(tokenizer, messages[:i], add_generation_prompt=True)["input_ids"]
        answered = render(tokenizer, messages[: i + 1])["input_ids"]
        # both must be prefixes of the full text, else positions do not match
        for shorter, longer in pairwise((prompt, answered, ids)):
            if longer[: len(shorter)] != shorter:
                raise InputError(
                    f"{name_of(tokenizer)} renders turn {i + 1} of "
                    f"{excerpt(messages)} differently when more turns follow, so its tokens "
                    "cannot be identified: use conversations of one answer, or a template with "
                    "{% generation %} marks"
                )
        end = len(answered)
        # some templates put a line break after the end token, which the model does not generate
        while end > len(prompt) and not str(tokenizer.decode([ids[end - 1]])).strip():
            end -= 1
        labels[len(prompt) : end] = ids[len(prompt) : end]
    return ids, labels


def last_answer(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message]
) -> tuple[list[int], str]:
    """The prompt tokens of the assistant's last turn, and the text of that turn."""
    # later user turns, if any, are not part of the question
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    checked_template(tokenizer)
    prompt = within_deadline(
        lambda: render(tokenizer, messages[:last], add_generation_prompt=True)["input_ids"],
        name_of(tokenizer),
    )
    return prompt, messages[last]["content"]


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], **options: Any
) -> dict[str, Any]:
    """Render a conversation with the tokenizer's chat template, as token ids.

    Raises:
        InputError: the template refuses the conversation, or fails.
    """
    try:
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, **options
        )
    except Exception as error:  # a template can raise any: it divides by zero, calls itself, ...
        reason = first_line(error) or type(error).__name__
        raise InputError(f"{name_of(tokenizer)} refuses {excerpt(messages)}: {reason}") from error
    assert isinstance(rendered, BatchEncoding)
    return rendered.data


def excerpt(messages: list[Message], length: int = 60) -> str:
    """The beginning of a conversation, which identifies it in messages."""
    text = " ".join(f"{message['role']}: {message['content']}" for message in messages)
    return repr(text if len(text) <= length else text[:length] + "...")
