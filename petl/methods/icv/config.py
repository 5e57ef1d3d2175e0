"""The fields of ICV, and the modules that they mean in a model."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from petl.core.layers.context import is_encoder_decoder
from petl.core.model.structure import find_sublayers, list_of_blocks, stacks_of
from petl.core.spec.config import MethodConfig, blocks_field, config_field, require
from petl.core.types import Fields, Record
from petl.errors import InputError, UnsupportedError

AUTO = "auto"


@dataclass
class IcvConfig(MethodConfig):
    """Fields of ICV; `strength` is read in each forward pass, so that a change acts at once."""

    target_modules: set[str] | list[str] | str | None = config_field(
        "the modules whose outputs are shifted; null, as mode and layers determine them", None
    )
    strength: float | str = config_field(
        "strength of the shift, 0 for none; auto, in runs: the best on held-out training rows",
        0.1,
        pattern=AUTO,
    )
    mode: str = config_field(
        "what is shifted: mlp (the output of each MLP, before the residual sum) or stream (the "
        "output of each block)",
        "mlp",
        choices=("mlp", "stream"),
    )
    scale: str = config_field(
        "cosine: states that point away from the vector move up to twice as far; or plain",
        "cosine",
        choices=("cosine", "plain"),
    )
    keep_norm: bool = config_field(
        "keep the norm of each state; false, with plain only: add strength times vector", True
    )
    pairs: str | None = config_field(
        "demonstrations of a run: answers (question and answer of a conversation), columns (text "
        "and target, or text and text_pair, of a row); null, with train only: start at zero",
        "answers",
        choices=("answers", "columns"),
    )
    rank: int = config_field("number of principal components added to the mean", 1, ge=1)
    layers: list[int] | None = config_field(
        "indices of the blocks that are shifted, from 0; null: all", None
    )
    blocks: str | None = blocks_field(
        "that with attention, of a model for images and text that of its language model"
    )
    train: bool = config_field("train the vectors, which start at the calibrated ones", False)
    calibration_data: dict[str, Any] | None = config_field(
        "demonstrations of petl train: data, num_samples, seq_len, batch_size, seed", None
    )

    def check(self) -> None:
        require(
            not (self.train and self.strength == 0),
            "strength=0 with train=True leaves the vectors without a gradient; choose another",
        )
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            value = getattr(self, name)
            require(
                value is None,
                f"{name}={value}: mode and layers determine the modules; leave it null",
            )
        layers = self.layers
        require(layers is None or bool(layers), "layers=[] is empty; name blocks, or leave it null")
        require(
            layers is None or all(type(layer) is int and layer >= 0 for layer in layers),
            f"layers={layers} has entries that are no block indices from 0",
        )
        if layers is not None:
            self.layers = sorted(set(layers))
        require(
            self.keep_norm or self.scale == "plain",
            "keep_norm=False goes with scale='plain' only; the cosine scale shifts directions",
        )
        require(
            self.train or self.pairs is not None,
            "pairs=None starts the vectors at zero, which only train=True can move; name the pairs",
        )
        require(
            self.pairs is not None or self.starts_at_zero,
            "pairs=None starts the vectors at zero, which have no direction; it needs "
            "scale='plain' and keep_norm=False",
        )

    def check_shapes(self, shapes: object) -> None:
        """Accept all shapes: there is no rank."""

    def sized(self, size: int) -> Fields:
        """Raise InputError: the size is that of the model."""
        raise InputError(
            f"method 'icv' has one vector per block, so no size to choose: leave "
            f"train.budget={size} out"
        )

    @property
    def starts_at_zero(self) -> bool:
        """True if the vectors can train from zero."""
        return self.train and self.scale == "plain" and not self.keep_norm

    def to_dict(self) -> Record:
        """Return the fields to save, without those of the run that computed the vectors."""
        return {**super().to_dict(), "calibration_data": None}


def check_model(model: nn.Module, config: IcvConfig) -> None:
    """Raise UnsupportedError for a model that ICV does not steer.

    Those are encoder-decoders, and without `train` all that do not generate.
    """
    name = type(model).__name__
    if is_encoder_decoder(model):
        raise UnsupportedError(
            f"icv reads x and y with the same blocks, and {name} is an encoder-decoder, which has "
            "two stacks of them; use a decoder"
        )
    can_generate = getattr(model, "can_generate", None)
    if not config.train and not (callable(can_generate) and can_generate()):
        raise UnsupportedError(
            f"icv steers what a model generates, and {name} does not generate; use a causal "
            "language model, or train=True"
        )


def hosts(config: IcvConfig, model: nn.Module) -> dict[str, int]:
    """Return the path of each module whose output is shifted, with the index of its block.

    In mode mlp that is the smallest module around the feed-forward's linear layers, or where that
    would be the block itself, the projection that closes the feed-forward. Of a model for images
    and text, `blocks` becomes the list of its language model.

    Raises:
        InputError: the model has no such block or MLP.
    """
    config.blocks = list_of_blocks(model, config.blocks)
    (paths,) = stacks_of(model, config.blocks, 1, "icv")
    chosen = range(len(paths)) if config.layers is None else config.layers
    require(
        max(chosen) < len(paths),
        f"layers={config.layers} is not in [0, {len(paths) - 1}]: {type(model).__name__} has "
        f"{len(paths)} blocks",
    )
    if config.mode == "stream":
        return {paths[index]: index for index in chosen}
    mlps = _mlps(model, paths)
    missing = [paths[index] for index in chosen if paths[index] not in mlps]
    require(
        not missing,
        f"{', '.join(missing[:3])} of {type(model).__name__} has no MLP that is known; use "
        "mode='stream'",
    )
    return {mlps[paths[index]]: index for index in chosen}


def _mlps(model: nn.Module, paths: list[str]) -> dict[str, str]:
    """Return the path of the MLP by the path of its block."""
    found = {}
    for sub in find_sublayers(model):
        block = next((path for path in paths if sub.closing.startswith(f"{path}.")), None)
        if sub.kind == "ffn" and block is not None:
            found[block] = _around(sub.closing, sub.source or sub.closing, block)
    return found


def _around(closing: str, source: str, block: str) -> str:
    """Return the smallest module inside `block` around two others, or `closing` if it is none."""
    owner = closing
    while not f"{source}.".startswith(f"{owner}."):
        owner = owner.rpartition(".")[0]
    return owner if owner.startswith(f"{block}.") else closing
