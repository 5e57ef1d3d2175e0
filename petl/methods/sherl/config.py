"""The fields of SHERL, and the blocks that they mean in a model."""

from dataclasses import dataclass

from torch import nn

from petl.core.layers.context import is_encoder_decoder
from petl.core.model.structure import list_of_blocks, stacks_of
from petl.core.spec.config import MethodConfig, blocks_field, config_field, require
from petl.core.tuners.gradients import has_reversible_blocks


@dataclass
class SherlConfig(MethodConfig):
    """Fields of SHERL; the targets are always the blocks that the other fields determine."""

    target_modules: set[str] | list[str] | str | None = config_field(
        "the blocks that hold the side networks; null, as the other fields determine them", None
    )
    side_layers: list[int] | None = config_field(
        "indices of the blocks whose outputs are read, from 0; null: all below the late blocks",
        None,
    )
    late_layers: int = config_field("number of last blocks that run with a gradient", 1, ge=1)
    r: int | None = config_field("width of the side network; null: by reduction_factor", None, ge=1)
    reduction_factor: float = config_field(
        "the side network is width / reduction_factor",
        8,
        gt=0,
        acts=("r=null", lambda config: config.r is None),
    )
    gate_temperature: float = config_field("divides the gate of the late block's input", 0.1, gt=0)
    encoder_memory: bool = config_field(
        "encoder-decoders: a second side network reads the encoder; false: it is left alone", True
    )
    blocks: str | None = blocks_field(
        "that with attention, of a model for images and text that of its language model"
    )
    train_final_norm: bool = config_field("also train and save the model's last norm", False)

    def check(self) -> None:
        sides = self.side_layers
        require(
            sides is None or bool(sides), "side_layers=[] is empty; name blocks, or leave it null"
        )
        require(
            sides is None or all(type(side) is int and side >= 0 for side in sides),
            f"side_layers={sides} has entries that are no block indices from 0",
        )
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            value = getattr(self, name)
            require(
                value is None,
                f"{name}={value}: side_layers and late_layers determine the blocks; leave it null",
            )
        if sides is not None:
            self.side_layers = sorted(set(sides))

    def width(self, stream: int) -> int:
        """Return H for a stream of this width."""
        return self.r or max(1, int(stream // self.reduction_factor))


@dataclass
class SherlLayout:
    """What a config means in a model.

    Attributes:
        stacks: blocks of the decoder, or of a model with one stack, then of the encoder, if any.
        late: index of the first late block.
        sides: indices of the blocks that are read, of each stack with a side network.
    """

    stacks: list[list[str]]
    late: int
    sides: list[list[int]]

    @property
    def hosts(self) -> list[str]:
        """Paths of the blocks that hold the side networks, in the order of `sides`."""
        encoder = [self.stacks[1][sides[-1]] for sides in self.sides[1:]]
        return [self.stacks[0][self.late], *encoder]


def plan_of(config: SherlConfig, model: nn.Module) -> SherlLayout:
    """Return the stacks of `model` and the blocks that the side networks read.

    Of a model for images and text, `blocks` becomes the list of its language model.

    Raises:
        InputError: the model has no such blocks.
    """
    require(
        not has_reversible_blocks(model),
        f"the blocks of {type(model).__name__} are reversible: each returns two streams, and "
        "sherl's side network reads one; take lora",
    )
    has_encoder = is_encoder_decoder(model)
    require(
        config.blocks is None or not has_encoder,
        f"blocks={config.blocks} names one list, and {type(model).__name__} is an encoder-decoder, "
        "of which sherl takes two; leave it null",
    )
    config.blocks = list_of_blocks(model, config.blocks)
    main, *encoders = stacks_of(model, config.blocks, 1 + has_encoder, "sherl")
    L = len(main)
    require(
        config.late_layers < L,
        f"late_layers={config.late_layers} is not in [1, {L - 1}]: {type(model).__name__} has {L} "
        "blocks, of which one at least must be before the late ones",
    )
    late, given = L - config.late_layers, config.side_layers
    reads_encoder = has_encoder and config.encoder_memory
    end = len(encoders[0]) if reads_encoder else late
    require(
        given is None or given[-1] < max(end, late),
        f"side_layers={given} is not in [0, {max(end, late) - 1}]: {type(model).__name__} has {L} "
        f"blocks, of which the last {config.late_layers} are late",
    )
    sides = [[i for i in range(late) if given is None or i in given]]
    require(
        bool(sides[0]), f"side_layers={given} has no block of the decoder below {late}; add one"
    )
    if reads_encoder:
        sides.append([i for i in range(end) if given is None or i in given])
        require(
            bool(sides[1]),
            f"side_layers={given} has no block of the encoder, which has {end}; add one, or set "
            "encoder_memory=false",
        )
    return SherlLayout([main, *encoders], late, sides)
