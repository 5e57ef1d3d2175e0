"""Sparse fine-tuning: trains a small set of weight entries, exchanged by drop-and-grow.

Ansell et al. 2024, "Scaling Sparse Fine-Tuning to Large Language Models" (arXiv:2401.16405), where
it is called SpIEL. Every R updates a fraction of the entries is exchanged: those that have changed
least from the base weight are dropped, and the set grows at candidates with large gradients
accumulated over A updates (SpIEL-AG, `rigl`), or with large accumulators of the SM3 optimizer
(SpIEL-MA, `sm3`).

    budget.py      the number of tuned entries of each layer
    schedule.py    the steps at which gradients are accumulated and entries exchanged
    adapter.py     the tuned entries of a layer, candidate gradients, the exchange
    selection.py   drop-and-grow after an update, and checks of the optimizer
    sm3.py         the SM3 optimizer
    compiled.py    the layer as a custom operator, for torch.compile

Shapes: I in, O out. The weight of a layer is stored as [P, Q], that is [O, I] (Conv1D: [I, O]); K
entries of it are tuned, `values` [K] at the flat positions `indices` [K].

Where we depart from the authors' code: gradients are accumulated over A updates before every
selection, as in the paper (the code: A + 1 in all but the first); Adam's moments of new entries are
initialized from the gradients of complete updates (the code: of micro-batches, which is too small
under gradient accumulation), clipped like the optimizer's own; indices stay sorted;
candidates are the largest gradients of a complete update, averaged over processes (the code: of its
first micro-batch). Until that update ends, its gradients are summed in full, 4 bytes for each
weight of the adapted layers, once in R updates; of an update of one micro-batch, as `Lifecycle`
knows, a block of rows at a time.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from petl.core.compat import BaseTunerLayer
from petl.core.layers.layer import AdapterLayer, LayerShape
from petl.core.model.heat_map import HeatMap, of_layers
from petl.core.registry import register
from petl.core.spec.config import MethodConfig, config_field, require
from petl.core.support import Capability
from petl.core.tuners.base import updated
from petl.core.tuners.tuner import MethodTuner
from petl.errors import InputError
from petl.methods.sparse import schedule
from petl.methods.sparse.adapter import Candidates, SparseAdapter
from petl.methods.sparse.budget import deltas_by_module
from petl.methods.sparse.selection import SINGLE, checked, end_update, refuse_sharding, select
from petl.methods.sparse.sm3 import SparseSM3

__all__ = ["SparseAdapter", "SparseConfig", "SparseModel", "SparseSM3"]


@dataclass
class SparseConfig(MethodConfig):
    """Fields of sparse fine-tuning; `schedule` defines the cycle of selections."""

    density: float = config_field(
        "fraction of all base parameters to tune, in (0, 1]", 0.01, gt=0, le=1
    )
    r: int | None = config_field(
        "tune as many weights as LoRA of this rank has parameters; overrides density", None, ge=1
    )
    num_tunable_weights: int | None = config_field(
        "number of tuned weights in the model; overrides r and density", None, ge=1
    )
    rank_pattern: dict[str, int] | None = config_field(
        "shares of the tuned weights by module path or regular expression: modules that match get "
        "weights in proportion to their size times their number; null: to their size",
        None,
    )
    num_deltas: dict[str, int] | None = config_field(
        "number of tuned weights by module path; written by the tuner, overrides all others", None
    )
    selection_algorithm: str = config_field(
        "rigl: grow where accumulated gradients are large; sm3: where the optimizer's accumulators "
        "are large; none: a fixed random set",
        "rigl",
        choices=("rigl", "sm3", "none"),
    )
    reselection_steps: int = config_field("optimizer steps between selections", 20, ge=2)
    selection_accumulation_steps: int = config_field(
        "optimizer steps over which candidate gradients are accumulated before a selection, below "
        "reselection_steps",
        5,
        ge=1,
    )
    reselection_rate_policy: str = config_field(
        "decay of the exchanged fraction to 0 at total_step: linear or cosine",
        "linear",
        choices=("linear", "cosine"),
    )
    initial_reselection_rate: float = config_field(
        "fraction of the tuned weights exchanged at the start, in [0, 1]", 0.2, ge=0, le=1
    )
    full_first_reselection: bool | None = config_field(
        "the first selection may exchange all weights; null: true if the policy is linear", None
    )
    total_step: int | None = config_field(
        "length of the training in optimizer steps; no selection happens after it", None, ge=1
    )
    init_seed: int = config_field("seed of the initial random set", 0)
    fan_in_fan_out: bool = config_field(
        "field of PEFT's LoRA, without effect: Conv1D layers are recognized", False
    )

    def check(self) -> None:
        """Raise InputError if accumulation is not shorter than the cycle."""
        steps, accumulation = self.reselection_steps, self.selection_accumulation_steps
        require(
            accumulation < steps,
            f"selection_accumulation_steps={accumulation} is not below reselection_steps={steps}",
        )

    def check_total(self) -> None:
        """Raise InputError if weights are exchanged and the length of the training is unknown."""
        algorithm = self.selection_algorithm
        require(
            algorithm == "none" or self.total_step is not None,
            f"total_step is null, but selection_algorithm={algorithm!r} needs the optimizer steps "
            "of the training; set it, or selection_algorithm='none'",
        )


@register(
    "sparse",
    summary="a small set of single weights, exchanged during training where gradients are large",
    need="a few single weights",
    recommended="changes weights where gradients are large; merges without an approximation",
    paper="Ansell et al. 2024, Scaling Sparse Fine-Tuning to Large Language Models, "
    "arXiv:2401.16405",
)
class SparseModel(MethodTuner):
    """Tuner of `SparseConfig`."""

    config_cls, adapter_cls = SparseConfig, SparseAdapter
    by_position = True
    lacks = {
        Capability.ZERO: lambda config: "" if config.selection_algorithm == "none" else SINGLE,
    }

    def layer_settings(
        self, config: SparseConfig, model: nn.Module, shapes: Mapping[str, LayerShape]
    ) -> dict[str, dict[str, Any]]:
        """The number of tuned weights of each target, which is also written into the config."""
        # saved: a loaded adapter needs the sizes, not the rule
        config.num_deltas = deltas_by_module(config, model, shapes)
        empty = [key for key, count in config.num_deltas.items() if count == 0]
        if empty:
            warnings.warn(
                f"{len(empty)} of {len(shapes)} targets have no tuned weights, such as {empty[0]}; "
                "raise density, r or num_tunable_weights",
                stacklevel=2,
            )
        return {key: _settings(model, key, count) for key, count in config.num_deltas.items()}

    def prepare(self, batches: Any) -> None:
        """Raise InputError if the length of the training is needed and unknown."""
        for config in self._active_configs():
            config.check_total()

    def make_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer | None:
        """SM3 if `selection_algorithm='sm3'` needs its accumulators; else None."""
        # adapters of one model may differ
        rules = {config.selection_algorithm for config in self._active_configs()}
        # rigl works with any optimizer
        return SparseSM3(groups, self.model) if "sm3" in rules else None

    def attach_optimizer(
        self,
        optimizer: Optimizer,
        start_step: int = 0,
        *,
        first: int = 0,
        total_steps: int | None = None,
    ) -> None:
        """Check the optimizer, and start (or resume) at step `start_step`.

        Raises:
            InputError, UnsupportedError: as `update_and_allocate` would after the first step.
        """
        for name in self.active_adapters:
            config: Any = self.peft_config[name]
            adapters = self._trained(name)
            if adapters and config.selection_algorithm != "none":
                config.check_total()
                refuse_sharding(self.model, adapters)
                checked(config, optimizer, adapters)
            for adapter in adapters:
                # 0, or the step of a checkpoint
                adapter.begin(start_step)

    # Drop-and-grow

    @property
    def needs_updates(self) -> bool:
        """True unless the tuned entries of all active adapters are fixed."""
        return any(config.selection_algorithm != "none" for config in self._active_configs())

    def update_and_allocate(self, step: int, optimizer: Any = None) -> None:
        """Accumulate candidate gradients and exchange entries; call it after `optimizer.step()`.

        Args:
            step: completed optimizer steps, from 1.
            optimizer: the optimizer of the values, or a wrapper of it.

        Raises:
            InputError: `total_step` is null, or the optimizer is missing or of the wrong class.
            UnsupportedError: gradients are not averaged over the processes, or scaled by fp16.
        """
        updated(self)
        for name in self.active_adapters:
            config: Any = self.peft_config[name]
            # most steps need no work, and no synchronization
            if not schedule.is_due(config, step):
                continue
            adapters = self._trained(name)
            # frozen, as for inference
            if not adapters:
                continue
            config.check_total()
            refuse_sharding(self.model, adapters)
            unwrapped = checked(config, optimizer, adapters)
            if schedule.accumulates(config, step):
                end_update(adapters)
            if schedule.selects(config, step):
                is_random = all(adapter.starts_at_zero for adapter in adapters)
                fraction = schedule.exchange_fraction(config, step, is_random=is_random)
                for adapter in adapters:
                    select(adapter, fraction, unwrapped)
            for adapter in adapters:
                adapter.end_step(step)

    def heat_maps(self) -> list[HeatMap]:
        """Where the tuned weights are, and the changes of the weights."""
        counts: dict[str, Tensor] = {}
        for name in self.active_adapters:
            for key, adapter in self._adapters(name):
                # of all adapters of a module together
                counts[key] = counts.get(key, 0) + adapter.tuned_by_input()
        tuned = of_layers(
            self.model,
            {key: int(counts_I.sum()) for key, counts_I in counts.items()},
            "tuned_weights",
            "Sparse: tuned weights",
            "number of weights",
        )
        busy = of_layers(
            self.model,
            {key: 100 * share_of_busiest(counts_I) for key, counts_I in counts.items()},
            "tuned_inputs",
            "Sparse: tuned weights in the busiest tenth of the inputs",
            "% of the tuned weights",
            "The share of a module's tuned weights that belong to the tenth of its inputs with the "
            "most of them: some 10 to 20 % for random weights, more where few inputs matter.",
        )
        return [*tuned, *busy, *super().heat_maps()]

    def training_state(self) -> dict[str, Tensor]:
        """Completed steps, and candidate gradients accumulated so far, by module and adapter."""
        state = {}
        for name in self.active_adapters:
            for key, adapter in self._adapters(name):
                # equal for all adapters of a name
                state[f"{name}.step"] = torch.tensor(adapter.step)
                zero = state.get(f"{name}.starts_at_zero", torch.tensor(True))
                state[f"{name}.starts_at_zero"] = zero & adapter.starts_at_zero
                if adapter.candidates is not None:
                    fields = adapter.candidates.state()
                    state |= {f"{key}.{name}.{field}": value for field, value in fields.items()}
        return state

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state that `training_state` returned.

        Raises:
            InputError: the state is of other modules or adapters.
        """
        left = dict(state)
        for name in self.active_adapters:
            step = int(left.pop(f"{name}.step", torch.tensor(0)))
            # absent from states of earlier versions
            at_zero = bool(left.pop(f"{name}.starts_at_zero", torch.tensor(True)))
            for key, adapter in self._adapters(name):
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

    def _active_configs(self) -> list[Any]:
        return [self.peft_config[name] for name in self.active_adapters]

    def _trained(self, name: str) -> list[SparseAdapter]:
        return [a for _, a in self._adapters(name) if a.values.requires_grad]

    def _adapters(self, name: str) -> Iterator[tuple[str, SparseAdapter]]:
        """Yield the adapters called `name`, with the paths of their modules."""
        for module in self.model.modules():
            if isinstance(module, AdapterLayer):
                for _, adapter in module.pick([name]):
                    if isinstance(adapter, SparseAdapter):  # pyra has others beside its inner's
                        yield adapter.info.key, adapter


def share_of_busiest(counts_I: Tensor) -> float:
    """The fraction of all counts that the largest tenth of them has."""
    largest = counts_I.sort(descending=True).values[: -(-len(counts_I) // 10)]
    return float(largest.sum() / counts_I.sum().clamp(min=1))


def _settings(model: nn.Module, key: str, count: int) -> dict[str, Any]:
    module: Any = model.get_submodule(key)
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    device = next(base.parameters()).device  # values live where the weight is
    return {"count": count, "device": device, "transposed": isinstance(base, Conv1D)}
