"""The fields of DSEE, and the lists of modules that are updated and that are only masked."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from petl.core.model.names import in_layers, matched_stacks
from petl.core.model.targets import matched_names, resolve_targets
from petl.core.spec.checks import check_rank
from petl.core.spec.config import MethodConfig, config_field, require
from petl.errors import InputError

SPARSE_INITS = ("grebsmo", "magnitude", "random")
PRUNE_MODES = ("delta", "weight", "weight+delta", "random")


@dataclass
class DseeConfig(MethodConfig):
    """Fields of DSEE.

    Attributes:
        is_saved: True for a config read from an adapter's folder: its positions come from there.
    """

    target_modules: set[str] | list[str] | str | None = config_field(
        "modules that get the update: names, suffixes, a regular expression or a preset; null: "
        "all-linear",
        "query-value",
    )
    prune_modules: set[str] | list[str] | str | None = config_field(
        "modules that are only pruned, given as target_modules are; null: none", None
    )
    r: int = config_field("rank of the update B A", 16, ge=1)
    lora_alpha: float = config_field("B A and the entries are multiplied by lora_alpha / r", 32)
    num_sparse: int = config_field("single trained entries of each target, from 0", 64, ge=0)
    sparse_init: str = config_field(
        "where the entries are. grebsmo: the largest ones beside the low-rank part of the weight; "
        "magnitude: the largest ones of the weight; random",
        "grebsmo",
        choices=SPARSE_INITS,
        acts=("num_sparse above 0", lambda config: config.num_sparse > 0),
    )
    decomp_rank: int | None = config_field(
        "rank of the low-rank part of the weight, for grebsmo; null: r",
        None,
        ge=1,
        acts=("sparse_init=grebsmo", lambda config: config.sparse_init == "grebsmo"),
    )
    init_seed: int = config_field("seed of positions and random scores", 0)
    prune_ratio: float = config_field(
        "share of the weights of prune_modules to prune, in [0, 1)", 0.0, ge=0, lt=1
    )
    target_prune_ratio: float = config_field(
        "share of the weights of the targets to prune, in [0, 1)", 0.0, ge=0, lt=1
    )
    prune_mode: str = config_field(
        "scores of the targets' weights: the magnitude of the update (delta), of the weight, of "
        "their sum, or random",
        "delta",
        choices=PRUNE_MODES,
        acts=("target_prune_ratio above 0", lambda config: config.target_prune_ratio > 0),
    )
    prune_heads: int = config_field(
        "attention heads to prune in each layer, by the magnitude of the update", 0, ge=0
    )
    prune_step: float | None = config_field(
        "optimizer step after which the weights are pruned; below 1: a share of the run; null: "
        "only by a call of prune()",
        None,
        gt=0,
        acts=("prune_ratio, target_prune_ratio or prune_heads", lambda config: config.prunes),
    )
    only_masked: list[str] | None = config_field("paths of prune_modules; filled in", None)
    init_weights: bool = config_field(
        "false: all trained tensors start with small random values, for tests", True
    )

    def __post_init__(self) -> None:
        # only a file names the type; set before the parent sets the type
        self.is_saved = self.peft_type is not None
        if isinstance(self.prune_modules, list | tuple):
            self.prune_modules = set(self.prune_modules)
        if isinstance(self.only_masked, tuple | set):
            self.only_masked = sorted(self.only_masked)
        super().__post_init__()

    @property
    def prunes(self) -> bool:
        """True if there is something to prune."""
        return bool(self.prune_ratio or self.target_prune_ratio or self.prune_heads)

    def check(self) -> None:
        """Raise InputError for settings of pruning that do not fit together."""
        has_modules = bool(self.prune_modules or self.only_masked)
        require(
            has_modules or not self.prune_ratio,
            f"prune_ratio={self.prune_ratio:g} is the share to prune of prune_modules, which is "
            "null; name modules there, or set target_prune_ratio for the targets",
        )
        step = self.prune_step
        if step is not None:
            require(
                step < 1 or step == int(step),
                f"prune_step={step:g} is neither a number of steps nor a share below 1",
            )

    def step_to_prune(self, total: int | None) -> int | None:
        """Return the optimizer step after which to prune, from 1; None: never.

        Args:
            total: optimizer steps of the run; None: unknown.

        Raises:
            InputError: `prune_step` is a share of a run of unknown length, or after its end.
        """
        step = self.prune_step
        if step is None:
            return None
        if step < 1:
            if total is None:
                raise InputError(
                    f"prune_step={step:g} is a share of the run, whose length is unknown; set a "
                    "number of optimizer steps, or pass total_steps to attach_optimizer"
                )
            return max(1, round(step * total))
        require(
            total is None or step <= total,
            f"prune_step={step:g} is after the end of the run, which has {total} steps",
        )
        return int(step)

    def check_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Check rank and number of entries against the widths of the targets."""
        masked = set(self.only_masked or ())
        targets = {key: shape for key, shape in shapes.items() if key not in masked}
        check_rank(self, "r", targets)
        for key, (into, out) in targets.items():
            require(
                self.num_sparse <= into * out,
                f"num_sparse={self.num_sparse} is above {into * out}, the number of weights of "
                f"{key}; lower it",
            )


def resolve_lists(config: DseeConfig, model: nn.Module) -> None:
    """Write the paths of `prune_modules` into `only_masked`, and add them to the targets.

    Args:
        config: whose `target_modules` are resolved; changed in place.
        model: the base model.

    Raises:
        InputError: a pattern matches nothing, or a module is in both lists.
    """
    # filled in before: a saved config, whose targets have the paths already
    if config.only_masked is None:
        config.only_masked = []
        if config.prune_modules is not None:
            other = copy.copy(config)
            other.target_modules = config.prune_modules
            try:
                resolve_targets(other, model, words=("all-linear",))
            except InputError as error:
                raise type(error)(f"prune_modules: {error}") from error
            # PEFT does not apply layers_to_transform to a regular expression
            matched = matched_names(other, model)
            masked = [name for name in matched if in_layers(config, model, name)]
            targets = matched_names(config, model)
            both = [name for name in masked if name in targets]
            require(
                not both,
                f"{len(both)} modules, such as {both[0] if both else ''}, are in target_modules "
                "and in prune_modules; the weights of targets are pruned by target_prune_ratio, so "
                "leave them out of prune_modules",
            )
            config.only_masked = masked
            config.target_modules = {*targets, *masked, *matched_stacks(config, model)}
    found = [*matched_names(config, model), *matched_stacks(config, model)]
    missing = [name for name in config.only_masked if name not in found]
    require(
        not missing,
        f"only_masked has {missing[0] if missing else ''}, which is no target of this model; the "
        "adapter is of another model",
    )
    require(
        len(found) > len(config.only_masked),
        "prune_modules has all targets, so nothing would train; leave some out",
    )
