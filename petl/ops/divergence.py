"""The divergence of two distributions over classes, from their log-probabilities."""

import torch
from torch import Tensor


def divergence_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return p log(p / q) - p + q, whose sum over all classes is KL(p || q) in nats.

    Since p and q sum to 1, the last two change nothing, but each term is then at least 0, and an
    error that is common to all classes, as of the float32 normalization, is squared.

    Args:
        log_p, log_q: of one shape; computed in float64 where the device has it.
    """
    dtype = torch.float32 if log_p.device.type == "mps" else torch.float64
    log_p, log_q = log_p.to(dtype), log_q.to(dtype)
    p = log_p.exp()
    return p * (log_p - log_q) - p + log_q.exp()
