"""The adapter and the tuner of ICV."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from petl.core.layers.layer import Adapter, LayerInfo, LayerShape
from petl.core.method import (
    Finish,
    Method,
    Settings,
    Target,
    TrainContext,
    WrapContext,
    linear_target,
)
from petl.core.model.heat_map import HeatMap, of_layers
from petl.core.model.modes import without_adapters
from petl.core.model.structure import block_widths, find_sublayers
from petl.core.model.targets import matched_names
from petl.core.register import register
from petl.core.registry import no_calibration
from petl.core.spec.config import require
from petl.core.support import Capability
from petl.errors import InputError, UnknownNameError, did_you_mean
from petl.methods.icv.config import IcvConfig, check_model, hosts
from petl.methods.icv.directions import directions
from petl.methods.icv.steering import Steer, steered
from petl.system.collectives import to_full


class IcvAdapter(Adapter):
    """The vector of one block, `vector` [H]: a buffer, with `train` a parameter."""

    vector: Tensor

    keep_float32 = True  # in half precision small updates of a vector are lost
    is_joint = True  # of several vectors the mean counts, of the state that none has shifted

    def __init__(self, shape: LayerShape, config: IcvConfig, info: LayerInfo) -> None:
        super().__init__(shape, config, info)
        self.config = config
        start = torch.zeros(shape.out_features)
        if config.train:
            self.vector = nn.Parameter(start)
        else:
            self.register_buffer("vector", start)

    def steer(self) -> Steer:
        """Return the vector with the strength that the config has now.

        Raises:
            InputError: none has been chosen yet.
        """
        strength = self.config.strength
        if isinstance(strength, str):
            raise InputError(
                f"strength={strength!r} is chosen by `petl train`; here call "
                "petl.methods.icv.choose_strength(model, score), or set a number: "
                f"model.peft_config[{self.info.adapter_name!r}].strength = 0.1"
            )
        return Steer(self.vector, strength, self.config.scale == "cosine")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the output `y` [..., H] of the module, shifted; `x` is not used."""
        return self.together([self], y)

    @classmethod
    def together(cls, adapters: Sequence["IcvAdapter"], y: Tensor) -> Tensor:
        """Return `y` [..., H] shifted by the mean over several adapters; itself at strength 0."""
        steers = [adapter.steer() for adapter in adapters]
        if all(steer.strength == 0 for steer in steers):
            return y
        return steered(y, steers, keep_norm=adapters[0].config.keep_norm)


