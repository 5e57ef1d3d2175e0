"""The fields of PELA, and the rank of a layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor

from petl.core.spec.checks import rank_of
from petl.core.spec.config import MethodConfig, config_field, require

SVD = ("full", "randomized")


@dataclass
class PelaConfig(MethodConfig):
    """Fields of PELA: how small the factors are, how they start, and the perturbation term.

    Attributes:
        is_saved: True for a config read from an adapter's folder: its tensors come from there, so
            no weight is decomposed.
    """

    compression: float = config_field(
        "c, from 1: a layer gets 1/c of its weights, rank floor(in out / (c (in + out)))",
        2.0,
        ge=1,
        acts=("r=null", lambda config: config.r is None),
    )
    r: int | None = config_field("rank of all layers; null: by compression", None, ge=1)
    rank_pattern: dict[str, int] = config_field(
        "ranks by module path, or by a regular expression for paths, as for PEFT's LoRA; overrides "
        "r and compression",
        {},
    )
    min_out_features: int = config_field(
        "layers with fewer outputs stay as they are, at least 1", 10, ge=1
    )
    svd: str = config_field(
        "full, or randomized (torch.svd_lowrank with 10 further components and 2 power "
        "iterations; faster for small ranks)",
        "full",
        choices=SVD,
    )
    perturb_weight: float = config_field(
        "weight of the perturbation term, at least 0; paper: 1 for Swin and ALBEF, 0 for DeiT",
        0.0,
        ge=0,
    )
    perturb_eps: float = config_field(
        "difference of an entry that the perturbation term aims at, at least 0",
        1e-3,
        ge=0,
        acts=("perturb_weight above 0", lambda config: config.perturb_weight > 0),
    )

    def __post_init__(self) -> None:
        # only a file names the type; set before the parent sets the type
        self.is_saved = self.peft_type is not None
        super().__post_init__()

    def rank(self, key: str, shape: tuple[int, int]) -> int:
        """The rank of the layer at path `key` with these widths; 0 if `compression` leaves none."""
        width, other = shape
        by_compression = floor(width * other / (self.compression * (width + other)))
        return rank_of(self, key, by_compression if self.r is None else self.r)

    def check_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise InputError for a layer whose rank is not from 1 to its smaller width."""
        for key, shape in shapes.items():
            rank = self.rank(key, shape)
            require(
                1 <= rank <= min(shape),
                f"the rank of {key} would be {rank}, which is not in 1..{min(shape)}, its smaller "
                "width; set r, rank_pattern or compression, or leave it out with exclude_modules",
            )
