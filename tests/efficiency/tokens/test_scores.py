"""Which blocks of tokens are kept, by loops over rows, blocks and heads."""

import math

import pytest
import torch

from petl.efficiency.tokens.scores import Choice, column_sums, norm_scores, pooled_map


def chosen_by_loop(scores, valid, choice):
    """The positions of the kept tokens of each row: ends first, then the best blocks."""
    B, T = valid.shape
    N = math.ceil(T / choice.block)
    partial = T % choice.block > 0
    count = min(N, max(math.ceil(choice.keep * N), choice.first + choice.last + partial))
    found = []
    for row in range(B):
        there = [n for n in range(N) if valid[row, n * choice.block : (n + 1) * choice.block].any()]
        always = {*there[: choice.first], *there[len(there) - choice.last :]} if there else set()
        always |= {N - 1} if partial else set()
        rest = sorted({*there} - always, key=lambda n: -float(scores[row, n]))
        empty = [n for n in range(N) if n not in there and n not in always]
        blocks = sorted([*sorted(always), *rest, *empty][:count])
        tokens = [n * choice.block + i for n in blocks for i in range(choice.block)]
        found.append([t for t in tokens if t < T])
    return found


@pytest.mark.parametrize(
    ("tokens", "choice"),
    [
        (32, Choice(4, 0.4, 1, 1)),
        (30, Choice(4, 0.3, 1, 1)),  # the last block has 2 tokens
        (33, Choice(8, 0.5, 0, 0)),
        (24, Choice(4, 0.01, 2, 1)),
        (5, Choice(8, 0.5, 1, 1)),
        (7, Choice(1, 0.5, 1, 2)),
    ],
)
def test_the_best_blocks_are_kept_in_order_and_the_ends(tokens, choice):
    torch.manual_seed(0)
    scores = torch.randn(4, math.ceil(tokens / choice.block))
    valid = torch.ones(4, tokens, dtype=torch.bool)
    valid[1, tokens - tokens // 3 :] = False  # padding on the right, and on the left
    valid[2, : tokens // 2] = False
    expected = chosen_by_loop(scores, valid, choice)
    # rows keep equally many tokens; blocks of padding alone may fill them, whichever
    found = choice.positions(scores, valid).tolist()
    assert {len(row) for row in found} == {len(expected[0])}
    for row, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one == sorted({*one})
        real = {t for t in range(tokens) if valid[row, t]}
        assert {*one} & real == {*other} & real


def test_norms_are_means_over_tokens_without_padding():
    torch.manual_seed(0)
    hidden, valid = torch.randn(2, 10, 6), torch.ones(2, 10, dtype=torch.bool)
    valid[1, 5:] = False
    found = norm_scores(hidden, valid, 4)
    for row in range(2):
        for block in range(3):
            own = [t for t in range(4 * block, min(10, 4 * block + 4)) if valid[row, t]]
            norms = [math.sqrt(sum(float(x) ** 2 for x in hidden[row, t])) for t in own]
            expected = sum(norms) / len(norms) if norms else 0.0
            assert float(found[row, block]) == pytest.approx(expected, rel=1e-5)


def test_the_map_has_the_means_of_positive_products_with_earlier_keys():
    torch.manual_seed(0)
    B, h, groups, T, D, b, scale = 2, 4, 2, 10, 3, 4, 0.7
    queries, keys = torch.randn(B, h, T, D), torch.randn(B, groups, T, D)
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[1, 8:] = False
    found = pooled_map(queries, keys, valid, b, scale)
    expected = torch.zeros(B, 3, 3)
    for row in range(B):
        for i in range(T):
            for j in range(i + 1):
                if valid[row, i] and valid[row, j]:
                    products = [
                        scale * float(queries[row, head, i] @ keys[row, head // 2, j])
                        for head in range(h)
                    ]
                    expected[row, i // b, j // b] += sum(max(p, 0.0) for p in products) / b**2
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(column_sums(found), expected.sum(1))


def test_a_planted_needle_is_kept():
    torch.manual_seed(0)
    queries, keys = 0.1 * torch.randn(1, 2, 64, 8), 0.1 * torch.randn(1, 2, 64, 8)
    queries[..., 0] += 1
    keys[:, :, 21, 0] += 50  # of block 5
    valid = torch.ones(1, 64, dtype=torch.bool)
    choice = Choice(4, 0.2, 1, 1)
    scores = column_sums(pooled_map(queries, keys, valid, 4, 1.0))
    assert {20, 21, 22, 23} <= {*choice.positions(scores, valid)[0].tolist()}
