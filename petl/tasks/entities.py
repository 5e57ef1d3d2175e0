"""Entities in tagged sequences, as the scorer of CoNLL-2000 reads them (and seqeval after it).

A tag is `O`, or how a word stands in an entity and the entity's type: `B-PER` begins, `I-` goes on,
`E-` (or `L-`) ends, `S-` (or `U-`) is alone. Where a sequence breaks its scheme, an entity begins
at each word in one that the word before does not lead to.
"""

from collections.abc import Iterable, Iterator, Sequence

ALONE, LAST, OUTSIDE = ("S", "U"), ("E", "L"), "O"
PREFIXES = ("B", "I", *LAST, *ALONE)

Entity = tuple[str, int, int]  # type, first word, last word


def parts(tag: str) -> tuple[str, str]:
    """How a word stands in an entity, "O" outside of any, and the entity's type."""
    place, _, kind = tag.partition("-")
    return place, kind


def are_entities(tags: Iterable[str]) -> bool:
    """Whether these classes are tags of entities rather than, say, parts of speech."""
    inside = [parts(tag) for tag in tags if tag != OUTSIDE]
    return bool(inside) and all(place in PREFIXES and kind for place, kind in inside)


def entities(tags: Sequence[str]) -> Iterator[Entity]:
    """The entities of one sequence, in order."""
    start, before, kind = 0, OUTSIDE, ""
    for i, tag in enumerate((*tags, OUTSIDE)):
        place, own = parts(tag)
        goes_on = place in ("I", *LAST) and before in ("B", "I") and own == kind
        if before != OUTSIDE and not goes_on:
            yield kind, start, i - 1
        if not goes_on:
            start = i
        before, kind = place, own
