"""The tuner of IncreLoRA: importance, growth, saving."""

import logging
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from petl.core.layers.layer import LayerShape
from petl.core.model.heat_map import HeatMap, of_layers
from petl.core.register import register
from petl.core.support import Capability
from petl.core.tuners.base import updated
from petl.core.tuners.tuner import MethodTuner
from petl.errors import InputError
from petl.methods.increlora.adapter import Growth, IncreloraAdapter
from petl.methods.increlora.allocation import grant
from petl.methods.increlora.config import IncreloraConfig
from petl.methods.increlora.importance import smooth
from petl.methods.increlora.learning_rates import ComponentLearningRates
from petl.system import collectives as distributed

logger = logging.getLogger(__name__)

ROWS = {"lora_A": 0, "lora_B": 1, "E": 0, "steps": 1}  # dimension of the components, by tensor


def needs_own_learning_rates(config: IncreloraConfig) -> str:
    """The reason why this config needs unsharded tensors in the optimizer, or ""."""
    if not config.restart_warmup:
        return ""
    return "per-component learning rates need unsharded tensors; set restart_warmup=false"


@register(
    "increlora",
    summary="low-rank updates that start at rank 1 and grow where they are most important",
    need="capacity where it is needed",
    paper="Zhang et al. 2023, IncreLoRA: Incremental Parameter Allocation, arXiv:2308.12043",
    lr=3e-3,
)
class IncreloraModel(MethodTuner):
    """Tuner of `IncreloraConfig`. One adapter grows at a time: the active one."""

    config_cls, adapter_cls = IncreloraConfig, IncreloraAdapter
    needs_tuner = "it pads the tensors of its files, which have the active ranks only"
    lacks = {
        Capability.RANKS: "it finds its ranks itself while it trains",
        Capability.TOGETHER: "",
        Capability.ZERO: needs_own_learning_rates,
    }
    free_dims = ROWS  # a file has as many components as have grown

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.learning_rates: ComponentLearningRates | None = None
        self.next_step = 0
        self.warned = False
        super().__init__(*args, **kwargs)

    def layer_settings(
        self, config: IncreloraConfig, model: nn.Module, shapes: Mapping[str, LayerShape]
    ) -> dict[str, dict[str, Any]]:
        """Capacity of each target, and the state of growth that all targets share."""
        N, known = len(shapes), config.rank_pattern or {}
        # a row of A [I], a column of B [O] and an entry of E
        costs = {key: sum(shape) + 1 for key, shape in shapes.items()}
        config.resolve(costs.values())
        for key in known:
            if key not in shapes:
                raise InputError(
                    f"rank_pattern has {key!r}, which is not a target of this model; remove it, or "
                    "add the module to target_modules"
                )
        ranks = {key: known.get(key, config.init_r) for key in shapes}
        final = config.inference_mode or config.is_full(ranks.values(), costs.values())  # no growth
        growth = Growth(ranks, costs, config, grows=not final, scored=config.is_scored(0))
        if growth.is_open and config.total_step is not None:
            warn_if_too_short(config, N, config.total_step)
        # the highest reachable rank plus reserve: parameters never change during training
        full = config.limit(N) + config.reserve
        return {
            key: {"growth": growth, "capacity": rank if final else max(full, rank)}
            for key, rank in ranks.items()
        }

    # State, for users and training loops

    @property
    def active_layers(self) -> dict[str, IncreloraAdapter]:
        """The active adapter's layers by module path.

        Raises:
            InputError: several adapters are active.
        """
        active = [name for name in self.active_adapters if name in self.placed]  # of this tuner
        if len(active) > 1:
            raise InputError(
                f"adapters {', '.join(active)} are active, but IncreLoRA grows one at a time; "
                "activate one with set_adapter"
            )
        return cast(dict[str, IncreloraAdapter], self.placed[active[0]] if active else {})

    def get_rank_pattern(self) -> dict[str, int]:
        """The active rank of each module by its path."""
        return {key: adapter.active_rank for key, adapter in self.active_layers.items()}

    def importance_scores(self) -> dict[str, dict[str, float]]:
        """Importance "I", its uncertainty "U" and their product "score", by module path."""
        pairs = {key: adapter.ema.tolist() for key, adapter in self.active_layers.items()}
        return {key: {"I": I, "U": U, "score": I * U} for key, (I, U) in pairs.items()}

    @property
    def growth_finished(self) -> bool:
        """True if the active adapter will not grow any more."""
        return not any(adapter.growth.is_open for adapter in self.active_layers.values())

    def active_parameter_count(self) -> int:
        """Parameters of the active components, as counted in the paper."""
        return sum(a.active_rank * a.growth.costs[key] for key, a in self.active_layers.items())

    def planned_parameters(self) -> int:
        """Parameters of the active components at the end of growth.

        While ranks grow this is an estimate: the target distributed evenly over modules, and at
        most the `parameter_budget`.
        """
        if self.growth_finished:
            return self.active_parameter_count()
        # shared by all layers
        growth = next(iter(self.active_layers.values())).growth
        config, costs = growth.config, growth.costs.values()
        # the mean cost of a component times the total rank
        even = round(config.target(len(costs)) * sum(costs) / len(costs))
        return even if config.parameter_budget is None else min(even, config.parameter_budget)

    def aux_loss(self) -> Tensor:
        """The current weighted orthogonality penalty, 0-d and detached."""
        layers = list(self.active_layers.values())
        # no adapter, or no penalty
        if not layers or layers[0].growth.weight == 0:
            return torch.zeros(())
        values = [value for value, *_ in layers[0].growth.penalties_of(layers).values()]
        return torch.stack([value.to(values[0].device) for value in values]).sum()

    def series(self) -> dict[str, float]:
        """Metrics for the log: `total_rank`, and `active_parameters`, the parameters of it."""
        if not self.active_layers:
            return {}
        return {
            "total_rank": float(sum(self.get_rank_pattern().values())),
            "active_parameters": float(self.active_parameter_count()),
        }

    def heat_maps(self) -> list[HeatMap]:
        """The active rank of each module, and the changes of the weights."""
        ranks = self.get_rank_pattern()
        if not ranks:
            return []
        total, N = sum(ranks.values()), len(ranks)
        title = f"IncreLoRA: {total} ranks in {N} modules, {total / N:.2f} each on average"
        ranks_map = of_layers(self.model, ranks, "ranks", title, "rank of the update")
        return [*ranks_map, *super().heat_maps()]

    # Growth

    @property
    def needs_updates(self) -> bool:
        """True while an active adapter grows."""
        placed = [self.placed.get(name, {}) for name in self.active_adapters]
        adapters = [cast(IncreloraAdapter, a) for layers in placed for a in layers.values()]
        return any(adapter.growth.is_open for adapter in adapters)

    def update_and_allocate(self, global_step: int, optimizer: Optimizer | None = None) -> bool:  # ty: ignore[incompatible-method-override]
        """Update the importance by the step's scores, and let modules grow if it is due.

        Call it once per optimizer step, after backward and before gradients are cleared.

        Args:
            global_step: completed optimizer steps.
            optimizer: not needed, since growth does not replace parameters.

        Returns:
            True if modules grew.
        """
        updated(self)
        adapters = list(self.active_layers.values())
        if not adapters or not adapters[0].growth.is_open:
            return False
        growth, config = adapters[0].growth, adapters[0].config
        finite = self.update_importance(adapters) if growth.scored else None
        # bool(finite) synchronizes with the device, at growth steps only
        grew = config.is_growth_step(global_step) and (finite is None or bool(finite))
        if grew:
            self.allocate(adapters, global_step)
        self.begin_step(global_step + 1)
        attached = self.learning_rates is not None and bool(self.learning_rates.handles)
        if grew and config.restart_warmup and not attached:
            self.warn_unattached()
        return grew

    def begin_step(self, step: int) -> None:
        """Set the number of the next step, and whether its backward passes are scored."""
        self.next_step = step
        for adapter in self.active_layers.values():
            growth = adapter.growth
            growth.scored = growth.is_open and adapter.config.is_scored(step)
            break

    def training_state(self) -> dict[str, Tensor]:
        """The next step as `coming`; all other state of growth is in the adapter's file."""
        return {"coming": torch.tensor(self.next_step)}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state that `training_state` returned."""
        self.begin_step(int(state["coming"]))

    def update_importance(self, adapters: list[IncreloraAdapter]) -> Tensor | None:
        """Smooth the scores of this step into each module's importance.

        Scores are averaged over processes, so that all processes choose the same modules.

        Returns:
            True, 0-d, if all scores are finite; if not, the importance is unchanged. None if no
            backward pass computed a score.
        """
        scores = [adapter.pop_score() for adapter in adapters]
        # layers may be on several devices
        device = adapters[0].ema.device
        score_N = torch.stack(
            [
                torch.zeros((), device=device) if score is None else score.to(device)
                for score in scores
            ]
        )
        if distributed.num_processes() > 1:
            # one reduction for all modules
            score_N = distributed.summed(score_N) / distributed.num_processes()
        # with several processes, one without a score counts as zero
        elif all(score is None for score in scores):
            return None
        config, buffers = adapters[0].config, [adapter.ema for adapter in adapters]
        ema_N2 = torch.stack([ema.to(score_N) for ema in buffers])
        ema_N2 = smooth(score_N, ema_N2, config.beta1, config.beta2)
        torch._foreach_copy_(buffers, list(ema_N2.unbind()))
        return score_N.isfinite().all()

    def allocate(self, adapters: list[IncreloraAdapter], step: int) -> None:
        """Grow the modules with the highest importance times uncertainty."""
        growth, config = adapters[0].growth, adapters[0].config
        pairs = torch.stack([adapter.ema.to(adapters[0].ema.device) for adapter in adapters])
        # by index, the number of ranks that the module gains
        grants = grant(
            [importance * uncertainty for importance, uncertainty in pairs.tolist()],
            [config.limit(len(adapters)) - adapter.active_rank for adapter in adapters],
            top_h=config.top_h,
            step=config.rank_increase,
            # ranks left to the target
            left=config.target(len(adapters)) - sum(growth.ranks.values()),
            costs=[growth.costs[adapter.info.key] for adapter in adapters],
            budget=None
            if config.parameter_budget is None
            else config.parameter_budget - self.active_parameter_count(),
        )
        for index, count in grants.items():
            # changes counts only: the components exist already
            adapters[index].grow(count, step)
        growth.refresh()  # before the reserve starts: there is none once growth is over
        for index in grants:
            adapters[index].start_reserve(step)
        saved_config: Any = self.peft_config[self.active_adapters[0]]
        saved_config.rank_pattern = dict(growth.ranks)

    def warn_unattached(self) -> None:
        """Warn once that `restart_warmup` has no effect without `attach_optimizer`."""
        if not self.warned:
            logger.warning(
                "restart_warmup=true has no effect, because attach_optimizer was not called: "
                "components added during training have the learning rate of all others"
            )
        self.warned = True

    def attach_optimizer(
        self,
        optimizer: Optimizer,
        start_step: int = 0,
        *,
        first: int = 0,
        total_steps: int | None = None,
    ) -> None:
        """Set up per-component learning rates, if `restart_warmup` is set.

        Raises:
            InputError: the length of the training is neither in `total_step` of the config nor in
                `total_steps`.
        """
        adapters = list(self.active_layers.values())
        if not adapters:
            return
        config, growth = adapters[0].config, adapters[0].growth
        total = config.total_step or total_steps
        self.begin_step(start_step + first)
        if start_step == 0:
            # steps of an earlier training are none of this one, in which its components are initial
            for adapter in adapters:
                adapter.steps.clamp_(max=0)
        # otherwise the warning was logged on wrapping
        if growth.is_open and total is not None and config.total_step is None:
            warn_if_too_short(config, len(adapters), total)
        if not config.restart_warmup:
            return
        if total is None:
            raise InputError(
                f"total_step={config.total_step}, but the learning rates of new components end "
                "there; set it to the optimizer steps of the training, or restart_warmup=false"
            )
        if self.learning_rates is not None:
            # hooks of an earlier optimizer
            self.learning_rates.detach()
        self.learning_rates = ComponentLearningRates(
            optimizer, adapters, start_step + first, total + first, config.warmup_steps
        )

    # Saving

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """The tensors to save: once growth is over, the active components only.

        Also writes `rank_pattern` into the config, which is saved afterwards.
        """
        entries = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        stems = cls.stems(entries, adapter_name)
        if any(entries[f"{stem}rank"].is_meta for stem in stems):
            return entries  # a dry run has initial shapes only
        ranks = {stem: int(entries[f"{stem}rank"]) for stem in stems}
        config.rank_pattern = {cls.module_path(stem): rank for stem, rank in ranks.items()}
        shapes = [(entries[f"{s}lora_A"].shape[1], entries[f"{s}lora_B"].shape[0]) for s in stems]
        # from the shapes: a class method has no modules
        costs = [sum(shape) + 1 for shape in shapes]
        if not config.is_full(ranks.values(), costs):
            return entries
        for stem, rank in ranks.items():
            for name, dim in ROWS.items():
                entries[stem + name] = entries[stem + name].narrow(dim, 0, rank).clone()
        return entries

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Resize the tensors of a file to the capacity of the model."""
        remapped = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        own = model.state_dict()
        for stem in cls.stems(own, adapter_name):
            check_components(remapped, stem, capacity=own[f"{stem}lora_A"].shape[0])
            for name, dim in ROWS.items():
                remapped[stem + name] = resized(remapped[stem + name], own[stem + name], dim)
        return remapped

    @classmethod
    def stems(cls, keys: Mapping[str, Tensor], adapter_name: str) -> list[str]:
        """The common prefix of the names of a layer's tensors, for each layer of an adapter."""
        tail = f".{cls.prefix}adapters.{adapter_name}.rank"
        return [key.removesuffix("rank") for key in keys if key.endswith(tail)]

    @classmethod
    def module_path(cls, stem: str) -> str:
        """The path in the base model of the module that a stem belongs to."""
        return stem.partition(f".{cls.prefix}")[0].removeprefix("base_model.model.")


