"""The config of the density term."""

from dataclasses import dataclass

from petl.core.losses import LossConfig
from petl.core.registry import METHODS
from petl.core.spec.config import config_field, require
from petl.errors import choose

SIGNALS = ("activation", "down_input")


@dataclass
class ActivationDensityConfig(LossConfig):
    """Fields of the density term D: the counted values, and the weight of the term."""

    weight: float = config_field("weight of the density term, at least 0", 1.0, ge=0)
    eps: float = config_field(
        "smoothing constant, above 0: a value of sqrt(eps) counts as half active", 1e-7, gt=0
    )
    activation_modules: list[str] | None = config_field(
        "names or suffixes of the modules whose values are counted; null: the nonlinearities of "
        "the MLP blocks, or with signal=down_input their down projections",
        None,
    )
    signal: str = config_field(
        "counted values: activation (outputs of the nonlinearities) or down_input (inputs of the "
        "down projections, gate times up)",
        "activation",
        choices=SIGNALS,
    )
    mask_padding: bool = config_field(
        "leave padding tokens out of the term and of all metrics", False
    )
    gradient_accumulation_steps: int = config_field(
        "divisor of the term, for trainers that neither divide the loss by their accumulation "
        "steps nor pass num_items_in_batch; must be 1 with petl train and petl.Callback",
        1,
        ge=1,
    )
    threshold: float = config_field(
        "threshold of the reported metrics, at least 0: active means |a| > threshold", 0.0, ge=0
    )
    ppl_sparsity: bool = config_field(
        "report the PPL-1% sparsity of models that predict tokens; its search takes some 20 passes "
        "over 256 test rows",
        True,
    )

    def check(self) -> None:
        # `method` belongs to petl.wrap(model, "density")
        choose(METHODS, self.method, "method")

    def check_driven(self) -> None:
        steps = self.gradient_accumulation_steps
        # on top of the bounds: a trainer of one's own may divide by more
        require(
            steps == 1,
            f"gradient_accumulation_steps={steps} would divide the density term a second time: "
            "petl's own loop and petl.Callback already scale it; set it to 1",
        )
