"""Calls of functions: their form in chat templates, and how they are read from answers."""

import json

import pytest
from tool_templates import HERMES, LLAMA, MISTRAL, XML, tool_tokenizer

from petl.errors import InputError, UnsupportedError
from petl.generation.inference.calls import CallForm, CallReader, CallStream, Function, call_form
from petl.generation.inference.grammar import vocabulary_of

ONE = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
LISTED = '[{"name": "add", "arguments": {"a": 1}}, {"name": "now", "arguments": {}}]'
THEN = '{"name": "now", "parameters": {}}'
BOTH = [("add", '{"a": 1}'), ("now", "{}")]


def reader_of(template: str, most: int | None = None) -> CallReader:
    tokenizer = tool_tokenizer(template)
    form = call_form(tokenizer, [3])
    return CallReader(form, ["add", "now"], tokenizer.all_special_tokens, most)


def test_a_template_shows_the_form_of_its_calls():
    marks = ("<tool_call>\n", "\n</tool_call>")
    assert call_form(tool_tokenizer(HERMES), [3]) == CallForm(
        *marks, between=f"{marks[1]}\n{marks[0]}", key="arguments"
    )
    assert call_form(tool_tokenizer(MISTRAL), [3]) == CallForm(
        "[TOOL_CALLS][", "]", ", ", "arguments"
    )
    assert call_form(tool_tokenizer(LLAMA), [3]) == CallForm("", "", None, "parameters")


def test_a_template_without_calls_or_with_others_is_refused():
    with pytest.raises(UnsupportedError):
        call_form(tool_tokenizer(XML), [3])
    with pytest.raises(InputError):
        call_form(tool_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}"), [3])


ANSWERS = [
    (HERMES, ONE, "", BOTH[:1]),
    (HERMES, f"{ONE}\n{NOW}", "", BOTH),
    (HERMES, f"I add.\n{ONE}", "I add.\n", BOTH[:1]),
    (HERMES, '<tool_call>{"arguments":{"a":1},"name":"add"}</tool_call>', "", BOTH[:1]),
    (HERMES, "<s>no<unk>", "no", []),
    (HERMES, ONE[:-13], "", BOTH[:1]),  # without its end, but complete
    (HERMES, ONE[:30], ONE[:30], []),
    (HERMES, ONE.replace("add", "sub"), ONE.replace("add", "sub"), []),
    (HERMES, ONE.replace('{"a": 1}', "1"), ONE.replace('{"a": 1}', "1"), []),
    (MISTRAL, f"[TOOL_CALLS]{LISTED}", "", BOTH),
    (MISTRAL, f"[TOOL_CALLS] {LISTED}", "", BOTH),
    (MISTRAL, LISTED, LISTED, []),
    (LLAMA, '{"name": "add", "parameters": {"a": 1}}', "", BOTH[:1]),
    (LLAMA, '<s>\n{"name": "now", "parameters": {}}', "", BOTH[1:]),
    (LLAMA, f"{THEN} is it", f"{THEN} is it", []),
    (LLAMA, f"[{THEN}", "", BOTH[1:]),
    (LLAMA, '{"x": 1}', '{"x": 1}', []),
    (LLAMA, "[" * 5000, "[" * 5000, []),
    (LLAMA, '{"a":' * 5000, '{"a":' * 5000, []),
    (LLAMA, "", "", []),
]


@pytest.mark.parametrize(("template", "text", "content", "calls"), ANSWERS)
def test_calls_are_read_at_once_and_from_any_pieces(template, text, content, calls):
    reader = reader_of(template)
    found = reader.read(reader.clean(text))
    assert (found[0], [(call.name, call.arguments) for call in found[1]]) == (content, calls)
    stream, parts = CallStream(reader), []
    for piece in text:  # a special token, too, may be written as several ordinary ones
        parts.append(stream.add(piece))
        assert not calls or "name" not in "".join(parts)
    held, streamed = stream.end()
    assert "".join(parts) + held == content
    assert [(call.name, call.arguments) for call in streamed] == calls


def test_text_before_a_call_is_not_held_back():
    stream = CallStream(reader_of(HERMES))
    assert [stream.add(piece) for piece in ("I <b>", " add <tool", "_call>{", "}")] == [
        "I <b>",
        " add ",
        "",
        "",
    ]
    assert stream.end() == ("<tool_call>{}", [])


def test_a_single_call_is_taken_if_no_more_are_wanted():
    assert [call.name for call in reader_of(HERMES, 1).read(f"{ONE}\n{NOW}")[1]] == ["add"]


ADDS = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("template", "text", "most"),
    [
        (HERMES, ONE, 1),
        (HERMES, f"{ONE}\n{NOW}", 2),
        (MISTRAL, f"[TOOL_CALLS]{LISTED}", 2),
        (LLAMA, THEN, 1),
    ],
)
def test_the_grammar_takes_the_calls_of_a_template_and_no_more_than_asked_for(template, text, most):
    tokenizer = tool_tokenizer(template)
    vocabulary, form = vocabulary_of(tokenizer, [3]), call_form(tokenizer, [3])

    def is_taken(text: str, count: int) -> bool:
        functions = [Function("add", ADDS), Function("now", None)]
        matcher = vocabulary.matcher(form.grammar(functions, count, vocabulary))
        ids = tokenizer(text)["input_ids"]
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    assert is_taken(text, most)
    assert is_taken(text, 16)
    assert most == 1 or not is_taken(text, most - 1)
    assert not is_taken(text.replace('"now"', '"new"').replace('"add"', '"sub"'), most)
    assert not is_taken(text.replace("{}", '{"a": 1}').replace('{"a": 1}', '{"b": 1}'), most)


def test_identities_are_those_that_mistral_takes():
    _, calls = reader_of(MISTRAL).read(f"[TOOL_CALLS]{LISTED}")
    assert all(len(call.id) == 9 and call.id.isalnum() for call in calls)
    assert len({call.id for call in calls}) == 2
    assert json.loads(calls[0].arguments) == {"a": 1}


def test_a_mark_that_is_a_special_token_is_no_text_in_the_grammar():
    vocabulary = vocabulary_of(tool_tokenizer(MISTRAL), [3])
    assert vocabulary.literal('a[TOOL_CALLS]["') == r'"a" <[260]> "[\""'
