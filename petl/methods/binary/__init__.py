"""Binary: quantization-aware training of adapters with 1, 2, 4 or 8 bits, over any other method.

Jie, Wang and Deng 2023, "Revisiting the Parameter Efficiency of Adapters from the Perspective of
Precision Redundancy", ICCV (arXiv:2307.16867). Adapters tolerate coarse rounding, so at equal file
size a wide 1-bit adapter is better than a narrow 32-bit one. Training keeps latent float32 weights
under the inner method's names. The forward pass reads them standardized by their mean and standard
deviation and rounded to a fixed code book; the gradient takes the rounding for the identity
(straight-through) and flows through both statistics.

    binary/config.py             the config: the inner method's fields and those of this method
    binary/method.py             which weights are quantized, and how files hold them
    binary/quantized_weights.py  reading quantized weights while an adapter computes
    binary/pv.py                 steps on codes, in place of latent weights
    binary/head.py               the quantized classification head
    binary/stack.py              the "stacked" file format, for small adapters
    ops/quantize.py              the mathematics, and the layout of the codes in bytes

Shapes: N entries of a weight, W weights of an adapter.

A quantized weight of N entries takes ceil(N bits / 8) bytes of codes and 8 bytes of statistics in
the file, as the authors count. With save_format="packed" the names and offsets of these two tensors
take some 290 bytes more. Measured over codes and statistics, this makes the file of the default
adapter larger by 2 % for Llama 3 8B, 9 % for ViT-B, 13 % for SmolLM2-135M and 19 % for MiniLM; by
less than 5 % for weights of more than some 46,000 bits. With "stacked", the default of a run,
all weights share three tensors.

Where we depart from the authors' code: the last byte of a matrix is padded, not dropped; the 8-bit
code book is the converged one; a weight that is constant at the start (LoRA's B, a zero up
projection) would have zero deviation and never change, so it is initialized randomly around its
constant, as close to it as the authors' up projection is to zero.
"""

from petl.methods.binary.config import BinaryConfig
from petl.methods.binary.method import Binary, quantizer_of

__all__ = ["Binary", "BinaryConfig", "quantizer_of"]
