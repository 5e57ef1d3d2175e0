"""`segmented_loss`: loss and gradients of the plain cross-entropy, few logits at a time."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from petl.ops.segmented_loss import AnyHead, mean_loss, segmented_loss

P, V, D = 33, 50, 8


def drawn(dtype=torch.float32, labelled=21, **options):
    torch.manual_seed(0)
    hidden = torch.randn(P, D).to(dtype).requires_grad_()
    weight = torch.randn(V, D).to(dtype).requires_grad_(options.get("trained", True))
    bias = torch.randn(V).to(dtype).requires_grad_() if options.get("bias", True) else None
    labels = torch.randint(0, V, (P,))
    labels[torch.randperm(P)[labelled:]] = -100
    return hidden, weight, bias, labels


def by_hand(hidden, weight, bias, labels, items=None):
    """The sum over the labels of log sum exp z - z[label], over their number."""
    terms = []
    for h, y in zip(hidden, labels, strict=True):
        if y != -100:
            z = (weight @ h if bias is None else weight @ h + bias).float()
            terms.append(z.exp().sum().log() - z[y])
    return torch.stack(terms).sum() / (items or len(terms))


def gradients(loss, *tensors):
    return torch.autograd.grad(3 * loss, [t for t in tensors if t is not None and t.requires_grad])


def assert_equal_up_to(tolerance, one, other):
    for a, b in zip(one, other, strict=True):
        assert (a - b).float().norm() <= tolerance * b.float().norm()


@pytest.mark.parametrize("labelled", [P, 21, 1])
@pytest.mark.parametrize("tokens", [1, 5, 16, 1000])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"trained": False, "bias": False}])
def test_loss_and_gradients_are_those_of_the_equation(tokens, labelled, options):
    *inputs, labels = drawn(labelled=labelled, **options)
    hidden, weight, bias = inputs
    for items in (None, 7, torch.tensor(7)):
        expected = by_hand(*inputs, labels, items)
        found = segmented_loss(hidden, weight, labels, tokens=tokens, bias=bias, items=items)
        assert found.dtype == torch.float32
        assert found.ndim == 0
        assert_equal_up_to(2e-6, [found], [expected])
        assert_equal_up_to(2e-6, gradients(found, *inputs), gradients(expected, *inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_products_and_a_loss_in_float32(dtype):
    *inputs, labels = drawn(dtype)
    hidden, weight, bias = inputs
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = gradients(by_hand(*exact, labels), *exact)
    found = segmented_loss(hidden, weight, labels, tokens=16, bias=bias)
    assert found.dtype == torch.float32
    plain = gradients(
        F.cross_entropy((hidden @ weight.T + bias).float(), labels), hidden, weight, bias
    )
    for ours, torchs, right in zip(gradients(found, *inputs), plain, expected, strict=True):
        assert ours.dtype == dtype
        # no further from the exact gradient than the plain loss, up to the noise of rounding
        assert (ours - right).norm() <= 1.2 * (torchs - right).norm()


def test_the_precision_of_autocast_is_used():
    *inputs, labels = drawn()
    hidden, weight, bias = inputs
    with torch.autocast("cpu", torch.bfloat16):
        found = segmented_loss(hidden, weight, labels, tokens=16, bias=bias)
        plain = F.cross_entropy(F.linear(hidden, weight, bias).float(), labels)
    assert found != segmented_loss(hidden, weight, labels, tokens=16, bias=bias)
    assert_equal_up_to(1e-3, [found], [plain])
    assert_equal_up_to(2e-2, gradients(found, *inputs), gradients(plain, *inputs))


def test_any_head_has_the_gradients_of_its_parameters():
    hidden, weight, bias, labels = drawn()
    scale = torch.tensor(0.5, requires_grad=True)

    def logits(rows):
        return torch.tanh(F.linear(rows, weight, bias) * scale)

    found = mean_loss(
        AnyHead(logits, [weight, bias, scale]),
        hidden,
        labels,
        tokens=5,
        parameters=[weight, bias, scale],
    )
    expected = F.cross_entropy(logits(hidden), labels)
    everything = (hidden, weight, bias, scale)
    assert_equal_up_to(2e-6, gradients(found, *everything), gradients(expected, *everything))


def test_no_label_at_all_is_0_over_0():
    hidden, weight, _, labels = drawn()
    labels.fill_(-100)
    assert segmented_loss(hidden, weight, labels, tokens=5).isnan()
    assert segmented_loss(hidden, weight, labels, tokens=5, items=3) == 0


class Rows(TorchDispatchMode):
    """The most rows of width V of any tensor made in its block."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.shape[-1:] == (V,) and leaf.ndim == 2:
                self.most = max(self.most, len(leaf))
        return result


def test_logits_of_one_segment_exist_at_a_time():
    hidden, weight, bias, labels = drawn(trained=False, bias=False)
    with Rows() as rows:
        loss = segmented_loss(hidden, weight, labels, tokens=9, bias=bias)
        saved = loss.grad_fn.next_functions[0][0].saved_tensors
        assert sum(t.numel() for t in saved if t is not None) == 21 * D
        loss.backward()
    assert rows.most == 9  # the transposed weight has D = 8 rows
