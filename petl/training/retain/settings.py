"""The settings under `retain` of a run."""

from dataclasses import dataclass

from petl.system.values import field, integer


@dataclass(frozen=True, kw_only=True)
class RetainConfig:
    """How a run measures what its model loses on other texts."""

    data: object = field(
        None, help="texts: bundled, or files with a column text; null: not measured"
    )
    rows: int | None = field(
        None, integer(1), "number of texts; null: as many as take 3 % of the run, at most 256"
    )
    max_length: int = field(256, integer(2), "maximum tokens of a text")
    curve: bool = field(False, help="also measure at each evaluation of train.eval_steps")
