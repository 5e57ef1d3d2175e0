"""The settings under `retain` of a run."""

import math
from dataclasses import dataclass

from petl.errors import InputError
from petl.system.values import bounded, field, integer


@dataclass(frozen=True, kw_only=True)
class RetainConfig:
    """How a run measures what its model loses on other texts, and limits it."""

    # configs/train.yaml has "bundled": null, which reads as the default, has to mean none
    data: object = field(
        None,
        help="texts: bundled, files with a column text, or settings as of data; null: not measured",
    )
    rows: int | None = field(
        None, integer(1), "number of texts; null: as many as take 3 % of the run, at most 256"
    )
    max_length: int = field(256, integer(2), "maximum tokens of a text")
    curve: bool = field(False, help="also measure at each evaluation of train.eval_steps")
    limit: float | str | None = field(
        None,
        help='largest loss on the texts, in nats, or "5%" of perplexity, of the best checkpoint',
    )
    """Needs train.eval_steps, and implies curve. Of models without a vocabulary it limits the
    drift. If no checkpoint is within it, the one that lost least is kept, with a warning.
    """
    mix: float = field(
        0.0, bounded(ge=0, lt=1), "share of the examples of each batch that are retained texts"
    )
    mix_data: object = field(
        None, help="texts for mix, as data; null: half of data, of which the other half is measured"
    )

    @property
    def measures_curve(self) -> bool:
        """True if the texts are measured at each evaluation."""
        return self.curve or self.limit is not None

    def most(self, kind: str) -> float | None:
        """Return the largest loss in nats, or drift, that `limit` allows; None without a limit.

        Args:
            kind: "language" or "features".

        Raises:
            InputError: it is no number above 0, and no percentage of one.
        """
        if self.limit is None:
            return None
        given = str(self.limit)
        try:
            value = float(given.removesuffix("%"))
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise InputError(
                f"retain.limit={self.limit} is no loss above 0 in nats, such as 0.1, and no "
                'percentage of the perplexity, such as "5%"'
            )
        if not given.endswith("%"):
            return value
        return math.log1p(value / 100) if kind == "language" else value / 100
