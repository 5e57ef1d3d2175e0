"""What the names of modules tell of models for images or sound; `petl check` reads it alone."""

import re

AUDIO = re.compile(r"(^|\.)\w*(audio|speech)\w*(\.|$)")
VISION = re.compile(r"(^|\.)\w*(vision|visual|image|video)\w*(\.|$)")
PROJECTOR = re.compile(
    r"(^|\.)\w*(projector|projection|_proj|merger|connector|align|resampler|adapter|qformer)\w*"
    r"(\.|$)"
)
_TEXT = re.compile(r"(^|\.)(language|text)_model(\.|$)")
_BLOCK = re.compile(r"\.\d+(?=\.|$)")


def before_blocks(name: str) -> str:
    """The beginning of a module's name, up to the number of its block."""
    return _BLOCK.split(name, maxsplit=1)[0]


def is_beside_text(name: str) -> bool:
    """Return True if a module is in a tower for images or sound, or joins one to the text.

    Args:
        name: from a saved adapter, whose model is not at hand.
    """
    start = before_blocks(name)
    if _TEXT.search(start):
        return False
    return any(words.search(start) for words in (AUDIO, VISION, PROJECTOR))
