import pytest
from tiny_tokenizers import CHATML, MARKED_CHATML

from petl import testing
from petl.data.tasks.base import IGNORED
from petl.data.tasks.chat import answer_ends, encode_chat
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


@pytest.mark.parametrize("template", [CHATML, MARKED_CHATML], ids=["prefixes", "marks"])
def test_an_answer_of_weight_0_has_no_labels(tokenizer, template):
    tokenizer.chat_template = template
    first = {**CONVERSATION[2], "more": '{"weight": 0}'}
    found = encode_chat(tokenizer, [*CONVERSATION[:2], first, *CONVERSATION[3:]])
    assert learned(tokenizer, *found) == ["Me,\n two lines<|im_end|>"]


def test_the_tokens_before_an_answer_are_the_generation_prompt(tokenizer):
    tokenizer.chat_template = CHATML
    ids, labels = encode_chat(tokenizer, CONVERSATION)
    start = next(i for i, label in enumerate(labels) if label != IGNORED)
    asked = tokenizer.apply_chat_template(CONVERSATION[:2], add_generation_prompt=True)
    assert ids[:start] == asked["input_ids"]


def test_keys_of_other_rows_are_not_passed_to_the_template(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.keys() | join(',') }};{% endfor %}"
    turns = [{"role": "user", "content": "a", "name": None}]
    ids, _ = encode_chat(tokenizer, turns)
    assert tokenizer.decode(ids) == "role,content;"


def test_an_answer_ends_at_tokens_of_the_tokenizer_the_model_and_the_template(tokenizer):
    tokenizer.chat_template = CHATML
    base = testing.tiny_llama()
    base.generation_config.eos_token_id = [9, 7]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end not in (5, 7, 9)
    assert answer_ends(5, base, tokenizer) == sorted([5, 7, 9, end])
    assert answer_ends(None, base, None) == [7, 9]  # prompts that are no turns


@pytest.mark.parametrize(
    ("template", "first", "words"),
    [
        (FORGETFUL, 0, "turn 3 of 'system: Be brief"),
        ("{{ raise_exception('Must alternate') }}", 0, "'system: Be brief.*Must alternate"),
        (None, 0, "chat template"),
        (CHATML, 2, "'assistant: Hello"),  # begins with the assistant
    ],
)
def test_what_a_template_cannot_render_is_refused(tokenizer, template, first, words):
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=words):
        encode_chat(tokenizer, CONVERSATION[first:])
