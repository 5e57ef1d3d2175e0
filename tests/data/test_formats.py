"""Rows of other trainers' formats become conversations, and which format it is is recognized."""

import csv
import gzip
import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_tokenizers import CHATML, byte_tokenizer

from petl.data.base import read_data
from petl.data.tasks.base import IGNORED
from petl.data.tasks.chat import encode_chat, last_answer, unpacked
from petl.errors import InputError

SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]
ASKED, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}
PAIR = [ASKED, ANSWER]
WORSE = {"role": "assistant", "content": "No."}
FORMATS = {  # name of a format: a row, its messages, and what the run's output says
    "messages": ({"messages": PAIR}, PAIR, "messages (messages; loss on the assistant's turns)"),
    "sharegpt": (
        {"conversations": SHAREGPT, "system": "Be kind."},
        [{"role": "system", "content": "Be kind."}, *PAIR],
        "sharegpt (conversations, system; loss on the assistant's turns)",
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        [{"role": "user", "content": "Add.\n1 2"}, {"role": "assistant", "content": "3"}],
        "alpaca (instruction, input; loss on output)",
    ),
    "prompt_completion": (
        {"prompt": "Hi", "completion": "Yes?"},
        PAIR,
        "prompt_completion (prompt; loss on completion)",
    ),
    "preference": (
        {"prompt": "Hi", "chosen": "Yes?", "rejected": "No."},
        PAIR,
        "preference (prompt; loss on chosen)",
    ),
}


def write(folder, rows, name="rows.jsonl"):
    file = folder / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif name.endswith(".csv"):
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        text = "\n".join(map(json.dumps, rows))
        file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return str(file)


def read(train, task="causal_lm", test=None, **settings):
    given = {"name": "files", "source": "files", "train": train, "test": test or train}
    return read_data({**given, "task": task, **settings})


def messages(raw):
    return [unpacked(row["messages"]).turns for row in raw.train]


@pytest.mark.parametrize("name", [*FORMATS])
@pytest.mark.parametrize("streaming", [False, True])
def test_each_format_is_recognized_and_said(tmp_path, caplog, name, streaming):
    row, expected, described = FORMATS[name]
    named = {"format": name} if name == "preference" else {}
    with caplog.at_level(logging.INFO, "petl"):
        raw = read(write(tmp_path, [row]), streaming=streaming, **named)
    train = list(raw.train.rows()) if streaming else raw.train.to_list()
    assert [unpacked(found["messages"]).turns for found in train] == [expected]
    assert raw.task.chat
    assert raw.format == described
    lines = [line for line in caplog.messages if f"is read as {described}" in line]
    assert len(lines) == (name != "preference")  # a format that is named needs no line


@pytest.mark.parametrize("name", ["a.json", "a.parquet", "a.csv", "a.jsonl.gz"])
def test_a_format_is_the_same_in_every_kind_of_file(tmp_path, name):
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    if name == "a.json":
        file = tmp_path / name
        file.write_text(json.dumps([row]))
    raw = read(str(tmp_path / name) if name == "a.json" else write(tmp_path, [row], name))
    assert messages(raw) == [FORMATS["alpaca"][1]]


def test_columns_that_only_some_rows_have_are_read(tmp_path):
    history = [["a", "b"]]
    rows = [
        {"instruction": "x", "output": "y"},
        {"instruction": "Add.", "input": "1 2", "output": "3", "history": history, "system": "S"},
        {"instruction": "x", "input": None, "output": "y"},
    ]
    found = sorted(messages(read(write(tmp_path, rows))), key=len)
    assert [[turn["content"] for turn in turns] for turns in found] == [
        ["x", "y"],
        ["x", "y"],
        ["S", "a", "b", "Add.\n1 2", "3"],
    ]


def test_files_of_several_formats_are_read_together(tmp_path):
    files = [write(tmp_path, [FORMATS[n][0]], f"{n}.jsonl") for n in ("alpaca", "messages")]
    raw = read(files)
    assert sorted(messages(raw), key=str) == sorted(
        [FORMATS["alpaca"][1], FORMATS["messages"][1]], key=str
    )
    assert raw.format == f"{FORMATS['alpaca'][2]}, {FORMATS['messages'][2]}"


def test_roles_of_all_trainers_are_those_of_chat_templates(tmp_path):
    names = {"Human": "user", "model": "assistant", "observation": "tool", "developer": "system"}
    turns = [{"from": name, "value": name} for name in names]
    (found,) = messages(read(write(tmp_path, [{"conversations": turns}])))
    assert [turn["role"] for turn in found] == [*names.values()]


def test_text_in_parts_is_joined_and_other_parts_are_refused(tmp_path):
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    rows = [{"messages": [{"role": "user", "content": parts}, ANSWER]}]
    assert messages(read(write(tmp_path, rows))) == [PAIR]
    parts.append({"type": "image_url", "image_url": {"url": "x"}})
    with pytest.raises(InputError):
        read(write(tmp_path, rows))


