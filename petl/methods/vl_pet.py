"""VL-PET: gated bottleneck adapters in the encoder, light ones at the decoder's cross-attention.

Hu, Li, Lyu and Wang 2023, "VL-PET: Vision-and-Language Parameter-Efficient Tuning via Granularity
Control", ICCV (arXiv:2308.09804); reference code: HenryHZY/VL-PET.

Shapes: K width of the residual stream, I and O those of a value projection, D `r`, E `gate_rank`,
V `value_rank`. For a sub-layer of the encoder with residual stream x and output y, both [N, T, K],
and for the projection v to values [N, T, O] of cross-attention, which reads the encoder's output m

    y1 = y + up act(down y + b) + c,    y' = scaling * g(x, y1) * y1,    v' = v + up act(down m)

plus biases, with the gates g of `petl.methods.families.gates`. All norms of the encoder train.

The paper's adapters have several heads, whose outputs are concatenated before one up projection:
the same function and the same start as one down projection, so there is no field for their number.

Where we depart from the code: the gate `small` leaves padding out of its mean, so that a row's
result does not depend on the longest row of its batch; the code averages padding in. `middle_y`
starts as 1 plus normal numbers, as there, and is never exactly the base. With the start `linear`,
that of the code for BART, each sub-layer of the encoder begins at about half of its output, the
start of published results; `zero_up` with `identity_gate` and the gate `large` starts at the base.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from petl.core.layers.layer import LayerInfo, LayerShape
from petl.core.method import Method, NewAdapters, Settings, Target, TrainContext, WrapContext
from petl.core.model.heat_map import HeatMap
from petl.core.model.names import in_layers
from petl.core.model.structure import encoder_of, find_sublayers, norm_names, value_projections
from petl.core.model.targets import matched_names, resolve_targets
from petl.core.register import register
from petl.core.spec.checks import check_rank
from petl.core.spec.config import MethodConfig, config_field, require
from petl.core.support import Capability
from petl.errors import ModuleKindError
from petl.methods.families.gates import (
    GATES,
    LARGE,
    READING,
    READS,
    GatedAdapter,
    gate_settings,
    keep_mask,
)
from petl.methods.families.stacked import linear
from petl.methods.families.sublayers import (
    add_saved,
    check_activation,
    network_sizes,
    targets_with_streams,
)


@dataclass
class VlPetConfig(MethodConfig):
    """Fields of VL-PET; the defaults are those of the code for BART."""

    # of the adapters' placement, see `SubLayerConfig`: not to be chosen
    placement, adds_input, input_modules = "sequential", True, None

    target_modules: set[str] | list[str] | str | None = config_field(
        "some of the modules that the method adapts, as names, suffixes or a regular expression; "
        "null: all of them",
        None,
    )
    r: int = config_field("width of the encoder's bottlenecks", 96, ge=1)
    gate: str = config_field(
        "factor of the encoder's sub-layers: large (by value), middle_x (by token), middle_y (by "
        "channel), small (by row) or none",
        "large",
        choices=GATES,
    )
    gate_rank: int | None = config_field(
        "bottleneck of the gate large; null: r", None, ge=1, acts=LARGE
    )
    value_rank: int | None = config_field(
        "bottleneck beside the values of cross-attention; null: r, 0: the decoder stays as it is",
        None,
        ge=0,
    )
    scaling: float = config_field("factor of the encoder's gated outputs", 1.0)
    non_linearity: str = config_field("a name in transformers' ACT2FN", "gelu_new")
    init_weights: str = config_field(
        "initialization: linear (torch's default) or zero_up (up projections start at zero)",
        "linear",
        choices=("linear", "zero_up"),
    )
    identity_gate: bool = config_field(
        "double the sigmoid of the gate: with zero_up and the gate large, training starts at the "
        "base model's outputs",
        False,
        acts=READS,
    )
    train_encoder_norms: bool = config_field("also train and save all norms of the encoder", True)

    def check(self) -> None:
        """Raise UnknownNameError for an activation that transformers does not have."""
        check_activation(self.non_linearity)

    def check_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise InputError for a bottleneck that is far wider than the layers."""
        for name in ("r", "gate_rank", "value_rank"):
            check_rank(self, name, shapes, linear=False)


