"""SHERL: a side network over frozen blocks that feeds the last ones; backward ends at it.

Diao et al. 2024, "SHERL: Synthesizing High Accuracy and Efficient Memory for Resource-Limited
Transfer Learning", ECCV (arXiv:2407.07523).

    config.py    the fields, and the blocks that they mean in a model
    adapter.py   the side network of one stack of blocks
    hooks.py     what reads the blocks and feeds the late ones
    method.py    injection, heat map

Shapes: N rows, T tokens, K width of the stream, H of the side network, S features. Feature 0 is the
input of the first block, the others are the outputs of the blocks in `side_layers`, x_i [N, T, K],
all detached; the last one is the guide g. With a tier of matrices for each feature:

    u_i = relu(x_i D_i^T + d_i)            z_i = (u_i M_i^T + m_i + u_i) sigmoid(u_i G_i^T + g_i)
    e_i = z_i / (|z_i| + eps)              R_i = sum_j relu(e_i . e_j)      (without the guide)
    a_i = relu(w . (z_i z_g) + b) / R_i    a_i <- a_i / (sum_j |a_j| + eps)
    f = z_g + sum_i a_i z_i                y = relu(f) U^T + c + tanh(q / temperature) last

y replaces the input of the first of the `late_layers` last blocks, `last` is what it would have
got. In an encoder-decoder that is so in the decoder; a second side network makes `norm(y)` of the
encoder's blocks, which the late decoder blocks see instead of the encoder's output.

Where we depart from the authors' code: the norm of e_i has a gradient of zero, not NaN, at z_i = 0,
and R is at least 1e-6. Their decoder ends in a new norm; here it is the model's own, which trains
with `train_final_norm`.
"""

from petl.methods.sherl.adapter import SherlAdapter
from petl.methods.sherl.config import SherlConfig
from petl.methods.sherl.method import Sherl

__all__ = ["Sherl", "SherlAdapter", "SherlConfig"]
