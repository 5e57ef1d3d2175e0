"""The settings under `ranks` of a run."""

from dataclasses import dataclass

from petl.system.values import field, integer, one_of, real
from petl.training.calibration import CalibrationData
from petl.training.ranks.importance import METRICS


@dataclass(frozen=True, kw_only=True)
class RanksConfig(CalibrationData):
    """How a run distributes ranks over blocks: `+ranks=cfsp`, see `petl.ranks.allocate`."""

    name: str = field("cfsp", one_of("cfsp"))
    metric: str = field("angular", one_of(*METRICS))
    least: int = field(1, integer(1))
    most: int | None = field(None, integer(1))
    power: float = field(1.0, real(0))
    # what is equal to that of equal ranks: their sum, or the parameters
    budget: str = field("sum", one_of("sum", "params"))
    num_samples: int = field(128, integer(1))
    seq_len: int = field(1024, integer(1))
