"""The claims that no description tries yet, each with what it takes."""

from claims.claim import Untried

UNTRIED = (
    Untried(
        "density-relu",
        "the density loss with ReLU (0.47 of the density in an encoder, 0.09 in a decoder) and "
        "SwiGLU, and what a CPU gains from it",
        "Runwal et al. 2025, arXiv:2402.01911",
        "a packaged pretrained model with ReLU, hours of a decoder for SwiGLU, and a product that "
        "skips zeros, which torch does not have",
    ),
    Untried(
        "parts",
        "DKVB, VL-PET, SCEdit, ICV: their claims",
        "the papers on their pages",
        "a description each; DKVB needs the stream of classes of the results page, VL-PET and "
        "SCEdit pretrained models that no package has; the page of results has three seeds of "
        "several",
    ),
)
