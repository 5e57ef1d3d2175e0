"""The config of MoS."""

from dataclasses import dataclass

from petl.core.spec.config import MethodConfig, config_field, in_proportion, require
from petl.core.types import Fields


@dataclass
class MosConfig(MethodConfig):
    """Fields of MoS: R is `r`, E `equivalent_rank`, P `private_rank` and S `shards_per_vector`."""

    r: int = config_field(
        "rank of each layer's factors; paper: 2 to 4 times equivalent_rank", 16, ge=1
    )
    lora_alpha: float = config_field("the update is scaled by lora_alpha / r", 16.0, gt=0)
    lora_dropout: float = config_field(
        "dropout probability at the adapter's input, in [0, 1); paper: 0.1", 0.0, ge=0, lt=1
    )
    equivalent_rank: int = config_field(
        "parameter budget: the rank of a plain LoRA with as many parameters", 2, ge=1
    )
    shards_per_vector: int = config_field(
        "shards of a low-rank vector; must divide every width; 1: no vector sharding", 4, ge=1
    )
    private_rank: int = config_field(
        "rank of the private shards of each layer, at most equivalent_rank; 0: no privatization",
        1,
        ge=0,
    )
    subset_selection: bool = config_field(
        "each layer draws its own public shards; false: one draw for all layers of a group", True
    )
    pair_dissociation: bool = config_field(
        "separate draws for A and B; false: one draw for both", True
    )
    seed: int = config_field(
        "seed of the draw, which does not depend on the global random state", 0
    )
    init_weights: bool = config_field(
        "start at the base model's outputs (B = 0); false: random B, for debugging", True
    )
    fan_in_fan_out: bool = config_field(
        "field of PEFT's LoRA, without effect: Conv1D layers are recognized", False
    )

    def check(self) -> None:
        """Raise InputError for ranks that do not go together."""
        if self.target_modules is None:  # null: all linear layers
            self.target_modules = "all-linear"
        require(isinstance(self.seed, int), f"seed={self.seed!r} is not an integer")
        r, budget, private = self.r, self.equivalent_rank, self.private_rank
        require(private <= budget, f"private_rank={private} exceeds equivalent_rank={budget}")
        require(private <= r, f"private_rank={private} exceeds r={r}")
        require(
            # without public shards, a layer has its private vectors only
            private < budget or r == budget,
            f"r={r} must equal equivalent_rank={budget} when all shards are private "
            f"(private_rank={private})",
        )

    def sized(self, size: int) -> Fields:
        """Fields for equivalent rank `size`: `r` scales with it, `private_rank` only down."""
        ratio = size / self.equivalent_rank
        r, private = max(size, round(ratio * self.r)), min(1.0, ratio) * self.private_rank
        # the scale lora_alpha / r stays
        return {**in_proportion(self, r), "equivalent_rank": size, "private_rank": int(private)}