CALL = {"id": "c1", "type": "function", "function": {"name": "sum", "arguments": '{"of": [1, 2]}'}}
CALLED = {**CALL, "function": {"name": "sum", "arguments": {"of": [1, 2]}}}
FUNCTION = {"type": "function", "function": {"name": "sum", "parameters": {}}}
TOOL_CHATML = "{% if tools %}tools {{ tools | tojson }}\n{% endif %}" + CHATML.replace(
    "{{ m.content }}",
    "{{ m.content }}{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% endif %}",
)


def calling():
    """Rows with calls of a function, as OpenAI and as ShareGPT have them."""
    openai = [
        ASKED,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
        ANSWER,
    ]
    sharegpt = [
        SHAREGPT[0],
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "3"},
        SHAREGPT[1],
    ]
    return [
        {"messages": openai, "tools": [FUNCTION]},
        {"conversations": sharegpt, "tools": json.dumps([FUNCTION["function"]])},
    ]


@pytest.mark.parametrize("row", calling(), ids=["openai", "sharegpt"])
def test_calls_of_functions_reach_the_template_and_are_learned(tmp_path, row):
    raw = read(write(tmp_path, [row, {**row}]))
    stored = raw.train["messages"][0]
    chat = unpacked(stored)
    assert chat.options == {"tools": [FUNCTION]}
    assert chat.turns[1]["tool_calls"][0]["function"] == CALLED["function"]
    tokenizer = byte_tokenizer(pad_token="<unk>")
    tokenizer.chat_template = TOOL_CHATML
    ids, labels = encode_chat(tokenizer, stored)
    text = tokenizer.decode(ids)
    assert text.startswith('tools [{"type": "function", "function": {"name": "sum"')
    assert "<|im_start|>tool\n3<|im_end|>" in text
    learned = tokenizer.decode([label for label in labels if label != IGNORED])
    assert learned == 'sum{"of": [1, 2]}<|im_end|>Yes?<|im_end|>'
    # a call that ends a conversation is the answer that generated text is compared with
    prompt, answer = last_answer(tokenizer, stored[:-2])
    assert ids[: len(prompt)] == prompt
    assert answer.strip() == 'sum{"of": [1, 2]}'


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_functions_and_calls_have_only_their_own_keys_in_every_kind_of_file(tmp_path, name):
    rows = []
    for key in "ab":  # in a table each row has the keys of both
        call = {"function": {"name": "f", "arguments": {key: [{key: 1}]}}}
        turns = [ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}]
        tool = {"type": "function", "function": {"name": "f", "parameters": {key: {"is": key}}}}
        rows.append({"messages": turns, "tools": [tool]})
    raw = read(write(tmp_path, rows, name))
    found = sorted(
        (json.dumps(chat.options), chat.turns[1]["tool_calls"][0]["function"]["arguments"])
        for chat in (unpacked(row["messages"]) for row in raw.train)
    )
    assert found == [
        (json.dumps({"tools": row["tools"]}), {key: [{key: 1}]})
        for key, row in zip("ab", rows, strict=True)
    ]


@pytest.mark.parametrize(
    ("template", "lost"),
    [
        (CHATML, "out tools"),
        ("{{ tools }}" + CHATML, "tool_calls"),
        (TOOL_CHATML.replace("in messages %}", "in messages if m.role != 'tool' %}"), "role tool"),
    ],
)
def test_a_template_that_would_leave_out_a_part_is_refused(tmp_path, template, lost):
    raw = read(write(tmp_path, calling()[:1]))
    tokenizer = byte_tokenizer(pad_token="<unk>")
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=lost):
        encode_chat(tokenizer, raw.train["messages"][0])


def learned_text(stored):
    tokenizer = byte_tokenizer(pad_token="<unk>")
    tokenizer.chat_template = CHATML
    _, labels = encode_chat(tokenizer, stored)
    return tokenizer.decode([label for label in labels if label != IGNORED])


PAST = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_a_last_answer_without_loss_is_no_answer_to_score(tmp_path):
    silent = {"role": "assistant", "content": "c", "weight": 0}
    raw = read(write(tmp_path, [{"messages": [*PAIR, PAST[0], silent]}]))
    tokenizer = byte_tokenizer(pad_token="<unk>")
    tokenizer.chat_template = CHATML
    prompt, answer = last_answer(tokenizer, raw.train["messages"][0])
    assert answer == "Yes?"
    assert tokenizer.decode(prompt).endswith("assistant\n")
    alone = read(write(tmp_path, [{"messages": [PAST[0], silent]}])).train["messages"][0]
    assert last_answer(tokenizer, alone)[1] == "c"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [*PAST, ASKED], "completion": [ANSWER]},
        {"prompt": [*PAST, ASKED], "chosen": [ANSWER], "rejected": [WORSE]},
        {"chosen": [*PAST, *PAIR], "rejected": [*PAST, ASKED, WORSE]},
        {"prompt": "a", "chosen": [*PAST, *PAIR], "rejected": [*PAST, ASKED, WORSE]},
        {"messages": [PAST[0], {**PAST[1], "weight": 0}, *PAIR]},
    ],
    ids=["pair", "preference", "conversations", "with the prompt as text", "weight"],
)
def test_answers_in_the_prompt_have_no_loss(tmp_path, row):
    named = {"format": "preference"} if "chosen" in row else {}
    raw = read(write(tmp_path, [row]), **named)
    assert messages(raw) == [[*PAST, *PAIR]]
    assert learned_text(raw.train["messages"][0]) == "Yes?<|im_end|>"


