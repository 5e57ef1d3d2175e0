"""Convolution and batch norm of a conformer block.

Shapes: N rows, T tokens, D channels, W kernel size.
"""

from torch import Tensor
from torch.nn import functional as F


def depthwise(v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve each channel of `v` along the tokens, [N, T, D], with zero padding.

    Args:
        v: [N, T, D].
        weight: [D, 1, W], W odd.
        bias: [D].
    """
    channels, _, size = weight.shape
    out = F.conv1d(v.transpose(1, 2), weight, bias, padding=size // 2, groups=channels)
    return out.transpose(1, 2)


def normalize_channels(
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: tuple[Tensor, Tensor],
    *,
    training: bool,
    update: bool,
) -> Tensor:
    """Batch-normalize `v` [N, T, D] over N and T, as `torch.nn.BatchNorm1d` with its defaults.

    Args:
        v: input.
        weight: [D].
        bias: [D].
        statistics: running mean and variance, both [D]; used unless `training`.
        training: use the statistics of this batch.
        update: update the running statistics with momentum 0.1; with `training` only.
    """
    # copies take the update instead of None: checkpointing has to save the same number of tensors
    # in the forward pass and in the recomputation
    if training and not update:
        statistics = (statistics[0].clone(), statistics[1].clone())
    mean, variance = statistics
    # [N T, D]: batch_norm takes channels second
    flat = F.batch_norm(v.flatten(0, 1), mean, variance, weight, bias, training)
    return flat.view(v.shape)
