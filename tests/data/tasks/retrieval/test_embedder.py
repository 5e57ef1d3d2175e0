"""The loss of a batch of a run: in one pass, in slices, on several processes."""

import copy
from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from datasets import Dataset
from kept_processes import in_processes
from tiny_tokenizers import byte_tokenizer
from transformers import BertConfig, BertModel

import petl
from petl import retrieval
from petl.data.tasks.retrieval import Retrieval, embedder
from petl.data.tasks.retrieval.embedder import LOSSES, loss_of, whole_step
from petl.efficiency.together.batches import check_loss
from petl.errors import UnsupportedError

PAIRS = [(f"q{i} ask", f"answer {i * i} {'x' * i}") for i in range(6)]
ROWS = {
    "in_batch": [
        # unlike numbers of negatives, a copy of another row's positive, one of the own
        {"query": q, "positive": d, "negatives": [d[::-1], PAIRS[0][1], d][: 1 + i % 3]}
        for i, (q, d) in enumerate(PAIRS)
    ],
    "triplet": [
        {"query": q, "positive": d, "negatives": [d[::-1], "no"][: 1 + i % 2]}
        for i, (q, d) in enumerate(PAIRS)
    ],
    "cosent": [{"sentence1": q, "sentence2": d, "score": i % 3} for i, (q, d) in enumerate(PAIRS)],
    "cosine": [{"sentence1": q, "sentence2": d, "score": i / 5} for i, (q, d) in enumerate(PAIRS)],
    "listwise": [
        {
            "query": q,
            "documents": [d, d[::-1], q][: 2 + i % 2],
            "scores": [2.0, 1.0, -1.0][: 2 + i % 2],
        }
        for i, (q, d) in enumerate(PAIRS)
    ],
    "supervised": [{"text": q + d, "label": i % 2} for i, (q, d) in enumerate(PAIRS)],
}


def tokenizer():
    return byte_tokenizer(pad_token="<|im_end|>")


def model_for(task: Retrieval, dropout: float = 0.0) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer()),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    model = BertModel(config, add_pooling_layer=False).double().train()
    task.adjust(model)
    return model


def batch_for(task: Retrieval, rows) -> dict[str, torch.Tensor]:
    encoded = task.encode(tokenizer(), Dataset.from_list(rows))
    batch = task.collate(tokenizer())(list(encoded))
    return {n: t.double() if t.is_floating_point() else t for n, t in batch.items()}


def gradients(model) -> torch.Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def vectors(model, texts: list[str]) -> torch.Tensor:
    """Each text alone, mean over its tokens."""
    found = []
    for text in texts:
        ids = torch.tensor([tokenizer()(text)["input_ids"]])
        mask = torch.ones_like(ids)
        found.append(model(input_ids=ids, attention_mask=mask).last_hidden_state[0].mean(0))
    return torch.stack(found)


def by_hand(loss: str, model, rows) -> torch.Tensor:
    def column(name):
        return vectors(model, [row[name] for row in rows])

    if loss == "in_batch":
        total = 0.0
        texts = [row["positive"] for row in rows] + [n for row in rows for n in row["negatives"]]
        for row in rows:
            others = [text for text in texts if text != row["positive"]]
            q, *documents = vectors(model, [row["query"], row["positive"], *others])
            cosines = torch.stack([F.cosine_similarity(q, d, dim=0) for d in documents])
            total = total - (20 * cosines).log_softmax(0)[0]
        return total / len(rows)
    if loss == "triplet":
        flat = [(r["query"], r["positive"], n) for r in rows for n in r["negatives"]]
        return retrieval.triplet(*(vectors(model, list(each)) for each in zip(*flat, strict=True)))
    if loss in ("cosent", "cosine"):
        scores = torch.tensor([row["score"] for row in rows], dtype=torch.float64)
        return LOSSES[loss].function(column("sentence1"), column("sentence2"), scores)
    if loss == "listwise":
        each = []
        for row in rows:
            q, *documents = vectors(model, [row["query"], *row["documents"]])
            scores = torch.tensor([row["scores"]], dtype=torch.float64)
            each.append(retrieval.listwise(q[None], torch.stack(documents)[None], scores))
        return torch.stack(each).mean()
    return retrieval.supervised(column("text"), torch.tensor([row["label"] for row in rows]))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_has_the_loss_and_gradients_of_its_texts_alone(loss):
    task = Retrieval(loss=loss, max_length=64)
    model, rows = model_for(task), ROWS[loss]
    found = model(**batch_for(task, rows)).loss
    found.backward()
    got = gradients(model)
    expected = by_hand(loss, model, rows)
    expected.backward()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got, gradients(model), atol=1e-6, rtol=1e-6)


