"""CorDA: LoRA initialized from components of the weight, oriented by the layer's inputs.

Yang et al. 2024, "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for
Task-Aware Parameter-Efficient Fine-tuning", NeurIPS (arXiv:2406.05223). A few hundred samples give
the second moment C of each layer's inputs; W C is decomposed by SVD, W C = U S V^T, and W = U S V^T
C^-1. Instruction-previewed mode ("ipm") trains the leading components, with samples of the task;
knowledge-preserved mode ("kpm") trains the trailing ones, with samples of the knowledge to keep.
Training is plain LoRA on the residual weight, and the adapter is saved as a plain LoRA of twice the
rank on the original weight.

    config.py           the fields, on top of PEFT's LoraConfig
    covariance.py       second moments of the inputs of many layers, in one pass over the data
    cache.py            covariances and factors on disk, found by their content
    calibration.py      from data to covariances: within a memory bound, over all processes
    decompose.py        from covariances to components, distributed over processes
    initialization.py   checks, the initial factors, CorDA++'s ranks
    method.py           the residual base weights, saving

Shapes: I in, O out, R rank, B rows of a batch, T tokens, K = min(I, O).

Where the sources disagree: each sample is first divided by its signed maximum, as in both codes
(`activation_norm: none` for the paper). CorDA++ (arXiv:2506.13187, 2025) adds the choice of one of
several covariances and of the ranks; both are experimental here, since its formulas were available
second-hand only: the compactness is that of the damped C.
"""

from petl.methods.corda.config import CordaConfig
from petl.methods.corda.method import Corda

__all__ = ["Corda", "CordaConfig"]
