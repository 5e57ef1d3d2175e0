"""Scores of queries with documents: losses, rows, rankings of candidates."""

import math

import pytest
import torch
from datasets import Dataset
from tiny_tokenizers import byte_tokenizer
from training_fixtures import bert_config, write_model
from transformers import BertForSequenceClassification

from petl import retrieval
from petl.data.judgements import candidate_rows
from petl.data.models.loading import load_base, load_processor
from petl.data.tasks.retrieval.reranking import LOSSES, Reranking
from petl.errors import InputError

ROWS = [
    {"query": "the cat", "positive": "a green cat", "negatives": ["the red dog", "the bird"]},
    {"query": "the red bird", "positive": "bird", "negatives": ["green green", "dog"]},
    {"query": "dog", "positive": "the dog and the cat", "negatives": ["red", "cat"]},
]
LISTS = [
    {"query": row["query"], "documents": [row["positive"], *row["negatives"]], "scores": scores}
    for row, scores in zip(ROWS, ([1.0, 0.2, 0.6], [0.3, 0.9, 0.0], [0.5, 0.4, 0.1]), strict=True)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("cross") / "bert"
    config = bert_config()
    config.num_labels = 1
    names = ["input_ids", "token_type_ids", "attention_mask"]
    settings = {"cls_token": "[CLS]", "model_input_names": names}
    write_model(place, BertForSequenceClassification, config, **settings)
    return place


def loaded(folder, **fields):
    cfg = {"name": "bert", "source": "path", "path": str(folder), "dtype": "float32"}
    task = Reranking(max_length=24, **fields)
    tokenizer = load_processor(cfg, task)
    return task, load_base(cfg, task, processor=tokenizer), tokenizer


def batch_of(task, tokenizer, rows):
    return task.collate(tokenizer)(list(task.encode(tokenizer, Dataset.from_list(rows))))


def their_loss(loss, model, losses):
    none = torch.nn.Identity()
    if loss == "listwise":
        # of one row, which has no negatives of others
        function = losses.MultipleNegativesRankingLoss(model, scale=1.0, activation_fn=none)
        columns = [
            [[row["query"]], [row["positive"]], *([n] for n in row["negatives"])] for row in ROWS
        ]
        return sum(function(own, None) for own in columns) / len(ROWS)
    pairs = [
        (r["query"], *each) for r in LISTS for each in zip(r["documents"], r["scores"], strict=True)
    ]
    queries, documents, scores = zip(*pairs, strict=True)
    kind = losses.BinaryCrossEntropyLoss if loss == "binary" else losses.MSELoss
    return kind(model)([queries, documents], torch.tensor(scores))


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_are_those_of_sentence_transformers(loss, folder):
    st = pytest.importorskip("sentence_transformers.cross_encoder")
    task, ours, tokenizer = loaded(folder, loss=loss)
    value = ours(**batch_of(task, tokenizer, ROWS if loss == "listwise" else LISTS)).loss
    value.backward()
    theirs = st.CrossEncoder(str(folder), device="cpu", max_length=24).eval()
    expected = their_loss(loss, theirs, st.losses)
    expected.backward()
    torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-6)
    gradients = {n.partition("model.")[2]: p.grad for n, p in theirs.named_parameters()}
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert "classifier.weight" in found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, gradients[name], atol=1e-6, rtol=1e-5, msg=name)


def test_losses_are_their_equations():
    logits = torch.tensor([0.3, -1.2, 2.0, 0.7, -0.1])
    scores = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0])
    places = torch.tensor([[0, 1, 2], [3, 4, -1]])
    pairs = list(zip(logits.tolist(), scores.tolist(), strict=True))
    sigmoid = [1 / (1 + math.exp(-z)) for z, _ in pairs]
    each = [
        -y * math.log(p) - (1 - y) * math.log(1 - p)
        for p, (_, y) in zip(sigmoid, pairs, strict=True)
    ]
    assert LOSSES["binary"](logits, scores, places).item() == pytest.approx(sum(each) / 5)
    squares = [(z - y) ** 2 for z, y in pairs]
    assert LOSSES["mse"](logits, scores, places).item() == pytest.approx(sum(squares) / 5)
    total = 0.0
    for own in ([0.3, -1.2, 2.0], [0.7, -0.1]):
        total -= math.log(math.exp(own[0]) / sum(map(math.exp, own)))
    assert LOSSES["listwise"](logits, scores, places).item() == pytest.approx(total / 2)


def test_a_batch_has_the_scores_of_its_pairs_alone_and_its_items(folder):
    rows = [{**ROWS[0], "negatives": ["dog"]}, ROWS[1]]  # unlike numbers of negatives
    task, model, tokenizer = loaded(folder)
    batch = batch_of(task, tokenizer, rows)
    assert batch["labels"].tolist() == [1, 0, 1, 0, 0]
    assert batch["places"].tolist() == [[0, 1, -1], [2, 3, 4]]
    assert task.items(batch) == 5
    assert Reranking(loss="listwise").items(batch) == 2
    found = task.score(task.outputs(model, batch), batch)
    pairs = [(r["query"], d) for r in rows for d in [r["positive"], *r["negatives"]]]
    for (query, document), value in zip(pairs, found, strict=True):
        alone = model(**tokenizer(query, document, return_tensors="pt")).logits
        torch.testing.assert_close(value, alone[0], atol=1e-6, rtol=1e-5)


