"""Answers that follow a JSON schema: what is allowed, with and without drafts, and hostile ones."""

import json

import pytest
import torch
from tiny_tokenizers import byte_tokenizer

from petl.errors import InputError, UnsupportedError
from petl.generation.inference.grammar import GrammarMask, json_grammar, vocabulary_of
from petl.generation.inference.sampling import Sampling

pytest_plugins = ["writer_fixtures"]

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}, "on": {"type": "boolean"}},
    "required": ["x", "on"],
    "additionalProperties": False,
}
TOKENIZER = byte_tokenizer()


def mask_of(schema, start=0) -> GrammarMask:
    return GrammarMask(vocabulary_of(TOKENIZER, [3]).matcher(json_grammar(schema)), start)


def allowed(mask: GrammarMask, *rows: str) -> list[str]:
    """The texts of the tokens that may follow in each row; the vocabulary has two more outputs."""
    ids = torch.tensor([TOKENIZER(row)["input_ids"] for row in rows])
    scores = mask(ids, torch.zeros(len(rows), 262))
    return [TOKENIZER.decode(row.isfinite().nonzero()[:, 0]) for row in scores]


def test_a_row_goes_on_as_its_schema_says():
    mask = mask_of({"enum": ["ab", "ac"]})
    assert allowed(mask, "") == ['"']
    assert allowed(mask, '"') == ["a"]
    assert allowed(mask, '"a') == ["bc"]
    assert allowed(mask, '"ac') == ['"']
    assert allowed(mask, '"ac"') == ["<|im_end|>"]


def test_rows_have_answers_of_their_own_behind_the_prompt_and_padding_behind_their_end():
    mask = mask_of({"enum": [1, 23]}, start=2)
    assert allowed(mask, "??", "!!") == ["12", "12"]
    assert allowed(mask, "??1", "!!2") == ["<|im_end|>", "3"]
    # the first row has ended; what `generate` puts behind its end is not read
    assert allowed(mask, "??1?", "!!23") == ["<|im_end|>", "<|im_end|>"]


@pytest.mark.parametrize("drafting", ["none", "free"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_follow_the_schema_with_and_without_drafts(writers, drafting, temperature):
    from petl.generation.inference.loading import load_language_model

    model = load_language_model(writers.folder / "lora", drafting=drafting)
    sampling = Sampling(max_new_tokens=200, temperature=temperature, grammar=json_grammar(POINT))
    torch.manual_seed(3)
    with model.using("default"):
        (answer,) = model.answer([model.encode("a b a b a")], sampling)
        several = model.answer([model.encode(text) for text in ("Hi", "a b a b a")], sampling)
    for each in (answer, *several):
        assert each.finish == "stop"
        found = json.loads(each.text)
        assert (type(found["x"]), type(found["on"]), len(found)) == (int, bool, 2)
    if not temperature:
        assert several[1].text == answer.text


def test_a_grammar_and_another_setting_that_leave_no_token_are_an_error():
    mask = mask_of({"enum": ["a"]})
    with pytest.raises(InputError):
        mask(torch.zeros(1, 0, dtype=torch.long), torch.full((1, 262), -torch.inf))


def nested(depth: int) -> dict:
    schema: dict = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "foo"}, "foo"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"$ref": "#"}, "allows no text"),
        ({"$ref": "http://localhost:1/x"}, "resources"),
        ({"$ref": "file:///etc/passwd"}, "resources"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "integer", "maximum": 10**30}, "cannot be read"),
        ({"type": "integer", "multipleOf": 987654321}, "fuel exhausted"),
        (
            {
                "allOf": [
                    {"anyOf": [{"properties": {f"{i} {j}": {}}} for j in range(9)]}
                    for i in range(9)
                ]
            },
            "schema too large",
        ),
        ({"const": "x" * 2**16}, "65,5.* 65,536"),
        (nested(65), "65 deep.* 64"),
        (nested(100_000), "100000"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_bounded_time(schema, message):
    with pytest.raises(InputError, match=message):
        mask_of(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "(a{1,1000}){1,1000}"},
        {"type": "string", "minLength": 10**9},
        {"type": "array", "minItems": 10**6, "maxItems": 10**9},
        {"anyOf": [{"type": "string", "pattern": f".*a{i}.*b"} for i in range(500)]},
        nested(64),
    ],
)
def test_large_texts_are_no_large_grammars(schema):
    mask = mask_of(schema)
    assert allowed(mask, "")[0]


@pytest.mark.thorough
def test_an_answer_that_could_go_on_in_too_many_ways_ends_in_an_error():
    mask = mask_of({"type": "object", "properties": {f"p{i}": {} for i in range(2500)}})
    assert allowed(mask, "") == ["{"]
    with pytest.raises(InputError):
        allowed(mask, "{")


def test_a_tokenizer_without_end_is_refused():
    with pytest.raises(UnsupportedError):
        vocabulary_of(TOKENIZER, [])
