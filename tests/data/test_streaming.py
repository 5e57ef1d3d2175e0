"""Streaming: the order of rows, memory use, and errors."""

import json
import tracemalloc
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from tiny_tokenizers import byte_tokenizer

from petl.data.base import Stream, read_data
from petl.data.batch_sampler import SequentialStepSampler
from petl.data.streaming import StreamedRows, shuffled
from petl.data.task_columns import ClassificationColumns
from petl.data.tasks.causal_lm import CausalLM
from petl.data.tasks.classification import Classification
from petl.errors import InputError
from petl.training.dataloader import digest, load

TOKENIZER = byte_tokenizer(pad_token="<unk>")


def numbers(count, buffer=8, *, held=0, seed=0, recent=4):
    """Training rows streamed from the texts t0, t1, ..."""
    stream = Stream(lambda: ({"text": f"t{i}"} for i in range(count)), buffer, 5)
    return StreamedRows(stream, CausalLM(), TOKENIZER, seed, recent, held)


def texts(rows, places):
    return [int(TOKENIZER.decode(rows[i]["input_ids"][1:-1])) for i in places]


def test_rows_are_drawn_from_the_buffer_and_each_occurs_once():
    order = list(shuffled(iter(range(500)), 50, Random(0)))
    assert sorted(order) == list(range(500))
    assert order != sorted(order)
    assert all(row < place + 50 for place, row in enumerate(order))  # none before it was read
    late = np.abs(np.array(order) - np.arange(500)).mean()
    assert 20 < late < 120  # about the size of the buffer away from its place


def test_the_order_depends_on_the_seed_and_the_epoch():
    rows = numbers(30)
    passes = [texts(rows, range(30 * i, 30 * i + 30)) for i in range(3)]
    assert all(sorted(found) == list(range(30)) for found in passes)
    assert len({tuple(found) for found in passes}) == 3
    assert texts(numbers(30), range(30)) == passes[0]
    assert texts(numbers(30, seed=1), range(30)) != passes[0]


def test_a_position_can_be_read_directly_and_repeatedly():
    straight = texts(numbers(40), range(60))
    rows = numbers(40)
    assert texts(rows, [45, 47, 45]) == [straight[i] for i in (45, 47, 45)]
    assert texts(rows, [3]) == [straight[3]]  # from the beginning, once more
    assert texts(rows.restarted(), [0]) == [straight[0]]


def test_held_rows_are_the_first_and_are_never_trained_on():
    rows = numbers(20, held=5)
    held = [int(TOKENIZER.decode(ids[1:-1])) for ids in rows.held_out()["input_ids"]]
    assert held == [0, 1, 2, 3, 4]
    assert sorted(texts(rows, range(15))) == list(range(5, 20))
    with pytest.raises(InputError):
        numbers(20, held=20)[0]


def test_another_stream_has_another_digest():
    assert digest(numbers(40)) == digest(numbers(40).restarted())
    assert digest(numbers(40)) != digest(numbers(41))


@pytest.fixture
def formats(tmp_path):
    rows = [{"text": f"text {i}\u2028", "label": i % 3 + 0.5} for i in range(250)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    csv = ["text,label", *(f"{row['text']},{row['label']}" for row in rows)]
    (tmp_path / "a.csv").write_text("\ufeff" + "\n".join(csv), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "test.jsonl").write_text("\n".join(lines[:5]), encoding="utf-8")
    return tmp_path


def read(folder, train, **settings):
    given = {"name": "files", "source": "files", "task": "regression", "streaming": True}
    files = {"train": str(folder / train), "test": str(folder / "test.jsonl")}
    return read_data({**given, **files, **settings})


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_streamed_files_give_the_rows_of_files_in_memory(formats, name):
    streamed = read(formats, name)
    assert isinstance(streamed.train, Stream)
    whole = read(formats, name, streaming=False).train.to_list()
    found = list(streamed.train.rows())
    assert [row["text"] for row in found] == [f"text {i}\u2028" for i in range(250)]
    assert sorted(found, key=str) == sorted(whole, key=str)
    assert len(list(read(formats, name, train_rows=7).train.rows())) == 7
    assert isinstance(streamed.test, Dataset)


# Tasks that depend on all rows


@pytest.fixture
def tagged(tmp_path):
    """Twenty rows of two classes, the second of which occurs late, and questions about them."""
    rows = [
        {
            "text": f"text {i}",
            "label": "late" if i in (15, 18) else "early",
            "tokens": ["text", str(i)],
            "tags": ["O", "B-N" if i == 15 else "O"],
            "question": "which",
            "context": " ".join(str(i + j) for j in range(12)),
            "answers": {"text": [str(i)], "answer_start": [0]},
        }
        for i in range(20)
    ]
    for name, some in (("a.jsonl", rows), ("test.jsonl", rows[:3])):
        (tmp_path / name).write_text("\n".join(map(json.dumps, some)))
    return tmp_path


@pytest.mark.parametrize("task", ["classification", "token_classification", "question_answering"])
def test_task_and_rows_of_a_stream_are_those_of_the_file_in_memory(tagged, task):
    streamed, whole = (read(tagged, "a.jsonl", task=task, streaming=s) for s in (True, False))
    assert streamed.task == whole.task
    assert streamed.task.labels in (["early", "late"], ["B-N", "O"], None)
    ours, theirs = (
        sorted(map(without_number, rows)) for rows in (streamed.train.rows(), whole.train)
    )
    assert ours == theirs
    assert streamed.test.to_list() == whole.test.to_list()


def without_number(row):
    """A row without its number, which depends on the order."""
    return str([(key, value) for key, value in sorted(row.items()) if key != "number"])


@pytest.mark.parametrize("streaming", [True, False])
def test_with_class_names_the_stream_is_not_searched_for_classes(tagged, monkeypatch, streaming):
    monkeypatch.setattr(ClassificationColumns, "names", None)
    classes = ["late", 7, "early"]  # one that no row has; a number is its name
    given = {"task": "classification", "labels": classes, "streaming": streaming}
    found = read(tagged, "a.jsonl", **given)
    assert found.task.labels == ["late", "7", "early"]
    rows = found.train.rows() if streaming else found.train
    assert {row["text"]: row["label"] for row in rows} == {
        f"text {i}": 0 if i in (15, 18) else 2 for i in range(20)
    }


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        ("classification", ["early", "x"], r"a\.jsonl, line 16: label is 'late'"),
        ("token_classification", ["O", "x"], "line 16: tags .*'B-N'"),
    ],
)
def test_an_unknown_class_is_named_with_its_line(tagged, task, labels, message):
    rows = read(tagged, "a.jsonl", task=task, labels=labels).train.rows()
    assert len([next(rows) for _ in range(15)]) == 15
    with pytest.raises(InputError, match=message):
        next(rows)