def test_a_trained_head_for_one_score_is_kept(folder):
    _, model, _ = loaded(folder)
    plain = BertForSequenceClassification.from_pretrained(folder)
    assert torch.equal(model.classifier.weight, plain.classifier.weight)
    assert not model.petl_new_modules


def test_the_candidates_of_a_query_are_ranked(folder):
    task, _, tokenizer = loaded(folder)
    rows = [*ROWS, {"query": "dog", "positive": "cat", "negatives": ["bird"]}]
    entries = candidate_rows(rows)
    own = {row["document"]: row["grade"] for row in entries if row["query"] == "dog"}
    # a negative of one row is the positive of another one
    assert own == {"the dog and the cat": 1, "red": 0, "cat": 1, "bird": 0}
    encoded = task.encode(tokenizer, Dataset.from_list(entries))
    values = torch.randn(len(entries), 1)
    found = task.summarize_rows(values, encoded)
    ranked, relevant = {}, {}
    for query in {row["query_id"] for row in entries}:
        each = [
            (v.item(), r) for v, r in zip(values, entries, strict=True) if r["query_id"] == query
        ]
        ranked[query] = [r["document_id"] for _, r in sorted(each, key=lambda one: -one[0])]
        relevant[query] = {r["document_id"]: r["grade"] for _, r in each}
    for name, value in retrieval.metrics(ranked, relevant).items():
        assert found[name] == pytest.approx(value), name


def test_equal_scores_are_in_the_order_of_ids_and_do_not_favour_the_positive(folder):
    task, _, tokenizer = loaded(folder)
    entries = candidate_rows(ROWS)
    encoded = task.encode(tokenizer, Dataset.from_list(entries))
    found = task.summarize_rows(torch.zeros(len(entries), 1), encoded)
    first = [
        min((r for r in entries if r["query"] == q["query"]), key=lambda r: r["document_id"])
        for q in ROWS
    ]
    assert found["accuracy_at_1"] == sum(row["grade"] for row in first) / 3
    assert found["accuracy_at_1"] < 1
    assert found["queries_with_ties"] == 3


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_ranks_nothing(value, folder):
    task, _, tokenizer = loaded(folder)
    entries = candidate_rows(ROWS)
    encoded = task.encode(tokenizer, Dataset.from_list(entries))
    values = torch.arange(float(len(entries)))[:, None]
    values[1] = value
    with pytest.raises(InputError):
        task.summarize_rows(values, encoded)


def test_held_out_rows_become_the_pairs_that_test_rows_are(folder):
    task, _, tokenizer = loaded(folder)
    held = task.encode(tokenizer, Dataset.from_list(ROWS))
    found = task.scored_rows(held, held)
    expected = task.encode(tokenizer, Dataset.from_list(candidate_rows(ROWS)))
    names = ("input_ids", "token_type_ids")
    keys = [
        (*(tuple(r[n]) for n in names), r["_grade"]) for rows in (found, expected) for r in rows
    ]
    assert {*keys[:9]} == {*keys[9:]}
    assert len(found) == len(expected) == 9


def test_a_pair_without_token_types_is_read_by_a_tokenizer_that_has_none():
    tokenizer = byte_tokenizer(pad_token="<|im_end|>")
    batch = batch_of(Reranking(), tokenizer, [{"query": "ab", "document": "c"}])
    assert batch["input_ids"].tolist() == [tokenizer("ab", "c")["input_ids"]]
    assert "labels" not in batch


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([ROWS[0], {**ROWS[1], "query": "the cat"}], "all 2 training rows have one query"),
        ([{**row, "scores": [0.5] * 3} for row in LISTS], "all 3 training rows have one score"),
    ],
)
def test_rows_that_tell_no_documents_apart_are_refused(folder, rows, words):
    task, _, tokenizer = loaded(folder)
    assert words in task.nothing_to_learn(task.encode(tokenizer, Dataset.from_list(rows)), 8)


def test_queries_without_both_kinds_of_documents_are_refused():
    with pytest.raises(InputError):
        candidate_rows([{"query": q, "positive": "d"} for q in "ab"])


def test_sure_pairs_have_the_ranks_of_their_logits(folder):
    """Of the largest logits, all probabilities are 1."""
    task, _, tokenizer = loaded(folder)
    encoded = task.encode(tokenizer, Dataset.from_list(candidate_rows(ROWS[:1])))
    rows = [{**row, "_number": i} for i, row in enumerate(encoded)]
    logits = torch.tensor([30.0, 50.0, 40.0])
    found = [each for _, each in task.described(logits.numpy(), rows)]
    assert [each["rank"] for each in found] == [3, 1, 2]
    assert {each["prediction"] for each in found} == {1.0}