class VlPetAdapter(GatedAdapter):
    """Bottleneck and gate of a sub-layer of the encoder, or a bottleneck beside values.

    `down_weight` [D, K], `down_bias` [D], `up_weight` [K, D], `up_bias` [K]; beside values [V, I],
    [V], [O, V] and [O]. Those of the gate: see `GatedAdapter`.
    """

    down_weight: Tensor
    up_weight: Tensor

    def __init__(self, shape: LayerShape, config: VlPetConfig, info: LayerInfo) -> None:
        super().__init__(shape, config, info)
        self.output_scale = config.scaling
        if self.is_value and config.value_rank is not None:
            self.bottleneck = config.value_rank
        self.adopt("down", nn.Linear(self.input_width, self.bottleneck))
        self.adopt("up", nn.Linear(self.bottleneck, self.width))
        self.add_gate()
        if config.init_weights == "zero_up":
            for name, parameter in self.named_parameters():
                if name.startswith(("up_", "gate_up_")):
                    nn.init.zeros_(parameter)

    def combination_refusal(self) -> str | None:
        """Return why no other adapter may be active beside it: PEFT has one active norm."""
        if not self.config.train_encoder_norms:
            return None
        return (
            "its encoder norms train with it, and of a norm one copy can be active; activate one "
            "adapter at a time, or train with train_encoder_norms=false"
        )

    def network(self, h: Tensor) -> Tensor:
        """Return the update, [..., K] for h [..., K], or [..., O] for h [..., I]."""
        z = self.act(linear(h, *self.projection("down", h)))
        return linear(z, *self.projection("up", z))

    def matrices(self) -> tuple[Tensor, Tensor]:
        return self.down_weight, self.up_weight

    @property
    def stacks(self) -> bool:
        return self.gate_stacks


@register
class VlPet(Method[VlPetConfig, VlPetAdapter]):
    """Gated bottlenecks in the encoder, light ones at the values of cross-attention."""

    name = "vl_pet"
    config_cls, adapter_cls = VlPetConfig, VlPetAdapter
    summary = "gated bottlenecks in the encoder, light ones at the values of cross-attention"
    paper = (
        "Hu et al. 2023, VL-PET: Vision-and-Language Parameter-Efficient Tuning via Granularity "
        "Control, ICCV, arXiv:2308.09804"
    )
    need = "added layers"
    lacks = {
        Capability.MERGE: (
            "VL-PET's adapters and gates depend on the input and cannot be merged; keep the "
            "adapter, or call unload() for the base model"
        ),
        Capability.RANKS: "the encoder's adapters and gates have one width, r",
    }

    def targets(self, c: WrapContext[VlPetConfig]) -> list[Target]:
        """The encoder's sub-layers and the decoder's values; also adds norms.

        Raises:
            InputError: the model is no encoder-decoder, its parts are not known, or a target is
                none that the method adapts.
        """
        config, model, hosts = c.config, c.model, _hosts(c)
        if config.target_modules is None:
            config.target_modules = {path for path in hosts if in_layers(config, model, path)}
            require(
                bool(config.target_modules),
                f"layers_to_transform={config.layers_to_transform} leaves no sub-layer of the "
                f"encoder and no value projection of {type(model).__name__}",
            )
        if config.train_encoder_norms:
            encoder = _encoder(model)
            add_saved(config, [name for name in norm_names(model) if name.startswith(encoder)])
        resolve_targets(config, model)
        for key in matched_names(config, model):
            require(
                key in hosts,
                f"target {key} is neither the end of a sub-layer of the encoder nor a value "
                "projection of cross-attention; leave target_modules null, or use method 'adapter'",
            )
            require(
                hosts[key] or config.gate not in READING,
                f"gate={config.gate!r} reads the residual stream, which is not known at {key}; use "
                "gate='middle_y' or 'none', or method 'adapter' with input_modules",
            )
        of_values, of_gate = _values(c), "residual" if config.gate in READING else ""
        return targets_with_streams(c, lambda path: "" if path in of_values else of_gate)

    def settings(self, c: WrapContext[VlPetConfig]) -> dict[str, Settings]:
        """The role of the adapters."""
        return gate_settings(c, _values(c))

    def added(self, new: NewAdapters[VlPetConfig, VlPetAdapter]) -> None:
        """Let the model keep the mask of the tokens, if the gate reads it."""
        keep_mask(new)

    def heat_maps(self, t: TrainContext[VlPetConfig, VlPetAdapter]) -> list[HeatMap]:
        """The size of each network."""
        return network_sizes(t)


def _values(c: WrapContext[VlPetConfig]) -> list[str]:
    """Return the paths of the value projections that get an adapter."""
    return [] if c.config.value_rank == 0 else value_projections(c.model)


def _encoder(model: nn.Module) -> str:
    """Return the prefix of the paths in the encoder."""
    encoder = encoder_of(model)
    if encoder is None:
        raise ModuleKindError(
            f"method 'vl_pet' adapts encoder-decoders such as T5 and BART, and "
            f"{type(model).__name__} is none; method 'adapter' has its gates for other models: "
            "gate=large"
        )
    return f"{encoder[0]}."


def _hosts(c: WrapContext[VlPetConfig]) -> dict[str, bool]:
    """Return the modules that the method adapts, and whether their gates' input is known."""
    encoder, name = _encoder(c.model), type(c.model).__name__
    subs = [sub for sub in find_sublayers(c.model) if sub.closing.startswith(encoder)]
    values = _values(c)
    require(bool(subs), f"no sub-layers are found in the encoder of {name}")
    require(
        bool(values) or c.config.value_rank == 0,
        f"no projection to the values of cross-attention is found in {name}; set value_rank=0",
    )
    return {sub.closing: sub.residual is not None for sub in subs} | dict.fromkeys(values, True)
