"""Quantized weights, compared with the code books' definition, the authors' layer and dump."""

import pytest
import torch
from torch.special import ndtr, ndtri

from petl.ops.quantize import (
    BITS,
    EPSILON,
    POSITIVE_CODES,
    code_book,
    decode,
    decode_latent,
    encode,
    numbers_of,
    pack,
    packed_bytes,
    quantize,
    quantize_each,
    unpack,
)

CPU = torch.device("cpu")


def matrix(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3 + 0.1


def authors_codes(bits):
    """Run the authors' iteration, 500 rounds from zero, in float64."""
    values = torch.zeros(2**bits, dtype=torch.float64)
    for _ in range(500):
        bounds = (values[1:] + values[:-1]) / 2
        p = torch.cat([torch.tensor([0.0]), ndtr(bounds), torch.tensor([1.0])])
        values = ndtri((p[1:] + p[:-1]) / 2)
    return values


def authors_weight(w, bits):
    """Return the weight of the authors' layer: codes as a sum of signs."""
    codes = authors_codes(bits).float()
    bounds, steps = (codes[1:] + codes[:-1]) / 2, (codes[1:] - codes[:-1]) / 2
    mean, std = w.mean(), w.std()
    z = (w - mean) / (std + 1e-5)
    q = (torch.sign(z.unsqueeze(-1) - bounds) * steps).sum(-1)
    return (q.data + z - z.data) * std + mean


def authors_dump(w, bits):
    """Return their byte string, padded with zeros where they drop the last partial byte."""
    codes = authors_codes(bits).float()
    z = (w - w.mean()) / (w.std() + 1e-5)
    numbers = (z.reshape(-1, 1) - codes).abs().argmin(1).tolist()
    per = 8 // bits
    numbers += [0] * (-len(numbers) % per)
    return bytes(
        sum(n << bits * i for i, n in enumerate(numbers[j : j + per]))
        for j in range(0, len(numbers), per)
    )


@pytest.mark.parametrize("bits", BITS)
def test_each_code_is_the_median_of_its_cell(bits):
    codes, bounds = code_book(bits, CPU)
    assert len(codes) == 2**bits
    assert torch.equal(codes, -codes.flip(0))
    assert (codes.diff() > 0).all()
    positive = torch.tensor(POSITIVE_CODES[bits], dtype=torch.float64)
    edges = torch.cat(
        [torch.zeros(1), (positive[1:] + positive[:-1]) / 2, torch.tensor([torch.inf])]
    )
    survival = ndtr(-edges.double())
    medians = -ndtri((survival[1:] + survival[:-1]) / 2)
    torch.testing.assert_close(positive, medians, atol=2e-8, rtol=0)
    torch.testing.assert_close(bounds, (codes[1:] + codes[:-1]) / 2, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_codes_are_those_of_the_authors(bits):
    codes = code_book(bits, CPU)[0]
    torch.testing.assert_close(codes.double(), authors_codes(bits), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("bits", "absolute", "square"),
    [(1, 0.4724, 0.3770), (2, 0.2654, 0.1283), (4, 0.0744, 0.0117)],
)
def test_expected_errors_are_those_noted_for_the_code_books(bits, absolute, square):
    codes, bounds = (t.double() for t in code_book(bits, CPU))
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    error = x - codes[torch.bucketize(x, bounds)]
    weight = torch.exp(-x.square() / 2) / (2 * torch.pi) ** 0.5 * (x[1] - x[0])
    found = float((weight * error.abs()).sum()), float((weight * error.square()).sum())
    assert found == pytest.approx((absolute, square), rel=1e-2)  # noted from random draws
    if bits == 1:  # 2 (2 phi(c) - phi(0)) and 1 - 2 c sqrt(2 / pi) + c^2, not 1 - 2 / pi
        assert found == pytest.approx((0.4732217, 0.3786065), abs=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_weights_and_gradients_equal_the_authors_layer(bits):
    ours, theirs = (matrix(8, 12).requires_grad_() for _ in range(2))
    upstream = matrix(8, 12, seed=1)
    W_q, expected = quantize(ours, bits), authors_weight(theirs, bits)
    torch.testing.assert_close(W_q, expected, atol=2e-6, rtol=0)
    W_q.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-4, rtol=0)


def test_gradient_is_straight_through_plus_one_term_along_the_scale():
    W = matrix(8, 12).double().requires_grad_()
    G = matrix(8, 12, seed=1)
    quantize(W, 2).backward(G)
    with torch.no_grad():
        Z = (W - W.mean()) / W.std()
        codes, bounds = code_book(2, CPU)
        Q = codes[torch.bucketize(Z.float(), bounds)]
        expected = G + (G * (Q - Z)).sum() * Z / (W.numel() - 1)
    assert (expected - G).abs().max() > 1e-3  # the statistics are not detached
    torch.testing.assert_close(W.grad.float(), expected.float(), atol=2e-4, rtol=0)


@pytest.mark.parametrize("bits", BITS)
def test_at_most_two_to_the_bits_values_and_they_are_exact(bits):
    W = matrix(64, 33)
    values = quantize(W, bits).unique()
    assert len(values) <= 2**bits
    packed, stats = encode(W, bits)
    assert torch.equal(decode(packed, stats, W.shape, bits), quantize(W, bits))


@pytest.mark.parametrize("bits", [1, 2, 4])  # their 8-bit code book has not converged
@pytest.mark.parametrize("shape", [(8, 12), (5, 7), (3, 3, 1)])
def test_bytes_are_those_of_the_authors_dump(bits, shape):
    W = matrix(*shape)
    packed, stats = encode(W, bits)
    assert bytes(packed.tolist()) == authors_dump(W, bits)
    assert len(packed) == packed_bytes(W.numel(), bits)
    torch.testing.assert_close(stats, torch.stack([W.mean(), W.std()]))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 63])
