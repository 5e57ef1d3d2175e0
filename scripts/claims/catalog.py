"""All claims, in the order in which a user would ask for them."""

from claims import more, verbs
from claims.claim import Claim
from claims.untried import UNTRIED

CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for claim in (
        verbs.MOLA,
        verbs.INCRE,
        verbs.SHARING,
        verbs.BITS,
        verbs.SPARSE,
        more.ADAPTERS,
        more.START,
        more.LATER,
    )
}

__all__ = ["CLAIMS", "UNTRIED"]
