"""The config of CorDA: fields on top of PEFT's LoraConfig, saved as the config of a plain LoRA."""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import PeftType

from petl.core.compat import get_pattern_key
from petl.core.experts.linears import stack_of
from petl.core.spec.checks import rank_of
from petl.core.spec.config import config_field, require
from petl.core.types import Record
from petl.system.values import check_rules

PEFT_TYPE = "PETL_CORDA"
DTYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
REQUIRED_DEFAULTS = {  # fields of LoraConfig that would have no effect, or be wrong, in CorDA
    "init_lora_weights": True,  # replaced by CorDA's own
    "use_dora": False,  # its magnitude would be that of the residual
    "corda_config": None,
    "eva_config": None,
    "lora_ga_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "arrow_config": None,
    "use_bdlora": None,
    "use_qalora": False,
    "alora_invocation_tokens": None,
    "layer_replication": None,  # would share one residual base weight
    "trainable_token_indices": None,
}


@dataclass
class CordaConfig(LoraConfig):
    """Fields of CorDA. `save_pretrained` writes the config of the plain LoRA that is saved."""

    corda_method: str = config_field(
        "mode: ipm (samples of the task; trains the leading components) or kpm (samples of the "
        "knowledge to preserve; trains the trailing components)",
        "ipm",
        choices=("ipm", "kpm"),
    )
    calibration_data: dict[str, Any] | None = config_field(
        "calibration data of petl train: data, num_samples, seq_len, batch_size, seed", None
    )
    activation_norm: str = config_field(
        "divisor of each sample: signed_max (published code), abs_max, or none (paper)",
        "signed_max",
        choices=("signed_max", "abs_max", "none"),
    )
    damp: float = config_field(
        "damping of the covariance C as a fraction of its mean diagonal, above 0; doubled until C "
        "can be inverted",
        0.01,
        gt=0,
    )
    inverse_tol: float = config_field(
        "largest error of the inverse of C (Frobenius norm), above 0", 0.05, gt=0
    )
    covariance_dtype: str = config_field(
        "dtype of covariances: float32, float64, or float16 to save memory",
        "float32",
        choices=tuple(DTYPES),
    )
    max_covariance_bytes: int | None = config_field(
        "largest memory for covariances, in bytes; a lower bound takes more passes over the data; "
        "null: one pass",
        None,
        ge=1,
    )
    covariance_cache: str | None = config_field("folder that caches covariances", None)
    factors_cache: str | None = config_field("folder that caches decompositions", None)
    num_covariance_rounds: int = config_field(
        "CorDA++ (experimental): covariances per layer, of which the best is used", 1, ge=1
    )
    rank_budget: int | None = config_field(
        "CorDA++ (experimental), kpm only: trained parameters to distribute over the layers; null: "
        "rank r everywhere",
        None,
        ge=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[PEFT_TYPE]
        # the initial factors by module path, computed by `petl.wrap` before injection; never saved
        self.initial: Any = None
        self.check()

    def check(self) -> None:
        """Raise InputError for values out of bounds, or wrong together."""
        check_rules(self)  # PEFT's own configs do not
        require(
            self.rank_budget is None or self.corda_method == "kpm",
            f"rank_budget={self.rank_budget} chooses among trailing components, so it needs "
            f"corda_method='kpm', not {self.corda_method!r}",
        )
        require(
            self.rank_budget is None or not (self.rank_pattern or self.alpha_pattern),
            f"rank_budget={self.rank_budget} sets the rank of each layer; leave out rank_pattern "
            "and alpha_pattern",
        )
        for name, default in REQUIRED_DEFAULTS.items():
            value = getattr(self, name)
            require(value == default, f"{name}={value!r} is not supported by CorDA; use {default}")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the covariances."""
        return DTYPES[self.covariance_dtype]

    def rank_of(self, key: str) -> int:
        """The rank of the module, or of the expert, at path `key`."""
        return rank_of(self, stack_of(key), self.r)

    def scale_of(self, key: str) -> float:
        """The factor of B A in the module at path `key`, as PEFT computes it."""
        # as PEFT matches patterns, so that factors fit its scaling
        alphas, rank = self.alpha_pattern or {}, self.rank_of(key)
        alpha = alphas.get(get_pattern_key(list(alphas), stack_of(key)), self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def to_dict(self) -> Record:
        """Fields of the plain LoRA that is saved: twice the rank, with the same scaling."""
        values = super().to_dict()
        for field in fields(CordaConfig):
            # plain PEFT must be able to read the file
            if field.name not in {known.name for known in fields(LoraConfig)}:
                del values[field.name]
        factor = math.sqrt(2) if self.use_rslora else 2  # keeps alpha / r, or alpha / sqrt(r)
        return values | {
            "peft_type": PeftType.LORA,
            "r": 2 * self.r,
            "lora_alpha": factor * self.lora_alpha,
            "rank_pattern": {key: 2 * rank for key, rank in (self.rank_pattern or {}).items()},
            "alpha_pattern": {k: factor * alpha for k, alpha in (self.alpha_pattern or {}).items()},
        }
