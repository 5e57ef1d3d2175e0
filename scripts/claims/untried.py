"""The claims that no description tries yet, each with what it takes."""

from claims.claim import Untried

UNTRIED = (
    Untried(
        "density-decoder",
        "the density loss with ReLU in a decoder (0.09 of the density)",
        "Runwal et al. 2025, arXiv:2402.01911",
        "a packaged pretrained decoder with ReLU, or hours of pretraining one",
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
