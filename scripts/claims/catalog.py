"""All claims, in the order in which a user would ask for them."""

from claims import audio, costs, decoder, densities, images, more, smaller, tasks, verbs
from claims.claim import Claim
from claims.untried import UNTRIED

CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for claim in (
        verbs.MOLA,
        verbs.ROUTERS,
        verbs.INCRE,
        verbs.SHARING,
        verbs.BITS,
        verbs.SPARSE,
        more.ADAPTERS,
        more.START,
        more.LATER,
        smaller.MASKS,
        smaller.COMPRESS,
        costs.LENGTHS,
        densities.GELU,
        densities.RELU,
        densities.SWIGLU,
        costs.RANKS,
        decoder.FORGETTING,
        decoder.PACKING,
        tasks.COMBINED,
        tasks.SHARED,
        images.MERGING,
        audio.PLACEMENTS,
    )
}

__all__ = ["CLAIMS", "UNTRIED"]
