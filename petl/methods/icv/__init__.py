"""ICV: demonstrations become one direction per block, by which hidden states are shifted.

Liu et al. 2024, "In-context Vectors: Making In Context Learning More Effective and Controllable
Through Latent Space Steering", ICML (arXiv:2311.06668). One forward pass over each text of a few
demonstrations (x_i, y_i) gives the directions; nothing is trained.

    config.py          the fields, and the modules that they mean in a model
    directions.py      from demonstrations to directions, over all processes
    method.py          the adapter, injection, calibration of a wrapped model
    run.py             demonstrations and scores by strength of a run

Shapes: N demonstrations, L blocks, H width of the stream. With h_l(s) [H] the last token's hidden
state of text s behind block l:

    d_i = [h_1(y_i) - h_1(x_i); ...; h_L(y_i) - h_L(x_i)]
    v = mean(d) + the first `rank` principal components of d, cut back into v_l
    x' = |x| unit(unit(x) + (1/m) sum_j w_j (1 + max(0, cos(x, -v_lj))) v_lj / |v_lj|)

for the output x of the MLP of block l and the m active adapters j of strengths w_j. The formulas
are in `petl.methods.icv.steering`.

Where we depart from the authors' code (shengliu66/ICV): the last block's state is read before the
model's final norm, not behind it; the sign of a component is fixed, which an SVD leaves open; the
states are shifted in float32 and cast back, where the code returns float16. As there, each v_l is
normalized where it is applied, so that their relative sizes have no effect (with `keep_norm`).
`mode="stream"`, `scale="plain"`, `keep_norm=False`, `layers` and `train` are additions.
"""

from petl.core.strengths import choose_strength, scores_by_strength
from petl.methods.icv.config import IcvConfig
from petl.methods.icv.method import Icv, IcvAdapter, calibrate

__all__ = [
    "Icv",
    "IcvAdapter",
    "IcvConfig",
    "calibrate",
    "choose_strength",
    "scores_by_strength",
]