def test_dims_add_the_loss_of_shorter_vectors():
    rows = ROWS["in_batch"][:3]
    task = Retrieval(dims=[16, 4], mask_duplicates=False)
    model, batch = (
        model_for(task),
        batch_for(task, [{**r, "negatives": r["negatives"][:1]} for r in rows]),
    )
    q, p, n = (
        vectors(model, texts)
        for texts in (
            [r["query"] for r in rows],
            [r["positive"] for r in rows],
            [r["negatives"][0] for r in rows],
        )
    )
    expected = sum(retrieval.in_batch(q[:, :w], p[:, :w], [n[:, :w]]) for w in (16, 4))
    torch.testing.assert_close(model(**batch).loss, expected, atol=1e-6, rtol=1e-6)


def test_without_masking_copies_of_the_positive_are_negatives():
    rows = [{"query": q, "positive": "same"} for q, _ in PAIRS]
    losses = {}
    for mask in (True, False):
        task = Retrieval(mask_duplicates=mask)
        losses[mask] = model_for(task)(**batch_for(task, rows)).loss.item()
    assert losses[True] == pytest.approx(0, abs=1e-9)
    assert losses[False] == pytest.approx(torch.log(torch.tensor(6.0)).item(), abs=1e-6)


@pytest.mark.parametrize("loss", [name for name, kind in LOSSES.items() if kind.compares])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_micro_batches_have_the_gradients_of_the_whole_step(loss, dropout):
    task = Retrieval(loss=loss, max_length=64)
    model, rows = model_for(task, dropout), ROWS[loss]
    parts = [batch_for(task, part) for part in (rows[:3], rows[3:5], rows[5:])]
    weighted = [(part, len(part["places"]) / len(rows)) for part in parts]

    def forward(batch):
        assert "places" not in batch
        with torch.no_grad():
            return model(**batch)

    torch.manual_seed(5)
    losses = []
    for batch, weight in whole_step(task, weighted, forward):
        loss_of_part = model(**batch).loss * weight
        loss_of_part.backward()
        losses.append(loss_of_part.detach())
    after = torch.rand(1)
    found = gradients(model)
    # all vectors with one graph, drawn part by part as before
    torch.manual_seed(5)
    each = [
        model(**{n: t for n, t in part.items() if n not in task.label_columns}).sentence_embedding
        for part in parts
    ]
    assert torch.rand(1) == after
    expected = loss_of_vectors(task, torch.cat(each), parts)
    expected.backward()
    torch.testing.assert_close(sum(losses), expected.detach(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found, gradients(model), atol=1e-6, rtol=1e-6)


def loss_of_vectors(task, every, parts) -> torch.Tensor:
    """The loss of several batches as one, from their vectors."""
    count = max(part["places"].shape[1] for part in parts)
    places, identity, start = [], [], 0
    for part in parts:
        own = part["places"]
        places.append(
            F.pad(torch.where(own < 0, -1, own + start), (0, count - own.shape[1]), value=-1)
        )
        identity.append(F.pad(part["identity"], (0, count - own.shape[1])))
        start += len(part["input_ids"])
    batch = {"places": torch.cat(places), "identity": torch.cat(identity)}
    batch["labels"] = torch.ones(len(batch["places"]))
    if "scores" in parts[0]:
        batch["scores"] = torch.cat([part["scores"] for part in parts])
    return loss_of(task, every, batch)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("in_batch", {"scale": 7.0, "margin": -0.01, "symmetric": True}),
        ("triplet", {"margin": 0.3, "distance": "cosine"}),
        ("cosent", {"scale": 7.0}),
        ("listwise", {"temperature": 3.0}),
        ("supervised", {"scale": 7.0}),
    ],
)
def test_settings_of_a_loss_are_arguments_of_its_function(loss, options):
    rows = [dict(row) for row in ROWS[loss][:3]]
    for row in rows:  # of one length
        for name in ("negatives", "documents", "scores"):
            if name in row:
                row[name] = row[name][:2] if name != "negatives" else row[name][:1]
    if loss == "supervised":
        rows = ROWS[loss]
    task = Retrieval(loss=loss, max_length=64, mask_duplicates=False, **options)
    model = model_for(task)
    found = model(**batch_for(task, rows)).loss

    def column(name):
        return vectors(model, [row[name] for row in rows])

    function = LOSSES[loss].function
    if loss in ("in_batch", "triplet"):
        negatives = vectors(model, [row["negatives"][0] for row in rows])
        more = [negatives] if loss == "in_batch" else negatives
        expected = function(column("query"), column("positive"), more, **options)
    elif loss == "cosent":
        scores = torch.tensor([row["score"] for row in rows])
        expected = function(column("sentence1"), column("sentence2"), scores, **options)
    elif loss == "listwise":
        documents = torch.stack([vectors(model, row["documents"]) for row in rows])
        scores = torch.tensor([row["scores"] for row in rows])
        expected = function(column("query"), documents, scores, **options)
    else:
        labels = torch.tensor([row["label"] for row in rows])
        expected = function(column("text"), labels, **options)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    plain = Retrieval(loss=loss, max_length=64, mask_duplicates=False)
    assert abs(model_for(plain)(**batch_for(plain, rows)).loss - found) > 1e-4


