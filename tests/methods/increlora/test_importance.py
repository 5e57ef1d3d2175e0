"""Scores of updates and their smoothing, compared with the dense formulas."""

import pytest
import torch

from petl.methods.increlora.importance import smooth, update_score, watch

T, I, O, R = 11, 6, 9, 3


def make(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, T, O), (2, T, I), (R, I), (O, R))
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("block_bytes", [1, 4 * I * 4, 2**20])
def test_score_is_the_dense_sum_in_blocks_of_any_size(block_bytes):
    grad, x, A, B = make()
    dense = torch.einsum("bto,bti->oi", grad, x)
    expected = sum(
        abs(float((B @ A)[o, i]) * float(dense[o, i])) for o in range(O) for i in range(I)
    )
    assert float(update_score(grad, x, A, B, block_bytes=block_bytes)) == pytest.approx(expected)


def test_score_of_half_precision_tensors_is_computed_in_float32():
    grad, x, A, B = make()
    grad, x = grad.bfloat16(), x.bfloat16()
    expected = update_score(grad.double(), x.double(), A.double(), B.double())
    found = update_score(grad, x, A, B)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(update_score(grad, x, A, B), found)


def test_watch_changes_nothing_but_the_gradient_of_its_probe():
    _, x, A, B = make(torch.float64)
    W = torch.randn(O, I, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tensors = [t.requires_grad_() for t in (x, A, B)]
    probe = torch.zeros((), requires_grad=True)

    def loss(watched):
        y = x @ W.t() + 0.5 * (x @ A.t()) @ B.t()
        y = watch(y, x, A, B, 0.5, probe) if watched else y
        return y.tanh().square().sum()

    plain = torch.autograd.grad(loss(False), tensors)
    loss(True).backward()
    for tensor, expected in zip(tensors, plain, strict=True):
        assert torch.equal(tensor.grad, expected)
    M = (0.5 * B @ A).detach().requires_grad_()
    (x.detach() @ (W + M).t()).tanh().square().sum().backward()
    assert float(probe.grad) == pytest.approx(float((M * M.grad).abs().sum()), rel=1e-6)


def test_scores_of_several_backward_passes_add_up_in_the_probe():
    _, x, A, B = make()
    probe = torch.zeros((), requires_grad=True)
    sums = []
    for part in (x[0], x[1]):
        y = (part @ A.t() @ B.t()).requires_grad_()
        watch(y, part, A, B, 1.0, probe).square().sum().backward()
        sums.append(float(update_score(2 * y.detach(), part, A, B)))
    assert float(probe.grad) == pytest.approx(sum(sums), rel=1e-5)


def test_smoothing_follows_its_definition_and_skips_what_is_not_finite():
    scores = torch.tensor([[1.0, 4.0], [3.0, 0.5], [2.0, 2.0]])
    ema = torch.zeros(2, 2)
    I, U = [0.0, 0.0], [0.0, 0.0]
    for score in scores:
        ema = smooth(score, ema, 0.8, 0.6)
        for n in range(2):
            I[n] = 0.8 * I[n] + 0.2 * float(score[n])
            U[n] = 0.6 * U[n] + 0.4 * abs(float(score[n]) - I[n])
        assert ema[:, 0].tolist() == pytest.approx(I)
        assert ema[:, 1].tolist() == pytest.approx(U)
    for bad in (torch.inf, torch.nan):
        assert torch.equal(smooth(torch.tensor([1.0, bad]), ema, 0.8, 0.6), ema)


def test_a_single_vector_has_the_score_of_a_batch_of_one():
    grad, x, A, B = torch.randn(5), torch.randn(4), torch.randn(2, 4), torch.randn(5, 2)
    assert torch.equal(update_score(grad, x, A, B), update_score(grad[None], x[None], A, B))
