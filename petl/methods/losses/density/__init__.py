"""Activation density: a loss term that approximates the fraction of active MLP neurons.

Runwal et al. 2025, "From PEFT to DEFT: Parameter Efficient Finetuning for Reducing Activation
Density in Transformers", AAAI (arXiv:2402.01911). It works with any method; the base stays frozen.
PEFT has another method called DEFT, so here everything is called density. The metric `ppl_sparsity`
is from Luo et al. 2025, "Sparsing Law", ICML (arXiv:2411.02335).

    config.py    the fields
    modules.py   the nonlinearities and down projections of a model
    tally.py     the term of one forward pass, and its gradient
    tokens.py    padding masks
    metrics.py   the density on given batches
    ppl.py       PPL-p% sparsity

Shapes: B rows, T tokens, F neurons of an MLP block.

For the output a [B, T, F] of a nonlinearity (of the gate, in a gated MLP), `h(a) = a^2 / (a^2 +
eps)` is close to 1 where a is not 0. A layer's term is the mean of h over its values, a stack's the
mean over its layers; encoder and decoder are added. With eps = 1e-7 only values within some 1e-3 of
0 have a notable gradient; a larger eps trains faster and measures something else, so report it with
every result.

The gradient of the term is added in the backward pass of the activations, in any trainer (see
`petl.core.layers.context`); `outputs.loss` includes its value for logging. Counts are summed over
processes, but under torch.compile each process averages over its own values.
"""

import logging
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from petl.core.layers.context import ForwardContext
from petl.core.losses import WRAP_ONLY, extra_losses, loss_list, register_loss
from petl.core.model.heat_map import HeatMap, of_layers
from petl.core.model.modes import evaluation_mode, has_enabled_adapter
from petl.core.spec.config import require
from petl.core.support import Capability
from petl.core.types import Record
from petl.errors import InputError, UnsupportedError
from petl.methods.losses.density.config import ActivationDensityConfig
from petl.methods.losses.density.counts import count_nonzero
from petl.methods.losses.density.metrics import active_fractions, mean, on_device, predicts_tokens
from petl.methods.losses.density.modules import find_sites, has_down, never_zero, register_hooks
from petl.methods.losses.density.ppl import Search
from petl.methods.losses.density.tally import Tally, count_in_loss
from petl.methods.losses.density.tokens import Masks, rows_of, token_masks
from petl.system.collectives import num_processes
from petl.system.files.disk import as_json, write_atomic

__all__ = ["ActivationDensity", "ActivationDensityConfig"]

PRECISE = 1e-5  # eps from which on bfloat16's gradients are float32's, to a cosine of 0.96 and more
NEVER_ZERO = "exact zeros never occur with silu"
FILE = "density.json"
logger = logging.getLogger(__name__)
NO_GRAPH = (
    "the first pass of reentrant checkpointing has no graph to add to; set "
    "train.gradient_checkpointing=true"
)
Batches = Iterable[Mapping[str, Any]]


def float32_reason(config: ActivationDensityConfig) -> str:
    """Return why the gradient of the term needs activations in float32; "" if it does not."""
    if config.eps >= PRECISE or config.weight == 0:
        return ""
    return f"with eps={config.eps:g} its gradient comes from values near 0, which bf16 rounds away"