def test_one_micro_batch_is_left_as_it_is():
    task = Retrieval()
    weighted = [(batch_for(task, ROWS["in_batch"]), 1.0)]
    assert task.whole_step(weighted, pytest.fail) is weighted
    several = weighted * 2
    assert Retrieval(loss="cosine").whole_step(several, pytest.fail) is several


COMPARING = [name for name, kind in LOSSES.items() if kind.compares]


def gradients_of_a_part():
    """In a process: the gradients of its part of a step, averaged as DDP does, by loss."""
    rank, size = dist.get_rank(), dist.get_world_size()
    found = {}
    for loss, slices in product(COMPARING, (1, 2)):
        task = Retrieval(loss=loss, max_length=64)
        model, rows = model_for(task), ROWS[loss]
        own = rows[:4] if rank == 0 else rows[4:]
        each = [own] if slices == 1 else [own[:1], own[1:]]
        weighted = [(batch_for(task, part), len(part) * size / len(rows)) for part in each]

        def forward(batch, model=model):
            with torch.no_grad():
                return model(**batch)

        value = 0.0
        for batch, weight in task.whole_step(weighted, forward):
            part = model(**batch).loss * weight
            part.backward()
            value += part.item()
        mean = torch.cat([gradients(model), torch.tensor([value], dtype=torch.float64)])
        dist.all_reduce(mean)
        found[loss, slices] = (mean / size).tolist()
    return found


