"""All claims, in the order in which a user would ask for them."""

from claims import verbs
from claims.claim import Claim
from claims.untried import UNTRIED

CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for claim in (verbs.MOLA, verbs.INCRE, verbs.SHARING, verbs.BITS, verbs.SPARSE)
}

__all__ = ["CLAIMS", "UNTRIED"]
