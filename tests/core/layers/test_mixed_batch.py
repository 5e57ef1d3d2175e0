"""Mixed batches: how rows are grouped, and how long prepared weights are cached."""

import gc
import weakref

import pytest
import torch

import petl
from petl import testing
from petl.core.layers.mixed_batch import AdapterRows, PreparedBatch, group_size, grouped
from petl.methods import mos
from petl.testing import Case

NAMES = ["one", "two", "__base__", "two"]
FIELDS = {"mos": {"r": 4}, "mola": {"r": 2, "num_experts": 4}, "lora": {"r": 2}}


def two(method="mos", **fields):
    """Return a case and a model with adapters "one" and "two", in evaluation mode."""
    case = Case(method, "llama", FIELDS.get(method, {"r": 4}) | fields).without_head()
    model = testing.stir(case.wrap(adapter_name="one"), "one")
    model.add_adapter("two", case.config())
    model.set_adapter("two")
    return case, testing.stir(model, "two", seed=3).eval()


def generated(model, ids, names, **more):
    return model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names,
        max_new_tokens=6, min_new_tokens=6, do_sample=False, **more,
    )  # fmt: skip


@pytest.mark.cells(2)
@pytest.mark.parametrize("method", ["mos", "mola", "adapter", "compacter"])
def test_each_row_generates_the_same_as_with_its_adapter_alone(method):
    case, model = two(method)
    ids = case.batch()["input_ids"]
    found = generated(model, ids, NAMES, use_cache=True)
    for row, name in enumerate(NAMES):
        assert torch.equal(found[row], generated(model, ids[row : row + 1], [name])[0])


@pytest.mark.parametrize("method", ["mos", "lora"])
def test_names_that_are_passed_again_keep_the_stacked_weights(method, monkeypatch):
    case, model = two(method)
    if method == "lora":
        petl.fuse_lora(model)
    made = []
    original = AdapterRows.prepared

    def prepared(self, layer, x, adapters, make):
        return original(self, layer, x, adapters, lambda *args: made.append(layer) or make(*args))

    monkeypatch.setattr(AdapterRows, "prepared", prepared)
    names = AdapterRows(NAMES, is_generation_call=True)
    ids = case.batch()["input_ids"]
    with torch.no_grad():
        first = model(input_ids=ids, adapter_names=names).logits
        count = len(made)
        assert torch.equal(model(input_ids=ids, adapter_names=names).logits, first)
        assert len(made) == count > 0
        model(input_ids=ids, adapter_names=NAMES)  # a list is of one call
    assert len(made) == 2 * count


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("half", ["base", "autocast"])
@pytest.mark.parametrize("method", ["mos", "mola", "adapter", "compacter", "lora"])
def test_in_half_precision_each_row_is_computed_by_its_adapter(method, half, tokens):
    every = {"num_experts": 2} if method == "mola" else {}  # else rounding changes what is picked
    case, model = two(method, **every)
    if method == "lora":
        petl.fuse_lora(model)
    if half == "base":
        model.bfloat16()
    ids = case.batch()["input_ids"][:, :tokens]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
        found = model(input_ids=ids, adapter_names=NAMES).logits.float()
        for row, name in enumerate(NAMES):
            own = model(input_ids=ids[row : row + 1], adapter_names=[name]).logits.float()
            assert testing.difference(found[row], own[0]) < 5e-2
        other = model(input_ids=ids[:1], adapter_names=["two"]).logits.float()
        assert testing.difference(found[0], other[0]) > 5e-2  # with the wrong adapter


def test_beams_of_a_row_use_its_adapter():
    case, model = two()
    ids = case.batch()["input_ids"]
    beams = generated(model, ids, NAMES, num_beams=2)
    alone = [generated(model, ids[i : i + 1], [n], num_beams=2)[0] for i, n in enumerate(NAMES)]
    assert torch.equal(beams, torch.stack(alone))


def test_a_generate_call_computes_factors_once(monkeypatch):
    case, model = two()
    calls = []
    factors = mos.MosAdapter.factors
    monkeypatch.setattr(
        mos.MosAdapter, "factors", lambda self: (calls.append(self), factors(self))[1]
    )
    generated(model, case.batch()["input_ids"][:3, :2], NAMES[:3], use_cache=True)
    assert len(calls) == len(set(calls))  # in six forward passes


def test_weight_changes_between_two_calls_take_effect():
    case, model = two()
    ids = case.batch()["input_ids"]
    generated(model, ids, NAMES)
    before = testing.logits(model, case.batch(), adapter_names=NAMES)
    testing.stir(model, "two", seed=8)
    after = testing.logits(model, case.batch(), adapter_names=NAMES)
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [False, True, False, True]


class CachedKernel:
    """Stand-in for a batched adapter."""

    def __call__(self, x, y):
        return y