def warn_if_too_short(config: IncreloraConfig, modules: int, total: int) -> None:
    """Warn if ranks cannot reach their target within `total` steps, and suggest settings."""
    count, last = config.num_growth_steps(modules), config.last_growth_step(modules)
    if last < total:
        return
    first, interval = config.next_growth_step(0), (total - 1) // (count + 1)
    logger.warning(
        "%s, but the training ends after step %d; %s",
        f"no rank will grow: the first growth step is {first}"
        if first >= total
        else f"ranks will not reach their target: the last of {count} growth steps is {last}",
        total,
        f"use tinit={interval} and deltaT={interval}, with which all {count} growth steps fit"
        if interval
        else "use a larger top_h or rank_step, for fewer growth steps, or train longer",
    )


def check_components(tensors: Mapping[str, Tensor], stem: str, capacity: int) -> None:
    """Raise InputError unless a layer's tensors in a file match one another and the model."""
    rows = {name: tensors[stem + name].shape[dim] for name, dim in ROWS.items()}
    rank = tensors[f"{stem}rank"]
    if len(set(rows.values())) > 1 or rank.dim() or tensors[f"{stem}steps"].shape[0] != 2:
        raise InputError(
            f"{stem[:-1]}: the tensors differ in their number of components: {rows}; the file is "
            "damaged"
        )
    # a file with more components than the model has room for must consist of active ones
    if not 0 <= int(rank) <= min(rows["E"], capacity) or rows["E"] > capacity != int(rank):
        raise InputError(
            f"{stem[:-1]}: {rows['E']} components, {int(rank)} of them active, do not fit the "
            f"capacity {capacity} of this model; load it with the fields that it was trained with"
        )


def resized(tensor: Tensor, own: Tensor, dim: int) -> Tensor:
    """`tensor` with as many components along `dim` as `own`, which fills in missing ones."""
    missing = own.shape[dim] - tensor.shape[dim]
    if missing <= 0:
        return tensor.narrow(dim, 0, own.shape[dim])
    # inactive components keep their fresh initial values
    rest = own.narrow(dim, tensor.shape[dim], missing)
    rest = torch.zeros_like(rest, device=tensor.device) if rest.is_meta else rest.to(tensor)
    return torch.cat([tensor, rest], dim)
