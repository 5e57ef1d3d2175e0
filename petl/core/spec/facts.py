"""What is asked of the config of any method: its value, or that of one without the field."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from petl.core.types import Fields


@dataclass(frozen=True)
class Facts:
    """Flags of petl's configs and fields of PEFT's, with the value where a config has none.

    Attributes:
        replaces_head: the adapter takes the place of the model's head.
        divides_calibration: calibration adds over processes, so that each gets a part of the rows.
        tasks: that the method serves.
        init_lora_weights: how LoRA starts; a string: from weights or data.
        bias: biases of the base that train: none, all or NAME_only.
    """

    replaces_head: bool = False
    divides_calibration: bool = False
    tasks: Sequence[str] = ()
    r: int | None = None
    lora_alpha: float | None = None
    alpha: float | None = None
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str | None = None
    bias: str | None = None
    rank_pattern: Mapping[str, Any] | None = None
    target_modules: Collection[str] | str | None = None
    exclude_modules: Collection[str] | str | None = None
    target_parameters: Sequence[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    modules_to_save: Sequence[str] | None = None
    ensure_weight_tying: bool = False
    layers_to_transform: Any = None
    layers_pattern: list[str] | str | None = None
    layer_replication: list[tuple[int, int]] | None = None
    prompt_tuning_init_state_dict_path: str | None = None
    megatron_core: str | None = "megatron.core"
    adapters: Mapping[str, str] | None = None

    @property
    def trains_biases(self) -> bool:
        """True if biases of the base model train with the adapter."""
        return self.bias not in (None, "none")

    @property
    def trained_tokens(self) -> set[int]:
        """The tokens of which rows train, in any table."""
        given = self.trainable_token_indices or ()
        parts = given.values() if isinstance(given, Mapping) else [given]
        return {token for part in parts for token in part}


DEFAULTS: Fields = {field.name: field.default for field in fields(Facts)}


def facts_of(config: object) -> Facts:
    """Return the facts of a config, or of its class, of petl or PEFT."""
    return Facts(**{name: getattr(config, name, default) for name, default in DEFAULTS.items()})


# values of init_lora_weights, or how they begin ("pissa_niter_16")
MODIFIES_BASE_WEIGHTS = ("pissa", "olora", "corda", "lora_ga", "loftq")


def modifies_base_weights(config: object) -> bool:
    """Return True if the initialization of an adapter of this config changes the base weights.

    Such an adapter gives correct outputs on the original base only if it is saved relative to its
    initial state: `save_pretrained(..., path_initial_model_for_weight_conversion=START)`.
    """
    initialization = facts_of(config).init_lora_weights
    return isinstance(initialization, str) and initialization.startswith(MODIFIES_BASE_WEIGHTS)
