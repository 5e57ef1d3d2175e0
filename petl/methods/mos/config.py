"""The fields of MoS."""

from dataclasses import dataclass
from typing import Any

from petl.core.spec.config import MethodConfig, config_field, in_proportion, require


@dataclass
class MosConfig(MethodConfig):
    """R is `r`, E `equivalent_rank`, P `private_rank` and S `shards_per_vector`."""

    r: int = config_field("rank of each layer's factors; paper: 2 to 4 times equivalent_rank", 16)
    lora_alpha: float = config_field("the update is scaled by lora_alpha / r", 16.0)
    lora_dropout: float = config_field("dropout of the adapter's input, in [0, 1); paper 0.1", 0.0)
    equivalent_rank: int = config_field("rank of the plain LoRA with as many parameters", 2)
    shards_per_vector: int = config_field("pieces of a low-rank vector; 1: no vector sharding", 4)
    private_rank: int = config_field("rank that each layer keeps to itself; 0: no privatization", 1)
    subset_selection: bool = config_field(
        "each layer draws public shards of its own; false: one draw for the group", True
    )
    pair_dissociation: bool = config_field(
        "A and B are drawn apart; false: one draw for both", True
    )
    seed: int = config_field("of the draw, whatever the global random state", 0)
    init_weights: bool = config_field(
        "start at the base model; false: B random, for debugging", True
    )
    fan_in_fan_out: bool = config_field(
        "PEFT's name; Conv1D layers are recognised by themselves", False
    )

    def check(self) -> None:
        if self.target_modules is None:
            self.target_modules = "all-linear"
        for name, least in {
            "r": 1,
            "equivalent_rank": 1,
            "shards_per_vector": 1,
            "private_rank": 0,
        }.items():
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            require(
                whole and value >= least, f"{name}={value!r} is not a whole number from {least}"
            )
        require(isinstance(self.seed, int), f"seed={self.seed!r} is not a whole number")
        require(self.lora_alpha > 0, f"lora_alpha={self.lora_alpha} is not above 0")
        require(0 <= self.lora_dropout < 1, f"lora_dropout={self.lora_dropout} is not in [0, 1)")
        r, budget, private = self.r, self.equivalent_rank, self.private_rank
        require(private <= budget, f"private_rank={private} exceeds equivalent_rank={budget}")
        require(private <= r, f"private_rank={private} exceeds r={r}")
        require(
            private < budget or r == budget,
            f"r={r} must equal equivalent_rank={budget} when all shards are private",
        )

    def sized(self, size: int) -> dict[str, Any]:
        """The equivalent rank, with `r` in proportion, and no larger a share that is private."""
        share = size / self.equivalent_rank
        r, private = max(size, round(share * self.r)), min(1.0, share) * self.private_rank
        return {**in_proportion(self, r), "equivalent_rank": size, "private_rank": int(private)}
