"""Sparse fine-tuning: a small set of single weights is trained, and revised while training.

Ansell et al. 2024, "Scaling Sparse Fine-Tuning to Large Language Models" (arXiv:2401.16405), called
SpIEL there. Two rules say where the set grows: by gradients added up over a few steps (SpIEL-AG,
`rigl`), or by the accumulators of the SM3 optimizer (SpIEL-MA, `sm3`). Dropped are the entries that
have moved least from the base weight.

Shapes: the weight of a layer is stored as [P, Q], that is [O, I] (Conv1D: [I, O]); K entries of it
are tuned, `values` at the flat positions `indices`.

Where the authors' code departs from the paper: gradients are watched over A updates in every phase
(the code takes one more in all but the first); Adam's moments of new entries start from the
gradients of whole updates (the code: of micro-batches, too small under accumulation), clipped as
the optimizer's own are; indices stay sorted. A module that is called several times in a forward
pass is watched over all calls, but its candidates come from the first one to go backward.
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
from petl.core.registry import register
from petl.core.spec.config import MethodConfig, config_field, require
from petl.core.tuners.tuner import MethodTuner
from petl.errors import InputError
from petl.methods.sparse import schedule
from petl.methods.sparse.adapter import SparseAdapter, Watch
from petl.methods.sparse.budget import deltas_by_module
from petl.methods.sparse.revision import SINGLE, checked, end_update, refuse_sharding, select
from petl.methods.sparse.sm3 import SparseSM3

__all__ = ["SparseAdapter", "SparseConfig", "SparseModel", "SparseSM3"]


@dataclass
class SparseConfig(MethodConfig):
    """See the module's docstring for the method and `schedule` for the cycle."""

    density: float = config_field("share of all base parameters to tune, in (0, 1]", 0.01)
    r: int | None = config_field(
        "as many weights as LoRA of this rank has; overrides density", None
    )
    num_tunable_weights: int | None = config_field(
        "how many weights; overrides r and density", None
    )
    num_deltas: dict[str, int] | None = config_field(
        "how many weights by module path; filled in and saved, overrides all others", None
    )
    selection_algorithm: str = config_field(
        "rigl: grow where gradients are large, sm3: by the optimizer's accumulators, none: the "
        "weights stay those drawn at random",
        "rigl",
    )
    reselection_steps: int = config_field("optimizer steps from one selection to the next", 20)
    selection_accumulation_steps: int = config_field(
        "optimizer steps over which gradients of candidates are added up before a selection", 5
    )
    reselection_rate_policy: str = config_field(
        "how the share exchanged falls: linear, cosine", "linear"
    )
    initial_reselection_rate: float = config_field("share exchanged at the start, in [0, 1]", 0.2)
    full_first_reselection: bool | None = config_field(
        "the first selection may exchange all; null: if the policy is linear", None
    )
    total_step: int | None = config_field(
        "optimizer steps of the run; none is exchanged after it", None
    )
    init_seed: int = config_field("seed of the random start", 0)
    fan_in_fan_out: bool = config_field(
        "PEFT's name; Conv1D layers are recognised by themselves", False
    )

    def check(self) -> None:
        require(0 < self.density <= 1, f"density must be in (0, 1], got {self.density}")
        for name in ("r", "num_tunable_weights", "total_step"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}={value} is not at least 1")
        require(
            self.selection_algorithm in ("rigl", "sm3", "none"),
            f"selection_algorithm must be rigl, sm3 or none, got {self.selection_algorithm!r}",
        )
        steps, observed = self.reselection_steps, self.selection_accumulation_steps
        require(observed >= 1, f"selection_accumulation_steps={observed} is not at least 1")
        require(
            observed < steps,
            "selection_accumulation_steps must be smaller than reselection_steps, "
            f"got {observed} and {steps}",
        )
        require(
            self.reselection_rate_policy in ("linear", "cosine"),
            f"reselection_rate_policy={self.reselection_rate_policy!r} is not linear or cosine",
        )
        rate = self.initial_reselection_rate
        require(0 <= rate <= 1, f"initial_reselection_rate={rate} is not in [0, 1]")

    def check_total(self) -> None:
        """Raise InputError if weights are reselected and nobody said for how long."""
        require(
            self.selection_algorithm == "none" or self.total_step is not None,
            "total_step must be set when weights are reselected: the optimizer steps of the run; "
            "selection_algorithm='none' does without",
        )