@pytest.mark.cells(2)
@pytest.mark.parametrize(
    ("turns", "is_generation_call", "alive"),
    [(1, False, [False]), (3, False, [False, True]), (1, True, [True]), (3, True, [True])],
)
def test_the_cache_lives_as_long_as_the_call(turns, is_generation_call, alive):
    rows, layer, made = (
        AdapterRows(["a"], is_generation_call=is_generation_call),
        torch.nn.Linear(1, 1),
        [],
    )

    def make(names, dtype):
        assert (names, dtype) == (["a"], torch.float32)
        found = CachedKernel()
        made.append(weakref.ref(found))
        return found

    with torch.no_grad():
        for _ in range(turns):
            rows.prepared(layer, torch.ones(1, 1, 1), ["a"], make)
    gc.collect()
    assert [one() is not None for one in made] == alive
    del rows
    gc.collect()
    assert not any(one() is not None for one in made)


def test_weights_stacked_for_the_prompt_are_used_for_the_tokens_if_groups_are_equal():
    made = []

    def make(names, dtype):
        made.append(names)
        return CachedKernel()

    def turns(names, *tokens, dtype=torch.float32):
        rows, layer = AdapterRows(names, is_generation_call=True), torch.nn.Linear(1, 1)
        made.clear()
        for count in tokens:
            rows.prepared(layer, torch.ones(len(names), count, 1, dtype=dtype), names, make)
        return [len(groups) for groups in made]

    with torch.no_grad():
        assert turns(["a", "b", "c"], 7, 1, 1) == [3]
        assert turns(["a", "b"] * 8, 7, 1, 1) == [16, 2]  # then two groups of eight rows


def test_another_dtype_is_stacked_again():
    rows, layer, made = AdapterRows(["a", "b"], is_generation_call=True), torch.nn.Linear(1, 1), []
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16, torch.bfloat16):
            x = torch.ones(2, 1, 1, dtype=dtype)
            rows.prepared(layer, x, "ab", lambda names, kind: made.append(kind) or CachedKernel())
    assert made == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("names", ["abcab", "aabbb", "aaaaa", "-ab-a", "edcba", "a----"])
def test_rows_go_to_their_groups_and_back(names, n):
    """Each group adds its adapter's number to its own rows only."""
    own = {name: float(i + 1) for i, name in enumerate("abcde")}
    rows_of = {}
    for row, name in enumerate(names):
        if name != "-":
            rows_of.setdefault(name, []).append(row)
    groups = grouped(rows_of, len(names), n)
    x, y = torch.randn(5, 2, 3), torch.randn(5, 2, 4)

    def batched(x_, y_):
        assert x_.shape == (len(groups.names), n * 2, 3)
        more = torch.tensor([own[name] for name in groups.names]).view(-1, 1, 1)
        return y_.add_(more * x_[..., :1])

    expected = torch.stack(
        [y[row] + own.get(name, 0.0) * x[row][:, :1] for row, name in enumerate(names)]
    )
    before = y.clone()
    found = PreparedBatch(groups, batched).compute(x, y, is_own=False)
    torch.testing.assert_close(found, expected)
    assert torch.equal(y, before)
    torch.testing.assert_close(PreparedBatch(groups, batched).compute(x, y, is_own=True), expected)


def test_rows_in_order_are_not_copied():
    assert grouped({"a": [0, 1], "b": [2, 3]}, 4, 2).take is None
    assert grouped({"b": [0], "a": [1], "c": [2]}, 3, 1).take is None
    assert grouped({"a": [0, 2], "b": [1, 3]}, 4, 2).take is not None


@pytest.mark.parametrize(
    ("counts", "tokens", "size"),
    [
        ([1] * 64, 1, 1),
        ([4] * 16, 1, 4),  # each adapter is read once instead of four times
        ([16] * 4, 1, 16),
        ([4] * 4, 64, 1),  # long rows cost more to copy than adapters to read
        ([33, *[1] * 31], 1, 1),  # one group for each adapter would compute 1,056 rows
    ],
)
def test_group_size_has_the_lowest_cost(counts, tokens, size):
    rows_of = {str(i): [0] * count for i, count in enumerate(counts)}
    assert group_size(rows_of, tokens) == size


@pytest.mark.parametrize("method", ["mos", "mola", "adapter"])
def test_rows_of_a_batch_give_gradients_to_their_adapters(method):
    case, model = two(method)
    model.set_requires_grad(["one", "two"], True)
    ids = case.batch()["input_ids"][:4]
    for _ in range(2):  # the second call has what the first one has left
        model.zero_grad()
        model(input_ids=ids, adapter_names=NAMES).logits.square().sum().backward()
    trained = {n: p for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert all(any(f".{name}." in f"{key}." for key in trained) for name in ("one", "two"))
    mixed = {name: parameter.grad.clone() for name, parameter in trained.items()}
    model.zero_grad()
    for row, name in enumerate(NAMES):  # each row by itself
        if name != "__base__":
            model.set_adapter(name)
            model.set_requires_grad(["one", "two"], True)
            model(input_ids=ids[row : row + 1]).logits.square().sum().backward()
    for name, expected in mixed.items():
        torch.testing.assert_close(trained[name].grad, expected, atol=1e-4, rtol=1e-4)
