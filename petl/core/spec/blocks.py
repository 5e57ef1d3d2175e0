"""The blocks that a method adapts, given as a share or number of the last ones."""

import math
import re

from petl.errors import InputError

MEANING = (
    "indices of the blocks to adapt, from 0; or the last ones, top:0.33 (a share) or top:2 (a "
    "number); null: all"
)
TOP = re.compile(r"top:(\d+|\d*\.\d+|\d+\.\d*)")


def parse(text: str) -> int | float:
    """Return the number of blocks, an int, or their share, a float in (0, 1].

    >>> parse("top:2"), parse("top:0.5"), parse("top:1"), parse("top:1.0")
    (2, 0.5, 1, 1.0)

    Raises:
        InputError: `text` is neither.
    """
    match = TOP.fullmatch(text)
    if match is not None:
        number = float(match[1]) if "." in match[1] else int(match[1])
        if number > 0 and (isinstance(number, int) or number <= 1):
            return number
    raise InputError(
        f"layers_to_transform={text!r} is not top:N, the last N blocks, or top:SHARE with a share "
        "above 0 to 1.0, such as top:2 or top:0.33; or list indices from 0"
    )


def last_blocks(text: str, length: int) -> list[int]:
    """Return the indices of the blocks that `text` names, of a model with `length` blocks.

    A share is rounded to the nearest number of blocks, halves up, and is at least one block.

    >>> last_blocks("top:0.33", 6), last_blocks("top:0.25", 30)[0], last_blocks("top:1", 3)
    ([4, 5], 22, [2])

    Raises:
        InputError: there are fewer blocks than named.
    """
    number = parse(text)
    count = number if isinstance(number, int) else max(1, math.floor(number * length + 0.5))
    if count > length:
        raise InputError(
            f"layers_to_transform={text} names more blocks than the model's {length}: name fewer"
        )
    return list(range(length - count, length))
