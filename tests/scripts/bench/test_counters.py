"""The counters count what a hand counts: these figures repeat exactly, so they gate."""

from dataclasses import replace

import pytest
import torch
from bench.contenders import RANK, contenders
from bench.counters import Kernels, count, flops, kept_bytes
from bench.shapes import Bench, gradient_to_embeddings
from bench.step import floor_of, runner
from tiny_shapes import TINY, TINY_LLAMA
from torch import nn

from petl.ops.recomputation import recomputed


def row(name):
    return next(row for row in contenders() if row.name == name)


def adapted(bench):
    """Width in and out of each linear layer of the blocks."""
    layers = bench.base.named_modules()
    return [(m.in_features, m.out_features) for n, m in layers if is_target(n, m)]


def is_target(name, module):
    return isinstance(module, nn.Linear) and "layer" in name


@pytest.mark.parametrize("name", TINY)
def test_the_floor_counts_four_products_for_each_weight_and_token(name):
    shape = TINY[name]
    bench = Bench(shape)
    weights = [m.weight.numel() for m in bench.base.modules() if isinstance(m, nn.Linear)]
    assert floor_of(bench)[1].flops == 4 * sum(weights) * shape.tokens
    assert shape.product_weights == sum(weights)


def test_the_floor_of_a_small_decoder_is_that_of_a_hand_count():
    # q, o: 64 x 64; k, v: 64 x 32; gate, up, down: 64 x 96; head: 64 x 200
    N = 2 * (2 * 4096 + 2 * 2048 + 3 * 6144) + 12_800
    assert N == 74_240
    assert floor_of(Bench(TINY_LLAMA))[1].flops == 4 * N * 32


def test_a_step_without_a_gradient_to_the_embeddings_saves_what_the_shape_says():
    bench = Bench(TINY_LLAMA)
    floor = floor_of(bench)[1].flops
    model = row("lora").wrap(bench)
    whole, saved = runner(row("lora"), bench).counts.flops, flops(bench.step(model), model)
    frozen = TINY_LLAMA.first_layer_saving * floor
    of_lora = 3 * 2 * TINY_LLAMA.tokens * RANK * 64  # the same inputs, by the A of q, k and v
    assert whole - saved == frozen + of_lora


@pytest.mark.parametrize("name", TINY)
def test_lora_adds_six_products_for_each_weight_and_token(name):
    bench = Bench(TINY[name])
    extra = runner(row("lora"), bench).counts.flops - floor_of(bench)[1].flops
    assert extra == 6 * bench.shape.tokens * RANK * sum(i + o for i, o in adapted(bench))


def test_a_sparse_method_adds_its_sampled_products_alone():
    bench = Bench(TINY_LLAMA)
    found = runner(row("sparse 1 %"), bench)
    tuned = sum(len(m.values) for m in found.model.modules() if hasattr(m, "stored_shape"))
    extra = found.counts.flops - floor_of(bench)[1].flops
    assert extra == 2 * bench.shape.tokens * tuned > 0


@pytest.mark.parametrize("name", TINY)
def test_lora_keeps_each_distinct_input_once(name):
    shape = TINY[name]
    bench = Bench(shape)
    kept = runner(row("lora"), bench).counts.kept - floor_of(bench)[1].kept
    inner = len(adapted(bench)) * RANK * shape.tokens * 4  # of each layer, x A^T
    assert shape.kept_by_lora == (2 * 64 + 96) * 4
    assert kept == shape.kept_by_lora * shape.tokens * shape.layers + inner


@pytest.mark.thorough
def test_kernels_of_mola_do_not_depend_on_the_number_of_experts():
    bench, mola = Bench(TINY_LLAMA), row("mola 8/2")
    counts = [
        runner(replace(mola, fields={**mola.fields, "num_experts": E}), bench).counts.kernels
        for E in (2, 4, 8)
    ]
    assert len(set(counts)) == 1