@register
class Icv(Method[IcvConfig, IcvAdapter]):
    """Hidden states are shifted along directions that demonstrations give."""

    name = "icv"
    config_cls, adapter_cls = IcvConfig, IcvAdapter
    summary = (
        "hidden states are shifted along directions that a few demonstrations give; no training"
    )
    paper = (
        "Liu et al. 2024, In-context Vectors: Making In Context Learning More Effective and "
        "Controllable Through Latent Space Steering, ICML, arXiv:2311.06668"
    )
    need = "adapting in seconds, without training"
    recommended = "a few demonstrations give one vector per block, of adjustable strength"
    features = ("petl.methods.icv.run:Strengths",)
    strength_field, strengths = "strength", (0.0, 0.05, 0.1, 0.2, 0.4)
    lacks = {
        Capability.MERGE: (
            "ICV shifts hidden states by amounts that depend on them, which no weight can; keep "
            "the adapter, or call unload() for the base model"
        ),
        Capability.NEW_TOKENS: "it computes vectors from activations and trains no rows",
        Capability.RANKS: "it has one vector per block, of no rank",
    }

    def needs_data(self, config: IcvConfig) -> str:
        """Return why demonstrations are needed; "" if the vectors start at zero."""
        return "" if config.pairs is None else "method 'icv'"

    def is_computed(self, config: IcvConfig) -> bool:
        """Return True unless the vectors train."""
        return not config.train

    def calibrate(self, c: WrapContext[IcvConfig]) -> Finish | None:
        """Compute the directions of the base model; on the meta device there are none.

        Raises:
            InputError: a model that ICV does not steer, or demonstrations that are missing or
                wrong.
        """
        config = c.config
        check_model(c.model, config)
        hosts(config, c.model)
        if not c.has_weights:
            return None
        if c.calibration is None:
            if config.starts_at_zero:
                return None
            if not config.train:
                raise no_calibration("method 'icv'")
            raise InputError(
                "train=True without calibration starts the vectors at zero, which have no "
                f"direction with scale={config.scale!r} and keep_norm={config.keep_norm}: set "
                "scale='plain' and keep_norm=False, or pass calibration=batches"
            )
        found = directions(c.model, config, cast(Iterable[Any], c.calibration))
        return partial(set_vectors, directions=found)

    def targets(self, c: WrapContext[IcvConfig]) -> list[Target]:
        """Return the modules that `mode` and `layers` mean: blocks, MLPs, or linear projections.

        Raises:
            InputError: other ones are given, or the model has none.
        """
        config, model = c.config, c.model
        check_model(model, config)
        found, given = hosts(config, model), config.target_modules
        # PEFT shortens the names of many linear layers to what they have in common
        require(
            given is None or set(found) in (set(given), set(matched_names(config, model))),
            f"target_modules={given} are not the modules {sorted(found)} that mode={config.mode!r} "
            f"and layers={config.layers} give in {type(model).__name__}; leave it null, or "
            "load the adapter onto a model of its kind",
        )
        config.target_modules = set(found)
        width = next(iter(block_widths(model, config.blocks).values()))
        linear = {sub.closing for sub in find_sublayers(model) if sub.closing != sub.source}
        shape = LayerShape(width, width)
        return [
            linear_target(c, path) if path in linear else Target(path, shape, is_block=True)
            for path in matched_names(config, model)
        ]

    def settings(self, c: WrapContext[IcvConfig]) -> dict[str, Settings]:
        """Return the index of the block of each module."""
        return {path: {"block": index} for path, index in hosts(c.config, c.model).items()}

    def joins(self, configs: Sequence[IcvConfig]) -> str:
        """Return why some of them keep the norm of states and others do not."""
        kept = [config.keep_norm for config in configs]
        if len(set(kept)) < 2:
            return ""
        return (
            f"they have keep_norm={kept}, and there is no mean of a shift that keeps the norm of "
            "states and one that does not"
        )

    def planned(self, t: TrainContext[IcvConfig, IcvAdapter]) -> int:
        """Return the numbers of the active adapters' vectors, whether they train or not."""
        return sum(adapter.vector.numel() for _, adapter in t.adapters)

    @torch.no_grad()
    def heat_maps(self, t: TrainContext[IcvConfig, IcvAdapter]) -> list[HeatMap]:
        """Return the norms of the vectors by block."""
        norms = {key: float(to_full(adapter.vector).norm()) for key, adapter in t.adapters}
        return of_layers(
            t.model,
            norms,
            "vectors",
            "ICV: size of the vectors",
            "norm",
            "The norm of each block's vector: mostly the mean difference of the hidden states "
            "between target and source of the demonstrations. With keep_norm=true only its "
            "direction counts.",
        )


@torch.no_grad()
def set_vectors(model: PeftModel, directions: Tensor, adapter_name: str | None = None) -> None:
    """Set the vectors of an adapter of ICV (None: the active one) to those of `directions`.

    Args:
        model: wrapped.
        directions: of all blocks, [L, H].
        adapter_name: of the adapter.
    """
    tuner: Any = model.base_model
    name = tuner.active_adapters[0] if adapter_name is None else adapter_name
    for adapter in tuner.placed[name].values():
        adapter.vector.copy_(directions[adapter.info.settings["block"]])


def calibrate(
    model: PeftModel, calibration: Iterable[object], adapter_name: str | None = None
) -> None:
    """Compute the vectors of an adapter from other demonstrations, or of one that was just added.

    Args:
        model: wrapped with ICV; other adapters do not affect the result.
        calibration: batches as for `petl.wrap(model, "icv", calibration=...)`.
        adapter_name: of the adapter; None: the active one.

    Raises:
        InputError: the model has no such adapter, or as `petl.wrap`.
    """
    tuner: Any = getattr(model, "base_model", None)
    if not isinstance(getattr(type(tuner), "method", None), Icv):
        raise InputError(f"{type(model).__name__} has no ICV adapter")
    name = tuner.active_adapters[0] if adapter_name is None else adapter_name
    if name not in tuner.placed:
        raise UnknownNameError(f"no adapter {name!r}" + did_you_mean(name, tuner.placed))
    with without_adapters(model):
        found = directions(tuner.model, tuner.peft_config[name], calibration)
    set_vectors(model, found, name)
