"""The tuner of IncreLoRA: importance, growth, saving."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from petl.core import distributed
from petl.core.layers.layer import LayerShape
from petl.core.pictures import draw_by_layer
from petl.core.registry import register
from petl.core.tuners.tuner import MethodTuner
from petl.errors import InputError
from petl.methods.increlora.adapter import Growth, IncreloraAdapter
from petl.methods.increlora.config import IncreloraConfig
from petl.methods.increlora.rates import ComponentRates
from petl.ops.allocation import grant
from petl.ops.importance import smooth

logger = logging.getLogger(__name__)

ROWS = {"lora_A": 0, "lora_B": 1, "E": 0, "steps": 1}  # which dimension counts the components


def own_rates(config: IncreloraConfig) -> str:
    """Why this config needs an optimizer of whole tensors, or ""."""
    if not config.restart_warmup:
        return ""
    return "the learning rates of single components need whole tensors; set restart_warmup=false"


@register(
    "increlora",
    summary="low-rank updates that start at rank 1 and grow where they matter most",
    paper="Zhang et al. 2023, IncreLoRA: Incremental Parameter Allocation, arXiv:2308.12043",
    lr=3e-3,
)
class IncreloraModel(MethodTuner):
    """The tuner of `IncreloraConfig`. One adapter grows at a time: the active one."""

    config_cls, adapter_cls = IncreloraConfig, IncreloraAdapter
    unsupported = {"deepspeed": own_rates}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.rates: ComponentRates | None = None
        self.coming = 0  # the step that comes next
        self.warned = False
        super().__init__(*args, **kwargs)

    def layer_settings(
        self, config: IncreloraConfig, model: nn.Module, shapes: Mapping[str, LayerShape]
    ) -> dict[str, dict[str, Any]]:
        """Capacity of each target, and the growth that all of them share."""
        N, known = len(shapes), config.rank_pattern or {}
        costs = {key: sum(shape) + 1 for key, shape in shapes.items()}
        config.settle(costs.values())
        for key in known:
            if key not in shapes:
                raise InputError(f"rank_pattern names {key!r}, which is not a target of this model")
        start = {key: known.get(key, config.init_r) for key in shapes}
        final = config.inference_mode or config.is_full(start.values(), costs.values())
        growth = Growth(start, costs, config, grows=not final, scored=config.is_scored(0))
        if growth.is_open and config.total_step is not None:
            warn_if_too_late(config, N, config.total_step)
        full = config.limit(N) + config.reserve
        return {
            key: {"growth": growth, "capacity": rank if final else max(full, rank)}
            for key, rank in start.items()
        }

    # What a user or a loop asks

    @property
    def active_layers(self) -> dict[str, IncreloraAdapter]:
        """By module path, the active adapter of each layer.

        Raises:
            InputError: several adapters are active, of which only one can grow.
        """
        active = [name for name in self.active_adapters if name in self.placed]
        if len(active) > 1:
            raise InputError(
                f"adapters {', '.join(active)} are active, and IncreLoRA grows one at a time; "
                "choose it with set_adapter"
            )
        return cast(dict[str, IncreloraAdapter], self.placed[active[0]] if active else {})

    def get_rank_pattern(self) -> dict[str, int]:
        """The live rank of each module, by its path."""
        return {key: adapter.live for key, adapter in self.active_layers.items()}

    def importance_scores(self) -> dict[str, dict[str, float]]:
        """By module path the importance "I", its spread "U", and their product, the "score"."""
        pairs = {key: adapter.ema.tolist() for key, adapter in self.active_layers.items()}
        return {key: {"I": I, "U": U, "score": I * U} for key, (I, U) in pairs.items()}

    @property
    def growth_finished(self) -> bool:
        """Whether the active adapter will not grow any more."""
        return not any(adapter.growth.is_open for adapter in self.active_layers.values())

    def active_parameter_count(self) -> int:
        """Numbers in the active components: what the paper counts."""
        return sum(a.live * a.growth.costs[key] for key, a in self.active_layers.items())

    def planned_parameters(self) -> int:
        """As `active_parameter_count`; while ranks grow, with the target spread evenly.

        With a `parameter_budget`, at most that.
        """
        if self.growth_finished:
            return self.active_parameter_count()
        growth = next(iter(self.active_layers.values())).growth
        config, costs = growth.config, growth.costs.values()
        even = round(config.target(len(costs)) * sum(costs) / len(costs))
        return even if config.parameter_budget is None else min(even, config.parameter_budget)

    def aux_loss(self) -> Tensor:
        """The weighted orthogonality penalty as it stands, 0-d and detached."""
        layers = list(self.active_layers.values())
        if not layers or layers[0].growth.weight == 0:
            return torch.zeros(())
        values = [value for value, *_ in layers[0].growth.penalties_of(layers).values()]
        return torch.stack([value.to(values[0].device) for value in values]).sum()

    def series(self) -> dict[str, float]:
        """`total_rank`, and `active_parameters`, which belong to it."""
        if not self.active_layers:
            return {}
        return {
            "total_rank": float(sum(self.get_rank_pattern().values())),
            "active_parameters": float(self.active_parameter_count()),
        }

    def pictures(self, folder: Path) -> list[Path]:
        """`ranks.png`: the live rank by layer and module."""
        ranks = self.get_rank_pattern()
        if not ranks:
            return []
        total, N = sum(ranks.values()), len(ranks)
        title = f"IncreLoRA: {total} ranks in {N} modules, {total / N:.2f} each on average"
        unit = "rank of the update"
        return draw_by_layer(self.model, ranks, folder / "ranks.png", title=title, unit=unit)

    # Growth

    def update_and_allocate(self, global_step: int, optimizer: Optimizer | None = None) -> bool:
        """Take in the scores of a step, and let modules grow if it is time; whether they did.

        Once per optimizer step, after its backward passes, before the gradients are cleared.

        Args:
            global_step: optimizer steps that are done.
            optimizer: not needed, since growth leaves every parameter as it is.
        """
        adapters = list(self.active_layers.values())
        if not adapters or not adapters[0].growth.is_open:
            return False
        growth, config = adapters[0].growth, adapters[0].config
        finite = self.take_in(adapters) if growth.scored else None
        grew = config.is_event(global_step) and (finite is None or bool(finite))
        if grew:
            self.allocate(adapters, global_step)
        self.expect(global_step + 1)
        if grew and config.restart_warmup and not (self.rates and self.rates.handles):
            self.warn_unattached()
        return grew

    def expect(self, step: int) -> None:
        """Let the backward passes of step `step` be scored, if that is due."""
        self.coming = step
        for adapter in self.active_layers.values():
            growth = adapter.growth
            growth.scored = growth.is_open and adapter.config.is_scored(step)
            break

    def training_state(self) -> dict[str, Tensor]:
        """The step that comes next; all else that growth depends on is in the adapter's file."""
        return {"coming": torch.tensor(self.coming)}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `training_state` gave."""
        self.expect(int(state["coming"]))

    def take_in(self, adapters: list[IncreloraAdapter]) -> Tensor | None:
        """Smooth the scores of this step into each module's importance.

        The scores are the mean over processes, so that all processes choose the same modules.

        Returns:
            Whether all of them were finite, 0-d: if not, the importance is as it was. None if no
            backward pass left a score.
        """
        scores = [adapter.take_score() for adapter in adapters]
        device = adapters[0].ema.device
        score_N = torch.stack(
            [
                torch.zeros((), device=device) if score is None else score.to(device)
                for score in scores
            ]
        )
        if distributed.num_processes() > 1:
            score_N = distributed.summed(score_N) / distributed.num_processes()
        elif all(score is None for score in scores):
            return None
        config, kept = adapters[0].config, [adapter.ema for adapter in adapters]
        ema_N2 = torch.stack([ema.to(score_N) for ema in kept])
        ema_N2 = smooth(score_N, ema_N2, config.beta1, config.beta2)
        torch._foreach_copy_(kept, list(ema_N2.unbind()))
        return score_N.isfinite().all()

    def allocate(self, adapters: list[IncreloraAdapter], step: int) -> None:
        """Let the modules of the highest importance times spread grow."""
        growth, config = adapters[0].growth, adapters[0].config
        pairs = torch.stack([adapter.ema.to(adapters[0].ema.device) for adapter in adapters])
        grants = grant(
            [importance * spread for importance, spread in pairs.tolist()],
            [config.limit(len(adapters)) - adapter.live for adapter in adapters],
            top_h=config.top_h,
            step=config.grant,
            left=config.target(len(adapters)) - sum(growth.ranks.values()),
            costs=[growth.costs[adapter.info.key] for adapter in adapters],
            budget=None
            if config.parameter_budget is None
            else config.parameter_budget - self.active_parameter_count(),
        )
        for index, count in grants.items():
            adapters[index].grow(count, step)
        growth.refresh()
        for index in grants:
            adapters[index].give_birth(step)
        written: Any = self.peft_config[self.active_adapters[0]]
        written.rank_pattern = dict(growth.ranks)

    def warn_unattached(self) -> None:
        if not self.warned:
            logger.warning(
                "restart_warmup is on, but the tuner's attach_optimizer was not called: late "
                "components follow the learning rate of all others"
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
        """Give late components a learning-rate curve of their own, if `restart_warmup` is set.

        Raises:
            InputError: neither the config's `total_step` nor `total_steps` says how long the
                training is.
        """
        adapters = list(self.active_layers.values())
        if not adapters:
            return
        config, growth = adapters[0].config, adapters[0].growth
        total = config.total_step or total_steps
        self.expect(start_step + first)
        if growth.is_open and total is not None and config.total_step is None:
            warn_if_too_late(config, len(adapters), total)
        if not config.restart_warmup:
            return
        if total is None:
            raise InputError(
                "total_step is not given, and the learning rates of late components end there; "
                "set it to the optimizer steps of the training, or restart_warmup=false"
            )
        if self.rates is not None:
            self.rates.detach()
        self.rates = ComponentRates(
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
        """Once growth is over, the live components alone; `rank_pattern` goes into the config."""
        found = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        stems = cls.stems(found, adapter_name)
        if any(found[f"{stem}rank"].is_meta for stem in stems):
            return found  # shapes alone: those at the start
        ranks = {stem: int(found[f"{stem}rank"]) for stem in stems}
        config.rank_pattern = {cls.module_path(stem): rank for stem, rank in ranks.items()}
        shapes = [(found[f"{s}lora_A"].shape[1], found[f"{s}lora_B"].shape[0]) for s in stems]
        costs = [sum(shape) + 1 for shape in shapes]
        if not config.is_full(ranks.values(), costs):
            return found
        for stem, rank in ranks.items():
            for name, dim in ROWS.items():
                found[stem + name] = found[stem + name].narrow(dim, 0, rank).clone()
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Fit the components of a file to the capacity that the model has."""
        remapped = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        here = model.state_dict()
        for stem in cls.stems(here, adapter_name):
            check_components(remapped, stem, capacity=here[f"{stem}lora_A"].shape[0])
            for name, dim in ROWS.items():
                remapped[stem + name] = fitted(remapped[stem + name], here[stem + name], dim)
        return remapped

    @classmethod
    def stems(cls, keys: Mapping[str, Tensor], adapter_name: str) -> list[str]:
        """What the names of a layer's tensors begin with, for each layer of an adapter."""
        tail = f".{cls.prefix}adapters.{adapter_name}.rank"
        return [key.removesuffix("rank") for key in keys if key.endswith(tail)]

    @classmethod
    def module_path(cls, stem: str) -> str:
        """The path in the base model of the module that a stem belongs to."""
        return stem.partition(f".{cls.prefix}")[0].removeprefix("base_model.model.")


