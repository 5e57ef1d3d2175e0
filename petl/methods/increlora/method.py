"""The method IncreLoRA: importance, growth, saving."""

import logging
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor

from petl.core.method import (
    AdapterSet,
    Method,
    Settings,
    Tensors,
    TrainContext,
    WrapContext,
)
from petl.core.model.heat_map import HeatMap, of_layers
from petl.core.register import register
from petl.core.support import Capability
from petl.core.tuners.asking import AskingTuner
from petl.errors import InputError
from petl.methods.increlora.adapter import Growth, IncreloraAdapter
from petl.methods.increlora.config import IncreloraConfig
from petl.methods.increlora.importance import grant, smooth
from petl.methods.increlora.learning_rates import ComponentLearningRates
from petl.system import collectives as distributed
from petl.system.files.tensor_file import check_finite

logger = logging.getLogger(__name__)

# keys of what is kept for a model: the next step, the learning rates, whether it was warned
NEXT, RATES, WARNED = "next", "rates", "warned"
Adapters = AdapterSet[IncreloraConfig, IncreloraAdapter]
Training = TrainContext[IncreloraConfig, IncreloraAdapter]
ROWS = {"lora_A": 0, "lora_B": 1, "E": 0, "steps": 1}  # dimension of the components, by tensor


def needs_own_learning_rates(config: IncreloraConfig) -> str:
    """The reason why this config needs unsharded tensors in the optimizer, or ""."""
    if not config.restart_warmup:
        return ""
    return "per-component learning rates need unsharded tensors; set restart_warmup=false"