@register(
    "sparse",
    summary="a few single weights, chosen anew during training where gradients are large",
    paper="Ansell et al. 2024, Scaling Sparse Fine-Tuning to Large Language Models, "
    "arXiv:2401.16405",
)
class SparseModel(MethodTuner):
    """The tuner of `SparseConfig`."""

    config_cls, adapter_cls = SparseConfig, SparseAdapter
    unsupported = {
        "deepspeed": lambda config: "" if config.selection_algorithm == "none" else SINGLE,
    }

    def layer_settings(
        self, config: SparseConfig, model: nn.Module, shapes: Mapping[str, LayerShape]
    ) -> dict[str, dict[str, Any]]:
        """How many weights of each target are tuned; written into the config."""
        config.num_deltas = deltas_by_module(config, model, shapes)
        empty = [key for key, count in config.num_deltas.items() if count == 0]
        if empty:
            warnings.warn(
                f"{len(empty)} of {len(shapes)} targets get no tunable weight, such as {empty[0]}; "
                "raise density, r or num_tunable_weights",
                stacklevel=2,
            )
        return {key: _plan(model, key, count) for key, count in config.num_deltas.items()}

    def prepare(self, batches: Any) -> None:
        """Refuse to begin without the length of the run."""
        for config in self._active_configs():
            config.check_total()

    def make_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer | None:
        """SM3, whose accumulators the rule `sm3` grows by."""
        rules = {config.selection_algorithm for config in self._active_configs()}
        return SparseSM3(groups, self.model) if "sm3" in rules else None

    def attach_optimizer(
        self,
        optimizer: Optimizer,
        start_step: int = 0,
        *,
        first: int = 0,
        total_steps: int | None = None,
    ) -> None:
        """Begin at step `start_step`, after what cannot be trained was refused.

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
                adapter.begin(start_step)

    # The revision of the set

    def update_and_allocate(self, step: int, optimizer: Any = None) -> None:
        """Watch gradients and exchange entries; call it after each `optimizer.step()`.

        Args:
            step: completed optimizer steps, from 1.
            optimizer: the one that holds the values, or a wrapper of it.

        Raises:
            InputError: `total_step` is not set, or the optimizer is missing or of another kind.
            UnsupportedError: gradients that are not averaged over the processes, or are scaled.
        """
        for name in self.active_adapters:
            config: Any = self.peft_config[name]
            if not schedule.is_due(config, step):
                continue
            adapters = self._trained(name)
            if not adapters:
                continue
            config.check_total()
            refuse_sharding(self.model, adapters)
            bare = checked(config, optimizer, adapters)
            if schedule.observes(config, step):
                end_update(adapters)
            if schedule.selects(config, step):
                for adapter in adapters:
                    select(adapter, schedule.share(config, step), bare)
            for adapter in adapters:
                adapter.end_step(step)

    def training_state(self) -> dict[str, Tensor]:
        """The steps done and, within a phase, what was watched so far, by module and adapter."""
        state = {}
        for name in self.active_adapters:
            for key, adapter in self._adapters(name):
                state[f"{name}.step"] = torch.tensor(adapter.step)
                if adapter.watch is not None:
                    fields = adapter.watch.state()
                    state |= {f"{key}.{name}.{field}": value for field, value in fields.items()}
        return state

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `training_state` gave.

        Raises:
            InputError: it is about other modules or adapters.
        """
        left = dict(state)
        for name in self.active_adapters:
            step = int(left.pop(f"{name}.step", torch.tensor(0)))
            for key, adapter in self._adapters(name):
                marks = {f: f"{key}.{name}.{f}" for f in Watch.FIELDS}
                fields = {f: left.pop(mark) for f, mark in marks.items() if mark in left}
                adapter.step = step
                adapter.watch = Watch.read(fields, adapter.values.device) if fields else None
        if left:
            raise InputError(f"the training state is about {min(left)}, which this model lacks")

    def _active_configs(self) -> list[Any]:
        return [self.peft_config[name] for name in self.active_adapters]

    def _trained(self, name: str) -> list[SparseAdapter]:
        return [a for _, a in self._adapters(name) if a.values.requires_grad]

    def _adapters(self, name: str) -> Iterator[tuple[str, SparseAdapter]]:
        """The adapters called `name`, with the paths of their modules."""
        for module in self.model.modules():
            if isinstance(module, AdapterLayer):
                for _, adapter in module.pick([name]):
                    assert isinstance(adapter, SparseAdapter)
                    yield adapter.info.key, adapter


def _plan(model: nn.Module, key: str, count: int) -> dict[str, Any]:
    module: Any = model.get_submodule(key)
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    device = next(base.parameters()).device
    return {"count": count, "device": device, "transposed": isinstance(base, Conv1D)}
