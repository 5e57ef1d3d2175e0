"""The fields of the density term."""

from dataclasses import dataclass

from petl.core.registry import METHODS
from petl.core.spec.config import config_field, require
from petl.core.spec.losses import LossConfig
from petl.errors import UnknownNameError, did_you_mean

SIGNALS = ("activation", "down_input")


@dataclass
class ActivationDensityConfig(LossConfig):
    """What is counted, and how much it counts; the density term is D."""

    weight: float = config_field("factor of the term, at least 0", 1.0)
    eps: float = config_field("above 0; a value counts half at its square root", 1e-7)
    activation_modules: list[str] | None = config_field(
        "names or suffixes of the modules to watch; null: the nonlinearities of the MLP blocks, or "
        "their down projections",
        None,
    )
    signal: str = config_field(
        "what is counted: activation, the nonlinearity's output, or down_input, the down "
        "projection's input (gate times up)",
        "activation",
    )
    mask_padding: bool = config_field(
        "leave padding tokens out of the term and of all figures", False
    )
    gradient_accumulation_steps: int = config_field(
        "divides the term, for a trainer that neither divides its loss by the steps it accumulates "
        "over nor says how many items they hold; train.py and petl.Callback need 1",
        1,
    )
    threshold: float = config_field("for reports: active means |a| > threshold", 0.0)

    def check(self) -> None:
        if self.method not in METHODS:
            raise UnknownNameError(
                f"no method {self.method!r}" + did_you_mean(str(self.method), METHODS)
            )
        require(self.weight >= 0, f"weight must be >= 0, got {self.weight}")
        require(self.eps > 0, f"eps must be positive, got {self.eps}")
        require(self.signal in SIGNALS, f"signal={self.signal!r} is not {' or '.join(SIGNALS)}")
        steps = self.gradient_accumulation_steps
        require(steps >= 1, f"gradient_accumulation_steps={steps} is not at least 1")
        require(self.threshold >= 0, f"threshold={self.threshold} is negative")

    def check_driven(self) -> None:
        steps = self.gradient_accumulation_steps
        require(
            steps == 1,
            f"gradient_accumulation_steps={steps} would divide the density term a second time: "
            "petl's own loop and petl.Callback weigh it; leave it 1",
        )
