"""The parts of a model for images and text: language model, vision tower, projector."""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

LANGUAGE, VISION, PROJECTOR = PARTS = ("language", "vision", "projector")
OTHER = "other"  # such as a tower for sound
_VISION = re.compile(r"(^|\.)\w*(vision|visual|image|video)\w*(\.|$)")
_PROJECTOR = re.compile(
    r"(^|\.)\w*(projector|projection|_proj|merger|connector|align|resampler|adapter|qformer)\w*"
    r"(\.|$)"
)


def language_path(model: nn.Module) -> str | None:
    """Return the path of the language model inside a model that has a vision tower too, or None.

    "" if the language model is not a module of its own.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    config: Any = model.config
    sees = any("vision" in name for name in (*vars(config), *config.sub_configs))
    if not sees or getattr(config, "is_encoder_decoder", False):
        return None
    decoder: Any = model.get_decoder()
    found = (name for name, module in model.named_modules() if module is decoder)
    path = next(found, None)
    if path is None:
        return None
    parts = {name: part_in(name, path) for name, _ in model.named_modules()}
    # a vision transformer has no decoder of its own; its head is no language model
    has_blocks = any(p == LANGUAGE and re.search(r"\.\d+\.", name) for name, p in parts.items())
    return path if has_blocks and VISION in parts.values() else None


def part_in(name: str, language: str) -> str:
    """Return the part that the module called `name` belongs to, one of PARTS, or OTHER.

    Args:
        language: from `language_path`.
    """
    before_blocks = re.split(r"\.\d+(?=\.|$)", name)[0]
    inside = not language or f"{name}.".startswith(f"{language}.")
    rest = before_blocks[len(language) :] if inside else before_blocks
    sees, joins = bool(_VISION.search(rest)), bool(_PROJECTOR.search(rest))
    if joins and (sees or not inside):
        return PROJECTOR
    if sees:
        return VISION
    return LANGUAGE if inside else OTHER


def names_of(part: str, names: Iterable[str], language: str | None) -> list[str]:
    """Return those of `names` in a part; all of them if the model has one part only."""
    if language is None:
        return list(names)
    return [name for name in names if part_in(name, language) == part]
