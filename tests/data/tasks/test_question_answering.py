from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from tiny_tokenizers import word_tokenizer

from petl.data.tasks.question_answering import QuestionAnswering, best_span
from petl.errors import InputError

CONTEXT = "Ada wrote notes in London. Later, Bob read them in Paris."


def rows(*answers, question="who?"):
    """Questions about CONTEXT; an answer is a text that occurs in it once, or "" for none."""
    texts = [[answer] if answer else [] for answer in answers]
    return Dataset.from_dict(
        {
            "question": [question] * len(answers),
            "context": [CONTEXT] * len(answers),
            "answers": texts,
            "starts": [[CONTEXT.index(t) for t in some] for some in texts],
            "number": list(range(len(answers))),
        }
    )


@pytest.fixture
def task():
    return QuestionAnswering(max_length=28, stride=8, max_answer_length=8)


def test_windows_overlap_and_point_at_the_characters_of_the_answer(task, tokenizer):
    encoded = task.encode(tokenizer, rows("London"))
    windows = [tokenizer.decode(ids)[len("who?") :] for ids in encoded["input_ids"]]
    assert windows[0] + "".join(window[8:] for window in windows[1:]) == CONTEXT
    holding = ["London" in window for window in windows]
    assert any(holding)
    assert not all(holding)
    for row, holds in zip(encoded, holding, strict=True):
        start, end = row["start_positions"], row["end_positions"]
        assert (tokenizer.decode(row["input_ids"][start : end + 1]) == "London") == holds
        assert holds or start == end == 0


def values_of(encoded, task, *, sure=5.0, null=-1.0):
    """Scores of a model that predicts the labels, in windows without answer the null position."""
    values = []
    for row in encoded:
        T = len(row["input_ids"])
        start, end = torch.zeros(1, T), torch.zeros(1, T)
        points = row["start_positions"], row["end_positions"]
        start[0, 0] = end[0, 0] = null
        if points != (0, 0):
            start[0, points[0]] = end[0, points[1]] = sure
        batch = {
            "start_positions": torch.tensor(points[:1]),
            "end_positions": torch.tensor(points[1:]),
            "attention_mask": torch.ones(1, T),
        }
        outputs = SimpleNamespace(start_logits=start, end_logits=end)
        values.append(task.score(outputs, batch))
    return torch.cat(values)


def test_the_best_span_of_all_windows_is_compared_as_text(task, tokenizer):
    encoded = task.encode(tokenizer, rows("London", "Paris.", "Bob"))
    assert len(encoded) > 3
    scores = task.summarize_rows(values_of(encoded, task), encoded)
    assert (scores["exact_match"], scores["f1"], scores["rows"]) == (1, 1, 3)


def test_the_answer_is_empty_if_all_windows_prefer_the_null_position(tokenizer):
    task = QuestionAnswering(max_length=28, stride=8, unanswerable=True)
    encoded = task.encode(tokenizer, rows("London", ""))
    assert task.summarize_rows(values_of(encoded, task, null=1.0), encoded)["exact_match"] == 1
    task.unanswerable = False
    assert task.summarize_rows(values_of(encoded, task, null=1.0), encoded)["exact_match"] == 0.5


def test_the_first_questions_may_all_be_without_an_answer(tokenizer, monkeypatch):
    monkeypatch.setattr(QuestionAnswering, "encoded_at_once", 2)
    task = QuestionAnswering(max_length=28, stride=8, unanswerable=True)
    encoded = task.encode(tokenizer, rows("", "", "London"))
    assert task.summarize_rows(values_of(encoded, task, null=1.0), encoded)["exact_match"] == 1


def test_the_best_span_is_ordered_and_within_the_maximum_length():
    draw = torch.Generator().manual_seed(0)
    context = "abcdefghijkl"
    offsets = [(-1, -1), (-1, -1), *((i, i + 1) for i in range(12))]
    for _ in range(20):
        starts, ends = torch.randn(2, 14, generator=draw).numpy()
        pairs = [(s, e) for s in range(2, 14) for e in range(s, min(14, s + 3))]
        s, e = max(pairs, key=lambda pair: starts[pair[0]] + ends[pair[1]])
        sure, text, *_ = best_span(starts, ends, offsets, context, 3)
        assert text == context[s - 2 : e - 1]
        assert sure == pytest.approx(float(starts[s] + ends[e]))


def test_spaces_around_an_answer_are_no_part_of_its_label(task):
    tokenizer = word_tokenizer("is", "in", "Paris")
    context = "Paris is in Paris "
    for answer, start, expected in [(" in ", 8, " in"), ("Paris ", 12, " Paris")]:
        columns = {"answers": [[answer]], "starts": [[start]], "number": [0]}
        rows = {"question": ["a"], "context": [context], **columns}
        encoded = task.encode_rows(tokenizer, rows)
        (first,), (last,) = encoded["start_positions"], encoded["end_positions"]
        assert tokenizer.decode(encoded["input_ids"][0][first : last + 1]) == expected


def test_padding_is_excluded_from_the_loss(task, tokenizer):
    encoded = task.encode(tokenizer, rows("London"))
    made = task.collate(tokenizer)([encoded[0], {**encoded[-1], "start_positions": 3}])
    starts = torch.randn(2, made["input_ids"].shape[1])
    outputs = SimpleNamespace(start_logits=starts, end_logits=starts)
    short = int(made["attention_mask"][1].sum())
    assert short < starts.shape[1]
    expected = sum(
        F.cross_entropy(starts[1:, :short], made[key][1:]) / 2
        for key in ("start_positions", "end_positions")
    )
    assert task.score(outputs, made)[1, -1].item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_question_that_leaves_no_room_for_the_context_is_named(task, tokenizer):
    with pytest.raises(InputError, match=r"a long question.*28"):
        task.encode(tokenizer, rows("Bob", question="a long question, is it?."))
