"""The settings under `ranks` of a run."""

from dataclasses import dataclass, field
from typing import Any

from petl.system.settings.schema import Rule, integer, one_of, real, setting
from petl.training.ranks.importance import METRICS

DATA = Rule("settings of data", lambda value: True)  # read when the run reads its data


@dataclass(frozen=True, kw_only=True)
class RanksConfig:
    """How a run distributes ranks over blocks: `+ranks=cfsp`, see `petl.ranks.allocate`."""

    name: str = setting("cfsp", one_of("cfsp"))
    metric: str = setting("angular", one_of(*METRICS))
    least: int = setting(1, integer(1))
    most: int | None = setting(None, integer(1).or_null())
    power: float = setting(1.0, real(0))
    # what is equal to that of equal ranks: their sum, or the parameters
    budget: str = setting("sum", one_of("sum", "params"))
    # calibration data, as `method.calibration_data` has them
    data: dict[str, Any] | None = field(default=None, metadata={"rule": DATA})
    num_samples: int = setting(128, integer(1))
    seq_len: int = setting(1024, integer(1))
    batch_size: int = setting(1, integer(1))
    seed: int = setting(233, integer(0))

    @property
    def calibration(self) -> dict[str, Any]:
        """The settings of the calibration data."""
        names = ("data", "num_samples", "seq_len", "batch_size", "seed")
        return {name: getattr(self, name) for name in names}
