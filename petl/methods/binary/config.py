"""The config of a quantized method: fields beside those of the inner method."""

import re
from dataclasses import dataclass
from typing import Any

from petl.core.registry import method
from petl.core.spec.config import config_field, require
from petl.core.spec.facts import facts_of
from petl.errors import InputError
from petl.methods.families.outer import OuterConfig
from petl.ops.quantize import BITS
from petl.system.values import BETAS, field

DEFAULT_INNER = "adapter"
FORMATS = ("packed", "stacked", "latent")
STEPS = ("straight_through", "pv")
ON_CODES = ("steps=pv", lambda config: config.steps == "pv")
UNSUPPORTED_INNER = {  # by method, the reason that an error gives
    "binary": "its weights are quantized already",
    "adalora": "it prunes by setting values to zero, which no code represents",
    "dsee": "it prunes base weights by its update, and most of the scores of a rounded one are "
    "equal",
    "increlora": "its file has the active ranks only, and the statistics of the rounding are those "
    "of inactive ranks as well",
    "pela": "its factors stand in place of the weights, and rounded ones compute another model",
    "corda": "it subtracts the initial update from the base weights, and quantized factors do not "
    "add up to the original weights again",
    "delora": "it normalizes its factors, so that even small initial values change the base "
    "model's outputs",
    "dkvb": "rounding moves values that no row picked, which must stay as they are",
    "pst": "it ranks base weights by scores that its factors have exactly, and rounding them makes "
    "most of the scores equal",
    "vblora": "it ranks its logits to choose vectors, and rounding makes most of them equal",
}
INNER_DEFAULTS: dict[str, dict[str, Any]] = {
    "adapter": {  # Bi-AdaptFormer
        "r": 32,  # ~ the size of a 32-bit adapter of width 1
        "locations": ["ffn"],
        "placement": "parallel_residual",
        "non_linearity": "relu",
        "use_bias": False,
        "bneck_dropout": 0.1,
        "init_weights": "binary",
    }
}


@dataclass
class BinaryConfig(OuterConfig):
    """The inner method and its quantization."""

    inner: str = config_field(
        "method whose weights are quantized: any method but binary", DEFAULT_INNER
    )
    bits: int = config_field("bits per weight: 1, 2, 4 or 8", 1, choices=BITS)
    bits_pattern: dict[str, int] = config_field(
        "bits of single tensors where they differ from bits, by name of the tensor in the adapter; "
        "written by petl squeeze --what bits",
        {},
    )
    exclude_params: list[str] = config_field(
        "regular expressions for names of tensors that stay in float32", []
    )
    save_format: str = config_field(
        "format of the adapter file: packed (codes and statistics per weight, for inference), "
        "stacked (the same in three tensors, smaller for small adapters), or latent (float32, for "
        "further training)",
        "packed",
        choices=FORMATS,
    )
    head_bits: int | None = config_field(
        "bits per weight of the classification head, which then has no bias: 1, 2, 4 or 8; null: "
        "the head is not quantized",
        None,
        choices=BITS,
    )
    head_module: str | None = config_field(
        "name of the head; null: classifier, score or head",
        None,
        acts=("head_bits", lambda config: config.head_bits is not None),
    )

    steps: str = config_field(
        "straight_through (float32 weights train and are rounded in each forward pass) or pv "
        "(mean, deviation and codes themselves train, a few codes after each optimizer step)",
        "straight_through",
        choices=STEPS,
    )
    pv_fraction: float = config_field(
        "largest share of a tensor's codes that change in a step", 0.01, gt=0, le=1, acts=ON_CODES
    )
    pv_trust: float | None = config_field(
        "largest change of a tensor in a step, as a share of its norm; null: no bound",
        None,
        gt=0,
        acts=ON_CODES,
    )
    pv_decay: float = config_field(
        "by how much the buffers of the gradients return to the quantized values after a step, "
        "from 0 (not at all) to 1 (completely)",
        0.0,
        ge=0,
        le=1,
        acts=ON_CODES,
    )
    pv_lr_ratio: float = config_field(
        "learning rate of the buffers over that of the method", 10.0, gt=0, acts=ON_CODES
    )
    pv_betas: list[float] = field(
        [0.0, 0.95], BETAS, "AdamW's betas for the buffers", acts=ON_CODES
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pv_betas = list(self.pv_betas)
        require(
            self.steps != "pv" or self.head_bits is None,
            f"head_bits={self.head_bits} with steps=pv: the head would train straight-through; "
            "leave head_bits out, or use steps=straight_through",
        )
        self.exclude_params = list(self.exclude_params)  # from a tuple or OmegaConf's list
        self.bits_pattern = dict(self.bits_pattern)
        for name, bits in self.bits_pattern.items():
            require(
                bits in BITS,
                f"bits_pattern has {bits!r} for {name}: allowed are {', '.join(map(str, BITS))}",
            )
        init = facts_of(self).init_lora_weights
        require(
            method(self.inner).keeps_base(self) and init != "eva",
            f"inner={self.inner!r} with init_lora_weights={init!r} changes the base weights or "
            "the ranks at initialization, which quantized factors cannot compensate; use another "
            "init_lora_weights",
        )
        # raise here, not when the tensors are matched
        for pattern in self.exclude_params:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(
                    f"exclude_params: {pattern!r} is not a regular expression: {error}"
                ) from error