def test_only_training_rows_are_searched_for_classes(tagged):
    for rows, words in ((15, "'early'"), (None, r"a\.jsonl, line 21: label")):
        with pytest.raises(InputError, match=words):
            read(tagged, "a.jsonl", task="classification", train_rows=rows)
        with (tagged / "a.jsonl").open("a") as opened:
            opened.write('\n{"text": "x", "label": null}')


def test_questions_without_an_answer_are_found_anywhere_in_the_stream(tagged):
    with (tagged / "a.jsonl").open("a") as opened:
        opened.write('\n{"question": "which", "context": "c", "answers": null}')
    found = read(tagged, "a.jsonl", task="question_answering", max_length=30, stride=2)
    assert found.task.unanswerable


def test_windows_of_one_question_are_held_out_together(tagged):
    given = {"task": "question_answering", "max_length": 22, "stride": 3}
    found = read(tagged, "a.jsonl", **given)
    tokenizer = byte_tokenizer(pad_token="<unk>", cls_token="<s>")
    encoded = list(found.train.encoded(found.task, tokenizer))
    numbers = [row["_number"] for row in encoded]
    assert numbers[4] == numbers[5]  # five windows do not end with a question
    rows = StreamedRows(found.train, found.task, tokenizer, seed=0, recent=4, held=5)
    held = rows.held_out()["_number"]
    assert held == [number for number in numbers if number <= numbers[4]]
    left = [row["input_ids"] for row in encoded[len(held) :]]
    assert sorted(rows[i]["input_ids"] for i in range(len(left))) == sorted(left)


# Which process encodes which rows


class Counting(Classification):
    """Count the rows that are encoded."""

    encoded = 0

    def encode_rows(self, tokenizer, rows):
        Counting.encoded += len(rows["text"])
        return super().encode_rows(tokenizer, rows)


class Joining(Counting):
    """A task that may drop rows, so that rows are encoded before they are shuffled."""

    one_for_one = False


def two_processes(task, count=2):
    """The texts of each step of each process, and the number of rows that it encoded."""
    stream = Stream(lambda: ({"text": f"t{i}", "label": i % 2} for i in range(10, 60)), 8, 5)
    found = []
    for rank in range(count):
        Counting.encoded = 0
        rows = StreamedRows(stream, task, TOKENIZER, seed=0, recent=6, held=2)
        shape = {"rows": 0, "batch_size": 6, "micro_batch_size": None, "seed": 0}
        plan = SequentialStepSampler(**shape, steps=9, rank=rank, processes=count)
        batches = load(rows, task.collate(TOKENIZER), plan, torch.device("cpu"), 0)
        steps = [{TOKENIZER.decode(ids[:3]) for ids in batch["input_ids"]} for batch in batches]
        found.append((steps, Counting.encoded))
    return found


def test_each_process_encodes_only_its_rows_and_together_they_equal_one_process():
    task = Counting(classes=["a", "b"], max_length=16)
    ((one, _),) = two_processes(task, count=1)
    (first, encoded), (second, also) = two_processes(task)
    assert [a | b for a, b in zip(first, second, strict=True)] == one
    assert encoded == also == 9 * 3
    ((joined, every),) = two_processes(Joining(classes=["a", "b"], max_length=16), count=1)
    assert joined == one  # the order does not depend on which way the rows go
    assert every > 9 * 6


def test_memory_use_is_that_of_the_buffer(tmp_path):
    """Twenty megabytes of text are read with less than two megabytes of memory."""
    line = json.dumps({"text": "x" * 9_000, "label": 1.0})
    with (tmp_path / "a.jsonl").open("w") as opened:
        opened.writelines(f"{line}\n" for _ in range(2_200))
    (tmp_path / "test.jsonl").write_text(line)
    stream = read(tmp_path, "a.jsonl").train
    rows = shuffled(stream.rows(), 20, Random(0))
    tracemalloc.start()
    count = sum(1 for _ in rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2_200
    assert peak < 2e6
