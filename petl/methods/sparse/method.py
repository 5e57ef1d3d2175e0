"""The method sparse: drop-and-grow of the tuned weights while they train."""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from petl.core.compat import BaseTunerLayer
from petl.core.method import Method, Settings, Tensors, TrainContext, WrapContext
from petl.core.model.heat_map import HeatMap, of_layers
from petl.core.register import register
from petl.core.support import Capability
from petl.errors import InputError
from petl.methods.sparse import schedule
from petl.methods.sparse.adapter import Candidates, SparseAdapter
from petl.methods.sparse.budget import deltas_by_module
from petl.methods.sparse.config import SparseConfig
from petl.methods.sparse.selection import FLAT, SINGLE, checked, end_update, select
from petl.methods.sparse.sm3 import SparseSM3

Training = TrainContext[SparseConfig, SparseAdapter]


@register
class Sparse(Method[SparseConfig, SparseAdapter]):
    """A small set of single weights, exchanged while they train."""

    name = "sparse"
    config_cls, adapter_cls = SparseConfig, SparseAdapter
    summary = "a small set of single weights, exchanged during training where gradients are large"
    paper = (
        "Ansell et al. 2024, Scaling Sparse Fine-Tuning to Large Language Models, arXiv:2401.16405"
    )
    need = "a few single weights"
    recommended = "changes weights where gradients are large; merges without an approximation"
    lacks = {
        Capability.ZERO: lambda config: "" if config.selection_algorithm == "none" else SINGLE,
        Capability.FSDP1: lambda config: "" if config.selection_algorithm == "none" else FLAT,
    }
    strength_tensors = ("values",)
    by_position = True

    def settings(self, c: WrapContext[SparseConfig]) -> dict[str, Settings]:
        """The number of tuned weights of each target, which is also written into the config."""
        # saved: a loaded adapter needs the sizes, not the rule
        c.config.num_deltas = deltas_by_module(c.config, c.model, c.shapes)
        empty = [key for key, count in c.config.num_deltas.items() if count == 0]
        if empty:
            warnings.warn(
                f"{len(empty)} of {len(c.targets)} targets have no tuned weights, such as "
                f"{empty[0]}; raise density, r or num_tunable_weights",
                stacklevel=2,
            )
        return {key: _settings(c.model, key, n) for key, n in c.config.num_deltas.items()}

    # Drop-and-grow

    def optimizer(self, t: Training) -> Optimizer | None:
        """SM3 if `selection_algorithm='sm3'` needs its accumulators; else None."""
        # adapters of one model may differ; rigl works with any optimizer
        uses_sm3 = any(config.selection_algorithm == "sm3" for config in t.configs)
        return SparseSM3(t.groups, t.model) if uses_sm3 else None

    def begin(self, t: Training) -> None:
        """Check the optimizer, and start (or resume) at step `step`.

        Raises:
            InputError, UnsupportedError: as `after_step` would after the first step.
        """
        for adapters in t.trained:
            if adapters.config.selection_algorithm != "none":
                checked(t, adapters)
            for adapter in adapters.adapters.values():
                # 0, or the step of a checkpoint
                adapter.begin(t.step)

    def is_idle(self, t: Training) -> bool:
        """True if the tuned entries of all active adapters are fixed."""
        return all(config.selection_algorithm == "none" for config in t.configs)

    def after_step(self, t: Training) -> None:
        """Accumulate candidate gradients and exchange entries.

        Raises:
            InputError: `total_step` is null, or the optimizer is missing or of the wrong class.
            UnsupportedError: gradients are not averaged over the processes, or scaled by fp16.
        """
        for adapters in t.active:
            config, own = adapters.config, list(adapters.adapters.values())
            # most steps need no work, and no synchronization; frozen adapters are for inference
            if not schedule.is_due(config, t.step) or not adapters.trains:
                continue
            optimizer = checked(t, adapters)
            if schedule.accumulates(config, t.step):
                end_update(own)
            if schedule.selects(config, t.step):
                is_random = all(adapter.starts_at_zero for adapter in own)
                fraction = schedule.exchange_fraction(config, t.step, is_random=is_random)
                for adapter in own:
                    select(adapter, fraction, optimizer)
            for adapter in own:
                adapter.end_step(t.step)

    def state(self, t: Training) -> Tensors:
        """Completed steps, and candidate gradients accumulated so far, by module and adapter."""
        state = {}
        for adapters in t.active:
            name, own = adapters.name, adapters.adapters
            if own:
                # equal for all adapters of a name
                state[f"{name}.step"] = torch.tensor(next(iter(own.values())).step)
                state[f"{name}.starts_at_zero"] = torch.tensor(
                    all(adapter.starts_at_zero for adapter in own.values())
                )
            for key, adapter in own.items():
                if adapter.candidates is not None:
                    fields = adapter.candidates.state()
                    state |= {f"{key}.{name}.{field}": value for field, value in fields.items()}
        return state

    def load_state(self, t: Training, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned.

        Raises:
            InputError: the state is of other modules or adapters.
        """
        left = dict(state)
        for adapters in t.active:
            name = adapters.name
            step = int(left.pop(f"{name}.step", torch.tensor(0)))
            at_zero = bool(left.pop(f"{name}.starts_at_zero"))
            for key, adapter in adapters.adapters.items():
                keys = {f: f"{key}.{name}.{f}" for f in Candidates.FIELDS}
                # empty: no accumulation was under way at the checkpoint
                fields = {f: left.pop(k) for f, k in keys.items() if k in left}
                adapter.step = step
                adapter.starts_at_zero = at_zero
                device = adapter.values.device
                adapter.candidates = Candidates.from_state(fields, device) if fields else None
        # what remains belongs to modules that this model lacks
        if left:
            raise InputError(
                f"the training state has {min(left)}, which this model does not have; resume with "
                "the model and targets of that run"
            )

    def heat_maps(self, t: Training) -> list[HeatMap]:
        """Where the tuned weights are."""
        counts: dict[str, Tensor] = {}
        for key, adapter in t.adapters:
            # of all adapters of a module together
            counts[key] = counts.get(key, 0) + adapter.tuned_by_input()
        tuned = of_layers(
            t.model,
            {key: int(counts_I.sum()) for key, counts_I in counts.items()},
            "tuned_weights",
            "Sparse: tuned weights",
            "number of weights",
        )
        busy = of_layers(
            t.model,
            {key: 100 * share_of_busiest(counts_I) for key, counts_I in counts.items()},
            "tuned_inputs",
            "Sparse: tuned weights in the busiest tenth of the inputs",
            "% of the tuned weights",
            "The share of a module's tuned weights that belong to the tenth of its inputs with the "
            "most of them: some 10 to 20 % for random weights, more where few inputs matter.",
        )
        return [*tuned, *busy]


def share_of_busiest(counts_I: Tensor) -> float:
    """The fraction of all counts that the largest tenth of them has."""
    largest = counts_I.sort(descending=True).values[: -(-len(counts_I) // 10)]
    return float(largest.sum() / counts_I.sum().clamp(min=1))


def _settings(model: nn.Module, key: str, count: int) -> Settings:
    module = model.get_submodule(key)
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    device = base.weight.device  # values live where the weight is
    return {"count": count, "device": device, "transposed": isinstance(base, Conv1D)}
