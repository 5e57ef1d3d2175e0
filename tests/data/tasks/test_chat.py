import pytest
from tiny_tokenizers import CHATML, MARKED_CHATML

from petl.data.tasks.base import IGNORED
from petl.data.tasks.chat import encode_chat
from petl.errors import InputError

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi\n"},
    {"role": "assistant", "content": "Hello. Who?"},
    {"role": "user", "content": "Hello. Who?"},  # the words of the assistant, not learned here
    {"role": "assistant", "content": "Me,\n two lines"},
]
# renders an earlier answer differently when turns follow, as templates that strip thoughts do
FORGETFUL = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content[:2] }}")


def learned(tokenizer, ids, labels):
    """The labeled text, one string for each contiguous run of labels."""
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    runs, last = [[]], IGNORED
    for label in labels:
        if label != IGNORED:
            runs[-1].append(label)
        elif last != IGNORED:
            runs.append([])
        last = label
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("template", [CHATML, MARKED_CHATML], ids=["prefixes", "marks"])
def test_only_assistant_turns_and_their_end_tokens_have_labels(tokenizer, template):
    tokenizer.chat_template = template
    ids, labels = encode_chat(tokenizer, CONVERSATION)
    assert learned(tokenizer, ids, labels) == [
        "Hello. Who?<|im_end|>",
        "Me,\n two lines<|im_end|>",
    ]
    everything = "".join(
        f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in CONVERSATION
    )
    assert tokenizer.decode(ids) == everything


def test_the_tokens_before_an_answer_are_the_generation_prompt(tokenizer):
    tokenizer.chat_template = CHATML
    ids, labels = encode_chat(tokenizer, CONVERSATION)
    start = next(i for i, label in enumerate(labels) if label != IGNORED)
    asked = tokenizer.apply_chat_template(CONVERSATION[:2], add_generation_prompt=True)
    assert ids[:start] == asked["input_ids"]


def test_a_template_that_changes_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(InputError, match=r"renders turn 3 of 'system: Be brief.* differently"):
        encode_chat(tokenizer, CONVERSATION)


def test_a_template_that_refuses_a_conversation_is_quoted(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('Roles must alternate') }}"
    with pytest.raises(InputError, match=r"refuses 'system: Be brief.*Roles must alternate"):
        encode_chat(tokenizer, CONVERSATION)


def test_a_tokenizer_without_a_template_is_refused(tokenizer):
    with pytest.raises(InputError, match="has no chat template: choose an instruct-tuned model"):
        encode_chat(tokenizer, CONVERSATION)


def test_a_conversation_that_begins_with_the_assistant_is_refused(tokenizer):
    tokenizer.chat_template = CHATML
    with pytest.raises(InputError, match=r"'assistant: Hello. .*' begins with an assistant turn"):
        encode_chat(tokenizer, CONVERSATION[2:])


def test_keys_of_other_rows_are_not_passed_to_the_template(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.keys() | join(',') }};{% endfor %}"
    turns = [{"role": "user", "content": "a", "name": None}]
    ids, _ = encode_chat(tokenizer, turns)
    assert tokenizer.decode(ids) == "role,content;"
