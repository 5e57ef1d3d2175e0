"""Entities in tagged sequences, by the rules of the CoNLL-2000 scorer (and of seqeval).

A tag is `O`, or a position in an entity and the entity's type: `B-PER` is the first word, `I-` a
word inside, `E-` (or `L-`) the last word, `S-` (or `U-`) the only word. Where a sequence violates
its scheme, a new entity begins at each word that does not continue the entity before it.
"""

from collections.abc import Iterable, Iterator, Sequence

SINGLE, LAST, OUTSIDE = ("S", "U"), ("E", "L"), "O"
PREFIXES = ("B", "I", *LAST, *SINGLE)

Entity = tuple[str, int, int]  # type, first word, last word


def parts(tag: str) -> tuple[str, str]:
    """Split a tag into the position in an entity ("O" for none) and the entity's type."""
    position, _, entity_type = tag.partition("-")
    return position, entity_type


def are_entities(tags: Iterable[str]) -> bool:
    """True if these classes are tags of entities rather than, say, parts of speech."""
    # parts of speech, for example, have no prefix and no type
    inside = [parts(tag) for tag in tags if tag != OUTSIDE]
    return bool(inside) and all(position in PREFIXES and type_ for position, type_ in inside)


def entities(tags: Sequence[str]) -> Iterator[Entity]:
    """Yield the entities of one sequence in order."""
    start, previous, entity_type = 0, OUTSIDE, ""
    # the additional tag closes an entity at the end of the sequence
    for i, tag in enumerate((*tags, OUTSIDE)):
        position, own_type = parts(tag)
        continues = position in ("I", *LAST) and previous in ("B", "I") and own_type == entity_type
        if previous != OUTSIDE and not continues:
            yield entity_type, start, i - 1
        if not continues:
            start = i
        previous, entity_type = position, own_type
