"""Mixed batches that generate: what is put together for the rows once serves each token."""

import gc
import weakref

import pytest
import torch

import petl
from petl import testing
from petl.core.rows import Rows
from petl.methods import mos
from petl.testing import Case

NAMES = ["a", "b", "__base__", "b"]


def two():
    """A model of MoS with adapters "a" and "b", in evaluation mode."""
    case = Case("mos", "llama", {"r": 4})
    model = testing.stir(case.wrap(adapter_name="a"), "a")
    model.add_adapter("b", case.config())
    model.set_adapter("b")
    return case, testing.stir(model, "b", seed=3).eval()


def generated(model, ids, names, **more):
    return model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names,
        max_new_tokens=6, min_new_tokens=6, do_sample=False, **more,
    )  # fmt: skip


def test_each_row_generates_what_its_adapter_alone_does():
    case, model = two()
    ids = case.batch()["input_ids"]
    found = generated(model, ids, NAMES)
    for row, name in enumerate(NAMES):
        assert torch.equal(found[row], generated(model, ids[row : row + 1], [name])[0])
    beams = generated(model, ids, NAMES, num_beams=2)
    alone = [generated(model, ids[i : i + 1], [n], num_beams=2)[0] for i, n in enumerate(NAMES)]
    assert torch.equal(beams, torch.stack(alone))


def test_factors_are_gathered_for_the_first_tokens_and_not_for_each(monkeypatch):
    case, model = two()
    calls = []
    factors = mos.MosAdapter.factors
    monkeypatch.setattr(
        mos.MosAdapter, "factors", lambda self: (calls.append(self), factors(self))[1]
    )
    generated(model, case.batch()["input_ids"][:, :2], NAMES, use_cache=True)
    assert len(calls) == 2 * len(set(calls))  # of six turns


def test_weights_that_change_between_two_calls_are_seen():
    case, model = two()
    ids = case.batch()["input_ids"]
    generated(model, ids, NAMES)
    before = testing.logits(model, case.batch(), adapter_names=NAMES)
    testing.stir(model, "b", seed=8)
    after = testing.logits(model, case.batch(), adapter_names=NAMES)
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [False, True, False, True]


@pytest.mark.parametrize("turns", [1, 3])
def test_what_is_kept_lasts_as_long_as_the_call(turns):
    rows, layer, made = Rows(["a"]), torch.nn.Linear(1, 1), []

    def make():
        found = petl.ops.low_rank.stack_rows(
            [(torch.ones(2, 1), torch.ones(1, 2), 1.0)], torch.float32
        )
        made.append(weakref.ref(found.A))
        return found

    for _ in range(turns):
        rows.stacked(layer, torch.float32, make)
    gc.collect()
    assert [one() is not None for one in made] == ([False, True] if turns > 1 else [False])
    del rows
    gc.collect()
    assert not any(one() is not None for one in made)
