"""The claims that no description tries yet, each with what it takes."""

from claims.claim import Untried

UNTRIED = (
    Untried(
        "routers",
        "MoLA: how far routers agree",
        "Gao et al. 2025, arXiv:2402.08562",
        "a pass over the test rows that notes the experts of each token, and a measure that does "
        "not depend on their order",
    ),
    Untried(
        "placements",
        "adapters: placements and residual connections of the audio study",
        "Cappellazzo et al. 2024, arXiv:2312.03694",
        "a pretrained audio model, of which the packages have Whisper tiny alone, and about "
        "5,000 labeled clips; the packaged recordings are some 2,800 clips in five languages",
    ),
    Untried(
        "forgetting",
        "CorDA in knowledge-preserving mode forgets less than LoRA and PiSSA",
        "Yang et al. 2024, arXiv:2406.05223",
        "a decoder (SmolLM2-135M), a score on the knowledge to preserve before and after training "
        "on another task, and hours of processor time for five seeds of three contenders",
    ),
    Untried(
        "density",
        "the density loss halves the density of activations at no loss of score, and a CPU gains",
        "Runwal et al. 2025, arXiv:2402.01911",
        "a comparison of densities beside that of scores, a packaged pretrained model with ReLU "
        "(GELU is never exactly 0, so that the threshold decides the density), and a product that "
        "skips zeros",
    ),
    Untried(
        "parts",
        "PST, PELA and distillation, Polyhistor, PYRA, DKVB, VL-PET, SCEdit, ICV: what their "
        "papers name",
        "the papers on their pages",
        "a description each; the first four run on the packaged data, PYRA and DKVB need the small "
        "ViT and the stream of classes of the results page, VL-PET and SCEdit pretrained models "
        "that no package has; the page of results has three seeds of several",
    ),
    Untried(
        "lengths",
        "length buckets, packing and the segmented loss save the time and memory that they promise",
        "no paper: promises of these pages",
        "an idle machine, since seconds are compared, and texts of very different lengths; "
        "scripts/bench.py measures single steps",
    ),
)