@register_loss(
    "density",
    summary="lowers the fraction of active MLP neurons along with the task's loss",
    paper="Runwal et al. 2025, From PEFT to DEFT: Parameter Efficient Finetuning for Reducing "
    "Activation Density in Transformers, AAAI, arXiv:2402.01911",
    charts=(("density_loss", "Density loss", "share of active neurons, smoothed"),),
)
class ActivationDensity:
    """The density term of a PeftModel, available as `model.activation_density`.

    Merging, loading and generation of the adapter do not change; `save_pretrained` also writes
    density.json. If no adapter is left or enabled, there is nothing to train, and the loss is the
    task's alone.

    Attributes:
        loss: the term D of the last training forward, detached and unweighted; None before it.
        metrics: results of `measure` and `ppl_sparsity` for the current adapter; cleared by
            training.
        fractions: the density of each MLP block, as last measured.

    Raises:
        InputError: the model has no suitable modules, or has the term already.
    """

    config_cls = ActivationDensityConfig
    lacks = {
        Capability.REENTRANT: NO_GRAPH,
        Capability.BF16: float32_reason,
        Capability.NEW_HEAD: "it reads the blocks alone, and the head behind them is what trains",
    }

    def __init__(self, model: PeftModel, config: ActivationDensityConfig) -> None:
        if any(isinstance(part, ActivationDensity) for part in extra_losses(model)):
            raise InputError(
                f"{type(model).__name__} already has a density term; call "
                "model.activation_density.remove() first"
            )
        # hooks on the base model see all tokens, also virtual ones
        base = model.get_base_model()
        self.model, self.base, self.config = model, base, config
        self.sites = find_sites(base, config.signal, config.activation_modules)
        self.is_encoder_decoder = any(self.sites.stacks.values())
        self.context = ForwardContext()
        self.factor = 0.0
        self.tally = Tally(self.sites.stacks, torch.zeros(()))
        self.masks: Masks = {}
        self.loss: Tensor | None = None
        self.metrics: dict[str, float] = {}
        self.fractions: dict[str, float] = {}
        self.logged: set[str] = set()
        self.hooks = [
            base.register_forward_pre_hook(self._begin, with_kwargs=True),
            *register_hooks(base, self.sites, self._count),
            base.register_forward_hook(self._end, with_kwargs=True),
        ]
        self.save_adapter = model.save_pretrained
        # instance attributes shadow PeftModel's `save_pretrained`
        model.__dict__ |= {"save_pretrained": self.save_pretrained, "activation_density": self}
        loss_list(model).append(self)

    @staticmethod
    def check(model: nn.Module, config: ActivationDensityConfig) -> None:
        """Raise InputError unless a base model has the modules that the term needs."""
        find_sites(model, config.signal, config.activation_modules)

    def remove(self) -> None:
        """Remove the term from the model."""
        for handle in self.hooks:
            handle.remove()
        loss_list(self.model).remove(self)
        for name in ("save_pretrained", "activation_density"):
            del self.model.__dict__[name]

    # In training

    def prepare(self, batches: Iterable[object]) -> None:
        """Check the config for training by petl, which scales the term itself."""
        self.config.check_driven()

    def series(self) -> dict[str, float]:
        """`density_loss`: the term D of the last training forward, unweighted."""
        return {} if self.loss is None else {"density_loss": float(self.loss)}

    def heat_maps(self) -> list[HeatMap]:
        """The density of each MLP block as last measured; none before."""
        percent = {key: 100 * fraction for key, fraction in self.fractions.items()}
        return of_layers(
            self.base,
            percent,
            "density",
            "Activation density",
            "% of the neurons",
            "The share of an MLP's neurons whose activation exceeds the threshold, averaged over "
            "the evaluated examples.",
        )

    def _begin(self, model: nn.Module, args: object, kwargs: Mapping[str, object]) -> None:
        """Forward pre-hook of the base model: start the tally of a training forward.

        Of the base model, because PEFT's own forward is not called for all task types.
        """
        context, config = self.context, self.config
        context.begin(model, args, kwargs)
        if not context.recording:
            return
        self.metrics.clear()
        # with num_items_in_batch, `context.scale` already divides by the accumulation steps
        is_scaled = kwargs.get("num_items_in_batch") is not None
        self.factor = config.weight / (1 if is_scaled else config.gradient_accumulation_steps)
        assert context.scale is not None
        self.tally = Tally(self.sites.stacks, context.scale * self.factor)
        self.masks = self._token_masks(kwargs)

    def _count(self, name: str, module: nn.Module, a: Tensor) -> Tensor:
        """Return `a`; in a training forward, count it and add the term's gradient in backward."""
        context, layer, eps = self.context, self.sites.layers[name], self.config.eps
        if not module.training:  # evaluation, or a frozen part in evaluation mode
            return a
        tally = self.tally if context.recording else None  # None: recomputed by checkpointing
        mask = None
        if tally is not None:
            self._refuse_reentrant()
            mask = rows_of(self.masks.get(self.sites.stack(name)), a)
            if torch.compiler.is_compiling():
                return tally.count_compiled(a, layer, eps, mask)
            rows = a[..., 0].numel() if mask is None else mask.sum()  # tokens
            tally.add(layer, count_nonzero(a, eps, mask), rows * a.shape[-1])
        # nothing to train through this activation
        if not (torch.is_grad_enabled() and a.requires_grad and self.config.weight > 0):
            return a
        reason = float32_reason(self.config)
        if reason and a.dtype.itemsize < 4:
            self._log_once(
                f"the density loss is mostly noise in {a.dtype}: {reason}; set train.precision=no, "
                f"or loss.eps={PRECISE:g} or more",
                logging.WARNING,
            )
        return count_in_loss(a, layer, eps, mask, tally)

    def _refuse_reentrant(self) -> None:
        """Raise UnsupportedError in the first pass of reentrant checkpointing."""
        if not torch.is_grad_enabled() and any(
            getattr(module, "gradient_checkpointing", False) for module in self.base.modules()
        ):
            raise UnsupportedError(
                f"density cannot add its gradient to {type(self.base).__name__} under reentrant "
                "checkpointing; pass gradient_checkpointing_kwargs={'use_reentrant': False}"
            )

    def _end(
        self, model: nn.Module, args: object, kwargs: Mapping[str, object], output: object
    ) -> object:
        """Forward hook of the base model: add the term's value to the output's loss."""
        if self.context.recording:
            if not self.tally.sums:
                self.context.recording = False
                names = list(self.sites.layers)
                raise UnsupportedError(
                    f"none of the {len(names)} activation modules was called, probably because of "
                    "a fused kernel: use signal='down_input', or disable the kernel; the modules "
                    f"are {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
                )
            if num_processes() > 1 and not torch.compiler.is_compiling():
                # set by `begin` for every training forward
                assert self.context.scale is not None
                self.tally.over_processes(self.context.scale)
            self.loss = self.tally.value()
            if self.tally.has_gradient and self._has_adapter():
                # for logging: the gradient is already in backward
                self.context.record("density", self.loss * self.factor)
        return self.context.end(model, args, kwargs, output)

    def _has_adapter(self) -> bool:
        """True if there is an enabled adapter that the term can train."""
        if any(config.is_prompt_learning for config in self.model.peft_config.values()):
            return True
        return has_enabled_adapter(self.base)

    def _token_masks(self, inputs: Mapping[str, object]) -> Masks:
        return token_masks(inputs, self.is_encoder_decoder) if self.config.mask_padding else {}

    # Metrics

    def measure(self, batches: Batches, threshold: float | None = None) -> Record:
        """The fraction of values with `|a| > threshold`, in [0, 1].

        It is computed for each example, then averaged over examples and over modules. With several
        processes, each one passes its own part of the batches.

        Args:
            threshold: default: that of the config. With 0, exact zeros count as inactive, which
                some nonlinearities never return.

        Returns:
            `density`, and `encoder` and `decoder` if there are both; `per_layer` by module.
        """
        threshold = self.config.threshold if threshold is None else threshold
        if threshold == 0 and never_zero(self.base):
            warnings.warn(f"{NEVER_ZERO}; pass threshold or use ppl_sparsity", stacklevel=2)
        return self._measure(batches, threshold)

    @torch.no_grad()
    def _measure(self, batches: Batches, threshold: float) -> Record:
        sites, inputs = self.sites, on_device(batches, self.base)
        with evaluation_mode(self.model):
            fractions = active_fractions(
                self._run, self.base, sites, inputs, threshold, self._token_masks
            )
        found: dict[str, object] = {"density": mean(fractions.values()), "per_layer": fractions}
        for stack in self._separate_stacks():
            found[stack] = mean(f for n, f in fractions.items() if sites.stack(n) == stack)
        self.metrics["density"], self.fractions = found["density"], fractions
        return found

    def _run(self, batch: Mapping[str, object]) -> object:
        return self.model(**batch)

    def _separate_stacks(self) -> list[str]:
        """`encoder` and `decoder`, if there are both; else empty."""
        stacks = set(self.sites.stacks.values())
        return sorted(stacks) if len(stacks) > 1 else []

    @torch.no_grad()
    def ppl_sparsity(self, batches: Batches, p: float = 1.0) -> Record:
        """The fraction of neurons that can be left out at `p` % more perplexity; see `Search`.

        Perplexity is the exponential of the model's loss per label. A classifier's is over its
        classes, and is meaningless while its head is untrained.

        Args:
            p: allowed increase of perplexity in percent, at least 0.

        Returns:
            `sparsity`, which is 1 - `activation_ratio`, the fraction of kept neurons over layers
            and tokens; `per_layer`, the sparsity by down projection; `cett`, the largest common
            CETT; `thresholds` on the neuron's norm by down projection; `ppl_dense` and
            `ppl_sparse`.

        Raises:
            InputError: p is negative, a batch lacks labels, or there are no down projections.
        """
        require(p >= 0, f"p={p} is negative; pass a percentage of at least 0")
        given = self.config.activation_modules if self.config.signal == "down_input" else None
        names = list(find_sites(self.base, "down_input", given).layers)
        sites = find_sites(self.base, "down_input", names)

        def token_mask(name: str, inputs: Mapping[str, object], a: Tensor) -> Tensor | None:
            return rows_of(self._token_masks(inputs).get(sites.stack(name)), a)

        with evaluation_mode(self.model):
            inputs = list(on_device(batches, self.base))
            found = Search(self.model, self.base, names, inputs, token_mask).run(p)
        self.metrics[f"ppl_{p:g}_sparsity"] = found["sparsity"]
        return found

    def report(self, batches: Batches) -> dict[str, float]:
        """Density and PPL-1% sparsity, for the metrics of a run.

        The sparsity is left out if the config says so, for a model that does not predict tokens,
        since it has no perplexity, and for one whose MLP blocks have no down projections.
        """
        inputs = list(batches)
        found = self._measure(inputs, self.config.threshold)
        metrics = {"density": found["density"]}
        metrics |= {f"{stack}_density": found[stack] for stack in self._separate_stacks()}
        reason = self._no_sparsity()
        if not reason:
            metrics["ppl_1_sparsity"] = self.ppl_sparsity(inputs)["sparsity"]
        else:
            self._log_once(f"the metrics have no ppl_1_sparsity: {reason}")
        if self.config.threshold == 0 and never_zero(self.base):
            self._log_once(f"density counts exact nonzeros, but {NEVER_ZERO}: set loss.threshold")
        return metrics

    def _log_once(self, text: str, level: int = logging.INFO) -> None:
        if text not in self.logged:
            self.logged.add(text)
            logger.log(level, text)

    def _no_sparsity(self) -> str:
        """The reason why a report has no PPL-p% sparsity, or ""."""
        if not self.config.ppl_sparsity:
            return "ppl_sparsity=False"
        if not predicts_tokens(self.base):
            return f"{type(self.base).__name__} predicts no tokens, so it has no perplexity"
        return "" if has_down(self.base) else "MLP blocks have no down projection as a module"

    # Files

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """Save the adapter as PEFT does, and density.json with config, modules and metrics."""
        self.save_adapter(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            content = {"name": "density", **asdict(self.config), "measured": self.metrics}
            content["activation_modules"] = list(self.sites.layers)
            for name in WRAP_ONLY:  # adapter_config.json has the method
                del content[name]
            write_atomic(Path(save_directory) / FILE, as_json(content))