@pytest.mark.cells(2)
@pytest.mark.parametrize("name", ["lora", "lora, dropout", "mola 8/2", "mos", "density on lora"])
def test_kernels_of_a_layer_stay_within_their_goal(name):
    bench, goal = Bench(replace(TINY_LLAMA, layers=4)), row(name).kernels  # as MoS needs
    extra = runner(row(name), bench).counts.kernels - floor_of(bench)[1].kernels
    assert extra <= goal * len(adapted(bench))


def test_steps_count_the_same_each_time():
    bench = Bench(TINY_LLAMA)
    model = row("mola 8/2").wrap(bench)
    step = bench.step(model)
    with gradient_to_embeddings(model):
        assert count(step, model, bench.batch.values()) == count(step, model, bench.batch.values())


@pytest.mark.thorough
def test_no_method_of_petl_waits_for_a_value():
    bench = Bench(replace(TINY_LLAMA, layers=4))  # MoS draws its rows from four layers
    floor = floor_of(bench)[1].waits
    own = [row for row in contenders() if row.is_own and not row.elsewhere]
    # the teacher of `distill` waits once more: it is a pass of the model itself
    passes = {row.name: 2 if row.method == "distill" else 1 for row in own}
    assert all(runner(row, bench).counts.waits == floor * passes[row.name] for row in own)


def test_products_in_place_and_sparse_ones_are_counted():
    a, b, out = torch.ones(3, 4), torch.ones(4, 5), torch.ones(3, 5)
    entries = torch.tensor([[1.0, 0, 0, 1.0], [0, 0, 1.0, 0], [0, 0, 0, 0]]).to_sparse_csr()
    pattern = torch.zeros(3, 5)
    pattern[0, 1] = pattern[2, 2] = 1
    pattern = pattern.to_sparse_csr()
    dense = 2 * 3 * 4 * 5
    assert flops(lambda: a @ b) == dense
    assert flops(lambda: torch.addmm(out, a, b)) == dense
    assert flops(lambda: out.addmm_(a, b)) == dense
    assert flops(lambda: torch.ones(6, 3, 5).baddbmm_(a.expand(6, 3, 4), b.expand(6, 4, 5))) == (
        6 * dense
    )
    assert flops(lambda: a @ b[:, 0]) == 2 * 3 * 4
    assert flops(lambda: a[0].dot(b[:, 0])) == 2 * 4
    assert flops(lambda: entries @ b) == 2 * 3 * 5  # three entries
    assert flops(lambda: torch.sparse.sampled_addmm(pattern, a, b)) == 2 * 2 * 4  # two of them


def test_views_and_allocations_are_no_kernels():
    x = torch.ones(4, 6)
    with Kernels() as kernels:
        x.view(2, 12).t().unsqueeze(0).expand(3, 12, 2).detach()
        torch.empty(3)
    assert kernels.count == 0
    with Kernels() as kernels:
        (x @ x.t()).add_(1).sum().item()
    assert (kernels.count, kernels.waits) == (3, 1)


def test_kept_bytes_count_a_storage_once_and_leave_weights_out():
    layer = nn.Linear(6, 5)
    x = torch.ones(4, 6, requires_grad=True)

    def step():
        y = layer(x).exp()  # keeps y; the layer keeps x and its weight
        (y * y).sum().backward()  # keeps y, twice

    assert count(step, layer).kept == 4 * 5 * 4 + 4 * 6 * 4
    assert count(step, layer, [x]).kept == 4 * 5 * 4


def test_kept_bytes_leave_out_what_backward_computes_again():
    x = torch.randn(8, 16, requires_grad=True)

    def function(x: torch.Tensor) -> torch.Tensor:
        return x.exp().sin().sum()

    assert kept_bytes(lambda: function(x).backward(), [x]) == 8 * 16 * 4  # x.exp(), and its own
    assert kept_bytes(lambda: recomputed(function, x).backward(), [x]) == 0
