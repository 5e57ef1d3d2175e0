"""Binary: adapters of 1, 2, 4 or 8 bits a weight, trained as such, over any other method.

Jie, Wang and Deng 2023, "Revisiting the Parameter Efficiency of Adapters from the Perspective of
Precision Redundancy", ICCV (arXiv:2307.16867). Adapters bear coarse rounding, so at equal bytes a
wide one of one bit beats a narrow one of 32. Training keeps latent float32 weights under the inner
method's names; what computes reads them rounded to a fixed code book between their mean and
standard deviation, and the gradient goes straight through the rounding and through both statistics.

    binary/config.py   the config: of the inner method, with the fields of this one
    binary/model.py    the tuner: of the inner method, which quantises, packs and unpacks
    binary/reading.py  how weights are read as quantised while an adapter computes
    binary/head.py     the head of few bits
    binary/stack.py    the file of small adapters
    ops/quantize.py    the mathematics, and the bytes of the file

In the file a quantised weight of N entries has ceil(N bits / 8) bytes of codes and 8 of statistics,
as many as the authors count. With save_format="packed" safetensors names each of the two tensors,
some 290 bytes together, which is most of what a small adapter has beside its bits: over codes and
statistics the file of the default adapter is 2 % for Llama 3 8B, 9 % for ViT-B, 13 % for
SmolLM2-135M and 19 % for MiniLM; it is below 5 % where weights have more than some 46,000 bits.
With "stacked", which train.py takes, all weights share three names.

Where we depart from the authors' code: the last byte of a matrix is filled up, not dropped; the
8-bit code book is the converged one; a weight that is constant at the start (LoRA's B, a zero up
projection), which would have no deviation and stay dead, is drawn anew, as near to that constant as
their up projection is to zero.
"""

from petl.methods.binary.config import BinaryConfig, config_of
from petl.methods.binary.model import BinaryModel, tuner_of

__all__ = ["BinaryConfig", "BinaryModel", "config_of", "tuner_of"]


def __getattr__(name: str) -> type:
    """Classes over an inner method, such as `BinaryConfig_lora`, made when a pickle asks."""
    makers = {"BinaryConfig": config_of, "BinaryModel": tuner_of}
    stem, _, inner = name.partition("_")
    if stem in makers and inner:
        return makers[stem](inner)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