def test_packing_is_lossless(bits, count):
    numbers = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(count))
    packed = pack(numbers, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_bytes(count, bits) == -(-count * bits // 8)
    assert torch.equal(unpack(packed, count, bits), numbers)


def test_each_row_is_quantized_by_its_own_statistics():
    W = torch.stack([matrix(40), 5 + 3 * matrix(40, seed=2)])
    expected = torch.stack([quantize(row, 2) for row in W])
    torch.testing.assert_close(quantize_each(W, 2), expected)


def test_quantizing_twice_shrinks_the_deviation():
    W = matrix(400, 100)
    once = quantize(W, 1)
    assert float(once.std() / W.std()) == pytest.approx(0.674, abs=5e-3)


@pytest.mark.parametrize("bits", BITS)
def test_latent_weights_are_quantized_to_the_packed_ones(bits):
    W = matrix(16, 24)
    packed, stats = encode(W, bits)
    latent = decode_latent(packed, stats, W.shape, bits)
    torch.testing.assert_close(quantize(latent, bits), decode(packed, stats, W.shape, bits))


def test_weights_of_one_code_are_restored():
    packed, stats = torch.tensor([0xFF], dtype=torch.uint8), torch.tensor([0.5, 2.0])
    latent = decode_latent(packed, stats, torch.Size([8]), 1)
    assert torch.equal(latent, decode(packed, stats, torch.Size([8]), 1))


def test_half_precision_weights_are_quantized_in_float32():
    W = matrix(8, 12).bfloat16()
    assert torch.equal(quantize(W, 1), quantize(W.float(), 1))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("entries", [7, 20_000])
def test_each_entry_gets_its_nearest_code(entries, bits):
    torch.manual_seed(0)
    W = torch.randn(entries) * 3 + 1
    book = torch.tensor([-c for c in reversed(POSITIVE_CODES[bits])] + [*POSITIVE_CODES[bits]])
    Z = (W - W.mean()) / (W.std() + EPSILON)
    apart = torch.stack([(Z - code).abs() for code in book])
    found, _ = numbers_of(W, bits)
    torch.testing.assert_close(
        apart.gather(0, found[None])[0], apart.min(0).values, atol=1e-6, rtol=0
    )
