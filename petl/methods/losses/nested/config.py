"""The config of the loss `nested`."""

from dataclasses import dataclass

from petl.core.losses import LossConfig
from petl.core.registry import METHODS
from petl.core.spec.components import SCALES
from petl.core.spec.config import config_field, require
from petl.errors import choose

DISTANCES = ("kl", "mse", "features")


@dataclass
class NestedConfig(LossConfig):
    """Fields of nested widths: which, how a smaller one learns, and its scale."""

    widths: list[int] | None = config_field(
        "rising, the last is that of the adapter; null: powers of two from 2, and that", None
    )
    weight: float = config_field("weight of the smaller width's own loss, at least 0", 1.0, ge=0)
    distill: float = config_field(
        "weight of its distance to the full width, at least 0; not both weights are 0", 1.0, ge=0
    )
    share: float = config_field(
        "of the rows of a batch that the smaller width sees too, in (0, 1]", 0.3, gt=0, le=1
    )
    distance: str = config_field(
        "kl (of the probabilities from the full width's), mse (of logits), or features (square of "
        "the blocks' outputs, relative)",
        "kl",
        choices=DISTANCES,
        acts=("distill above 0", lambda config: config.distill > 0),
    )
    scale: str = config_field(
        "of the update at width k: full (alpha / r at each width) or width (alpha / k)",
        "full",
        choices=SCALES,
    )

    def check(self) -> None:
        # `method` belongs to petl.wrap(model, "nested")
        choose(METHODS, self.method, "method")
        require(
            self.weight > 0 or self.distill > 0,
            "weight=0 and distill=0 leave no term; set one of them above 0",
        )
        widths = self.widths
        if widths is None:
            return
        are_integers = all(isinstance(k, int) and not isinstance(k, bool) for k in widths)
        require(
            are_integers and len(widths) > 1 and min(widths) >= 1 and widths == sorted({*widths}),
            f"widths={widths} is no rising list of two or more widths from 1",
        )

    def widths_of(self, full: int, step: int) -> list[int]:
        """Return the widths of an adapter of width `full`, of which each is a multiple of `step`.

        Raises:
            InputError: the last is another one, one is no multiple, or there is none below it.
        """
        widths = self.widths
        if widths is None:
            powers = [k for i in range(1, full.bit_length()) if (k := 2**i) < full and not k % step]
            multiple = "" if step == 1 else f" that is a multiple of {step}, its blocks"
            require(
                bool(powers),
                f"an adapter of width {full} has no power of two from 2 below it{multiple}; train "
                "a wider one, or set loss.widths",
            )
            return [*powers, full]
        require(
            widths[-1] == full,
            f"loss.widths={widths} ends in {widths[-1]}, and the adapter has width {full}; end in "
            "that",
        )
        other = next((k for k in widths[:-1] if k % step), None)
        require(
            other is None,
            f"loss.widths={widths} has {other}, which is not a multiple of {step}, the blocks of "
            "the bottleneck; take multiples",
        )
        return widths