@pytest.mark.thorough
def test_processes_have_the_gradients_of_one_with_all_rows():
    for found in in_processes(2, gradients_of_a_part):
        for (loss, _), values in found.items():
            task = Retrieval(loss=loss, max_length=64)
            model = model_for(task)
            value = model(**batch_for(task, ROWS[loss])).loss
            value.backward()
            expected = torch.cat([gradients(model), value.detach()[None]])
            got = torch.tensor(values, dtype=torch.float64)
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_the_model_can_be_copied():
    task = Retrieval(normalize=True)
    model = copy.deepcopy(model_for(task).eval())
    batch = batch_for(task, [{"text": "some words"}])
    vector = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert vector.sentence_embedding.norm().item() == pytest.approx(1)
    assert vector.loss is None


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_texts_of_unlike_lengths_are_computed_apart_with_equal_results(pooling, side, monkeypatch):
    task = Retrieval(pooling=pooling, max_length=64)
    model, batch = model_for(task), batch_for(task, ROWS["in_batch"])
    if side == "left":
        shifts = [int((row == 0).sum()) for row in batch["attention_mask"]]
        for name in ("input_ids", "attention_mask"):
            rows = zip(batch[name], shifts, strict=True)
            batch[name] = torch.stack([row.roll(shift) for row, shift in rows])
    found = {}
    for call in (10**6, 8):
        monkeypatch.setattr(embedder, "CALL", call)
        widths = []
        handle = model.embeddings.register_forward_hook(
            lambda _, __, out, widths=widths: widths.append([*out.shape[:2]])
        )
        loss = model(**batch).loss
        loss.backward()
        handle.remove()
        found[call] = torch.cat([loss.detach()[None], gradients(model)]), widths
        # what a run says of its padding
        assert model.petl_task.positions(batch) == sum(rows * width for rows, width in widths)
    (one, (whole,)), (parts, several) = found.values()
    torch.testing.assert_close(parts, one, atol=1e-9, rtol=1e-9)
    assert sum(rows for rows, _ in several) == whole[0]
    if side == "right":
        assert len(several) > 2
        assert sum(rows * width for rows, width in several) < 0.8 * whole[0] * whole[1]


def test_texts_are_computed_apart_in_a_model_with_adapters(monkeypatch):
    """PEFT's model of features passes its arguments on, None among them."""
    monkeypatch.setattr(embedder, "CALL", 8)
    task = Retrieval(max_length=64)
    fields = {"task_type": "FEATURE_EXTRACTION", "target_modules": ["query"]}
    model = petl.wrap(model_for(task), "lora", r=2, **fields).double().train()
    widths = []
    embeddings = model.get_base_model().embeddings
    embeddings.register_forward_hook(lambda _, __, out: widths.append(out.shape[:2]))
    assert model(**batch_for(task, ROWS["in_batch"])).loss.isfinite()
    assert len(widths) > 2


def test_adapters_of_embedders_do_not_train_in_one_pass():
    """Each job's rows would have to be its own negatives: the loss is none of logits."""
    task = Retrieval(max_length=64)
    fields = {"task_type": "FEATURE_EXTRACTION", "target_modules": ["query"]}
    model = petl.wrap(model_for(task), "lora", r=2, **fields)
    with pytest.raises(UnsupportedError):
        check_loss(model, batch_for(task, ROWS["in_batch"]))


def test_negatives_of_micro_batches_count_as_those_of_the_whole_step():
    """Rows have unlike numbers of negatives, each with a term in the loss."""
    task = Retrieval(loss="triplet", max_length=64)
    model, rows = model_for(task), ROWS["triplet"]
    whole = batch_for(task, rows)
    parts = [batch_for(task, part) for part in (rows[:3], rows[3:4], rows[4:])]
    weighted = [model(**part).loss * task.items(part) for part in parts]
    expected = model(**whole).loss * task.items(whole)
    torch.testing.assert_close(sum(weighted), expected, atol=1e-9, rtol=1e-9)


