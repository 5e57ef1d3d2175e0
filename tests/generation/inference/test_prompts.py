"""Prompts of files, and their answers in order."""

import json

import pytest
from writer_fixtures import PROMPTS

from petl.errors import InputError
from petl.generation.inference.prompts import (
    BATCHES,
    Question,
    answered,
    check_prompts,
    read_prompts,
)
from petl.generation.inference.sampling import Sampling

pytest_plugins = ["writer_fixtures"]

SHORT = Sampling(max_new_tokens=6)


def write(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def test_answers_keep_the_order_of_the_prompts(writers):
    model = writers.load("lora", second="other")
    texts = [f"{'a' * (i * 7 % 11)} {i}" for i in range(2 * BATCHES + 3)]
    questions = [Question({"prompt": text}, text) for text in texts]
    counted = []
    found = list(
        answered(
            model, iter(questions), SHORT, names=["default", "base"], batch_size=2,
            count=counted.append,
        )
    )  # fmt: skip
    assert [question.row["prompt"] for question, _ in found] == texts
    assert sum(counted) == 2 * len(texts)
    for question, answers in found[::9]:
        for name in ("default", "base"):
            with model.using(name):
                (alone,) = model.answer([model.encode(question.prompt)], SHORT)
            assert answers[name].text == alone.text


def test_only_some_prompts_are_read_before_the_first_answer(writers):
    model = writers.load("lora")
    read = []

    def endless():
        while True:
            read.append(0)
            yield Question({}, "Hi")

    next(answered(model, endless(), Sampling(max_new_tokens=1), names=["default"], batch_size=1))
    assert len(read) == BATCHES


def test_the_first_prompt_that_is_too_long_is_named(writers):
    model = writers.load("lora")
    questions = [Question({}, text) for text in ("Hi", "a" * 200, "a" * 300, "a" * 400)]
    check_prompts(model, questions[:2])
    for given, system, words in (
        (4, None, r"prompt 3: .* 3\d\d tokens"),
        (1, "a" * 300, "prompt 1:"),
    ):
        with pytest.raises(InputError, match=words):
            check_prompts(model, questions[:given], system=system)


def test_lines_of_a_text_file_are_prompts(writers, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("one\r\n\n  two\u2028words\n".encode())
    found = list(read_prompts(str(file), writers.load("lora")))
    assert [question.prompt for question in found] == ["one", "  two\u2028words"]
    file.write_text("\n\n")
    with pytest.raises(InputError):
        list(read_prompts(str(file), writers.load("lora")))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "more": 1},
        {"instruction": "Hi"},
        {"text": "Hi"},
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]},
        {"conversations": [{"from": "human", "value": "Hi"}]},
    ],
)
def test_rows_of_every_format_are_prompts(writers, tmp_path, row):
    model = writers.load("lora")
    (question,) = read_prompts(write(tmp_path / "rows.jsonl", [row]), model)
    assert question.row == row
    assert model.encode(question.prompt) == model.encode("Hi")


def test_rows_of_an_encoder_decoder_are_texts(writers, tmp_path):
    model = writers.load("t5-lora")
    (question,) = read_prompts(write(tmp_path / "rows.jsonl", [{"text": PROMPTS[1]}]), model)
    assert question.prompt == PROMPTS[1]


def test_a_file_without_prompts_is_refused(writers, tmp_path):
    file = write(tmp_path / "rows.jsonl", [{"color": "red"}])
    gone = str(tmp_path / "gone.txt")
    for name, words in ((file, r"rows\.jsonl, line 1"), (gone, gone)):
        with pytest.raises(InputError, match=words):
            list(read_prompts(name, writers.load("lora")))
