"""The convolution of a conformer block. Shapes: N rows, T tokens, D channels, W kernel size."""

from torch import Tensor
from torch.nn import functional as F


def depthwise(v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Each channel of `v` [N, T, D] convolved along the tokens, as long as before.

    Args:
        v: input; beyond its ends are zeros.
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
    """Batch normalisation of `v` [N, T, D] over N and T, as `torch.nn.BatchNorm1d` with defaults.

    Args:
        statistics: running mean and variance, both [D]; used unless `training`.
        training: use the statistics of this batch.
        update: move the running statistics a tenth of the way towards the batch's; `training` only.
    """
    if training and not update:  # copies: checkpointing wants the same tensors saved both times
        statistics = (statistics[0].clone(), statistics[1].clone())
    mean, variance = statistics
    flat = F.batch_norm(v.flatten(0, 1), mean, variance, weight, bias, training)
    return flat.view(v.shape)