def test_hooks_see_all_texts_in_one_pass(monkeypatch):
    monkeypatch.setattr(embedder, "CALL", 8)
    task = Retrieval(max_length=64)
    model, batch = model_for(task), batch_for(task, ROWS["in_batch"])
    model.register_forward_pre_hook(lambda *_: None)
    widths = []
    model.embeddings.register_forward_hook(lambda _, __, out: widths.append(out.shape[:2]))
    model(**batch)
    assert widths == [batch["input_ids"].shape]


def test_statistics_of_a_batch_are_of_all_texts(monkeypatch):
    monkeypatch.setattr(embedder, "CALL", 8)
    task = Retrieval(max_length=64)
    fields = {"task_type": "FEATURE_EXTRACTION", "block": "conformer", "conv_kernel_size": 3}
    model = petl.wrap(model_for(task), "adapter", **fields).train()
    model(**batch_for(task, ROWS["in_batch"]))
    counts = [n for name, n in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert {int(count) for count in counts} == {1}


def test_parts_save_more_positions_than_a_pass_costs():
    assert embedder.of_alike([5, 5, 6, 6, 50, 52], call=10) == [4, 2]
    assert embedder.of_alike([5, 5, 6, 6, 50, 52], call=1) == [2, 2, 1, 1]
    assert embedder.of_alike([5, 5, 6, 6, 50, 52], call=1000) == [6]
    assert embedder.of_alike([7], call=0) == [1]


def less(name: str, **fields) -> list[dict]:
    """The rows of a loss with other values in some columns."""
    return [{**row, **fields} for row in ROWS[name]]


@pytest.mark.parametrize(
    ("loss", "rows", "batch_size", "words"),
    [
        ("in_batch", [{"query": q, "positive": d} for q, d in PAIRS], 1, "batch_size=1 leaves"),
        ("in_batch", less("in_batch", query="q"), 4, "all 6 training rows have one query"),
        (
            "in_batch",
            less("in_batch", positive="d", negatives=["d"]),
            4,
            "all 6 training rows have one document",
        ),
        (
            "triplet",
            [*ROWS["triplet"], *less("triplet", negatives=[])[:2]],
            4,
            "2 of 8 training rows have no negative",
        ),
        (
            "listwise",
            [{**r, "documents": r["documents"][:1], "scores": [1.0]} for r in ROWS["listwise"]],
            4,
            "6 of 6 training rows have no second document",
        ),
        ("cosent", less("cosent", score=0.5), 4, "all 6 training rows have one score"),
        ("supervised", less("supervised", label=1), 4, "all 6 training rows have one label"),
        ("supervised", [*ROWS["supervised"], {"text": "x", "label": 2}], 4, "1 of 3 labels"),
    ],
)
def test_rows_that_teach_nothing_are_refused(loss, rows, batch_size, words):
    task = Retrieval(loss=loss, max_length=64)

    def reason(own, size):
        return task.nothing_to_learn(task.encode(tokenizer(), Dataset.from_list(own)), size)

    assert words in reason(rows, batch_size)
    assert not reason(ROWS[loss], 4)


def test_vectors_are_compared_as_the_loss_compares_them():
    """With `dims`, each loss has vectors of unit length: products are cosines there."""
    assert Retrieval(loss="listwise").similarity == "dot"
    assert Retrieval(loss="listwise", normalize=True).similarity == "cosine"
    assert Retrieval(loss="in_batch").similarity == "cosine"
    task = Retrieval(loss="listwise", dims=[16, 4], max_length=64)
    model, batch = model_for(task), batch_for(task, ROWS["listwise"])
    loss = model(**batch).loss
    # the lengths of vectors have no part in the loss
    found = model(**{n: t for n, t in batch.items() if n not in task.label_columns})
    longer = found.sentence_embedding * torch.arange(1, len(found.sentence_embedding) + 1)[:, None]
    torch.testing.assert_close(loss_of(task, longer, batch), loss, atol=1e-9, rtol=1e-9)
    assert task.similarity == "cosine"
