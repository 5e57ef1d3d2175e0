"""The claims that no description tries yet, each with what it takes."""

from claims.claim import Untried

UNTRIED = (
    Untried(
        "compacter",
        "Compacter under 0.1 % of the parameters equals adapters; adapters against LoRA at equal "
        "size; placements of the audio paper",
        "Karimi Mahabadi et al. 2021, arXiv:2106.04647; Houlsby et al. 2019, arXiv:1902.00751",
        "contenders on the verbs; for the placements an audio model with pretrained weights and "
        "spoken languages in 5,000 test clips, which the packaged 568 clips a language allow only "
        "in pieces",
    ),
    Untried(
        "corda",
        "CorDA forgets less than LoRA and PiSSA, and converges faster in instruction mode",
        "Yang et al. 2024, arXiv:2406.05223",
        "a decoder (SmolLM2-135M), a second set that measures what is forgotten before and after, "
        "and scores at several steps instead of one",
    ),
    Untried(
        "density",
        "the density loss halves the density of activations at no loss of score",
        "Runwal et al. 2025, arXiv:2402.01911",
        "a comparison of measured densities beside that of scores, on models with ReLU and GELU, "
        "and a CPU kernel that skips zeros to measure what is gained",
    ),
    Untried(
        "later",
        "of the methods added later, what their papers name",
        "see the page of each method",
        "a description each; three-seed results of several are on the page of results",
    ),
    Untried(
        "lengths",
        "length buckets, packing and the segmented loss save the time and memory that they promise",
        "see the page on buckets and packing",
        "an idle machine, since seconds are compared, and texts of very different lengths",
    ),
)
