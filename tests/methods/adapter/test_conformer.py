import pytest
import torch
from torch import nn

from petl.methods.adapter.conformer import depthwise, normalize_channels


def test_depthwise_equals_sums_over_the_kernel():
    N, T, D, W = 2, 4, 3, 5
    v, weight, bias = torch.randn(N, T, D), torch.randn(D, 1, W), torch.randn(D)
    expected = bias.repeat(N, T, 1)
    for t in range(T):
        for w in range(W):
            if 0 <= t + w - 2 < T:
                expected[:, t] += v[:, t + w - 2] * weight[:, 0, w]
    torch.testing.assert_close(depthwise(v, weight, bias), expected)


@pytest.mark.parametrize("update", [True, False])
def test_channels_are_normalized_as_by_batch_norm(update):
    norm = nn.BatchNorm1d(3)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    statistics = (torch.zeros(3), torch.ones(3))
    v = torch.randn(2, 4, 3)
    for training in (True, False):
        norm.train(training)
        expected = norm(v.transpose(1, 2)).transpose(1, 2)
        if not update:
            norm.running_mean.zero_()
            norm.running_var.fill_(1.0)
        found = normalize_channels(
            v, norm.weight, norm.bias, statistics, training=training, update=update and training
        )
        if training or update:
            torch.testing.assert_close(found, expected)
        torch.testing.assert_close(statistics, (norm.running_mean, norm.running_var))