def test_all_turns_of_the_assistant_are_learned_elsewhere(tmp_path):
    raw = read(write(tmp_path, [{"messages": [*PAST, *PAIR]}]))
    assert learned_text(raw.train["messages"][0]) == "b<|im_end|>Yes?<|im_end|>"


def test_rated_rows_are_read_where_a_format_is_named(tmp_path):
    rated = write(tmp_path, [{"prompt": "Hi", "completion": "Yes?", "label": True}])
    assert messages(read(rated, format="prompt_completion")) == [PAIR]


def test_plain_text_goes_before_other_formats_and_the_other_is_said(tmp_path, caplog):
    file = write(tmp_path, [{**FORMATS["alpaca"][0], "text": "Add."}])
    with caplog.at_level(logging.INFO, "petl"):
        assert not read(file).task.chat
    assert "is read as text (text); data.format=alpaca reads its other columns" in caplog.text
    assert messages(read(file, format="alpaca")) == [FORMATS["alpaca"][1]]


@pytest.mark.parametrize("name", ["alpaca", "prompt_completion", "messages"])
def test_an_encoder_decoder_reads_formats_with_one_question_and_one_answer(tmp_path, name):
    row, expected, _ = FORMATS[name]
    raw = read(write(tmp_path, [row]), "seq2seq")
    texts = [turn["content"] for turn in expected]
    assert raw.train.to_list() == [dict(zip(("text", "target"), texts, strict=True))]
    with pytest.raises(InputError):
        read(write(tmp_path, [{"messages": [*PAIR, *PAIR]}]), "seq2seq")


def test_doubled_braces_of_a_system_prompt_are_braces(tmp_path):
    file = write(tmp_path, [{"messages": PAIR}])
    raw = read(file, system="Answer {{so}}.\\nBe brief.")
    assert {turns[0]["content"] for turns in messages(raw)} == {"Answer {so}.\nBe brief."}


def test_a_system_prompt_is_put_before_conversations_without_one(tmp_path):
    rows = [
        {"messages": PAIR, "topic": "sums", "tools": [FUNCTION]},
        {"messages": [{"role": "system", "content": "Own."}, *PAIR], "topic": "sums"},
    ]
    raw = read(write(tmp_path, rows), system="About {topic}.")
    assert {turns[0]["content"] for turns in messages(raw)} == {"About sums.", "Own."}
    fixed = read(write(tmp_path, rows), system="Be brief.")
    assert {turns[0]["content"] for turns in messages(fixed)} == {"Be brief.", "Own."}


# Templates


def test_templates_join_columns(tmp_path):
    rows = [{"question": "Why?", "context": None, "year": 7, "answer": "So {x}."}]
    settings = {"prompt": r"Question: {question}\n{context}{{{year}}} \\n", "answer": "{answer}"}
    raw = read(write(tmp_path, rows), **settings)
    ((asked, answered),) = messages(raw)
    assert asked["content"] == "Question: Why?\n{7} \\n"
    assert answered["content"] == "So {x}."


def test_templates_are_for_the_texts_of_every_task(tmp_path):
    rows = [{"a b": "x", "c": "y", "label": str(i % 2)} for i in range(4)]
    file = write(tmp_path, rows, "a.csv")
    assert read(file, "classification", text="{a b}-{c}", text_pair="c").train[0]["text"] == "x-y"
    assert read(file, text="{a b}-{c}").train[0]["text"] == "x-y"
    raw = read(file, "seq2seq", text="{c}", target="{a b}{c}")
    assert raw.train[0] == {"text": "y", "target": "xy"}


# Several files


def test_several_files_are_one_set_of_rows(tmp_path):
    names = [
        write(tmp_path, [{"text": f"t{n}{i}", "label": str(i)} for i in range(3)], f"{n}.csv")
        for n in "abc"
    ]
    raw = read(names[:2], "classification", names[1:])
    assert sorted(raw.train["text"]) == ["ta0", "ta1", "ta2", "tb0", "tb1", "tb2"]
    assert sorted(raw.test["text"]) == ["tb0", "tb1", "tb2", "tc0", "tc1", "tc2"]
    streamed = read(names[:2], "classification", names[1:], streaming=True)
    assert [row["text"] for row in streamed.train.rows()] == sorted(raw.train["text"])
