"""CorDA: LoRA that starts from the weight's own components, oriented by what the layer sees.

Yang et al. 2024, "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for
Task-Aware Parameter-Efficient Fine-tuning", NeurIPS (arXiv:2406.05223). A few hundred samples give
the second moment C of each layer's inputs; the singular components of W C are the orientation.
Instruction-previewed mode ("ipm") trains the leading ones, of samples of the task;
knowledge-preserved mode ("kpm") the trailing ones, of samples of what must survive. Training is
plain LoRA on the residual weight, and the result is saved as a plain LoRA on the original one.

    config.py       the fields, on top of PEFT's LoraConfig
    covariance.py   second moments of the inputs of many layers in one pass over the data
    cache.py        covariances and factors on disk, by content
    passes.py       from data to covariances: within a memory bound, over all processes
    decompose.py    from covariances to components, shared out among processes
    start.py        refusals, the first factors, CorDA++'s ranks
    tuner.py        the residual base, saving

Shapes: I in, O out, R rank, B rows of a batch, T tokens.

Where the sources disagree: each sample is scaled by its signed maximum first, as in both codes
(`activation_norm: none` for the paper). CorDA++ (arXiv:2506.13187, 2025) adds the choice of one of
several covariances and of the ranks; both are experimental here, since its formulas were to be had
second hand only: the compactness is taken of the damped C.
"""

from petl.methods.corda.config import CordaConfig
from petl.methods.corda.tuner import CordaModel

__all__ = ["CordaConfig", "CordaModel"]
