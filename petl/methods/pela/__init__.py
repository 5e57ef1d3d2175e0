"""PELA: two thin factors in place of each weight, trained; exported as a plain, smaller model.

Guo, Wang, Kankanhalli 2024, "PELA: Learning Parameter-Efficient Models with Low-Rank
Approximation", CVPR (arXiv:2310.10700). Each weight W [O, I] is replaced by the product of B [O, R]
and A [R, I], from its truncated SVD W = U S V^T:

    R = floor(I O / (c (I + O))),  B = U_R sqrt(S_R),  A = sqrt(S_R) V_R^T
    y = (x A^T) B^T + bias         (W x is not computed)

so that with compression c a layer has 1/c of the weights and of the multiply-adds. All factors
train. The loss `distill` (`+loss=distill`) is the paper's feature distillation: the teacher is the
base model, which stays in memory until the factors are exported. The perturbation term, off by
default, keeps the product near W:

    perturb_weight * mean over the layers of (max |B A - W| - perturb_eps)^2

    config.py    the fields, the rank of a layer
    method.py    the adapter, its start from the SVD, the perturbation term
    export.py    the plain small model: made from an adapted one, and loaded from its folder

Shapes: I in, O out, R rank, c compression.

Departures from the authors' code (guoyang9/PELA): a fused q-k-v is one matrix, with a rank of its
own; the SVD is the reduced one; the gradient of the perturbation term is that of its largest entry,
as torch's infinity norm of the flattened matrix gives it, added in the backward pass. The
factors are unique up to a sign per component, so compare products. In several processes each weight
is decomposed by one of them, and all get its factors.
"""

from petl.methods.pela.config import PelaConfig
from petl.methods.pela.export import export, load, save
from petl.methods.pela.method import Pela

__all__ = ["Pela", "PelaConfig", "export", "load", "save"]
