"""The fields of sparse fine-tuning."""

from dataclasses import dataclass

from petl.core.spec.config import MethodConfig, config_field, require

SELECTS = (
    "selection_algorithm one of rigl, sm3",
    lambda config: config.selection_algorithm != "none",
)


@dataclass
class SparseConfig(MethodConfig):
    """Fields of sparse fine-tuning; `schedule` defines the cycle of selections."""

    density: float = config_field(
        "fraction of all base parameters to tune, in (0, 1]",
        0.01,
        gt=0,
        le=1,
        acts=(
            "r and num_tunable_weights null",
            lambda config: config.r is None and config.num_tunable_weights is None,
        ),
    )
    r: int | None = config_field(
        "tune as many weights as LoRA of this rank has parameters; overrides density",
        None,
        ge=1,
        acts=("num_tunable_weights=null", lambda config: config.num_tunable_weights is None),
    )
    num_tunable_weights: int | None = config_field(
        "number of tuned weights in the model; overrides r and density", None, ge=1
    )
    rank_pattern: dict[str, int] | None = config_field(
        "shares of the tuned weights by module path or regular expression: modules that match get "
        "weights in proportion to their size times their number; null: to their size",
        None,
    )
    num_deltas: dict[str, int] | None = config_field(
        "number of tuned weights by module path; written by the tuner, overrides all others", None
    )
    selection_algorithm: str = config_field(
        "rigl: grow where accumulated gradients are large; sm3: where the optimizer's accumulators "
        "are large; none: a fixed random set",
        "rigl",
        choices=("rigl", "sm3", "none"),
    )
    reselection_steps: int = config_field(
        "optimizer steps between selections", 20, ge=2, acts=SELECTS
    )
    selection_accumulation_steps: int = config_field(
        "optimizer steps over which candidate gradients are accumulated before a selection, below "
        "reselection_steps",
        5,
        ge=1,
        acts=SELECTS,
    )
    reselection_rate_policy: str = config_field(
        "decay of the exchanged fraction to 0 at total_step: linear or cosine",
        "linear",
        choices=("linear", "cosine"),
        acts=SELECTS,
    )
    initial_reselection_rate: float = config_field(
        "fraction of the tuned weights exchanged at the start, in [0, 1]",
        0.2,
        ge=0,
        le=1,
        acts=SELECTS,
    )
    full_first_reselection: bool | None = config_field(
        "the first selection may exchange all weights; null: true if the policy is linear",
        None,
        acts=SELECTS,
    )
    total_step: int | None = config_field(
        "length of the training in optimizer steps; no selection happens after it", None, ge=1
    )
    init_seed: int = config_field("seed of the initial random set", 0)
    fan_in_fan_out: bool = config_field(
        "field of PEFT's LoRA, without effect: Conv1D layers are recognized", False
    )

    def check(self) -> None:
        """Raise InputError if accumulation is not shorter than the cycle."""
        steps, accumulation = self.reselection_steps, self.selection_accumulation_steps
        require(
            accumulation < steps,
            f"selection_accumulation_steps={accumulation} is not below reselection_steps={steps}",
        )

    def check_total(self) -> None:
        """Raise InputError if weights are exchanged and the length of the training is unknown."""
        algorithm = self.selection_algorithm
        require(
            algorithm == "none" or self.total_step is not None,
            f"total_step is null, but selection_algorithm={algorithm!r} needs the optimizer steps "
            "of the training; set it, or selection_algorithm='none'",
        )