def warn_if_too_late(config: IncreloraConfig, modules: int, total: int) -> None:
    """Warn if ranks would not reach their target within `total` steps, and say what would fit."""
    events, last = config.rounds(modules), config.last_event(modules)
    if last < total:
        return
    first, fitting = config.next_event(0), (total - 1) // (events + 1)
    logger.warning(
        "%s, and the training ends after step %d; %s",
        f"no rank will grow: the first growth comes after step {first}"
        if first >= total
        else f"ranks will not all grow: the last of {events} growths comes after step {last}",
        total,
        f"with tinit={fitting} and deltaT={fitting} all {events} fit in"
        if fitting
        else "set a larger top_h or rank_step, for fewer growths, or train longer",
    )


def check_components(tensors: Mapping[str, Tensor], stem: str, capacity: int) -> None:
    """Raise InputError unless a layer's tensors in a file fit one another and the model."""
    rows = {name: tensors[stem + name].shape[dim] for name, dim in ROWS.items()}
    rank = tensors[f"{stem}rank"]
    if len(set(rows.values())) > 1 or rank.dim() or tensors[f"{stem}steps"].shape[0] != 2:
        raise InputError(f"{stem[:-1]}: the tensors differ in their number of components: {rows}")
    if not int(rank) <= min(rows["E"], capacity) or rows["E"] > capacity != int(rank):
        raise InputError(
            f"{stem[:-1]}: {rows['E']} components of which {int(rank)} are live do not fit into "
            f"the {capacity} of this model; load it with the fields that it was trained with"
        )


def fitted(given: Tensor, here: Tensor, dim: int) -> Tensor:
    """`given` with as many components along `dim` as `here` has, the missing ones taken from it."""
    missing = here.shape[dim] - given.shape[dim]
    if missing <= 0:
        return given.narrow(dim, 0, here.shape[dim])
    rest = here.narrow(dim, given.shape[dim], missing)
    rest = torch.zeros_like(rest, device=given.device) if rest.is_meta else rest.to(given)
    return torch.cat([given, rest], dim)
