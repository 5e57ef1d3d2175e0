"""The fields of CorDA, on top of PEFT's LoraConfig, and how it is written as a plain LoRA."""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import PeftType

from petl.core.compat import get_pattern_key
from petl.core.spec.config import config_field, require

PEFT_TYPE = "PETL_CORDA"
DTYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
PLAIN = {  # fields of LoraConfig that would be without effect or wrong here
    "init_lora_weights": True,
    "use_dora": False,
    "corda_config": None,
    "eva_config": None,
    "lora_ga_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "arrow_config": None,
    "use_bdlora": None,
    "use_qalora": False,
    "alora_invocation_tokens": None,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
}


@dataclass
class CordaConfig(LoraConfig):
    """See the package's docstring. `save_pretrained` writes the LoRA that the adapter becomes."""

    corda_method: str = config_field("ipm: sample the task; kpm: sample what must survive", "ipm")
    calibration_data: dict[str, Any] | None = config_field("what train.py calibrates on", None)
    activation_norm: str = config_field(
        "what scales each sample: signed_max (published code), abs_max, none (paper)", "signed_max"
    )
    damp: float = config_field(
        "share of C's mean diagonal that is added to it; doubled at need", 0.01
    )
    inverse_tol: float = config_field("largest error of the inverse of C, Frobenius", 0.05)
    covariance_dtype: str = config_field("float32, float64, or float16 to save memory", "float32")
    max_covariance_bytes: int | None = config_field(
        "bound on covariances in memory, in bytes; more passes over the data; null: one", None
    )
    covariance_cache: str | None = config_field("folder that keeps covariances", None)
    factors_cache: str | None = config_field("folder that keeps decompositions", None)
    num_covariance_rounds: int = config_field("CorDA++: covariances per layer, the best is used", 1)
    rank_budget: int | None = config_field(
        "CorDA++, kpm: trained parameters to spread over layers", None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[PEFT_TYPE]
        self.start: Any = None  # by module path, the first factors; `petl.wrap` works them out
        self.check()

    def check(self) -> None:
        """Raise InputError for a value that CorDA cannot use."""
        require(
            self.corda_method in ("ipm", "kpm"),
            f"corda_method must be 'ipm' or 'kpm', not {self.corda_method!r}",
        )
        norms = ("signed_max", "abs_max", "none")
        require(
            self.activation_norm in norms,
            f"activation_norm={self.activation_norm!r} is not one of {', '.join(norms)}",
        )
        require(
            self.covariance_dtype in DTYPES,
            f"covariance_dtype={self.covariance_dtype!r} is not one of {', '.join(DTYPES)}",
        )
        for name in ("damp", "inverse_tol"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, f"{name}={value} is not a number above 0")
        for name in ("num_covariance_rounds", "max_covariance_bytes", "rank_budget"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}={value} is below 1")
        require(
            self.rank_budget is None or self.corda_method == "kpm",
            "rank_budget chooses among trailing components, so it needs corda_method='kpm'",
        )
        require(
            self.rank_budget is None or not (self.rank_pattern or self.alpha_pattern),
            "rank_budget sets the rank of each layer; leave out rank_pattern and alpha_pattern",
        )
        for name, plain in PLAIN.items():
            value = getattr(self, name)
            require(value == plain, f"{name}={value!r} does not go with CorDA; leave it {plain}")

    @property
    def dtype(self) -> torch.dtype:
        """Of the covariances."""
        return DTYPES[self.covariance_dtype]

    def rank_of(self, key: str) -> int:
        """The rank of the module called `key`."""
        ranks = self.rank_pattern or {}
        return ranks.get(get_pattern_key(list(ranks), key), self.r)

    def scale_of(self, key: str) -> float:
        """What PEFT multiplies B A with in the module called `key`."""
        alphas, rank = self.alpha_pattern or {}, self.rank_of(key)
        alpha = alphas.get(get_pattern_key(list(alphas), key), self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def to_dict(self) -> dict[str, Any]:
        """The plain LoRA of twice the rank that the saved file holds, with the same scaling."""
        found = super().to_dict()
        for field in fields(CordaConfig):
            if field.name not in {known.name for known in fields(LoraConfig)}:
                del found[field.name]
        more = math.sqrt(2) if self.use_rslora else 2
        return found | {
            "peft_type": PeftType.LORA,
            "r": 2 * self.r,
            "lora_alpha": more * self.lora_alpha,
            "rank_pattern": {key: 2 * rank for key, rank in (self.rank_pattern or {}).items()},
            "alpha_pattern": {k: more * alpha for k, alpha in (self.alpha_pattern or {}).items()},
        }