@register
class Increlora(Method[IncreloraConfig, IncreloraAdapter]):
    """Low-rank updates that start at rank 1 and grow where they are most important."""

    name = "increlora"
    config_cls, adapter_cls = IncreloraConfig, IncreloraAdapter
    summary = "low-rank updates that start at rank 1 and grow where they are most important"
    paper = "Zhang et al. 2023, IncreLoRA: Incremental Parameter Allocation, arXiv:2308.12043"
    need = "capacity where it is needed"
    lr = 3e-3
    needs_tuner = "it pads the tensors of its files, which have the active ranks only"
    lacks = {
        Capability.RANKS: "it finds its ranks itself while it trains",
        Capability.TOGETHER: "",
        Capability.ZERO: needs_own_learning_rates,
        Capability.FSDP1: "it scores and grows whole components, of which FSDP1 leaves each "
        "process flat parts",
    }
    strength_tensors = ("lora_B",)
    components = "it orders them by importance itself"
    charts = (
        ("total_rank", "Total rank", "sum of the active ranks of all modules"),
        ("active_parameters", "Active parameters", "parameters of the active ranks"),
    )
    free_dims = ROWS  # a file has as many components as have grown

    def settings(self, c: WrapContext[IncreloraConfig]) -> dict[str, Settings]:
        """Capacity of each target, and the state of growth that all targets share."""
        config, shapes = c.config, c.shapes
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

    # Growth

    def is_idle(self, t: Training) -> bool:
        """True once no active adapter grows any more."""
        return not any(adapter.growth.is_open for _, adapter in t.adapters)

    def begin(self, t: Training) -> None:
        """Set up per-component learning rates, if `restart_warmup` is set.

        Raises:
            InputError: the length of the training is neither in `total_step` of the config nor in
                `total`.
        """
        adapters = _active(t)
        if not adapters:
            return
        config, growth = adapters[0].config, adapters[0].growth
        total = config.total_step or t.total
        begin_step(t, t.step + t.first)
        if t.step == 0:
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
        if RATES in t.kept:
            # hooks of an earlier optimizer
            t.kept[RATES].detach()
        assert t.optimizer is not None
        t.kept[RATES] = ComponentLearningRates(
            t.optimizer, adapters, t.step + t.first, total + t.first, config.warmup_steps
        )

    def after_step(self, t: Training) -> None:
        """Update the importance by the step's scores, and let modules grow if it is due."""
        adapters = _active(t)
        if not adapters or not adapters[0].growth.is_open:
            return
        growth, config = adapters[0].growth, adapters[0].config
        finite = update_importance(adapters) if growth.scored else None
        # bool(finite) synchronizes with the device, at growth steps only
        grew = config.is_growth_step(t.step) and (finite is None or bool(finite))
        if grew:
            allocate(adapters, t.step)
        begin_step(t, t.step + 1)
        attached = RATES in t.kept and bool(t.kept[RATES].handles)
        if grew and config.restart_warmup and not attached and not t.kept.get(WARNED):
            t.kept[WARNED] = True
            logger.warning(
                "restart_warmup=true has no effect, because attach_optimizer was not called: "
                "components added during training have the learning rate of all others"
            )

    def state(self, t: Training) -> Tensors:
        """The next step as `coming`; all other state of growth is in the adapter's file."""
        return {"coming": torch.tensor(t.kept.get(NEXT, 0))}

    def load_state(self, t: Training, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        begin_step(t, int(state["coming"]))

    # Results

    def planned(self, t: Training) -> int:
        """Parameters of the active components at the end of growth.

        While ranks grow this is an estimate: the target distributed evenly over modules, and at
        most the `parameter_budget`.
        """
        adapters = _active(t)
        if self.is_idle(t):
            return _parameters(adapters)
        # shared by all layers
        growth = adapters[0].growth
        config, costs = growth.config, growth.costs.values()
        # the mean cost of a component times the total rank
        even = round(config.target(len(costs)) * sum(costs) / len(costs))
        return even if config.parameter_budget is None else min(even, config.parameter_budget)

    def metrics(self, t: Training) -> dict[str, float]:
        """Metrics for the log: `total_rank`, and `active_parameters`, the parameters of it."""
        adapters = _active(t)
        if not adapters:
            return {}
        return {
            "total_rank": float(sum(adapter.active_rank for adapter in adapters)),
            "active_parameters": float(_parameters(adapters)),
        }

    def heat_maps(self, t: Training) -> list[HeatMap]:
        """The active rank of each module."""
        ranks = {adapter.info.key: adapter.active_rank for adapter in _active(t)}
        if not ranks:
            return []
        total, N = sum(ranks.values()), len(ranks)
        title = f"IncreLoRA: {total} ranks in {N} modules, {total / N:.2f} each on average"
        return of_layers(t.model, ranks, "ranks", title, "rank of the update")

    # Files

    def pack(self, saved: Adapters, tensors: Tensors) -> Tensors:
        """Once growth is over, save the active components only.

        Also writes `rank_pattern` into the config, which is saved afterwards.
        """
        stems = {path: saved.key(path, f"{saved.name}.") for path in saved.adapters}
        stems = {path: stem for path, stem in stems.items() if f"{stem}rank" in tensors}
        if any(tensors[f"{stem}rank"].is_meta for stem in stems.values()):
            return tensors  # a dry run has initial shapes only
        ranks = {path: int(tensors[f"{stem}rank"]) for path, stem in stems.items()}
        saved.config.rank_pattern = ranks
        # the parameters of a component: a row of A and a column of B, and an entry of E
        costs = [sum(saved.adapters[path].shape) + 1 for path in ranks]
        if not saved.config.is_full(ranks.values(), costs):
            return tensors
        for path, rank in ranks.items():
            for name, dim in ROWS.items():
                key = stems[path] + name
                tensors[key] = tensors[key].narrow(dim, 0, rank).clone()
        return tensors

    def unpack(self, saved: Adapters, tensors: Tensors) -> Tensors:
        """Resize the tensors of a file to the capacity of the model.

        Raises:
            InputError: a value is not finite, also of a component that resizing drops.
        """
        check_finite(tensors, "the adapter file")
        for path, adapter in saved.adapters.items():
            stem, own = saved.key(path, ""), adapter.tensors()
            names = {name: f"{stem}{name}" for name in (*ROWS, "rank")}
            if not all(_fits(tensors.get(key), own[name], name) for name, key in names.items()):
                continue  # an error, which the check of all tensors explains
            check_components(tensors, stem, capacity=len(own["lora_A"]))
            for name, dim in ROWS.items():
                tensors[names[name]] = resized(tensors[names[name]], own[name], dim)
        return tensors


def _fits(tensor: Tensor | None, own: Tensor, name: str) -> bool:
    """Return True if a tensor of a file has the shape of one's own but for the components."""
    if tensor is None or tensor.dim() != own.dim() or tensor.dtype.is_complex:
        return False
    free = ROWS.get(name)
    sizes = zip(tensor.shape, own.shape, strict=True)
    return all(i == free or size == size_here for i, (size, size_here) in enumerate(sizes))


# State, for users and training loops


def active_layers(model: PeftModel) -> dict[str, IncreloraAdapter]:
    """The active adapter's layers by module path.

    Raises:
        InputError: several adapters are active.
    """
    t: Training = cast(AskingTuner, model.base_model).context_of_training()
    return {adapter.info.key: adapter for adapter in _active(t)}


def rank_pattern(model: PeftModel) -> dict[str, int]:
    """The active rank of each module by its path."""
    return {key: adapter.active_rank for key, adapter in active_layers(model).items()}


def importance_scores(model: PeftModel) -> dict[str, dict[str, float]]:
    """Importance "I", its uncertainty "U" and their product "score", by module path."""
    pairs = {key: adapter.ema.tolist() for key, adapter in active_layers(model).items()}
    return {key: {"I": I, "U": U, "score": I * U} for key, (I, U) in pairs.items()}


def growth_finished(model: PeftModel) -> bool:
    """True if the active adapter will not grow any more."""
    return not any(adapter.growth.is_open for adapter in active_layers(model).values())


def active_parameters(model: PeftModel) -> int:
    """Parameters of the active components, as counted in the paper."""
    return _parameters(list(active_layers(model).values()))


def _active(t: Training) -> list[IncreloraAdapter]:
    if len(t.active) > 1:
        raise InputError(
            f"adapters {', '.join(t.names)} are active, but IncreLoRA grows one at a time; "
            "activate one with set_adapter"
        )
    return [adapter for _, adapter in t.adapters]


def _parameters(adapters: Sequence[IncreloraAdapter]) -> int:
    return sum(a.active_rank * a.growth.costs[a.info.key] for a in adapters)


def begin_step(t: Training, step: int) -> None:
    """Set the number of the next step, and whether its backward passes are scored."""
    t.kept[NEXT] = step
    for adapter in _active(t)[:1]:
        growth = adapter.growth
        growth.scored = growth.is_open and adapter.config.is_scored(step)


def update_importance(adapters: list[IncreloraAdapter]) -> Tensor | None:
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
        [torch.zeros((), device=device) if score is None else score.to(device) for score in scores]
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


def allocate(adapters: list[IncreloraAdapter], step: int) -> None:
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
        else config.parameter_budget - _parameters(adapters),
    )
    for index, count in grants.items():
        # changes counts only: the components exist already
        adapters[index].grow(count, step)
    growth.refresh()  # before the reserve starts: there is none once growth is over
    for index in grants:
        adapters[index].start_reserve(step)
    config.rank_pattern = dict(growth.ranks)  # saved


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
